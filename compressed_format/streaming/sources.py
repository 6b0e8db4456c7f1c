"""Where a job reads: files that must still be what they were when it was planned, and the matrices in them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compressed_format.checkpoint.header import TensorSpec
from compressed_format.checkpoint.spans import read_span
from compressed_format.dtypes import DTYPES, torch_dtype
from compressed_format.errors import CheckpointError, Problem
from compressed_format.reading.layout import Range

__all__ = ["SourceFile", "SourceMatrix", "StoredTensorSpan", "read_rows"]


@dataclass(frozen=True)
class SourceFile:
    """A file, and what it was when its header was read."""

    path: Path
    size: int
    mtime_ns: int

    def check(self) -> None:
        """Raise :class:`CheckpointError` if the file is another one by now."""
        try:
            status = self.path.stat()
        except OSError as error:
            message = f"cannot be read: {error.strerror or error}"
            raise CheckpointError(problems=[Problem(str(self.path), message)]) from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            message = "has changed since the job was planned; start it anew"
            raise CheckpointError(problems=[Problem(str(self.path), message)])


@dataclass(frozen=True)
class StoredTensorSpan:
    """A tensor in a file: dtype name, shape, and the byte at which it begins."""

    file: SourceFile
    dtype: str
    shape: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, spec: TensorSpec, file: SourceFile) -> StoredTensorSpan:
        """The span that a header tells of."""
        return cls(file, spec.dtype, spec.shape, spec.start)

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * (DTYPES[self.dtype].bits // 8)

    def read(self, part: Range | None = None) -> torch.Tensor:
        """The tensor, or a part of it along its first dimension, in memory of its own."""
        shape = self.shape if part is None else (part[1] - part[0], *self.shape[1:])
        row = math.prod(self.shape[1:]) * (DTYPES[self.dtype].bits // 8)
        return read_rows(self.file.path, self.start + (0 if part is None else part[0] * row), self.dtype, shape)


def read_rows(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of ``shape`` from the bytes at ``offset``, in memory of its own, aligned for every dtype."""
    count = math.prod(shape) * (DTYPES[dtype].bits // 8)
    buffer = torch.empty(count, dtype=torch.uint8, device="cpu")
    if count:
        read_span(path, offset, buffer.numpy().data)
    return buffer.view(torch_dtype(dtype)).view(shape)


@dataclass(frozen=True)
class SourceMatrix:
    """A weight ``[rows, columns]`` in a file, as a whole tensor or as part of the stacked weights of experts.

    ``stored`` is the matrix that the bytes are; with ``transposed``, its columns are the weight's rows. Of these, the
    weight has each ``step``-th one from ``first`` on.
    """

    stored: StoredTensorSpan
    rows: int
    transposed: bool = False
    first: int = 0
    step: int = 1

    @classmethod
    def whole(cls, stored: StoredTensorSpan) -> SourceMatrix:
        """The weight that is a tensor ``[rows, columns]``."""
        return cls(stored, stored.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, that is output features, and columns."""
        return self.rows, self.stored.shape[0 if self.transposed else 1]

    @property
    def nbytes(self) -> int:
        """How many bytes the weight takes."""
        return self.rows * self.shape[1] * (DTYPES[self.stored.dtype].bits // 8)

    @property
    def can_be_split(self) -> bool:
        """Whether a range of rows can be read without the others."""
        return not self.transposed

    def slabs(self, rows: Range, slab_rows: int) -> Iterator[tuple[Range, torch.Tensor]]:
        """The ``rows`` in turn, ``slab_rows`` at a time, and which ones they are."""
        whole = self.stored.read().T if self.transposed else None
        for top in range(rows[0], rows[1], slab_rows):
            bottom = min(top + slab_rows, rows[1])
            first, last = self.first + top * self.step, self.first + (bottom - 1) * self.step + 1
            slab = self.stored.read((first, last)) if whole is None else whole[first:last]
            yield (top, bottom), slab[:: self.step].contiguous()

    def part(self, first: int, step: int, rows: int) -> SourceMatrix:
        """Each ``step``-th row from ``first`` on: one projection of several that are stored together."""
        return replace(self, first=first, step=step, rows=rows)
