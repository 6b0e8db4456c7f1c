"""The ops in plain torch: what each of them means, and the oracle that kernels are tested against.

Every op on a weight takes the same description of it: ``weight`` is int32 words (``pack-quantized``, dense layout),
int8 or float8_e4m3fn codes, or plain values; with ``bitmask`` it is the non-zero ones only. ``block_rows`` x
``block_columns`` share a scale. Weights are dequantized as ``decompress`` does, in the dtype of the scale.
"""

from __future__ import annotations

import torch

from compressed_format import bitpack
from compressed_format.activations import fake_quantize_activations as fake_quantize
from compressed_format.bitmask import expand_bitmask
from compressed_format.blocks import dequantize_blocks

__all__ = ["dequantize", "embedding", "fake_quantize", "linear"]


def dequantize(
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    bitmask: torch.Tensor | None,
    bits: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The dense weight ``[..., O, columns]``, in the dtype of ``scale`` (of ``weight``, where there is none).

    Values are rounded to that, and then to ``dtype`` if it is given.
    """
    codes = _codes(weight, bitmask, bits, columns)
    if scale is None:
        # An op must not return its own argument.
        dense = codes.clone(memory_format=torch.contiguous_format) if codes is weight else codes
    else:
        zero_points = _zero_points(zero_point, scale, bits)
        dense = dequantize_blocks(codes, scale, zero_points, g_idx, block_rows, block_columns)
    return dense if dtype is None else dense.to(dtype)


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    bitmask: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    columns: int,
    block_rows: int,
    block_columns: int,
) -> torch.Tensor:
    """``input @ dense_weight.T + bias`` for ``input`` ``[..., columns]``, in the dtype of ``input``."""
    dense = dequantize(weight, scale, zero_point, g_idx, bitmask, bits, columns, block_rows, block_columns)
    return torch.nn.functional.linear(input, dense.to(input.dtype), None if bias is None else bias.to(input.dtype))


def embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    bitmask: torch.Tensor | None,
    bits: int,
    columns: int,
    block_rows: int,
    block_columns: int,
) -> torch.Tensor:
    """Rows ``indices`` of the dense weight, ``[*indices.shape, columns]``; the table is never made dense."""
    rows = indices.reshape(-1)
    if bitmask is not None:
        # The values of a row are found through the bits of all rows before it.
        codes = expand_bitmask(weight, bitmask, columns).index_select(0, rows)
    else:
        codes = _codes(weight.index_select(0, rows), None, bits, columns)
    if scale is not None:
        zero_points = _of_rows(_zero_points(zero_point, scale, bits), rows // block_rows)
        scales = scale if scale.numel() == 1 else scale[rows // block_rows]
        codes = dequantize_blocks(codes, scales, zero_points, g_idx, 1, block_columns)
    return codes.reshape(*indices.shape, columns)


def _codes(weight: torch.Tensor, bitmask: torch.Tensor | None, bits: int, columns: int) -> torch.Tensor:
    if weight.dtype == torch.int32:
        return bitpack.unpack_codes(weight, bits, columns)
    if bitmask is not None:
        return expand_bitmask(weight, bitmask, columns)
    return weight


def _zero_points(zero_point: torch.Tensor | None, scale: torch.Tensor, bits: int) -> torch.Tensor | None:
    """Zero points in the shape of ``scale``, out of int32 words along their rows where they are packed."""
    if zero_point is None or zero_point.dtype != torch.int32:
        return zero_point
    packed_rows = zero_point.transpose(-1, -2).contiguous()
    return bitpack.unpack_codes(packed_rows, bits, scale.shape[-2]).transpose(-1, -2)


def _of_rows(values: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """The scales or zero points of ``rows``; a single one serves them all."""
    return values if values is None or values.numel() == 1 else values[rows]
