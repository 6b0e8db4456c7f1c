"""Bitmasks of sparse weights: a bit for each place of a row, least significant bit first; plain torch."""

from __future__ import annotations

import torch

__all__ = ["bytes_of", "expand_bitmask", "nonzero", "pack_bitmask", "unpack_bitmask"]


def pack_bitmask(mask: torch.Tensor) -> torch.Tensor:
    """Bool ``[..., n]`` to uint8 ``[..., ceil(n/8)]``: bit ``j`` of byte ``k`` is place ``8k + j``."""
    padded: torch.Tensor = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(
        -1, (-1, 8)
    )
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(dim=-1).to(torch.uint8)


def expand_bitmask(compressed: torch.Tensor, bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """Put the values of ``compressed``, in row-major order, at the set bits of ``bitmask``; zero elsewhere."""
    mask = unpack_bitmask(bitmask, columns)
    expanded = torch.zeros(mask.shape, dtype=compressed.dtype, device=compressed.device)
    bytes_of(expanded).masked_scatter_(mask, bytes_of(compressed).reshape(-1))
    return expanded


def unpack_bitmask(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of :func:`pack_bitmask`: bool ``[..., columns]``."""
    bits = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    mask: torch.Tensor = (bitmask.unsqueeze(-1) >> bits & 1).flatten(-2)[..., :columns]
    return mask.to(torch.bool)


def nonzero(weight: torch.Tensor) -> torch.Tensor:
    """Which values are not zero; what is not a number is not."""
    # torch compares no float8.
    return (weight.to(torch.float32) if weight.dtype == torch.float8_e4m3fn else weight) != 0


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, seen as bytes if it is float8, for which torch has few operations on the CPU."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
