"""Where the tensors of a compressed weight may be split between processes: a pure function of their shapes.

A weight ``[O, I]`` is split along its rows (dimension 0) or its columns (dimension 1) into contiguous parts, the parts
that ``torch.chunk`` makes. Each tensor follows with whole elements: a word of packed codes, a scale, a word of packed
zero points, a byte of a bitmask. What describes the weight as a whole is replicated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from frozendict import frozendict

from compressed_format import bitpack
from compressed_format.activations import activation_group_size
from compressed_format.blocks import block_shape
from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationScheme
from compressed_format.errors import Problem, UnsupportedFormatError
from compressed_format.formats import PackQuantized

__all__ = ["ShardPlan", "plan_sharding"]

# Parallel sizes that an error tries, to say which of them work.
_LARGEST_SIZE_TRIED = 256


@dataclass(frozen=True)
class ShardPlan:
    """How the weight ``shape`` ``[O, I]`` is split along ``dim`` into ``parts``.

    ``splits`` has the dimension along which each tensor is split, by suffix; None for one that every process holds
    whole. ``block_columns`` is the number of columns that share a scale, as ops on a part are told.
    """

    shape: tuple[int, int]
    dim: int
    parts: int
    splits: frozendict[str, int | None]
    block_columns: int

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first row or column of the part of ``rank``, and the one after its last."""
        size = self.shape[self.dim]
        step = -(-size // self.parts)
        return min(rank * step, size), min((rank + 1) * step, size)

    def columns(self, rank: int) -> int:
        """How many columns the part of ``rank`` has."""
        first, last = self.bounds(rank)
        return last - first if self.dim == 1 else self.shape[1]


@dataclass(frozen=True)
class _Split:
    """A tensor split along ``dim``, with ``size`` elements of ``unit`` rows or columns of the weight each."""

    name: str
    dim: int
    size: int
    unit: Fraction
    element: str


def plan_sharding(
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    scheme: QuantizationScheme | None,
    sparsity: CompressionFormat | None,
    dim: int,
    parts: int,
    *,
    outputs: int = 0,
    place: str = "",
) -> ShardPlan:
    """How a module's ``tensors`` are split along ``dim`` of ``shape``; of them, dtypes and shapes matter, by suffix.

    ``outputs`` is the dimension of ``shape`` that the module's outputs have: 0 for a Linear, 1 for an Embedding.

    Raises :class:`UnsupportedFormatError` that names ``place``, the size, what a split would cut, and the parallel
    sizes that work.
    """
    reason = _never(tensors, shape, scheme, sparsity, dim)
    if reason is not None:
        raise UnsupportedFormatError(problems=[Problem(place, reason)])
    splits = _splits(tensors, shape, scheme, sparsity, dim, outputs)
    block_columns = _block_columns(tensors, shape, scheme, dim, parts)
    problem = _cut(splits, shape[dim], parts)
    if problem is None and block_columns is None:
        group = shape[1] // tensors["weight_scale"].shape[1]
        problem = f"columns of one group of weight_g_idx, of {group} columns, cannot be shared evenly"
    if problem is not None or block_columns is None:
        kind = ("rows", "columns")[dim]
        working = [
            size
            for size in range(2, min(shape[dim], _LARGEST_SIZE_TRIED) + 1)
            if _cut(splits, shape[dim], size) is None and _block_columns(tensors, shape, scheme, dim, size) is not None
        ]
        way_out = f"parallel sizes that work: {', '.join(map(str, working))}" if working else "no parallel size works"
        message = f"{shape[dim]} {kind} cannot be split over {parts} processes: {problem}; {way_out}"
        raise UnsupportedFormatError(problems=[Problem(place, message)])
    found: dict[str, int | None] = dict.fromkeys(tensors)
    found.update({split.name: split.dim for split in splits if split.name in tensors})
    return ShardPlan(shape, dim, parts, frozendict(found), block_columns)


def _never(
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    scheme: QuantizationScheme | None,
    sparsity: CompressionFormat | None,
    dim: int,
) -> str | None:
    """Why no number of processes can share these tensors, or None."""
    if sparsity is CompressionFormat.SPARSE_BITMASK:
        return (
            "sparse-bitmask stores as many values in a row as are not zero, so that no split of them is one of rows or "
            "columns; replicate the module"
        )
    packed = tensors.get("weight_packed")
    weights = None if scheme is None else scheme.weights
    if packed is not None and weights is not None:
        words = bitpack.packed_words(shape[1], weights.num_bits)
        zero_point = tensors.get("weight_zero_point")
        unpacked = zero_point is not None and zero_point.dtype != torch.int32
        older = unpacked and PackQuantized.packs_zero_points(weights)
        if packed.shape[-1] != words or older or "weight_shape" not in tensors:
            return _OLDER_LAYOUT
    return None if packed is not None or "weight" in tensors or "compressed" in tensors else _OLDER_LAYOUT


_OLDER_LAYOUT = "is stored in an older layout, which is re-encoded as it is loaded; load it in one process and save it"


def _splits(
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    scheme: QuantizationScheme | None,
    sparsity: CompressionFormat | None,
    dim: int,
    outputs: int,
) -> list[_Split]:
    """What is split along ``dim``, the codes first."""
    weights = None if scheme is None else scheme.weights
    bits = 8 if weights is None else weights.num_bits
    blocks = (1, 1) if weights is None else block_shape(weights, shape)
    reordered = "weight_g_idx" in tensors
    splits = []
    for name, tensor in tensors.items():
        sizes = tuple(tensor.shape)
        if name == "weight":
            splits.append(_Split(name, dim, sizes[dim], Fraction(1), "value"))
        elif name == "weight_packed":
            splits.append(_Split(name, dim, sizes[dim], Fraction(32, bits) if dim == 1 else Fraction(1), "word"))
        elif name == "compressed" and sparsity is not None:
            splits.append(_Split(name, dim, sizes[dim], Fraction(1 + dim), "value"))
        elif name == "bitmask":
            splits.append(_Split(name, dim, sizes[dim], Fraction(8 if dim == 1 else 1), "byte"))
        elif name == "weight_g_idx" and dim == 1:
            splits.append(_Split(name, 0, sizes[0], Fraction(1), "group number"))
        elif name in ("weight_scale", "weight_zero_point"):
            packed_rows = tensor.dtype == torch.int32 and dim == 0
            # One scale for all rows, or all columns, or one for all groups that reordered columns are in.
            if len(sizes) == 2 and not (reordered and dim == 1) and (packed_rows or sizes[dim] > 1):
                unit = Fraction(32, bits) if packed_rows else Fraction(blocks[dim])
                element = "word" if packed_rows else ("group", "block")[blocks[0] > 1]
                splits.append(_Split(name, dim, sizes[dim], unit, element))
        elif name == "bias" and dim == 0:
            splits.append(_Split(name, 0, sizes[0], Fraction(1), "value"))
    if scheme is not None:
        splits += _activation_splits("input", scheme.input_activations, tensors, shape, dim, 1)
        splits += _activation_splits("output", scheme.output_activations, tensors, shape, dim, outputs)
    return splits


def _activation_splits(
    name: str,
    args: QuantizationArgs | None,
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    dim: int,
    of: int,
) -> list[_Split]:
    """Groups of activations that are split with the dimension ``of`` of the weight, stored scales or not."""
    size = 0 if args is None else activation_group_size(args)
    # A single group is a whole token.
    if of != dim or not 0 < size < shape[dim]:
        return []
    stored = [f"{name}_{suffix}" for suffix in ("scale", "zero_point") if f"{name}_{suffix}" in tensors]
    count = -(-shape[dim] // size)
    return [_Split(suffix, 0, count, Fraction(size), "group") for suffix in stored or [f"{name} activations"]]


def _cut(splits: list[_Split], size: int, parts: int) -> str | None:
    """What would be cut if ``size`` rows or columns were split into ``parts``, or None."""
    step = -(-size // parts)
    if step * (parts - 1) >= size:
        return "a process would be left without any"
    if parts == 1:
        return None
    for split in splits:
        # All bounds are multiples of the first one.
        first = -(-split.size // parts) * split.unit
        if first != step:
            if step % split.unit == 0:
                return f"the second would start at {step}, but at {_text(first)} in {split.name}"
            return f"the second would start at {step}, inside a {split.element} of {split.name}"
    return None


def _block_columns(
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    scheme: QuantizationScheme | None,
    dim: int,
    parts: int,
) -> int | None:
    """The number of columns of a part that share a scale; None where reordered ones have no such number."""
    weights = None if scheme is None else scheme.weights
    columns = 1 if weights is None else max(block_shape(weights, shape)[1], 1)
    if dim == 0 or "weight_g_idx" not in tensors:
        return columns
    # Each part has all scales, and columns of any group: a part counts as many groups as the whole.
    groups, size = tensors["weight_scale"].shape[1], shape[1]
    step = -(-size // parts)
    width = -(-step // groups)
    last = size - step * (parts - 1)
    return width if all(part > 0 and -(-part // width) == groups for part in (step, last)) else None


def _text(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{float(value):g}"
