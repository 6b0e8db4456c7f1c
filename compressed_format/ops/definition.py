"""How an op is defined: once in plain torch, registered under its name, which kernels take over, and as a reference.

Every ``<op>`` has a twin ``<op>_reference`` that always runs the definition. Until a native library registers a kernel
for a device, ``<op>`` is that definition too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

__all__ = ["FLOATS", "define_op", "library", "register_autocast"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

library = torch.library.Library("compressed_format", "FRAGMENT")


def define_op(
    name: str,
    arguments: str,
    definition: Callable[..., torch.Tensor],
    check: Callable[..., None],
    fake: Callable[..., torch.Tensor],
    check_values: Callable[..., None] | None = None,
) -> Callable[..., torch.Tensor]:
    """Register the op ``name`` and its twin, and return what calls it.

    Arguments that it cannot take raise :class:`OpArgumentError` from there, whichever kernel runs. ``check_values``
    raises another error for values that kernels refuse.
    """

    def checked(*args: Any) -> torch.Tensor:
        check(*args)
        return definition(*args)

    def checked_fake(*args: Any) -> torch.Tensor:
        check(*args)
        return fake(*args)

    for op in (name, f"{name}_reference"):
        library.define(f"{op}({arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, checked, "CompositeExplicitAutograd")
        torch.library.register_fake(f"compressed_format::{op}", checked_fake, lib=library)
    op = getattr(torch.ops.compressed_format, name).default

    def call(*args: Any) -> torch.Tensor:
        try:
            if torch.is_grad_enabled() or torch.compiler.is_compiling():
                return cast(torch.Tensor, op(*args))
            # What torch calls for the sake of gradients is written in Python, and would take a third of a small call.
            with torch._C._AutoDispatchBelowAutograd():
                return cast(torch.Tensor, op(*args))
        except RuntimeError:
            # All that native code can raise, and to check first what is right nearly always takes longer than to
            # multiply: only now find out whether the arguments were wrong, and which.
            check(*args)
            if check_values is not None:
                check_values(*args)
            raise

    return call


def register_autocast(name: str, device: str, key: torch._C.DispatchKey) -> None:
    """Under ``torch.autocast``, multiply in its dtype, as torch's own linear does; float64 stays what it is."""
    op = getattr(torch.ops.compressed_format, name).default

    def with_cast(input: torch.Tensor, *rest: Any) -> Any:
        if input.is_floating_point() and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return op(input, *rest)

    library.impl(name, with_cast, key.name)
