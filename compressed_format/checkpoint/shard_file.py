"""One file of a checkpoint as it lies on the disk: opened with distrust, read up to its data, mapped."""

from __future__ import annotations

import mmap
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from compressed_format.checkpoint.header import LENGTH_BYTES, MAX_HEADER_BYTES, TensorSpec, read_header
from compressed_format.checkpoint.index import read_index
from compressed_format.errors import CheckpointError, Problem

__all__ = ["ShardFile", "read_regular", "read_shard_names"]

# A private mapping of a file takes no memory until it is written to; without this, Linux refuses to map a file that
# is larger than the machine's memory.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True)
class ShardFile:
    """A safetensors file whose header has been checked, and the file's status at that time."""

    path: Path
    name: str
    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    status: os.stat_result

    @classmethod
    def read(cls, folder: Path, name: str) -> ShardFile:
        """Read and check the header of the file ``name`` in ``folder``. Raises :class:`CheckpointError`."""
        with _opened(folder, name) as (source, status):
            start = source.read(LENGTH_BYTES + 1)  # and the first byte of the JSON
            length = int.from_bytes(start[:LENGTH_BYTES], "little")
            if len(start) <= LENGTH_BYTES or length == 0:
                raise _error(name, "ends before its header, or has an empty one")
            if length > MAX_HEADER_BYTES:
                raise _error(name, f"its header claims {length} bytes, and more than {MAX_HEADER_BYTES} are not read")
            if length > status.st_size - LENGTH_BYTES:
                raise _error(name, f"its header claims {length} bytes, the whole file has {status.st_size}")
            if not start.endswith(b"{"):  # seen before anything long is read
                raise _error(name, "its header does not start with an opening brace: this is no safetensors file")
            source.seek(LENGTH_BYTES)
            tensors, metadata = read_header(source, length, file=name, file_size=status.st_size)
        return cls(folder / name, name, tensors, metadata, status)

    def map(self) -> mmap.mmap:
        """The whole file as memory that can be written to without the file seeing it.

        Raises :class:`CheckpointError` when the file is no longer the one whose header was read: memory behind the
        end of a file that shrank would end the process at its first touch.
        """
        with _opened(self.path.parent, self.path.name) as (source, status):
            if _identity(status) != _identity(self.status):
                raise _error(str(self.path), "has changed since its header was read: read the checkpoint again")
            if sys.platform == "win32":  # pragma: no cover
                return mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_COPY)
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(source.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=protection)


def read_shard_names(folder: Path, name: str) -> dict[str, str]:
    """The index ``name`` of a folder: :func:`read_index`. Raises :class:`CheckpointError`."""
    with _opened(folder, name) as (source, status):
        if status.st_size > MAX_HEADER_BYTES:
            raise _error(name, f"has {status.st_size} bytes, and more than {MAX_HEADER_BYTES} are not read")
        return read_index(source, status.st_size, place=name)


def read_regular(folder: Path, name: str) -> bytes:
    """The content of a small file. Raises :class:`CheckpointError`."""
    with _opened(folder, name) as (source, status):
        if status.st_size > MAX_HEADER_BYTES:
            raise _error(name, f"has {status.st_size} bytes, and more than {MAX_HEADER_BYTES} are not read")
        return source.read(MAX_HEADER_BYTES)


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[tuple[BinaryIO, os.stat_result]]:
    """The file, which must be a regular one or a link to one, and its status."""
    path = folder / name
    try:
        # Asked before opening, which can do things to a device; not waiting, should it become a pipe meanwhile.
        _refuse_irregular(path.stat(), name)
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags), "rb") as source:
            status = os.fstat(source.fileno())
            _refuse_irregular(status, name)
            yield source, status
    except FileNotFoundError as error:
        raise _error(name, f"there is no such file in {folder}") from error
    except OSError as error:
        raise _error(name, f"cannot be read: {error.strerror or error}") from error


def _refuse_irregular(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _error(name, "is a folder, a device or a pipe, not a file")


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _error(place: str, message: str) -> CheckpointError:
    return CheckpointError(problems=[Problem(place, message)])
