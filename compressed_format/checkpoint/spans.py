"""Spans of files: read and written at their offsets, without a mapping and without a position that threads share."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compressed_format.checkpoint import syscalls
from compressed_format.checkpoint.disk_errors import blaming, disk_error

__all__ = ["read_span", "write_span"]


def read_span(path: Path, offset: int, buffer: bytearray | memoryview) -> None:
    """Fill ``buffer`` with the bytes of a file from ``offset`` on.

    Raises :class:`CheckpointError` when it cannot be read, is no regular file, or ends before that.
    """
    rest = _bytes_of(buffer)
    end = offset + len(rest)
    with _opened(path) as descriptor:
        while rest:
            with blaming(path, "cannot be read"):
                count = syscalls.read_at(descriptor, rest, end - len(rest))
            if count == 0:
                raise disk_error(
                    path, f"ends at byte {end - len(rest)}, and bytes up to {end} are needed: it was cut short"
                )
            rest = rest[count:]


def write_span(path: Path, offset: int, data: bytes | bytearray | memoryview) -> None:
    """Write ``data`` at ``offset`` of a file that is there already, and long enough.

    Raises :class:`CheckpointError` when it cannot be written.
    """
    rest = _bytes_of(data)
    end = offset + len(rest)
    with blaming(path, "cannot be written"):
        descriptor = syscalls.open_file(path)
        try:
            while rest:
                rest = rest[syscalls.write_at(descriptor, rest, end - len(rest)) :]
        finally:
            syscalls.close(descriptor)


def _bytes_of(data: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    with blaming(path, "cannot be read"):
        descriptor = syscalls.open_source(path)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise disk_error(path, "is a folder, a device or a pipe, not a file")
        yield descriptor
    finally:
        os.close(descriptor)
