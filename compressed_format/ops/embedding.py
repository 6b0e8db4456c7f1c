"""``compressed_format::embedding``: rows of a compressed table, of which nothing else is made dense."""

from __future__ import annotations

from typing import Any

import torch

from compressed_format.errors import OpArgumentError
from compressed_format.ops import reference
from compressed_format.ops.definition import define_op
from compressed_format.ops.weight_arguments import LAYOUT, WEIGHT, check_weight, rows_of

__all__ = ["embedding"]


def _check_embedding(indices: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
    check_weight("embedding", weight, *rest)
    if indices.dtype not in (torch.int64, torch.int32):
        raise OpArgumentError(f"embedding: indices must be int64 or int32, not {indices.dtype}")
    if len(rows_of(weight, rest[3])) != 1:
        raise OpArgumentError(f"embedding: weight must be a matrix, not shape {list(weight.shape)}")


def _fake_embedding(
    indices: torch.Tensor, weight: torch.Tensor, scale: Any, zero_point: Any, g_idx: Any, bitmask: Any, *layout: int
) -> torch.Tensor:
    dtype = weight.dtype if scale is None else scale.dtype
    return weight.new_empty((*indices.shape, layout[1]), dtype=dtype)


def _check_indices(indices: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
    rows = rows_of(weight, rest[3])[0]
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < rows:
        found = f"{int(indices.min())} to {int(indices.max())}"
        raise IndexError(f"embedding: index out of range: the table has {rows} rows, and indices are {found}")


embedding = define_op(
    "embedding",
    f"Tensor indices, {WEIGHT}, {LAYOUT}",
    reference.embedding,
    _check_embedding,
    _fake_embedding,
    _check_indices,
)
