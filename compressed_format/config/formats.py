"""Which format the tensors of a group have when nobody says so, and what each format can hold."""

from __future__ import annotations

from compressed_format.config.args import QuantizationArgs
from compressed_format.config.words import CompressionFormat, QuantizationType

__all__ = ["infer_format", "infer_format_of_file", "misfit"]

_F = CompressionFormat

# float width, group size and scale dtype (None: any) of the formats with scales of their own
_MICROSCALED = {
    _F.MXFP4_PACK_QUANTIZED: (4, 32, None),
    _F.MXFP6_PACK_QUANTIZED: (6, 32, None),
    _F.MXFP8_QUANTIZED: (8, 32, "torch.uint8"),
    _F.NVFP4_PACK_QUANTIZED: (4, 16, None),
}


def infer_format(weights: QuantizationArgs | None, inputs: QuantizationArgs | None) -> CompressionFormat:
    """The format that an author's group gets when none is given.

    It is that of :func:`infer_format_of_file`, with one exception: int weights of fewer than 8 bits whose inputs are
    quantized too (W4A8, W4A4, W4AFP8 and their like, whatever the type of the inputs) are ``pack-quantized``. The
    reference implementation spends a byte on each of those weights, as ``int-quantized``, which no GPU kernel of vLLM
    takes. Int weights of 8 bits with quantized inputs stay ``int-quantized``.
    """
    if weights is not None and weights.type is QuantizationType.INT and weights.num_bits < 8:
        return _F.PACK_QUANTIZED
    return infer_format_of_file(weights, inputs)


def infer_format_of_file(weights: QuantizationArgs | None, inputs: QuantizationArgs | None) -> CompressionFormat:
    """The format that the reference implementation takes a group of a file to have when the file does not say."""
    if weights is None:
        return _F.DENSE
    is_int = weights.type is QuantizationType.INT
    if not is_int:
        for name, (bits, group_size, scale_dtype) in _MICROSCALED.items():
            if (weights.num_bits, weights.group_size) == (bits, group_size) and (
                scale_dtype in (None, weights.scale_dtype)
            ):
                return name
    if inputs is not None:
        return _F.INT_QUANTIZED if is_int else _F.FLOAT_QUANTIZED
    return _F.PACK_QUANTIZED if is_int and 1 <= weights.num_bits <= 8 else _F.NAIVE_QUANTIZED


def misfit(format: CompressionFormat, weights: QuantizationArgs | None) -> str | None:
    """Why ``format`` cannot hold such weights, or ``None`` if it can."""
    if weights is None:
        return None if format is _F.DENSE else "stores quantized weights, and this group has none"
    found = f"and these are {weights.type}{weights.num_bits}"
    is_int = weights.type is QuantizationType.INT
    if format is _F.DENSE:
        return f"stores weights as they are, {found}"
    if format is _F.INT_QUANTIZED:
        return None if is_int else f"stores int weights, {found}"
    if format is _F.FLOAT_QUANTIZED:
        return None if not is_int and weights.num_bits == 8 else f"stores float8 weights, {found}"
    if format is _F.NAIVE_QUANTIZED:
        return None if is_int or weights.num_bits == 8 else f"stores int or float8 weights, {found}"
    if format is _F.PACK_QUANTIZED:
        return None if is_int else f"stores int weights, {found}"
    if format in _MICROSCALED:
        bits, group_size, _ = _MICROSCALED[format]
        if (is_int, weights.num_bits, weights.group_size) != (False, bits, group_size):
            grouping = f" in groups of {weights.group_size}" if weights.group_size else ""
            return f"stores float{bits} weights in groups of {group_size}, {found}{grouping}"
    return None
