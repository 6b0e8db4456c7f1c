"""Tensors read a few megabytes at a time, by reads and not by mappings: what has been read takes no memory, and a
file that shrinks meanwhile is an error, where touching mapped memory behind its end would end the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from compressed_format.checkpoint import Checkpoint, TensorSpec
from compressed_format.checkpoint.syscalls import close, open_source, read_at
from compressed_format.dtypes import DTYPES, torch_dtype
from compressed_format.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["CHUNK_BYTES", "ChunkReader"]

CHUNK_BYTES = 2 * 1024 * 1024
"""Of a tensor, at once: values take up to sixteen times as much while they are looked at."""


class ChunkReader:
    """Reads the tensors of a checkpoint; a context manager that closes their files.

    What it raises is a :class:`CheckpointError` that names the file.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._folder = checkpoint.folder
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._descriptors.values():
            close(descriptor)
        self._descriptors.clear()

    def chunks(self, spec: TensorSpec) -> Iterator[tuple[int, torch.Tensor]]:
        """The values in row-major order: the number of values before each part, and the part, one-dimensional."""
        for start, data in self.parts(spec):
            yield start, torch.frombuffer(data, dtype=torch_dtype(spec.dtype))

    def parts(self, spec: TensorSpec) -> Iterator[tuple[int, bytearray]]:
        """As :meth:`chunks`, the bytes of each part."""
        item = DTYPES[spec.dtype].bits // 8
        step = max(CHUNK_BYTES // item, 1) * item
        for start in range(spec.start, spec.stop, step):
            yield (start - spec.start) // item, self.read(spec, start, min(start + step, spec.stop))

    def whole(self, spec: TensorSpec) -> torch.Tensor:
        """A small tensor at once."""
        if spec.nbytes == 0:
            return torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        data = self.read(spec, spec.start, spec.stop)
        return torch.frombuffer(data, dtype=torch_dtype(spec.dtype)).view(spec.shape)

    def read(self, spec: TensorSpec, start: int, stop: int) -> bytearray:
        """Bytes ``start`` to ``stop`` of the file of a tensor."""
        data = bytearray(stop - start)
        try:
            if spec.file not in self._descriptors:
                self._descriptors[spec.file] = open_source(self._folder / spec.file)
            descriptor, done = self._descriptors[spec.file], 0
            while done < len(data):
                got = read_at(descriptor, memoryview(data)[done:], start + done)
                if got == 0:
                    size = os.fstat(descriptor).st_size
                    raise _error(spec.file, f"ends at byte {size}, and was longer when its header was read")
                done += got
        except OSError as error:
            raise _error(spec.file, f"cannot be read: {error.strerror or error}") from error
        return data


def _error(place: str, message: str) -> CheckpointError:
    return CheckpointError(problems=[Problem(place, message)])
