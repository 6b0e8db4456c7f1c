"""``compressed_format::expert_quantized_linear``: activations rounded to codes, through the weights of their experts.

It means ``quantized_linear`` for each expert, of the tokens that are routed to it: static scales are the expert's own,
and a dynamic scale of a whole tensor is that of the tokens of one expert.
"""

from __future__ import annotations

from typing import Any

import torch

from compressed_format.errors import OpArgumentError
from compressed_format.ops import reference
from compressed_format.ops.definition import define_op, library
from compressed_format.ops.experts import (
    check_experts,
    expert_linear_backward,
    of_expert,
    out_features,
    routed_experts,
)
from compressed_format.ops.fake_quantize import check_activations
from compressed_format.ops.weight_arguments import LAYOUT, WEIGHT, refuse_gradients

__all__ = ["expert_quantized_linear"]

_NAME = "expert_quantized_linear"
_ACTIVATIONS = (
    "Tensor? input_scale, Tensor? input_zero_point, int input_bits, bool input_is_float, bool input_symmetric, "
    "int input_group_size"
)
_EXPERTS, _WEIGHT, _LAYOUT = 7, 8, 13
"""Which argument is the first of each."""


def _linear(*args: Any) -> torch.Tensor:
    """``input`` ``[T, columns]`` and ``experts`` int64 ``[T, k]`` to ``[T, k, O]``, as ``expert_linear``.

    ``input_scale`` and ``input_zero_point`` are stacked as the tensors of the weight are.
    """
    input, *static = args[:3]
    experts, weight, layout = args[_EXPERTS], args[_WEIGHT:_LAYOUT], args[_LAYOUT:]
    output: torch.Tensor = input.new_zeros((*experts.shape, out_features(weight)))
    for expert in routed_experts(_NAME, experts, weight[0].shape[0]):
        tokens, slots = (experts == expert).nonzero(as_tuple=True)
        rounded = reference.fake_quantize(input[tokens], *of_expert(tuple(static), expert), *args[3:_EXPERTS])
        rest_of_linear = (*of_expert(weight, expert), None, *layout)
        output[tokens, slots] = reference.linear(rounded, *rest_of_linear)
    return output


def _check(*args: Any) -> None:
    input, scale, zero_point, *rounding = args[:_EXPERTS]
    experts, weight, layout = args[_EXPERTS], args[_WEIGHT:_LAYOUT], args[_LAYOUT:]
    check_experts(_NAME, input, experts, weight, layout)
    if input.ndim != 2 or input.shape[1] != layout[1]:
        raise OpArgumentError(f"{_NAME}: input must be [tokens, {layout[1]}], not {list(input.shape)}")
    count = weight[0].shape[0]
    for name, tensor in (("input_scale", scale), ("input_zero_point", zero_point)):
        if tensor is not None and (tensor.ndim != 2 or tensor.shape[0] != count):
            raise OpArgumentError(f"{_NAME}: {name} must have a row for each of {count} experts, not {[*tensor.shape]}")
    check_activations(_NAME, "input_", input, *of_expert((scale, zero_point), 0), *rounding)


def _fake(*args: Any) -> torch.Tensor:
    fake: torch.Tensor = args[0].new_empty((*args[_EXPERTS].shape, out_features(args[_WEIGHT:_LAYOUT])))
    return fake


def _check_routes(*args: Any) -> None:
    routed_experts(_NAME, args[_EXPERTS], args[_WEIGHT].shape[0])


expert_quantized_linear = define_op(
    _NAME, f"Tensor input, {_ACTIVATIONS}, Tensor experts, {WEIGHT}, {LAYOUT}", _linear, _check, _fake, _check_routes
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[_EXPERTS:_LAYOUT])
    ctx.layout = inputs[_LAYOUT:]


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """As if activations were not rounded, which has no useful derivative."""
    refuse_gradients(_NAME, ctx.needs_input_grad[_WEIGHT:_LAYOUT])
    to_input = None
    if ctx.needs_input_grad[0]:
        to_input = expert_linear_backward(gradient, *ctx.saved_tensors, *ctx.layout)
    return (to_input, *[None] * 16)


for _name in (_NAME, f"{_NAME}_reference"):
    torch.library.register_autograd(f"compressed_format::{_name}", _gradients, setup_context=_save, lib=library)
