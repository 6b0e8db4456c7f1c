"""``compressed_format::linear``: activations times a compressed weight. They and the bias have gradients."""

from __future__ import annotations

from typing import Any

import torch

from compressed_format.errors import OpArgumentError
from compressed_format.ops import reference
from compressed_format.ops.definition import FLOATS, define_op, library, register_autocast
from compressed_format.ops.dequantize import dequantize
from compressed_format.ops.weight_arguments import LAYOUT, WEIGHT, check_weight, refuse_gradients, rows_of

__all__ = ["check_linear", "fake_linear", "gradients_of_linear", "linear"]


def check_linear(
    op: str,
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: Any,
    zero_point: Any,
    g_idx: Any,
    bitmask: Any,
    bias: torch.Tensor | None,
    *layout: int,
) -> None:
    check_weight(op, weight, scale, zero_point, g_idx, bitmask, *layout)
    rows = rows_of(weight, bitmask)
    if len(rows) != 1:
        raise OpArgumentError(f"{op}: weight must be a matrix, not {len(rows) + 1}-dimensional")
    if input.dtype not in FLOATS:
        raise OpArgumentError(f"{op}: input must have a float dtype, not {input.dtype}")
    if input.ndim < 1 or input.shape[-1] != layout[1]:
        raise OpArgumentError(f"{op}: input must have {layout[1]} columns, not shape {list(input.shape)}")
    if bias is not None and (tuple(bias.shape) != tuple(rows) or bias.dtype not in FLOATS):
        raise OpArgumentError(f"{op}: bias must be [{rows[0]}] floats, not {bias.dtype} {list(bias.shape)}")


def _check_linear(*args: Any) -> None:
    check_linear("linear", *args)


def fake_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: Any,
    zero_point: Any,
    g_idx: Any,
    bitmask: Any,
    bias: Any,
    *layout: int,
) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], rows_of(weight, bitmask)[0]))


linear = define_op(
    "linear",
    f"Tensor input, {WEIGHT}, Tensor? bias, {LAYOUT}",
    reference.linear,
    _check_linear,
    fake_linear,
)


def _save_for_linear(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, scale, zero_point, g_idx, bitmask, bias, *layout = inputs
    ctx.save_for_backward(weight, scale, zero_point, g_idx, bitmask)
    ctx.layout = layout
    ctx.bias_dtype = None if bias is None else bias.dtype


def gradients_of_linear(
    op: str, ctx: Any, gradient: torch.Tensor, first: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of input and bias of an op whose weight's tensors begin at argument number ``first``."""
    refuse_gradients(op, ctx.needs_input_grad[first : first + 5])
    to_input = to_bias = None
    if ctx.needs_input_grad[0]:
        dense = dequantize(*ctx.saved_tensors, *ctx.layout)
        to_input = gradient @ dense.to(gradient.dtype)
    if ctx.needs_input_grad[first + 5]:
        to_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return to_input, to_bias


def _backward_of_linear(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    to_input, to_bias = gradients_of_linear("linear", ctx, gradient, 1)
    return (to_input, *[None] * 5, to_bias, *[None] * 4)


for _name in ("linear", "linear_reference"):
    torch.library.register_autograd(
        f"compressed_format::{_name}", _backward_of_linear, setup_context=_save_for_linear, lib=library
    )

for _name in ("linear", "linear_reference"):
    register_autocast(_name, "cpu", torch._C.DispatchKey.AutocastCPU)
    register_autocast(_name, "cuda", torch._C.DispatchKey.AutocastCUDA)
