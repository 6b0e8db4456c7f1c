"""The work of a job in pieces: each reads spans of the source and writes spans of the destination's files.

A unit is a description that can be pickled, and carrying it out twice changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from compressed_format.checkpoint.spans import read_span, write_span
from compressed_format.compression.weights import compressed_tensors
from compressed_format.config import Assignment, CompressionFormat, QuantizationStrategy
from compressed_format.dtypes import torch_dtype
from compressed_format.errors import Problem, QuantizationError
from compressed_format.quantization import weight_scales
from compressed_format.reading.layout import Range, WeightLayout
from compressed_format.streaming.sources import SourceFile, SourceMatrix, StoredTensorSpan

__all__ = [
    "UNIT_BYTES",
    "CompressRows",
    "CopyRows",
    "CopySpan",
    "DecompressRows",
    "Placement",
    "Task",
    "TaskUnit",
    "count_values",
    "unit_ranges",
]

_COPY_BYTES = 4 * 1024 * 1024
_SLAB_BYTES = 2 * 1024 * 1024
"""Of a weight, held at once: what is made of it meanwhile still fits in a core's share of the cache."""
UNIT_BYTES = 64 * 1024 * 1024
"""That one unit works on: much less than workers would quarrel over, much more than a unit costs."""
_DEVICE_SLAB_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Placement:
    """Where a tensor of the destination begins: in which of its files, and at which byte."""

    file: str
    start: int


class Task(Protocol):
    """A part of a unit."""

    @property
    def sources(self) -> frozenset[SourceFile]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def files(self) -> frozenset[str]: ...

    def run(self, folder: Path) -> None: ...


@dataclass(frozen=True)
class TaskUnit:
    """Tasks that are done together; see :class:`~compressed_format.streaming.job.Unit`."""

    id: str
    tasks: tuple[Task, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes of the source it reads."""
        return sum(task.nbytes for task in self.tasks)

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the destination that it writes to."""
        return tuple(sorted({file for task in self.tasks for file in task.files}))

    def run(self, folder: Path) -> None:
        """Do it. Raises :class:`CheckpointError` for what cannot be read or written, and as quantizing does."""
        for source in frozenset[SourceFile]().union(*(task.sources for task in self.tasks)):
            source.check()
        for task in self.tasks:
            task.run(folder)


@dataclass(frozen=True)
class CopySpan:
    """Bytes that stay as they are."""

    source: SourceFile
    start: int
    nbytes: int
    to: Placement

    @property
    def sources(self) -> frozenset[SourceFile]:
        """The file that it reads."""
        return frozenset({self.source})

    @property
    def files(self) -> frozenset[str]:
        """The file that it writes to."""
        return frozenset({self.to.file})

    def run(self, folder: Path) -> None:
        """Copy them."""
        buffer = memoryview(bytearray(min(_COPY_BYTES, self.nbytes)))
        for done in range(0, self.nbytes, _COPY_BYTES):
            chunk = buffer[: min(_COPY_BYTES, self.nbytes - done)]
            read_span(self.source.path, self.start + done, chunk)
            write_span(folder / self.to.file, self.to.start + done, chunk)


@dataclass(frozen=True)
class _RowsOfMatrix:
    """A task that reads ``rows`` of a weight that is not compressed yet."""

    matrix: SourceMatrix
    rows: Range

    @property
    def sources(self) -> frozenset[SourceFile]:
        """The file that it reads."""
        return frozenset({self.matrix.stored.file})

    @property
    def nbytes(self) -> int:
        """How many bytes it reads."""
        return self.matrix.nbytes * (self.rows[1] - self.rows[0]) // max(self.matrix.rows, 1)


@dataclass(frozen=True)
class CopyRows(_RowsOfMatrix):
    """Some rows of a weight that stays dense, but is stored as a tensor of its own."""

    to: Placement

    @property
    def files(self) -> frozenset[str]:
        """The file that it writes to."""
        return frozenset({self.to.file})

    def run(self, folder: Path) -> None:
        """Copy them, slab by slab."""
        step = slab_rows(self.matrix.nbytes // max(self.matrix.rows, 1), 1, None)
        for (first, _), slab in self.matrix.slabs(self.rows, step):
            _write_part(folder, self.to, slab, first)


@dataclass(frozen=True)
class CompressRows(_RowsOfMatrix):
    """Some rows of a weight, as the tensors of their module; those that are of no row too, if it begins with the first.

    ``layout`` is that of the whole weight, ``to`` where each of its tensors goes. ``values_before`` is, for
    sparse-bitmask, how many values the rows before these have.
    """

    assignment: Assignment
    layout: WeightLayout
    to: Mapping[str, Placement]
    values_before: int = 0
    device: str | None = None

    @property
    def files(self) -> frozenset[str]:
        """The files that it writes to."""
        return frozenset(placement.file for placement in self.to.values())

    def run(self, folder: Path) -> None:
        """Read, compress and write them, slab by slab."""
        before = self.values_before
        for rows, tensors in _compressed_slabs(self.matrix, self.rows, self.assignment, self.layout, self.device):
            parts = self.layout.rows_of_tensors(rows)
            for suffix, tensor in tensors.items():
                part = parts[suffix]
                if suffix == "compressed" and part is None:
                    part = before, before + len(tensor)
                    before += len(tensor)
                elif suffix == "row_offsets":
                    tensor = tensor + (before - len(tensors["compressed"]))  # which has been counted
                elif part is None and rows[0] != 0:
                    continue  # a single scale, or the weight's shape: written with the first rows
                if suffix in ("weight_shape", "shape"):
                    tensor = torch.tensor(self.layout.shape, dtype=torch.int64).reshape(tensor.shape)
                _write_part(folder, self.to[suffix], tensor, 0 if part is None else part[0])


@dataclass(frozen=True)
class DecompressRows:
    """Some rows of a compressed weight, dense again."""

    tensors: Mapping[str, StoredTensorSpan]
    rows: Range
    layout: WeightLayout
    dtype: str
    to: Placement
    device: str | None = None

    @property
    def sources(self) -> frozenset[SourceFile]:
        """The files that it reads."""
        return frozenset(span.file for span in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """How many bytes it reads, about."""
        whole = sum(span.nbytes for span in self.tensors.values())
        return whole * (self.rows[1] - self.rows[0]) // max(self.layout.shape[0], 1)

    @property
    def files(self) -> frozenset[str]:
        """The file that it writes to."""
        return frozenset({self.to.file})

    def run(self, folder: Path) -> None:
        """Read, dequantize and write them, slab by slab."""
        columns = self.layout.shape[1]
        itemsize = torch_dtype(self.dtype).itemsize
        step = slab_rows(columns * itemsize, self.layout.row_step, self.device)
        for top in range(self.rows[0], self.rows[1], step):
            rows = top, min(top + step, self.rows[1])
            tensors = {
                suffix: self.tensors[suffix].read(part)
                for suffix, part in self.layout.rows_of_tensors(rows).items()
                if suffix != "compressed" or self.layout.sparsity is not CompressionFormat.SPARSE_BITMASK
            }
            self.layout.cut_values(tensors, rows, self._values)
            if self.device is not None:
                tensors = {suffix: tensor.to(self.device) for suffix, tensor in tensors.items()}
            dense = self.layout.dense(tensors, (rows[1] - rows[0], columns), torch_dtype(self.dtype))
            _write_part(folder, self.to, dense, rows[0])

    def _values(self, first: int, last: int) -> torch.Tensor:
        span = self.tensors["compressed"]
        return span.read((max(first, 0), max(min(last, span.shape[0]), first, 0)))


def slab_rows(row_bytes: int, step: int, device: str | None) -> int:
    """How many rows of ``row_bytes`` each are worked on at once: some megabytes, and a multiple of ``step``."""
    size = _SLAB_BYTES if device in (None, "cpu") else _DEVICE_SLAB_BYTES
    return max(size // max(row_bytes, 1) // step, 1) * step


def unit_ranges(rows: int, row_bytes: int, step: int, device: str | None) -> list[Range]:
    """Rows of ``row_bytes`` each in parts that a unit works on: whole slabs, whose rows are multiples of ``step``."""
    slab = slab_rows(row_bytes, step, device)
    size = max(UNIT_BYTES // max(slab * row_bytes, 1), 1) * slab
    return [(top, min(top + size, rows)) for top in range(0, rows, size)]


def count_values(
    matrix: SourceMatrix, rows: Range, assignment: Assignment, layout: WeightLayout, device: str | None
) -> int:
    """How many values of ``rows`` are not zero once they are compressed."""
    slabs = _compressed_slabs(matrix, rows, assignment, layout, device)
    return sum(tensors["compressed"].numel() for _, tensors in slabs)


def _compressed_slabs(
    matrix: SourceMatrix, rows: Range, assignment: Assignment, layout: WeightLayout, device: str | None
) -> Iterator[tuple[Range, dict[str, torch.Tensor]]]:
    """The tensors of ``rows``, slab by slab."""
    row_bytes = matrix.nbytes // max(matrix.rows, 1)
    step = slab_rows(row_bytes, layout.row_step, device)
    args = layout.args
    scales: tuple[torch.Tensor, torch.Tensor | None] | None = None
    if args is not None and args.strategy is QuantizationStrategy.TENSOR and matrix.rows > step:
        if args.observer in ("mse", "memoryless_mse"):
            step = matrix.rows  # what it minimises is of the whole tensor
        else:
            # The scale follows from the extremes alone.
            found = []
            for part, slab in matrix.slabs((0, matrix.rows), step):
                found.append(torch.stack(torch.aminmax(_on(device, slab))))
                if not torch.isfinite(found[-1]).all():
                    raise _not_finite(slab, layout.place, part[0])
            scales = weight_scales(torch.cat(found).unsqueeze(0), args, place=f"{layout.place}.weight")
    for part, slab in matrix.slabs(rows, step):
        try:
            yield part, compressed_tensors(_on(device, slab), assignment, layout.place, scales=scales)
        except QuantizationError:
            if torch.isfinite(slab).all():
                raise
            raise _not_finite(slab, layout.place, part[0]) from None  # by its place in the whole weight


def _not_finite(slab: torch.Tensor, place: str, first: int) -> QuantizationError:
    row, column = (~torch.isfinite(slab)).nonzero()[0].tolist()
    value = slab[row, column].item()
    message = f"holds {value} at index {[first + row, column]}; a weight must be finite to be quantized"
    return QuantizationError(problems=[Problem(f"{place}.weight", message)])


def _on(device: str | None, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if device is None else tensor.to(device)


def _write_part(folder: Path, to: Placement, tensor: torch.Tensor, first: int) -> None:
    """Write ``tensor`` as the part of a larger one that begins at the index ``first`` of its first dimension."""
    values = tensor.cpu().contiguous()
    row_bytes = values[0].nbytes if values.ndim and len(values) else 0
    if values.numel():
        data = values.reshape(-1).view(torch.uint8).numpy().data
        write_span(folder / to.file, to.start + first * row_bytes, data)
