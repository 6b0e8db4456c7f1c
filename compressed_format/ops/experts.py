"""``compressed_format::expert_linear``: each token through the weights of the experts it is routed to.

The weights of all experts come stacked along a first dimension: slice ``e`` of every tensor is what ``linear`` takes
for the weight of expert ``e``. Only the experts that some token is routed to are read.
"""

from __future__ import annotations

from typing import Any

import torch

from compressed_format.errors import OpArgumentError
from compressed_format.ops import reference
from compressed_format.ops.definition import FLOATS, define_op, library, register_autocast
from compressed_format.ops.weight_arguments import LAYOUT, WEIGHT, check_weight, refuse_gradients

__all__ = ["check_experts", "expert_linear", "expert_linear_backward", "of_expert", "out_features", "routed_experts"]


def check_experts(
    op: str, values: torch.Tensor, experts: torch.Tensor, weight: tuple[Any, ...], layout: tuple[int, ...]
) -> None:
    def fail(argument: str, message: str) -> None:
        raise OpArgumentError(f"{op}: {argument} {message}")

    counts = [tensor.shape[0] if tensor.ndim else 0 for tensor in weight if tensor is not None]
    if counts[0] == 0 or any(count != counts[0] for count in counts):
        fail("weight", f"must be stacked for one and the same number of experts, not for {counts}")
    codes, bitmask = weight[0], weight[4]
    if bitmask is None and codes.ndim > 3:
        fail("weight", f"must be a matrix for each expert, not {codes.ndim - 1}-dimensional")
    check_weight(op, *of_expert(weight, 0), *layout)
    if experts.dtype != torch.int64 or experts.ndim != 2:
        fail("experts", f"must be int64 [tokens, experts of each], not {experts.dtype} {list(experts.shape)}")
    if values.dtype not in FLOATS:
        fail("input", f"must have a float dtype, not {values.dtype}")
    if values.ndim and values.shape[0] != experts.shape[0]:
        fail("experts", f"must have a row for each of the {values.shape[0]} tokens, not {experts.shape[0]}")


def of_expert(weight: tuple[Any, ...], expert: int) -> Any:
    return tuple(None if tensor is None else tensor[expert] for tensor in weight)


def _split(rest: tuple[Any, ...]) -> tuple[Any, Any]:
    """The tensors of the weight, and its layout."""
    return rest[:5], rest[5:]


def out_features(weight: tuple[Any, ...]) -> int:
    codes, bitmask = weight[0], weight[4]
    return int(codes.shape[1] if bitmask is None else bitmask.shape[1])


def routed_experts(op: str, experts: torch.Tensor, count: int) -> list[int]:
    """The experts that some token is routed to, without the one that stands for none."""
    found: list[int] = experts.unique().tolist()
    if found and not 0 <= found[0] <= found[-1] <= count:
        raise OpArgumentError(
            f"{op}: experts must lie in 0 to {count - 1}, or be {count} for none, not in {found[0]} to {found[-1]}"
        )
    return [expert for expert in found if expert < count]


# forward -------------------------------------------------------------------------------------------------------------


def _linear(input: torch.Tensor, experts: torch.Tensor, *rest: Any) -> torch.Tensor:
    """``input`` ``[T, columns]`` and ``experts`` int64 ``[T, k]`` to ``[T, k, O]``.

    There are ``E`` experts; number ``E`` stands for none, and gives zeros.
    """
    weight, layout = _split(rest)
    output = input.new_zeros((*experts.shape, out_features(weight)))
    for expert in routed_experts("expert_linear", experts, weight[0].shape[0]):
        tokens, slots = (experts == expert).nonzero(as_tuple=True)
        rest_of_linear = (*of_expert(weight, expert), None, *layout)
        output[tokens, slots] = reference.linear(input[tokens], *rest_of_linear)
    return output


def _check_linear(input: torch.Tensor, experts: torch.Tensor, *rest: Any) -> None:
    check_experts("expert_linear", input, experts, rest[:5], rest[5:])
    if input.ndim != 2 or input.shape[1] != rest[6]:
        raise OpArgumentError(f"expert_linear: input must be [tokens, {rest[6]}], not {list(input.shape)}")


def _fake_linear(input: torch.Tensor, experts: torch.Tensor, *rest: Any) -> torch.Tensor:
    return input.new_empty((*experts.shape, out_features(rest[:5])))


def _check_routes(input: torch.Tensor, experts: torch.Tensor, weight: torch.Tensor, *rest: Any) -> None:
    routed_experts("expert_linear", experts, weight.shape[0])


expert_linear = define_op(
    "expert_linear",
    f"Tensor input, Tensor experts, {WEIGHT}, {LAYOUT}",
    _linear,
    _check_linear,
    _fake_linear,
    _check_routes,
)


# backward ------------------------------------------------------------------------------------------------------------
# An op of its own, because which experts there are is only known from the values, which a compiled graph has not.


def _backward(gradient: torch.Tensor, experts: torch.Tensor, *rest: Any) -> torch.Tensor:
    """The gradient ``[T, columns]`` of ``input``, out of that of the output ``[T, k, O]``."""
    weight, layout = _split(rest)
    # Each slot has a row of its own, so that they are added in the same order whatever the device.
    by_slot = gradient.new_zeros((*experts.shape, layout[1]))
    for expert in routed_experts("expert_linear_backward", experts, weight[0].shape[0]):
        tokens, slots = (experts == expert).nonzero(as_tuple=True)
        dense = reference.dequantize(*of_expert(weight, expert), *layout)
        by_slot[tokens, slots] = gradient[tokens, slots] @ dense.to(gradient.dtype)
    return by_slot.sum(dim=1)


def _check_backward(gradient: torch.Tensor, experts: torch.Tensor, *rest: Any) -> None:
    check_experts("expert_linear_backward", gradient, experts, rest[:5], rest[5:])
    expected = (*experts.shape, out_features(rest[:5]))
    if tuple(gradient.shape) != expected:
        raise OpArgumentError(f"expert_linear_backward: gradient must be {list(expected)}, not {list(gradient.shape)}")


def _fake_backward(gradient: torch.Tensor, experts: torch.Tensor, *rest: Any) -> torch.Tensor:
    return gradient.new_empty((experts.shape[0], rest[6]))


expert_linear_backward = define_op(
    "expert_linear_backward",
    f"Tensor gradient, Tensor experts, {WEIGHT}, {LAYOUT}",
    _backward,
    _check_backward,
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.layout = inputs[7:]


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    refuse_gradients("expert_linear", ctx.needs_input_grad[2:7])
    to_input = None
    if ctx.needs_input_grad[0]:
        experts, *weight = ctx.saved_tensors
        to_input = expert_linear_backward(gradient, experts, *weight, *ctx.layout)
    return (to_input, *[None] * 10)


for _name in ("expert_linear", "expert_linear_reference"):
    torch.library.register_autograd(f"compressed_format::{_name}", _gradients, setup_context=_save, lib=library)
    register_autocast(_name, "cpu", torch._C.DispatchKey.AutocastCPU)
    register_autocast(_name, "cuda", torch._C.DispatchKey.AutocastCUDA)
