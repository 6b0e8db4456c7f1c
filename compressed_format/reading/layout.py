"""How the tensors of one stored weight follow from its shape: which of them a range of rows or columns needs.

A range is cut where every tensor can be cut: between words, groups and blocks. What lies around the range that was
asked for is decoded with it, and dropped again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from frozendict import frozendict

from compressed_format import ops
from compressed_format.blocks import block_shape
from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationStrategy
from compressed_format.errors import FormatError, Problem
from compressed_format.formats import (
    FORMATS,
    SPARSITY_FORMATS,
    PackLayout,
    PackQuantized,
    TensorSpec,
    format_named,
)
from compressed_format.formats.base import dense_weight
from compressed_format.quantization import QuantizedWeight

__all__ = ["Part", "Range", "WeightLayout", "weight_specs"]

Range = tuple[int, int]
"""The first index and the one after the last."""
Part = tuple[Range, Range]
"""Rows and columns of a weight."""

_SHAPES = frozenset({"weight_shape", "shape"})
# A byte of a bitmask has the bits of eight columns, and a group of 2:4 sparsity lies in one half of it.
_MASK_COLUMNS = 8


def weight_specs(
    shape: tuple[int, int],
    args: QuantizationArgs | None,
    format: CompressionFormat,
    sparsity: CompressionFormat | None,
    layout: PackLayout = PackLayout.DENSE,
    *,
    zero_points_unpacked: bool = False,
) -> dict[str, TensorSpec]:
    """The tensors of a weight of ``shape`` ``[O, I]``, by suffix, in any layout that was ever written."""
    if layout is PackLayout.WORD_ALIGNED and args is not None:
        specs = PackQuantized.word_aligned_specs(shape, args)
    else:
        specs = format_named(format).tensor_specs(shape, args)
    if zero_points_unpacked:
        specs["weight_zero_point"] = TensorSpec((torch.int8,), specs["weight_scale"].shape)
    if sparsity is not None:
        values = specs.pop("weight")
        sparse = dict(SPARSITY_FORMATS[sparsity].tensor_specs(shape))
        sparse["compressed"] = TensorSpec(values.dtypes, sparse["compressed"].shape)
        specs = {**sparse, **specs}
    return specs


@dataclass(frozen=True)
class WeightLayout:
    """How a weight of ``shape`` ``[O, I]`` is stored; picklable, and known before any of its values is.

    ``suffixes`` are those of the tensors that are there. ``place`` is the module's name, for errors.
    """

    place: str
    shape: tuple[int, int]
    args: QuantizationArgs | None
    format: CompressionFormat
    sparsity: CompressionFormat | None
    suffixes: frozenset[str]
    pack_layout: PackLayout = PackLayout.DENSE
    zero_points_unpacked: bool = False

    def specs(self, shape: tuple[int, int] | None = None) -> dict[str, TensorSpec]:
        """The tensors of this weight, or of one of another ``shape`` that is stored likewise."""
        shape = shape or self.shape
        specs = weight_specs(
            shape,
            self.args,
            self.format,
            self.sparsity,
            self.pack_layout,
            zero_points_unpacked=self.zero_points_unpacked,
        )
        if "weight_g_idx" in self.suffixes:  # in files whose config does not announce it, too
            specs["weight_g_idx"] = TensorSpec((torch.int32,), (shape[1],))
        return {suffix: spec for suffix, spec in specs.items() if suffix in self.suffixes}

    @property
    def row_step(self) -> int:
        """Rows can be cut at multiples of this."""
        if self.format is CompressionFormat.MARLIN_24:
            return max(self.shape[0], 1)  # its tiles and runs of them are shuffled over all of it
        if self.args is None:
            return 1
        step = block_shape(self.args, self.shape)[0] if self.args.strategy is QuantizationStrategy.BLOCK else 1
        if "weight_zero_point" in self.suffixes and self.format is CompressionFormat.PACK_QUANTIZED:
            step = math.lcm(step, self._codes_in_words)
        return max(step, 1)

    @property
    def column_step(self) -> int:
        """Columns can be cut at multiples of this."""
        if self.sparsity is CompressionFormat.SPARSE_BITMASK or self.format is CompressionFormat.MARLIN_24:
            return max(self.shape[1], 1)
        step = 1 if self.sparsity is None else _MASK_COLUMNS
        if self.args is None:
            return step
        if self.args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.BLOCK):
            step = math.lcm(step, max(block_shape(self.args, self.shape)[1], 1))
        if self.format is CompressionFormat.PACK_QUANTIZED:
            step = math.lcm(step, self._codes_in_words)
        return step

    @property
    def _codes_in_words(self) -> int:
        """How many codes fill whole words."""
        assert self.args is not None
        bits = self.args.num_bits
        return 32 // bits if self.pack_layout is PackLayout.WORD_ALIGNED else 32 // math.gcd(32, bits)

    def rows_of_tensors(self, rows: Range) -> frozendict[str, Range | None]:
        """For each tensor, the part along its first dimension that belongs to ``rows``; None stands for all of it.

        ``rows`` must begin at a multiple of :attr:`row_step` and end at one, or at the last row. Of ``compressed``
        of sparse-bitmask, only ``row_offsets`` can tell the part.
        """
        return frozendict(self._parts(rows, 0))

    def columns_of_tensors(self, columns: Range) -> frozendict[str, Range | None]:
        """As :meth:`rows_of_tensors`, for columns and the last dimension."""
        return frozendict(self._parts(columns, 1))

    def _parts(self, bounds: Range, dim: int) -> dict[str, Range | None]:
        def sized(size: int) -> tuple[int, int]:
            return (size, self.shape[1]) if dim == 0 else (self.shape[0], size)

        whole, longer = self.specs(), self.specs(sized(self.shape[dim] + 8 * self._longest_step))
        if bounds == (0, self.shape[dim]):
            return dict.fromkeys(whole)
        first, last = self.specs(sized(bounds[0])), self.specs(sized(bounds[1]))
        end = 0 if dim == 0 else -1
        parts: dict[str, Range | None] = {}
        for suffix, spec in whole.items():
            start, stop = first[suffix].shape[end], last[suffix].shape[end]
            moves = spec.shape[end] != longer[suffix].shape[end] and suffix not in _SHAPES
            parts[suffix] = (start, stop) if moves and start is not None and stop is not None else None
        return parts

    @property
    def _longest_step(self) -> int:
        return max(self.row_step, self.column_step, 32)

    def cut_values(
        self, tensors: dict[str, torch.Tensor], rows: Range, values: Callable[[int, int], torch.Tensor]
    ) -> None:
        """Add the values of ``rows`` to the other ``tensors`` of these rows, where only ``row_offsets`` tell which.

        ``values`` yields a range of the tensor ``compressed``, or less where it is shorter. Raises
        :class:`FormatError` for offsets that contradict it.
        """
        if self.sparsity is not CompressionFormat.SPARSE_BITMASK:
            return
        count = int(ops.count_bits(tensors["bitmask"], self.shape[1]).sum())
        offsets = tensors["row_offsets"]
        start = int(offsets[0]) if len(offsets) else 0
        tensors["compressed"] = found = values(start, start + count)
        if start < 0 or found.numel() != count:
            message = f"begins row {rows[0]} at {start}, where {count} values are not left of compressed"
            raise FormatError(problems=[Problem(f"{self.place}.row_offsets", message)])
        tensors["row_offsets"] = offsets - start

    def decode(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> QuantizedWeight:
        """The weight of ``shape``, which these tensors hold: those of the whole weight or of a part of it.

        Raises :class:`FormatError` for whatever contradicts the format.
        """
        found = self._of_shape(tensors, shape)
        format = FORMATS[self.format]
        if isinstance(format, PackQuantized):
            return format.decode(found, self.args, place=self.place, layout=self.pack_layout)
        return format.decode(found, self.args, place=self.place)

    def dense(
        self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """What :meth:`decode` yields, dequantized; see :func:`~compressed_format.quantization.dequantize`."""
        found = self._of_shape(tensors, shape)
        format = FORMATS[self.format]
        if isinstance(format, PackQuantized):
            return format.dense(found, self.args, dtype=dtype, place=self.place, layout=self.pack_layout)
        return dense_weight(format.decode(found, self.args, place=self.place), shape, self.args, dtype)

    def dequantize(self, quantized: QuantizedWeight, dtype: torch.dtype | None = None) -> torch.Tensor:
        """What :meth:`decode` has yielded, dense; see :func:`~compressed_format.quantization.dequantize`."""
        return dense_weight(quantized, tuple(quantized.shape), self.args, dtype)

    def _of_shape(self, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int]) -> dict[str, torch.Tensor]:
        """``tensors`` as the format has them for ``shape``, with those of a sparse weight expanded."""
        found = dict(tensors)
        stored = {suffix: torch.tensor(shape, dtype=torch.int64) for suffix in _SHAPES & found.keys()}
        found.update(stored)
        if self.sparsity is not None:
            if self.sparsity is CompressionFormat.SPARSE_24_BITMASK:
                found["shape"] = found["shape"].unsqueeze(-1)
            found["weight"] = SPARSITY_FORMATS[self.sparsity].decode(found, place=self.place)
        return found

    def widened(self, bounds: Range | None, dim: int) -> Range:
        """The smallest range around ``bounds`` that can be cut out. Raises :class:`FormatError` for bounds outside."""
        size = self.shape[dim]
        first, last = (0, size) if bounds is None else bounds
        if not 0 <= first <= last <= size:
            kind = ("rows", "columns")[dim]
            message = f"has {size} {kind}, and {first} to {last} were asked for"
            raise FormatError(problems=[Problem(self.place, message)])
        step = (self.row_step, self.column_step)[dim]
        if step >= size:  # of an empty range, too: what can only be decoded whole has no part without any columns
            return 0, size
        return first // step * step, min(-(-last // step) * step, size)

    def cropped(
        self, quantized: QuantizedWeight, wide: tuple[Range, Range], part: tuple[Range, Range]
    ) -> QuantizedWeight:
        """The ``part``, rows and columns, out of a weight that was decoded ``wide``.

        Raises :class:`FormatError` where it would cut a block of rows that share a scale.
        """
        block_rows, block_columns = (1, 1) if self.args is None else block_shape(self.args, self.shape)
        (rows, columns), (wide_rows, wide_columns) = part, wide
        in_blocks = self.args is not None and self.args.strategy is QuantizationStrategy.BLOCK
        if in_blocks and any(row % block_rows and row != self.shape[0] for row in rows):
            message = f"its blocks of {block_rows} rows share a scale; rows {rows[0]} to {rows[1]} would cut one"
            raise FormatError(problems=[Problem(self.place, message)])
        codes_part = _within(rows, wide_rows), _within(columns, wide_columns)
        # Blocks are whole in both, so that their scales are a range as well.
        scales_part = (
            _within(_blocks(rows, block_rows), _blocks(wide_rows, block_rows)),
            _within(_blocks(columns, block_columns), _blocks(wide_columns, block_columns)),
        )

        def of_blocks(values: torch.Tensor | None) -> torch.Tensor | None:
            return values[scales_part] if values is not None and values.ndim == 2 else values

        return replace(
            quantized,
            codes=quantized.codes[codes_part],
            scale=of_blocks(quantized.scale),
            zero_point=of_blocks(quantized.zero_point),
        )


def _within(part: Range, wide: Range) -> slice:
    return slice(part[0] - wide[0], part[1] - wide[0])


def _blocks(part: Range, block: int) -> Range:
    return part[0] // max(block, 1), -(-part[1] // max(block, 1))
