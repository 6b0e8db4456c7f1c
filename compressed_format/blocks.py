"""Rectangles of a weight that share a scale: their shape, and arithmetic by rectangle, in plain torch.

Each strategy gives one scale to ``block_rows`` x ``block_columns``: the whole matrix, one row, a group of a row, or a
block.
"""

from __future__ import annotations

import torch

from compressed_format.config import QuantizationArgs, QuantizationStrategy
from compressed_format.errors import UnsupportedFormatError

__all__ = ["block_shape", "dequantize_blocks", "from_blocks", "scale_shape", "scales_over_blocks", "to_blocks"]


def block_shape(args: QuantizationArgs, shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """The rectangle that shares one scale, as (rows, columns), for a weight of ``shape`` ``[..., O, I]``."""
    rows, columns = shape[-2:]
    if args.strategy is QuantizationStrategy.TENSOR:
        return rows, columns
    if args.strategy is QuantizationStrategy.CHANNEL:
        return 1, columns
    if args.strategy is QuantizationStrategy.BLOCK and args.block_structure is not None:
        # No larger than the weight: what lies beyond it would be padding, and a config may name any size.
        return min(args.block_structure[0], rows), min(args.block_structure[1], columns)
    if args.strategy is QuantizationStrategy.GROUP and args.group_size is not None:
        return 1, args.group_size
    raise UnsupportedFormatError(f"the strategy {args.strategy.value!r} is not one of weights")


def scale_shape(args: QuantizationArgs, shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The shape of ``weight_scale``: tensor ``[1]``, channel ``[..., O, 1]``, group ``[..., O, I/g]``,
    block ``[..., ceil(O/bh), ceil(I/bw)]``."""
    if args.strategy is QuantizationStrategy.TENSOR:
        return (1,)
    block_rows, block_columns = block_shape(args, shape)
    return (*shape[:-2], -(-shape[-2] // max(block_rows, 1)), -(-shape[-1] // max(block_columns, 1)))


def dequantize_blocks(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    block_rows: int,
    block_columns: int,
) -> torch.Tensor:
    """``(code - zero_point) * scale`` where each ``block_rows`` x ``block_columns`` of ``codes`` shares a scale.

    With ``g_idx``, column ``j`` uses the scale of group ``g_idx[j]`` instead.
    """
    if g_idx is not None:
        block_rows, block_columns = 1, 1
    values = to_blocks(codes.to(scale.dtype), block_rows, block_columns)
    if zero_point is not None:
        values = values - scales_over_blocks(zero_point, codes.ndim, g_idx).to(scale.dtype)
    return from_blocks(values * scales_over_blocks(scale, codes.ndim, g_idx), codes.shape)


def to_blocks(weight: torch.Tensor, block_rows: int, block_columns: int) -> torch.Tensor:
    """View ``[..., O, I]`` as ``[..., R, block_rows, C, block_columns]``, padded with zeros at the lower right."""
    block_rows, block_columns = max(block_rows, 1), max(block_columns, 1)
    pad_rows, pad_columns = -weight.shape[-2] % block_rows, -weight.shape[-1] % block_columns
    if pad_rows or pad_columns:
        weight = torch.nn.functional.pad(weight, (0, pad_columns, 0, pad_rows))
    rows, columns = weight.shape[-2:]
    by_columns: torch.Tensor = weight.unflatten(-1, (columns // block_columns, block_columns))
    blocks: torch.Tensor = by_columns.unflatten(-3, (rows // block_rows, block_rows))
    return blocks


def from_blocks(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of :func:`to_blocks`: ``[..., O, I]``, with the padding cropped away."""
    dense: torch.Tensor = blocks.flatten(-2).flatten(-3, -2)
    cropped: torch.Tensor = dense[..., : shape[-2], : shape[-1]]
    return cropped.contiguous()


def scales_over_blocks(values: torch.Tensor, ndim: int, g_idx: torch.Tensor | None = None) -> torch.Tensor:
    """Scales or zero points, shaped to broadcast over :func:`to_blocks` of a weight with ``ndim`` dimensions."""
    if values.numel() == 1:
        return values.reshape((1,) * (ndim + 2))
    if g_idx is not None:
        values = values[..., g_idx]
    return values.unsqueeze(-1).unsqueeze(-3)
