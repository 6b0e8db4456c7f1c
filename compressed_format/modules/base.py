"""What all modules that run straight from the tensors of a checkpoint have in common: :class:`CompressedModule`.

The tensors of the file are the module's parameters, under the file's names, so ``state_dict()`` is the checkpoint.
They are not trainable. ``module.weight`` dequantizes when a value of it is asked for; ``forward`` never does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from compressed_format import ops
from compressed_format.activations import activation_group_size
from compressed_format.blocks import block_shape
from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationScheme, QuantizationType
from compressed_format.config.scheme import describe_scheme
from compressed_format.errors import Problem, UnsupportedFormatError
from compressed_format.formats import SPARSITY_FORMATS, format_named
from compressed_format.modules.first_use import check_values_once
from compressed_format.modules.float8_pickling import Envelope
from compressed_format.modules.lazy_weight import LazyWeight
from compressed_format.modules.offloading import means_parameter
from compressed_format.quantization import QuantizedWeight

__all__ = [
    "CompressedModule",
    "SplitWeight",
    "compressed_modules",
    "frozen_parameter",
    "is_of_weight",
    "is_split",
]


class _ActivationArguments(NamedTuple):
    """The integers with which ``fake_quantize`` is called for an input or an output."""

    bits: int
    is_float: bool
    symmetric: bool
    group_size: int


class SplitWeight(Protocol):
    """What :mod:`compressed_format.parallel` puts into a module whose weight it has split."""

    def linear(self, module: CompressedModule, input: torch.Tensor) -> torch.Tensor: ...

    def embedding(self, module: CompressedModule, indices: torch.Tensor) -> torch.Tensor: ...

    def problems(self, module: CompressedModule, version: str | None, place: str) -> list[Problem]: ...


class CompressedModule(nn.Module):
    """What compressed modules have in common: the tensors of a weight ``[O, I]`` and what they mean.

    ``tensors`` maps the checkpoint's suffixes to tensors, on any device, ``meta`` included. ``scheme`` is None for a
    module that is only sparse. ``dtype`` is that of ``weight``, of embeddings looked up, and of ``bias``; codes and
    scales keep the dtypes in which they are stored.
    """

    scheme: QuantizationScheme | None
    format: CompressionFormat
    sparsity: CompressionFormat | None
    dtype: torch.dtype
    _layout: tuple[int, int, int, int]
    _weight_shape: tuple[int, int]
    _weight_name: str
    _input: _ActivationArguments | None
    _output: _ActivationArguments | None
    # How the weight is split between processes, for a module that computes on its part.
    _sharding: SplitWeight | None = None
    # The name under which it was loaded, as long as nobody has looked at the values of its scales.
    _unchecked: str | None = None

    def _set_up(
        self,
        tensors: Mapping[str, torch.Tensor],
        shape: tuple[int, int],
        scheme: QuantizationScheme | None,
        format: CompressionFormat,
        sparsity: CompressionFormat | None,
        dtype: torch.dtype,
    ) -> None:
        if "_parameters" not in vars(self):  # which the module whose place it takes has given it otherwise
            nn.Module.__init__(self)
        weights = None if scheme is None else scheme.weights
        rows, columns = (1, shape[1]) if weights is None else block_shape(weights, shape)
        # Models have thousands of these, and nn.Module looks at each attribute that is set the usual way.
        vars(self).update(
            scheme=scheme,
            format=format,
            sparsity=sparsity,
            dtype=dtype,
            _layout=(8 if weights is None else weights.num_bits, shape[1], max(rows, 1), max(columns, 1)),
            _weight_shape=shape,
            _weight_name=_name_of_codes(tensors),
            _input=_activation_arguments(None if scheme is None else scheme.input_activations),
            _output=_activation_arguments(None if scheme is None else scheme.output_activations),
        )
        for name, tensor in tensors.items():
            self._parameters[name] = frozen_parameter(tensor)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in :attr:`dtype`: a :class:`LazyWeight`, which dequantizes where a value of it is asked for.

        Inside ``torch.compile`` and ``torch.export`` it is a plain tensor; the compiler drops what nobody reads.
        """
        if torch.compiler.is_compiling():
            return self.dequantized_weight()
        codes = self._parameters.get("weight")
        if codes is not None and means_parameter(sys._getframe(1)):
            return codes
        packed = self._held_tensors()
        device = self._parameters[self._weight_name].device  # type: ignore[union-attr]
        return LazyWeight(partial(self._dequantize, packed, self.dtype), self._dense_shape, self.dtype, device)

    def dequantized_weight(self) -> torch.Tensor:
        """The weight in :attr:`dtype` as a plain tensor of its own, made anew by every call."""
        return self._dequantize(self._held_tensors(), self.dtype)

    def _dequantize(self, packed: tuple[torch.Tensor | None, ...], dtype: torch.dtype) -> torch.Tensor:
        # In this order: a compiled graph must not depend on what has been checked.
        if not torch.compiler.is_compiling() and self._unchecked is not None:
            check_values_once(self)
        return self._dense_weight(packed, dtype)

    def _dense_weight(self, packed: tuple[torch.Tensor | None, ...], dtype: torch.dtype) -> torch.Tensor:
        """The weight in the dtype of its scales and then in ``dtype``, dequantized from :meth:`_held_tensors`."""
        _refuse_parts(self, packed)
        return ops.dequantize(*packed, *self._layout, dtype)

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return self._weight_shape

    def quantized_weight(self) -> QuantizedWeight:
        """The weight as codes, scales and zero points, checked as strictly as when a file is decoded."""
        return self._decoded(self.checkpoint_parts("")[""])

    def checkpoint_parts(self, name: str) -> dict[str, dict[str, torch.Tensor]]:
        """The tensors by suffix, as a checkpoint has them for this module, which is ``name`` in the model.

        There is one entry, ``name``, but for experts, of whom each has its own.
        """
        return {name: {suffix: value.data for suffix, value in self._parameters.items() if value is not None}}

    @staticmethod
    def join_parts(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The inverse of :meth:`checkpoint_parts`."""
        (part,) = parts
        return dict(part)

    def _decoded(self, stored: Mapping[str, torch.Tensor]) -> QuantizedWeight:
        place = type(self).__name__
        _refuse_parts(self, stored.values())
        tensors = {name: tensor for name, tensor in stored.items() if name != "bias"}
        if self.sparsity is not None:
            tensors["weight"] = SPARSITY_FORMATS[self.sparsity].decode(tensors, place=place)
        args = None if self.scheme is None else self.scheme.weights
        return format_named(self.format).decode(tensors, args, place=place)

    def replace_weight(self, tensors: Mapping[str, torch.Tensor], format: CompressionFormat) -> None:
        """Hold the same weight as other tensors, of another format; bias and activation scales stay."""
        self._hold({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}, format)

    def share_weight(self, twin: CompressedModule) -> None:
        """Hold the very tensors of the weight of ``twin``; bias and activation scales stay this module's own."""
        self._hold({name: value for name, value in twin._parameters.items() if is_of_weight(name)}, twin.format)

    def _hold(self, weight: Mapping[str, nn.Parameter | None], format: CompressionFormat) -> None:
        own = {name: value for name, value in self._parameters.items() if not is_of_weight(name)}
        self._parameters.clear()
        self._parameters.update({**weight, **own})
        self._weight_name = _name_of_codes(weight)
        self.format = format

    def _weight_tensors(self) -> tuple[torch.Tensor | None, ...]:
        """What ops compute with. Raises :class:`FormatError` where its values, first looked at here, make no sense."""
        if not torch.compiler.is_compiling() and self._unchecked is not None:
            check_values_once(self)
        return self._held_tensors()

    def _held_tensors(self) -> tuple[torch.Tensor | None, ...]:
        get = self._parameters.get
        return (
            self._parameters[self._weight_name],
            get("weight_scale"),
            get("weight_zero_point"),
            get("weight_g_idx"),
            get("bitmask"),
        )

    def _quantize_input(self, input: torch.Tensor) -> torch.Tensor:
        if self._input is None:
            return input
        get = self._parameters.get
        return ops.fake_quantize(input, get("input_scale"), get("input_zero_point"), *self._input)

    def _quantize_output(self, output: torch.Tensor) -> torch.Tensor:
        if self._output is None:
            return output
        get = self._parameters.get
        return ops.fake_quantize(output, get("output_scale"), get("output_zero_point"), *self._output)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompressedModule:
        """Move every tensor, but let a change of dtype reach bias, buffers and :attr:`dtype` only."""
        if recurse:
            for child in self.children():
                child._apply(fn)
        bias = self._parameters.get("bias")
        free = (*self._buffers.values(), *(() if bias is None else (bias, bias.grad)))

        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype or any(tensor is other for other in free):
                return moved
            return tensor.to(moved.device)

        super()._apply(keeping_dtype, recurse=False)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(iter(self.parameters())).device)).dtype
        return self

    def requires_grad_(self, requires_grad: bool = True) -> CompressedModule:
        """Make the bias trainable, or freeze it; packed tensors have no gradient and stay frozen.

        Raises :class:`UnsupportedFormatError` where there is no bias, and so nothing to train.
        """
        bias = self._parameters.get("bias")
        if requires_grad and bias is None:
            raise UnsupportedFormatError(
                f"{type(self).__name__}({self._describe()}) has nothing to train: its weight is packed, and there is "
                "no bias; attach adapters to train beside it, or decompress() the model to train its weights"
            )
        for name, parameter in self._parameters.items():
            if parameter is not None:
                parameter.requires_grad_(requires_grad and name == "bias")
        for child in self.children():
            child.requires_grad_(requires_grad)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers a parameter only if no attribute of its name exists, and would find the property
        # `weight` (and dequantize it to do so).
        parameters = self.__dict__.get("_parameters", {})
        held = parameters.get(name)
        if name != "bias" and held is not None and isinstance(value, nn.Parameter):
            _refuse_cast(f"{type(self).__name__}.{name}", held, value)
        if name == "weight" and not _replaces(value, held):
            raise AttributeError(
                f"{type(self).__name__}.weight is computed from the packed tensors and cannot be set; "
                "decompress() the model to train or edit its weights"
            )
        if isinstance(value, nn.Parameter) and name in parameters:
            if name != "bias":
                value.requires_grad_(False)
            parameters[name] = value
            return
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As :meth:`torch.nn.Module.register_parameter`, but for parts of tensors, which only a plan may cut."""
        if param is not None and is_split(param):
            raise UnsupportedFormatError(
                f"{type(self).__name__}.{name}: this style splits tensors without regard to words, groups and what is "
                "one for all; split the model with compressed_format.parallel.parallelize_module, which takes the same "
                "plans, or with ColwiseParallel and RowwiseParallel of that package"
            )
        super().register_parameter(name, param)

    def __getstate__(self) -> dict[str, Any]:
        parameters = {
            name: value if value is None or value.dtype != torch.float8_e4m3fn else Envelope.of(value)
            for name, value in self._parameters.items()
        }
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "_parameters": parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A shallow copy does not open what it copies.
        parameters = {
            name: value.parameter if isinstance(value, Envelope) else value
            for name, value in state["_parameters"].items()
        }
        super().__setstate__({**state, "_parameters": parameters})  # type: ignore[no-untyped-call]

    def _describe(self) -> str:
        parts = [] if self.scheme is None else [describe_scheme(self.scheme)]
        parts += [self.format.value] if self.sparsity is None else [self.format.value, self.sparsity.value]
        size = sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())
        return ", ".join(part for part in (*parts, f"{size:,} bytes") if part)


def frozen_parameter(tensor: torch.Tensor) -> nn.Parameter:
    """``nn.Parameter(tensor, requires_grad=False)``, for plain tensors in two thirds of the time."""
    if type(tensor) is not torch.Tensor:
        return nn.Parameter(tensor, requires_grad=False)
    return torch.Tensor._make_subclass(nn.Parameter, tensor, False)


def compressed_modules(model: nn.Module) -> dict[str, CompressedModule]:
    """The compressed modules of ``model`` by name, in module order; one that is shared goes by its first name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedModule)}


def is_of_weight(suffix: str) -> bool:
    """Whether a module's tensor is part of its weight, which may be tied to another's; bias and scales are its own."""
    return suffix != "bias" and not suffix.startswith(("input_", "output_"))


def _name_of_codes(tensors: Collection[str]) -> str:
    if "weight_packed" in tensors:
        return "weight_packed"
    return "compressed" if "compressed" in tensors else "weight"


def is_split(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a ``DTensor``, told without importing what defines it."""
    return hasattr(tensor, "device_mesh")


def _refuse_cast(place: str, held: torch.Tensor, value: torch.Tensor) -> None:
    if held.dtype != value.dtype and (is_split(held) or is_split(value)):
        raise UnsupportedFormatError(
            f"{place} would be cast from {held.dtype} to {value.dtype} as it is gathered; shard compressed modules "
            "without mixed precision: call fully_shard on each of them, with an mp_policy that has no param_dtype, "
            "before it is called on the modules that contain them"
        )


def _refuse_parts(module: CompressedModule, tensors: Iterable[torch.Tensor | None]) -> None:
    if any(tensor is not None and is_split(tensor) for tensor in tensors):
        raise UnsupportedFormatError(
            f"{type(module).__name__}({module.extra_repr()}) is split between processes, and so is its weight; "
            "read it from get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict, or decompress the model before it is split"
        )


def _replaces(value: Any, held: nn.Parameter | None) -> bool:
    """Whether ``value`` may take the place of the codes ``held``, as when a state dict is loaded by assignment."""
    if held is None or not isinstance(value, nn.Parameter):
        return False
    return value.dtype == held.dtype and value.shape == held.shape


def _activation_arguments(args: QuantizationArgs | None) -> _ActivationArguments | None:
    if args is None:
        return None
    is_float = args.type is QuantizationType.FLOAT
    return _ActivationArguments(args.num_bits, is_float, args.symmetric, activation_group_size(args))
