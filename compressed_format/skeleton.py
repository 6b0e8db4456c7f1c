"""Turns a freshly built model into one that can take a checkpoint's tensors as they are, and finishes it after.

The two ways of loading share this: a module given by the caller, and transformers' ``from_pretrained``. Only headers
are read before the tensors are in place.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from compressed_format.config import (
    Assignment,
    CompressionFormat,
    QuantizationConfig,
    QuantizationScheme,
    resolve_targets,
)
from compressed_format.dtypes import DTYPES, torch_dtype
from compressed_format.errors import CompressedFormatWarning, FormatError, Problem, UnsupportedFormatError
from compressed_format.formats import FORMATS, PackLayout, PackQuantized, pack_layout
from compressed_format.formats.base import TensorSpec
from compressed_format.formats.module import check_runnable, module_tensor_specs
from compressed_format.linear import CompressedEmbedding, CompressedLinear, CompressedModule
from compressed_format.quantization import QuantizedWeight

__all__ = ["Skeleton", "StoredTensor"]

# Scales of a quantized KV cache, on attention modules; `output_scale` on k_proj and v_proj is their name of 2024.
_CACHE_SUFFIXES = frozenset(f"{part}_{what}" for part in "qkv" for what in ("scale", "zero_point"))
_OLD_CACHE_SUFFIXES = frozenset({"output_scale", "output_zero_point"})
_OLD_CACHE_MODULES = frozenset({"k_proj", "v_proj"})
_ZERO_POINT_SUFFIXES = frozenset({"weight_zero_point", "input_zero_point", "output_zero_point"})
_ONLINE_LOCATIONS = frozenset({"input", "output", "k_cache", "q_attn"})


class StoredTensor(Protocol):
    """What is known of a tensor before it is read: the name of its dtype, and its shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Skeleton:
    """Swaps compressed modules, on the meta device, into ``model`` for what ``config`` targets.

    ``stored`` describes the checkpoint's tensors by the model's names for them. Afterwards ``problems`` holds what
    does not fit, ``packed`` the names that must keep their stored dtype, and ``explained`` the names that need no
    further word, because a problem or a warning has told of them.

    Raises :class:`UnsupportedFormatError` for everything that would not run correctly, by feature and module.
    """

    def __init__(self, model: nn.Module, config: QuantizationConfig, stored: Mapping[str, StoredTensor]) -> None:
        self.model, self.config = model, config
        self.problems: list[Problem] = []
        self.packed: set[str] = set()
        self.explained: set[str] = set()
        self._stored = stored
        self._modules: dict[str, CompressedModule] = {}
        resolution = resolve_targets(model, config)
        for problem in resolution.warnings:
            warnings.warn(str(problem), CompressedFormatWarning, stacklevel=4)
        _refuse_what_cannot_run(model, config, resolution.assignments)
        by_module: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in stored.items():
            module, _, suffix = name.rpartition(".")
            by_module.setdefault(module, {})[suffix] = tensor
        for name, assignment in resolution.assignments.items():
            # Without any tensor of its own it is tied to another module, or missing, which the loader will tell.
            if name in by_module:
                self._swap(name, assignment, by_module[name])
        self._keep_cache_scales(by_module)

    def finish(self, dtype: torch.dtype | None = None) -> None:
        """Check what only the values tell, and re-encode layouts that are read but not run. Call it once, last."""
        problems: list[Problem] = []
        re_encoded = {"word-aligned": 0, "unpacked zero-point": 0, "marlin-24": 0}
        for name, module in self._modules.items():
            if dtype is not None:
                module.dtype = dtype
            try:
                legacy = _modernize(name, module, self.config.version)
            except FormatError as error:
                problems.extend(error.problems)
                continue
            if legacy is not None:
                re_encoded[legacy] += 1
        if problems:
            raise FormatError("the checkpoint contradicts itself:", problems)
        for legacy, count in re_encoded.items():
            if count:
                message = f"{count} modules were stored in the {legacy} layout, and are held as pack-quantized now"
                warnings.warn(message, CompressedFormatWarning, stacklevel=4)
        self.config = _without_marlin(self.config)

    def _swap(self, name: str, assignment: Assignment, stored: Mapping[str, StoredTensor]) -> None:
        module = self.model.get_submodule(name)
        assert isinstance(module, (nn.Linear, nn.Embedding))  # nothing else is ever assigned
        shape = (module.weight.shape[0], module.weight.shape[1])
        specs = module_tensor_specs(assignment.scheme, assignment.format, assignment.sparsity, shape)
        tensors = {}
        problems = []
        for suffix, spec in specs.items():
            tensor = stored.get(suffix)
            if tensor is None:
                if suffix != "weight_g_idx":
                    problems.append(
                        Problem(f"{name}.{suffix}", f"is missing from the checkpoint ({assignment.reason})")
                    )
                continue
            found = _problem(suffix, spec, tensor, assignment, shape)
            if found is not None:
                problems.append(Problem(f"{name}.{suffix}", found))
            tensors[suffix] = torch.empty(tuple(tensor.shape), dtype=torch_dtype(tensor.dtype), device="meta")
        if problems:
            self._explain(name, assignment, stored, problems)
            return
        for suffix in stored.keys() & _ZERO_POINT_SUFFIXES - specs.keys():
            # Old releases stored the zero points of symmetric schemes too; they mean nothing.
            self.explained.add(f"{name}.{suffix}")
        compressed = _compressed(module, tensors, shape, assignment)
        self.packed.update(f"{name}.{suffix}" for suffix in tensors)
        self._modules[name] = compressed
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, compressed)

    def _explain(
        self,
        name: str,
        assignment: Assignment,
        stored: Mapping[str, StoredTensor],
        problems: list[Problem],
    ) -> None:
        """One problem for a module that is plainly stored dense; else all that is wrong with its tensors."""
        self.explained.update(f"{name}.{suffix}" for suffix in stored)
        self.explained.add(f"{name}.weight")
        weight = stored.get("weight")
        dense = weight is not None and DTYPES[weight.dtype].bits > 8
        if dense and assignment.format is not CompressionFormat.DENSE:
            message = f"is stored dense, but {assignment.reason}; list {name} in ignore"
            problems = [Problem(f"{name}.weight", message)]
        self.problems.extend(problems)

    def _keep_cache_scales(self, by_module: Mapping[str, Mapping[str, StoredTensor]]) -> None:
        """Make room for KV-cache scales, so that they are kept and saved again; nothing here applies them."""
        kept = 0
        for name, stored in by_module.items():
            suffixes = stored.keys() & _CACHE_SUFFIXES
            if name.rpartition(".")[2] in _OLD_CACHE_MODULES:
                suffixes |= stored.keys() & _OLD_CACHE_SUFFIXES
            try:
                module = self.model.get_submodule(name)
            except AttributeError:
                continue
            for suffix in sorted(suffixes - module._parameters.keys()):
                if f"{name}.{suffix}" in self.explained:
                    continue
                tensor = stored[suffix]
                empty = torch.empty(tuple(tensor.shape), dtype=torch_dtype(tensor.dtype), device="meta")
                module._parameters[suffix] = nn.Parameter(empty, requires_grad=False)
                self.packed.add(f"{name}.{suffix}")
                kept += 1
        if kept:
            message = f"{kept} KV-cache scales are kept in the state dict, but not applied: the cache stays unquantized"
            warnings.warn(message, CompressedFormatWarning, stacklevel=5)


def _compressed(
    module: nn.Linear | nn.Embedding,
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    assignment: Assignment,
) -> CompressedModule:
    dtype = module.weight.dtype
    compressed: CompressedModule
    if isinstance(module, nn.Embedding):
        compressed = CompressedEmbedding(
            tensors,
            shape,
            assignment.scheme,
            assignment.format,
            sparsity=assignment.sparsity,
            padding_idx=module.padding_idx,
            dtype=dtype,
        )
    else:
        bias = module._parameters.get("bias")
        compressed = CompressedLinear(
            tensors, shape, assignment.scheme, assignment.format, sparsity=assignment.sparsity, bias=bias, dtype=dtype
        )
    return compressed.train(module.training)


def _problem(
    suffix: str, spec: TensorSpec, tensor: StoredTensor, assignment: Assignment, shape: tuple[int, int]
) -> str | None:
    message = spec.problem(torch_dtype(tensor.dtype), tuple(tensor.shape))
    scheme = assignment.scheme
    packed = assignment.format is CompressionFormat.PACK_QUANTIZED and suffix in ("weight_packed", "weight_zero_point")
    if message is None or not packed or scheme is None or scheme.weights is None:
        return message
    older = PackQuantized.legacy_specs(shape, scheme.weights)[suffix]
    fits_older = any(spec.problem(torch_dtype(tensor.dtype), tuple(tensor.shape)) is None for spec in older)
    return None if fits_older else message


def _modernize(name: str, module: CompressedModule, version: str | None) -> str | None:
    """Check ``weight_shape``, and re-encode a layout that is not run; returns the layout's name if it was one."""
    args = None if module.scheme is None else module.scheme.weights
    if args is None or module.format not in (CompressionFormat.PACK_QUANTIZED, CompressionFormat.MARLIN_24):
        return None
    tensors = {suffix: value.data for suffix, value in module._parameters.items() if value is not None}
    marlin = module.format is CompressionFormat.MARLIN_24
    if marlin:
        quantized = FORMATS[CompressionFormat.MARLIN_24].decode(tensors, args, place=name)
    else:
        stored, expected = tensors["weight_shape"].tolist(), list(module._weight_shape)
        if stored != expected:
            message = f"says {stored}, but the module's weight is {expected}"
            raise FormatError(problems=[Problem(f"{name}.weight_shape", message)])
        packed, columns = tensors["weight_packed"], module._weight_shape[1]
        layout = pack_layout(packed, args.num_bits, columns, version=version, place=name)
        zero_point = tensors.get("weight_zero_point")
        unpacked = zero_point is not None and zero_point.dtype == torch.int8 and PackQuantized.packs_zero_points(args)
        if layout is PackLayout.DENSE and not unpacked:
            return None
        quantized = PackQuantized().decode(tensors, args, place=name, layout=layout)
    module.replace_weight(_encode_packed(quantized, module.scheme, name), CompressionFormat.PACK_QUANTIZED)
    if marlin:
        return "marlin-24"
    return "word-aligned" if layout is PackLayout.WORD_ALIGNED else "unpacked zero-point"


def _encode_packed(
    quantized: QuantizedWeight, scheme: QuantizationScheme | None, place: str
) -> dict[str, torch.Tensor]:
    args = None if scheme is None else scheme.weights
    return FORMATS[CompressionFormat.PACK_QUANTIZED].encode(quantized, args, place=place)


def _refuse_what_cannot_run(
    model: nn.Module, config: QuantizationConfig, assignments: Mapping[str, Assignment]
) -> None:
    problems = []
    for name, assignment in assignments.items():
        problems += check_runnable(assignment.scheme, assignment.format, assignment.sparsity, name)
    attention = {
        target: group
        for group, scheme in config.config_groups.items()
        if scheme.weights is None
        for target in scheme.targets
    }
    for name, module in model.named_modules():
        target = type(module).__name__
        if target in attention and "attention" in target.lower():
            message = f"the group {attention[target]} quantizes attention, which cannot be run yet"
            problems.append(Problem(name, message))
    if config.transform_config is not None:
        for group, transform in config.transform_config.config_groups.items():
            for apply in transform.apply:
                if apply.location in _ONLINE_LOCATIONS:
                    place = f"transform_config.config_groups.{group}"
                    message = f"an online transform at {apply.location} of {', '.join(apply.targets)} cannot be run yet"
                    problems.append(Problem(place, message))
    if problems:
        raise UnsupportedFormatError("the checkpoint needs what cannot be run correctly here:", problems)


def _without_marlin(config: QuantizationConfig) -> QuantizationConfig:
    """The config of the same model once no module is held as marlin-24."""
    if all(config.format_of(scheme) is not CompressionFormat.MARLIN_24 for scheme in config.config_groups.values()):
        return config
    groups = {
        name: scheme.model_copy(update={"format": CompressionFormat.PACK_QUANTIZED})
        if config.format_of(scheme) is CompressionFormat.MARLIN_24
        else scheme
        for name, scheme in config.config_groups.items()
    }
    return config.replace(config_groups=groups, format=CompressionFormat.PACK_QUANTIZED)
