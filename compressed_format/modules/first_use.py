"""What is looked at when a loaded module is used for the first time, because looking at it while loading would take
time by the byte: that scales are finite. Whatever native code relies on has been checked by then."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from compressed_format.errors import FormatError
from compressed_format.formats.base import check_scales

__all__ = ["SCALES", "check_scales_of", "check_values_once"]

SCALES = ("weight_scale", "input_scale", "output_scale")
_PLAIN = (nn.Parameter, torch.Tensor)


class _Loaded(Protocol):
    """A compressed module, of which this is what is needed here."""

    _unchecked: str | None
    _parameters: dict[str, nn.Parameter | None]

    def checkpoint_parts(self, name: str) -> dict[str, dict[str, torch.Tensor]]: ...


def check_values_once(module: _Loaded) -> None:
    """Check the scales of a module that has been loaded and not used; from then on it counts as checked.

    It stays unchecked where there are no values to look at yet: on the meta device, in a tensor that is split between
    processes or fake, and while something records what is computed, which this must not become a part of.

    Raises :class:`FormatError` for the first scale that is NaN or infinite, at every use.
    """
    name = module._unchecked
    if name is None:
        return
    held = module._parameters
    for suffix in SCALES:
        scale = held.get(suffix)
        if scale is not None and (scale.is_meta or type(scale) not in _PLAIN or _is_recorded(scale)):
            return
    check_scales_of(name, module)
    vars(module)["_unchecked"] = None


def check_scales_of(name: str, module: _Loaded) -> None:
    """Raise :class:`FormatError` for the first scale of the module ``name`` that is NaN or infinite."""
    held = module._parameters
    for suffix in SCALES:
        scale = held.get(suffix)
        if scale is None:
            continue
        try:
            check_scales(scale.data, f"{name}.{suffix}")
        except FormatError:
            # All experts have been looked at together; the message names the one.
            for place, tensors in module.checkpoint_parts(name).items():
                check_scales(tensors[suffix], f"{place}.{suffix}")
            raise


def _is_recorded(tensor: torch.Tensor) -> bool:
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
