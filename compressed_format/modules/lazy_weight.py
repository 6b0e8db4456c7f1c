"""The ``weight`` of a compressed module: a tensor that knows what it is, and dequantizes when a value is asked for.

Much code reads ``linear.weight.dtype``, ``.device`` or ``.shape``, and none of that needs the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from compressed_format.errors import UnsupportedFormatError

__all__ = ["LazyWeight"]

_ATTRIBUTES = (
    "device", "dtype", "grad", "grad_fn", "is_cpu", "is_cuda", "is_leaf", "is_meta", "is_quantized", "is_sparse",
    "is_xpu", "itemsize", "layout", "nbytes", "ndim", "requires_grad", "retains_grad", "shape", "_backward_hooks",
)  # fmt: skip
_METHODS = (
    "__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_conj", "is_contiguous",
    "is_floating_point", "is_neg", "is_signed", "ndimension", "nelement", "numel", "size", "storage_offset", "stride",
)  # fmt: skip
_FUNCTIONS = (torch.numel, torch.is_floating_point, torch.is_complex, torch.get_device)
# New tensors with the dtype and the device of this one, whatever its values.
_LIKE_IT = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def _accessor(attribute: str, which: str) -> Any:
    """What ``__torch_function__`` gets when an attribute of a tensor is read or set, or None where there is none."""
    return getattr(getattr(torch.Tensor, attribute, None), which, None)


_METADATA = frozenset(
    (
        *(_accessor(name, "__get__") for name in _ATTRIBUTES),
        *(getattr(torch.Tensor, name) for name in _METHODS),
        *_FUNCTIONS,
    )
)
_NEW = frozenset(getattr(torch.Tensor, name) for name in _LIKE_IT)
_ALIASES = frozenset((_accessor("data", "__get__"), torch.Tensor.detach))
# Values of these that change nothing in a tensor without a gradient.
_UNTRAINED = {
    _accessor("requires_grad", "__set__"): False,
    torch.Tensor.requires_grad_: False,
    _accessor("grad", "__set__"): None,
}


class LazyWeight(torch.Tensor):
    """A weight ``[..., O, I]`` of which only ``shape``, ``dtype`` and ``device`` are known; ``make`` dequantizes it.

    These and their like cost nothing. Every other function of torch gets a plain tensor, made anew for it, and yields
    plain tensors; only ``data`` and ``detach()`` are lazy again, so that writing through them is noticed. It requires
    no gradient and has no memory.

    Writing to it in place, training it or making a parameter of it raises :class:`UnsupportedFormatError`, since the
    packed tensors would not follow. A view (``weight[0]``) is one of a dense copy, and may be written to.
    """

    _make: Callable[[], torch.Tensor]

    # The initializers of transformers pass over what says so.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls, make: Callable[[], torch.Tensor], shape: Iterable[int], dtype: torch.dtype, device: torch.device
    ) -> LazyWeight:
        lazy: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), dtype=dtype, device=device, requires_grad=False
        )
        lazy._make = make
        return lazy

    def dequantized(self) -> torch.Tensor:
        """The weight as a plain tensor, made anew."""
        return self._make()

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # What nn.Parameter does to a tensor that is not a plain one.
        raise _refusal("made a parameter")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func in _METADATA or (func in _UNTRAINED and _given(args, kwargs) is _UNTRAINED[func]):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ALIASES and isinstance(first, LazyWeight):
            return first._alias()
        if func in _NEW and isinstance(first, LazyWeight):
            return func(torch.empty(0, dtype=first.dtype, device=first.device), *args[1:], **kwargs)
        if func is torch.Tensor.type and isinstance(first, LazyWeight) and len(args) == 1 and not kwargs:
            return torch.empty(0, dtype=first.dtype, device=first.device).type()
        if func in _UNTRAINED:
            raise _refusal("trained")
        if _written(func, args, kwargs):
            raise _refusal("written to")
        if func is torch.Tensor.data_ptr:
            raise _refusal("read by its address")
        args, kwargs = _dense((args, dict(kwargs)))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without the class
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The same for what arrives from C++, or with ``__torch_function__`` switched off."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]._alias()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and _holds_one(value):
                raise _refusal("written to")
        if any(argument.is_write and _holds_one(kwargs.get(argument.name)) for argument in func._schema.arguments):
            raise _refusal("written to")
        args, kwargs = _dense((args, dict(kwargs)))
        return func(*args, **kwargs)

    def _alias(self) -> LazyWeight:
        return LazyWeight(self._make, self.shape, self.dtype, self.device)


def _dense(value: Any) -> Any:
    """``value`` with every lazy weight in it dequantized, one that occurs twice only once."""
    made: dict[int, torch.Tensor] = {}

    def dequantized(weight: LazyWeight) -> torch.Tensor:
        if id(weight) not in made:
            made[id(weight)] = weight.dequantized()
        return made[id(weight)]

    return tree_map_only(LazyWeight, dequantized, value)


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The value that an attribute is set to; ``requires_grad_()`` means True."""
    return args[1] if len(args) > 1 else kwargs.get("requires_grad", True)


def _holds_one(value: Any) -> bool:
    return any(isinstance(leaf, LazyWeight) for leaf in tree_leaves(value))


def _written(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a function of torch's Python interface would write to a lazy weight; by its name, as torch's own are."""
    name = getattr(func, "__name__", "")
    if _holds_one(kwargs.get("out")):
        return True
    in_place = name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
    in_place = in_place or (name.startswith("__i") and hasattr(torch.Tensor, f"__{name[3:]}"))
    if not in_place and not kwargs.get("inplace"):
        return False
    # The initializers of torch.nn.init pass everything by name.
    written = args[0] if args else kwargs.get("tensor", kwargs.get("input"))
    return _holds_one(written)


def _refusal(what: str) -> UnsupportedFormatError:
    return UnsupportedFormatError(
        f"the weight of a compressed module cannot be {what}: it is computed from packed tensors, which would not "
        "follow; take a dense copy of it (weight.clone()), or decompress() the model to edit or train it"
    )
