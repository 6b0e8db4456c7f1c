"""How a stored weight is laid out, told from headers: its shape, and which of the layouts that were ever written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from compressed_format.bitpack import packed_words, word_aligned_words
from compressed_format.config import Assignment, CompressionFormat, QuantizationArgs
from compressed_format.dtypes import torch_dtype
from compressed_format.errors import FormatError, Problem
from compressed_format.formats import PackLayout, PackQuantized, format_named, pack_layout
from compressed_format.formats.base import StoredTensor
from compressed_format.formats.pack_quantized import stored_shape
from compressed_format.reading.layout import WeightLayout, weight_specs

__all__ = ["layout_of"]


def layout_of(
    place: str,
    tensors: Mapping[str, StoredTensor],
    assignment: Assignment,
    version: str | None,
    read: Callable[[str], torch.Tensor],
) -> WeightLayout:
    """The layout of a module's weight out of what headers tell of its ``tensors``, by suffix.

    ``read`` yields one of them: the one that holds the shape and, for odd widths of which nothing else tells it, the
    packed codes. ``version`` is the release that wrote the file. Raises :class:`FormatError` for tensors that are
    missing, or contradict each other, and :class:`UnsupportedFormatError` for formats that cannot be decoded.
    """
    args = None if assignment.scheme is None else assignment.scheme.weights
    format_named(assignment.format, place)
    blank = WeightLayout(place, (0, 0), args, assignment.format, assignment.sparsity, frozenset(tensors))
    layout, unpacked = PackLayout.DENSE, False
    if assignment.sparsity is not None:
        shape = _sparse_shape(place, tensors, read)
    elif assignment.format is CompressionFormat.MARLIN_24:
        packed = _required(place, tensors, "weight_packed")
        bits = args.num_bits if args is not None else 4
        shape = (packed.shape[-1] * 2 // bits, packed.shape[0] * 32)
    elif assignment.format is CompressionFormat.PACK_QUANTIZED and args is not None:
        packed = _required(place, tensors, "weight_packed")
        _required(place, tensors, "weight_shape")
        shape = _matrix(
            place, stored_shape({"weight_shape": read("weight_shape"), "weight_packed": _meta(packed)}, place)
        )
        if 32 % args.num_bits:
            like = read("weight_packed") if _is_ambiguous(args, shape[1]) else _meta(packed)
            layout = pack_layout(like, args.num_bits, shape[1], version=version, place=place)
        zero_point = tensors.get("weight_zero_point")
        unpacked = zero_point is not None and zero_point.dtype == "int8" and PackQuantized.packs_zero_points(args)
    else:
        shape = _matrix(place, _required(place, tensors, "weight").shape)
    stored = frozenset(weight_specs((1, 1), args, assignment.format, assignment.sparsity)) | {"weight_g_idx"}
    return replace(
        blank, shape=shape, suffixes=stored & tensors.keys(), pack_layout=layout, zero_points_unpacked=unpacked
    )


def _is_ambiguous(args: QuantizationArgs, columns: int) -> bool:
    return packed_words(columns, args.num_bits) == word_aligned_words(columns, args.num_bits)


def _required(place: str, tensors: Mapping[str, StoredTensor], suffix: str) -> StoredTensor:
    if suffix not in tensors:
        message = f"is missing; found {', '.join(sorted(tensors)) or 'no tensors'}"
        raise FormatError(problems=[Problem(f"{place}.{suffix}", message)])
    return tensors[suffix]


def _matrix(place: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise FormatError(problems=[Problem(place, f"its weight has shape {list(shape)}, expected a matrix")])
    return shape[0], shape[1]


def _meta(tensor: StoredTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device="meta")


def _sparse_shape(
    place: str, tensors: Mapping[str, StoredTensor], read: Callable[[str], torch.Tensor]
) -> tuple[int, int]:
    found, mask = _required(place, tensors, "shape"), _required(place, tensors, "bitmask")
    if found.dtype != "int64" or math.prod(found.shape) != 2:
        message = f"is {found.dtype} {list(found.shape)}, expected two int64 values"
        raise FormatError(problems=[Problem(f"{place}.shape", message)])
    rows, columns = (int(size) for size in read("shape").flatten().tolist())
    # A byte holds eight columns, so that the sizes are bounded by what is really there.
    if tuple(mask.shape) != (rows, -(-columns // 8)):
        message = f"says [{rows}, {columns}], which the bitmask of shape {list(mask.shape)} contradicts"
        raise FormatError(problems=[Problem(f"{place}.shape", message)])
    return rows, columns
