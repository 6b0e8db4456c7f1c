"""``compressed_format::quantized_linear``: activations rounded to codes, multiplied with the codes of a weight.

It means ``linear(fake_quantize(input, ...), ...)``, which is its reference. Kernels may multiply the codes themselves
and scale at the end: that leaves out the rounding of what the codes stand for to the dtype of ``input``.
"""

from __future__ import annotations

from typing import Any

import torch

from compressed_format.ops import reference
from compressed_format.ops.definition import define_op, library
from compressed_format.ops.fake_quantize import check_activations, fake_quantize
from compressed_format.ops.linear import check_linear, fake_linear, gradients_of_linear, linear
from compressed_format.ops.weight_arguments import LAYOUT, WEIGHT

__all__ = ["quantized_linear"]

_ACTIVATIONS = (
    "Tensor? input_scale, Tensor? input_zero_point, int input_bits, bool input_is_float, bool input_symmetric, "
    "int input_group_size"
)
_FIRST_OF_WEIGHT = 7


def _reference(*args: Any) -> torch.Tensor:
    """``input`` ``[..., columns]`` in any float dtype to ``[..., O]``, in the same dtype."""
    rounded = reference.fake_quantize(*args[:_FIRST_OF_WEIGHT])
    return reference.linear(rounded, *args[_FIRST_OF_WEIGHT:])


def _two_steps(*args: Any) -> torch.Tensor:
    """The same by the kernels of the two ops that it consists of."""
    return linear(fake_quantize(*args[:_FIRST_OF_WEIGHT]), *args[_FIRST_OF_WEIGHT:])


def _check(*args: Any) -> None:
    check_activations("quantized_linear", "input_", *args[:_FIRST_OF_WEIGHT])
    check_linear("quantized_linear", args[0], *args[_FIRST_OF_WEIGHT:])


def _fake(*args: Any) -> torch.Tensor:
    return fake_linear(args[0], *args[_FIRST_OF_WEIGHT:])


quantized_linear = define_op(
    "quantized_linear", f"Tensor input, {_ACTIVATIONS}, {WEIGHT}, Tensor? bias, {LAYOUT}", _reference, _check, _fake
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *weight, bias = inputs[_FIRST_OF_WEIGHT : _FIRST_OF_WEIGHT + 6]
    ctx.save_for_backward(*weight)
    ctx.layout = inputs[_FIRST_OF_WEIGHT + 6 :]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """As if activations were not rounded, which has no useful derivative."""
    to_input, to_bias = gradients_of_linear("quantized_linear", ctx, gradient, _FIRST_OF_WEIGHT)
    return (to_input, *[None] * 11, to_bias, *[None] * 4)


def _register_autocast(name: str, device: str, key: torch._C.DispatchKey) -> None:
    """Under ``torch.autocast``, round in the dtype of the input and multiply in that of autocast, as two ops do."""
    op = getattr(torch.ops.compressed_format, name).default

    def with_cast(input: torch.Tensor, *rest: Any) -> Any:
        if input.dtype not in (torch.get_autocast_dtype(device), torch.float64):
            return _two_steps(input, *rest)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(input, *rest)

    library.impl(name, with_cast, key.name)


for _name in ("quantized_linear", "quantized_linear_reference"):
    torch.library.register_autograd(f"compressed_format::{_name}", _gradients, setup_context=_save, lib=library)
    _register_autocast(_name, "cpu", torch._C.DispatchKey.AutocastCPU)
    _register_autocast(_name, "cuda", torch._C.DispatchKey.AutocastCUDA)
