"""Values that go to each expert: their range, and which scales they are rounded with."""

from __future__ import annotations

import torch

from compressed_format.bitmask import bytes_of

__all__ = ["range_of_experts", "rows_at"]


def range_of_experts(values: torch.Tensor, experts: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest of all ``values`` ``[T, k, n]`` that go to each expert; zero where there are none."""
    index = experts.flatten()
    nothing = values.new_zeros(count + 1)
    least = nothing.scatter_reduce(0, index, values.amin(dim=-1).flatten(), "amin", include_self=False)
    largest = nothing.scatter_reduce(0, index, values.amax(dim=-1).flatten(), "amax", include_self=False)
    return least[:count], largest[:count]


def rows_at(values: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    """``values[index]``, through bytes: torch cannot pick among float8 zero points everywhere."""
    if values is None:
        return None
    picked = bytes_of(values)[index]
    return picked.view(values.dtype)
