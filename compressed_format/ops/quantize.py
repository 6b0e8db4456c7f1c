"""``compressed_format::quantize``: a weight into codes, a byte each or packed into words, with scales and zero points.

Scales and zero points are given, or found from the smallest and largest value of each rectangle of
``block_rows`` x ``block_columns``. A scale is NaN where a value that it is for is not finite, and codes are then any:
what is wrong with the weight is for the caller to say.
"""

from __future__ import annotations

from typing import cast

import torch

from compressed_format import bitpack
from compressed_format.blocks import block_shape, from_blocks, scale_shape, scales_over_blocks, to_blocks
from compressed_format.config import QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_format.errors import OpArgumentError
from compressed_format.ops.definition import library
from compressed_format.scales import round_to_codes, scale_of_range

__all__ = ["Quantized", "quantize", "quantize_weight"]

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FLOAT8_LARGEST = 448.0


def quantize(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
    is_float: bool,
    symmetric: bool,
    block_rows: int,
    block_columns: int,
    pack: bool,
) -> Quantized:
    """Codes, scale and zero point (of no elements where symmetric) of ``weight`` ``[..., O, I]``."""
    arguments = (weight, scale, zero_point, bits, is_float, symmetric, block_rows, block_columns, pack)
    try:
        return cast(Quantized, torch.ops.compressed_format.quantize.default(*arguments))
    except RuntimeError:
        # All that native code can raise: only now find out whether the arguments were wrong, and which.
        _check(*arguments)
        raise


def quantize_weight(
    weight: torch.Tensor,
    args: QuantizationArgs,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    *,
    pack: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """Codes, or packed words, scale and zero point by the op; None where the definition has to do it, or to refuse.

    ``weight`` holds values, and given scales fit it.
    """
    is_float = args.type is QuantizationType.FLOAT
    kinds_fit = (
        weight.dtype in _FLOATS
        and not (is_float and not args.symmetric)
        and (args.symmetric or args.zp_dtype in (None, "torch.int8"))
        and (scale is None or scale.dtype == weight.dtype)
        and (zero_point is None or zero_point.dtype == torch.int8)
    )
    if not kinds_fit:
        return None
    rows, columns = block_shape(args, weight.shape)
    matrix = weight
    if args.strategy is QuantizationStrategy.TENSOR:
        matrix = weight.reshape(-1, columns)
        rows = matrix.shape[0]
        scale = None if scale is None else scale.reshape(1, 1)
        zero_point = None if zero_point is None else zero_point.reshape(1, 1)
    codes, scale, zero_point = quantize(
        matrix, scale, zero_point, args.num_bits, is_float, bool(args.symmetric), rows, columns, pack
    )
    if not torch.isfinite(scale).all():
        return None
    shape = scale_shape(args, weight.shape)
    found = None if args.symmetric else zero_point.reshape(shape)
    return codes.reshape(*weight.shape[:-1], codes.shape[-1]), scale.reshape(shape), found


def _check(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
    is_float: bool,
    symmetric: bool,
    block_rows: int,
    block_columns: int,
    pack: bool,
) -> None:
    def fail(argument: str, message: str) -> None:
        raise OpArgumentError(f"quantize: {argument} {message}")

    if weight.dtype not in _FLOATS:
        fail("weight", f"must be bfloat16, float16 or float32, not {weight.dtype}")
    if weight.ndim < 2 or weight.numel() == 0:
        fail("weight", f"must be a matrix, or a stack of them, that holds values, not shape {list(weight.shape)}")
    if not 1 <= bits <= 8 or (is_float and bits != 8):
        fail("bits", f"must lie in 1 to 8 (8 for floats), not {bits}")
    if is_float and not symmetric:
        fail("symmetric", "must be true for float codes")
    if is_float and pack:
        fail("pack", "must be false for float codes")
    if block_rows < 1 or block_columns < 1:
        fail("block_rows and block_columns", f"must be positive, not {block_rows} and {block_columns}")
    expected = _scale_shape(weight, block_rows, block_columns)
    if scale is not None and (scale.dtype != weight.dtype or tuple(scale.shape) != expected):
        fail("scale", f"must be {weight.dtype} {list(expected)}, not {scale.dtype} {list(scale.shape)}")
    if (zero_point is not None) != (scale is not None and not symmetric):
        fail("zero_point", "must be given where a scale is given and codes are asymmetric, and only there")
    if zero_point is not None and (zero_point.dtype != torch.int8 or tuple(zero_point.shape) != expected):
        fail("zero_point", f"must be int8 {list(expected)}, not {zero_point.dtype} {list(zero_point.shape)}")


def _scale_shape(weight: torch.Tensor, block_rows: int, block_columns: int) -> tuple[int, ...]:
    return (*weight.shape[:-2], -(-weight.shape[-2] // block_rows), -(-weight.shape[-1] // block_columns))


def _reference(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
    is_float: bool,
    symmetric: bool,
    block_rows: int,
    block_columns: int,
    pack: bool,
) -> Quantized:
    _check(weight, scale, zero_point, bits, is_float, symmetric, block_rows, block_columns, pack)
    lowest = -_FLOAT8_LARGEST if is_float else -(2.0 ** (bits - 1))
    highest = _FLOAT8_LARGEST if is_float else 2.0 ** (bits - 1) - 1
    # Blocks larger than the weight would be padded to no end.
    rows, columns = min(block_rows, weight.shape[-2]), min(block_columns, weight.shape[-1])
    blocks = to_blocks(weight, rows, columns)
    minimum, maximum = blocks.amin((-3, -1)), blocks.amax((-3, -1))
    finite = torch.isfinite(minimum) & torch.isfinite(maximum)
    if scale is None:
        scale, zero_point = scale_of_range(minimum, maximum, lowest, highest, None if symmetric else torch.int8)
    scale = torch.where(finite, scale, torch.nan)
    ratio = blocks / scales_over_blocks(scale, weight.ndim)
    if zero_point is not None:
        ratio = ratio + scales_over_blocks(zero_point, weight.ndim).to(weight.dtype)
    elif is_float:
        ratio = ratio + 0.0  # -0.0, of pruned weights, is the code 0
    codes_dtype = torch.float8_e4m3fn if is_float else torch.int8
    codes = from_blocks(round_to_codes(ratio, lowest, highest, is_float).to(codes_dtype), weight.shape)
    if pack:
        codes = bitpack.pack_codes(codes, bits)
    zero_point = weight.new_empty(0, dtype=torch.int8) if zero_point is None else zero_point.clone()
    return codes, scale, zero_point


def _fake(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
    is_float: bool,
    symmetric: bool,
    block_rows: int,
    block_columns: int,
    pack: bool,
) -> Quantized:
    _check(weight, scale, zero_point, bits, is_float, symmetric, block_rows, block_columns, pack)
    size = bitpack.packed_words(weight.shape[-1], bits) if pack else weight.shape[-1]
    dtype = torch.int32 if pack else torch.float8_e4m3fn if is_float else torch.int8
    scales = _scale_shape(weight, block_rows, block_columns)
    return (
        weight.new_empty((*weight.shape[:-1], size), dtype=dtype),
        weight.new_empty(scales),
        weight.new_empty((0,) if symmetric else scales, dtype=torch.int8),
    )


_SCHEMA = (
    "(Tensor weight, Tensor? scale, Tensor? zero_point, int bits, bool is_float, bool symmetric, int block_rows, "
    "int block_columns, bool pack) -> (Tensor, Tensor, Tensor)"
)
for _name in ("quantize", "quantize_reference"):
    library.define(f"{_name}{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"compressed_format::{_name}", _fake, lib=library)
