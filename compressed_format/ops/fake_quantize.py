"""``compressed_format::fake_quantize``: activations rounded to codes and back."""

from __future__ import annotations

from typing import Any

import torch

from compressed_format.errors import OpArgumentError
from compressed_format.ops import reference
from compressed_format.ops.definition import FLOATS, define_op, library

__all__ = ["check_activations", "fake_quantize"]


def check_activations(
    op: str,
    prefix: str,
    input: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
    is_float: bool,
    symmetric: bool,
    group_size: int,
) -> None:
    """Raise for arguments that activations cannot be rounded by; ``prefix`` begins their names in the op."""

    def fail(argument: str, message: str) -> None:
        name = argument if argument == "input" else f"{prefix}{argument}"
        raise OpArgumentError(f"{op}: {name} {message}")

    if input.dtype not in FLOATS:
        fail("input", f"must have a float dtype, not {input.dtype}")
    if input.ndim < 1:
        fail("input", "must have at least one dimension")
    if not 1 <= bits <= 8 or (is_float and bits != 8):
        fail("bits", f"must lie in 1 to 8 (8 for floats), not {bits}")
    if group_size < -1 or (group_size > 0 and input.shape[-1] % group_size):
        fail("group_size", f"must be 0, -1 or divide the {input.shape[-1]} columns of input, not {group_size}")
    if scale is not None:
        groups = input.shape[-1] // group_size if group_size > 0 else 1
        expected = [[*input.shape[:-1], groups]] if group_size == -1 else [[groups], [*input.shape[:-1], groups]]
        if list(scale.shape) not in expected:
            fail("scale", f"must have shape {' or '.join(dict.fromkeys(map(str, expected)))}, not {list(scale.shape)}")
        if not symmetric and (zero_point is None or zero_point.shape != scale.shape):
            fail("zero_point", f"must have shape {list(scale.shape)} where codes are asymmetric")


def _check(*args: Any) -> None:
    check_activations("fake_quantize", "", *args)


def _fake(input: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(input, memory_format=torch.contiguous_format)


fake_quantize = define_op(
    "fake_quantize",
    "Tensor input, Tensor? scale, Tensor? zero_point, int bits, bool is_float, bool symmetric, int group_size",
    reference.fake_quantize,
    _check,
    _fake,
)


def _straight_through(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Rounding has no useful derivative; the gradient passes as if it were the identity (Bengio et al., 2013)."""
    return (gradient, *[None] * 6)


for _name in ("fake_quantize", "fake_quantize_reference"):
    torch.library.register_autograd(f"compressed_format::{_name}", _straight_through, lib=library)
