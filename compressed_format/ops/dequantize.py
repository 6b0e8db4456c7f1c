"""``compressed_format::dequantize``: the dense weight."""

from __future__ import annotations

from typing import Any

import torch

from compressed_format.errors import OpArgumentError
from compressed_format.ops import reference
from compressed_format.ops.definition import FLOATS, define_op
from compressed_format.ops.weight_arguments import LAYOUT, WEIGHT, check_weight, rows_of

__all__ = ["dequantize"]


def _check_dequantize(*arguments: Any) -> None:
    *weight, dtype = arguments if len(arguments) == 10 else (*arguments, None)
    check_weight("dequantize", *weight)
    if dtype is not None and dtype not in FLOATS:
        raise OpArgumentError(f"dequantize: dtype must be a float dtype, not {dtype}")


def _fake_dequantize(
    weight: torch.Tensor,
    scale: Any,
    zero_point: Any,
    g_idx: Any,
    bitmask: Any,
    bits: int,
    columns: int,
    block_rows: int,
    block_columns: int,
    dtype: torch.dtype | None = None,
) -> Any:
    own = weight.dtype if scale is None else scale.dtype
    return weight.new_empty((*rows_of(weight, bitmask), columns), dtype=own if dtype is None else dtype)


dequantize = define_op(
    "dequantize",
    f"{WEIGHT}, {LAYOUT}, ScalarType? dtype=None",
    reference.dequantize,
    _check_dequantize,
    _fake_dequantize,
)
