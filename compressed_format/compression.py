"""``compress``: replace what a config targets with compressed modules; ``decompress``: put plain modules back."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressed_format.calibrate import calibrate_activations, needs_calibration
from compressed_format.config import (
    PRESETS,
    Assignment,
    CompressionFormat,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
    TargetResolution,
    resolve_targets,
)
from compressed_format.errors import (
    CalibrationError,
    CompressedFormatWarning,
    ConfigError,
    Problem,
    QuantizationError,
    UnsupportedFormatError,
)
from compressed_format.formats import SPARSITY_FORMATS, format_named, prune_2_of_4
from compressed_format.formats.module import check_runnable
from compressed_format.linear import CompressedEmbedding, CompressedLinear, CompressedModule, compressed_modules
from compressed_format.quantization import QuantizedWeight, group_size_problem, quantize

__all__ = ["attach_config", "compress", "compress_module", "config_of", "decompress", "read_config"]

_CONFIG_ATTRIBUTE = "compressed_format_config"

Compressible = nn.Linear | nn.Embedding
ConfigLike = QuantizationConfig | Mapping[str, Any] | str | os.PathLike[str]


def compress(
    model: nn.Module,
    config: ConfigLike,
    *,
    calibration: Iterable[Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """Replace the modules of ``model`` that ``config`` targets with compressed ones, in place, and return ``model``.

    ``config`` is a :class:`QuantizationConfig`, a mapping, the path of a JSON file or the name of a preset.
    ``calibration`` yields model inputs (mappings, tuples or single values) for static activation scales; nothing else
    needs it. ``progress`` is called with the number of modules done and their total.

    Everything that can be known beforehand is checked before the first module is touched, and one
    :class:`QuantizationError` lists it all: group sizes that do not divide, number formats that cannot be quantized,
    modules without data. One module is compressed at a time, so that memory stays within the dense model and a layer.
    A module that appears in several places stays shared; weights tied across modules stay tied where all of them get
    the same scheme, and a warning says so where they do not.
    """
    config = read_config(config)
    if compressed_modules(model):
        raise QuantizationError("the model holds compressed modules already; decompress() it first")
    resolution = resolve_targets(model, config)
    for problem in resolution.warnings:
        warnings.warn(str(problem), CompressedFormatWarning, stacklevel=2)
    modules = {
        name: module
        for name, module in model.named_modules()
        if name in resolution.assignments and isinstance(module, Compressible)
    }
    _check_modules(modules, resolution)
    if config.kv_cache_scheme is not None:
        message = (
            "kv_cache_scheme: passed on to the saved config, but no k_scale or v_scale is computed; "
            "runtimes will use a scale of 1"
        )
        warnings.warn(message, CompressedFormatWarning, stacklevel=2)
    activation_scales = _activation_scales(model, modules, resolution, calibration)
    ties = _tied_weights(model)
    _announce_broken_ties(model, ties, resolution)
    places = _places(model)
    tied: dict[Any, CompressedModule] = {}
    for done, name in enumerate(list(modules), start=1):
        module, assignment = modules.pop(name), resolution.assignments[name]
        compressed = compress_module(module, assignment, activation_scales.get(name, {}), name)
        if name in ties:
            twin = tied.setdefault((ties[name], _treatment(assignment)), compressed)
            for suffix in compressed._parameters.keys() & twin._parameters.keys() - {"bias"}:
                compressed._parameters[suffix] = twin._parameters[suffix]
        for parent, child in places[id(module)]:
            setattr(parent, child, compressed)
        if progress is not None:
            progress(done, len(resolution.assignments))
    attach_config(model, config)
    return model


def decompress(model: nn.Module) -> nn.Module:
    """Replace the compressed modules of ``model`` with plain ``nn.Linear`` and ``nn.Embedding``, in place.

    Weights are dequantized bit for bit as compressed-tensors does, in each module's ``dtype``; activations are no
    longer rounded. Tied weights stay tied.
    """
    places = _places(model)
    dense: dict[int, nn.Parameter] = {}
    for module in list(compressed_modules(model).values()):
        key = id(module._parameters[module._weight_name])
        if key not in dense:
            dense[key] = nn.Parameter(module.weight, requires_grad=True)
        for parent, child in places[id(module)]:
            setattr(parent, child, _plain_module(module, dense[key]))
    if hasattr(model, _CONFIG_ATTRIBUTE):
        delattr(model, _CONFIG_ATTRIBUTE)
    return model


def compress_module(
    module: Compressible, assignment: Assignment, activation_scales: Mapping[str, torch.Tensor], place: str
) -> CompressedModule:
    """A compressed module for the Linear or Embedding ``module``. Raises :class:`QuantizationError`."""
    weight = module.weight.detach()
    scheme, sparsity = assignment.scheme, assignment.sparsity
    args = None if scheme is None else scheme.weights
    if sparsity is CompressionFormat.SPARSE_24_BITMASK:
        weight = prune_2_of_4(weight, place=place)
    if args is None:
        quantized = QuantizedWeight(weight)
    else:
        quantized = quantize(weight, args, place=f"{place}.weight")
    tensors = format_named(assignment.format, place).encode(quantized, args, place=place)
    if sparsity is not None:
        values = tensors.pop("weight")
        tensors = {**SPARSITY_FORMATS[sparsity].encode(values, place=place), **tensors}
    tensors = {**tensors, **activation_scales}
    shape = (weight.shape[0], weight.shape[1])
    compressed: CompressedModule
    if isinstance(module, nn.Linear):
        compressed = CompressedLinear(
            tensors, shape, scheme, assignment.format, sparsity=sparsity, bias=module.bias, dtype=weight.dtype
        )
    else:
        compressed = CompressedEmbedding(
            tensors,
            shape,
            scheme,
            assignment.format,
            sparsity=sparsity,
            padding_idx=module.padding_idx,
            dtype=weight.dtype,
        )
    return compressed.train(module.training)


def read_config(config: ConfigLike) -> QuantizationConfig:
    """A config from whatever ``compress`` takes: itself, a mapping, the path of a file or the name of a preset."""
    if isinstance(config, QuantizationConfig):
        return config
    if isinstance(config, Mapping):
        return QuantizationConfig.from_dict(config)
    try:
        path = Path(config)
    except TypeError as error:
        found = type(config).__name__
        message = f"a config is a QuantizationConfig, a mapping, a path or a preset's name, not a {found}"
        raise ConfigError(message) from error
    if isinstance(config, str) and config.upper() in PRESETS:
        return QuantizationConfig.preset(config)
    if isinstance(config, str) and not path.suffix and len(path.parts) == 1 and not path.exists():
        return QuantizationConfig.preset(config)  # says which presets there are
    return QuantizationConfig.from_file(path)


def attach_config(model: nn.Module, config: QuantizationConfig) -> None:
    """Remember with which config ``model`` was compressed or loaded."""
    setattr(model, _CONFIG_ATTRIBUTE, config)


def config_of(model: nn.Module) -> QuantizationConfig | None:
    """The config with which ``model`` was compressed or loaded, or None."""
    config = getattr(model, _CONFIG_ATTRIBUTE, None)
    return config if isinstance(config, QuantizationConfig) else None


def _check_modules(modules: Mapping[str, Compressible], resolution: TargetResolution) -> None:
    unsupported: list[Problem] = []
    problems: list[Problem] = []
    misfits: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, module in modules.items():
        assignment = resolution.assignments[name]
        unsupported += check_runnable(assignment.scheme, assignment.format, assignment.sparsity, name)
        message = _unusable(module, assignment)
        if message is not None:
            problems.append(Problem(name, message))
            continue
        args = None if assignment.scheme is None else assignment.scheme.weights
        if args is not None and args.strategy is QuantizationStrategy.GROUP and args.group_size:
            columns = module.weight.shape[-1]
            if columns % args.group_size:
                misfits[columns, args.group_size].append(name)
    if unsupported:
        raise UnsupportedFormatError(f"{len(unsupported)} modules cannot be compressed as asked:", unsupported)
    for (columns, group_size), names in misfits.items():
        counted = names[0] if len(names) == 1 else f"{len(names)} modules ({names[0]}, …)"
        problems.append(Problem(counted, group_size_problem(columns, group_size)))
    if problems:
        count = len(problems) - len(misfits) + sum(map(len, misfits.values()))
        raise QuantizationError(f"{count} of {len(modules)} targeted modules cannot be compressed:", problems)


def _unusable(module: Compressible, assignment: Assignment) -> str | None:
    """Why ``module`` itself cannot be replaced, or None."""
    base = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    weight = module.weight
    if type(module).forward is not base.forward:
        return (
            f"{type(module).__name__} computes something of its own in forward, which a compressed module would lose; "
            "list it in ignore"
        )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "an Embedding with max_norm rewrites its weight in forward; list it in ignore"
    if isinstance(module, nn.Embedding) and assignment.scheme is not None and assignment.scheme.input_activations:
        return "an Embedding has indices for inputs, which cannot be quantized; give it a group of its own"
    if weight.is_meta:
        return "its weight is on the meta device and holds no data; load the model first"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight has dtype {weight.dtype}, expected a float of 16 bits or more"
    return None if assignment.sparsity is None else _cannot_be_sparse(assignment, assignment.sparsity, weight.shape[-1])


def _cannot_be_sparse(assignment: Assignment, sparsity: CompressionFormat, columns: int) -> str | None:
    args = None if assignment.scheme is None else assignment.scheme.weights
    if sparsity is CompressionFormat.SPARSE_24_BITMASK and columns % 4:
        return f"2:4 sparsity needs a multiple of 4 input features, found {columns}"
    if assignment.format is CompressionFormat.PACK_QUANTIZED:
        return (
            f"{sparsity.value} holds int8, float8 or plain values, which pack-quantized has none of; "
            "use int-quantized, float-quantized or dense with it"
        )
    if args is not None and not args.symmetric:
        return f"{sparsity.value} leaves out values of zero, which asymmetric codes do not keep; use symmetric weights"
    return None


def _activation_scales(
    model: nn.Module,
    modules: Mapping[str, Compressible],
    resolution: TargetResolution,
    calibration: Iterable[Any] | None,
) -> dict[str, dict[str, torch.Tensor]]:
    static: dict[str, tuple[nn.Module, QuantizationScheme]] = {}
    for name, module in modules.items():
        scheme = resolution.assignments[name].scheme
        if scheme is not None and needs_calibration(scheme):
            static[name] = (module, scheme)
    if not static:
        return {}
    if calibration is None:
        first = next(iter(static))
        raise CalibrationError(
            f"{len(static)} modules ({first}, …) have static activation scales, which need data: "
            "pass calibration=, an iterable of model inputs, or make the activations dynamic"
        )
    return calibrate_activations(model, static, calibration)


def _tied_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each module whose weight other modules share: the names of all of them, itself included."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners[id(weight)].append(name)
    return {name: tuple(names) for names in owners.values() if len(names) > 1 for name in names}


def _announce_broken_ties(model: nn.Module, ties: Mapping[str, tuple[str, ...]], resolution: TargetResolution) -> None:
    """Say which weights shared by several modules stop being shared, because not all of them get the same scheme."""
    for names in dict.fromkeys(ties.values()):
        assignments = [resolution.assignments.get(name) for name in names]
        if len({None if found is None else _treatment(found) for found in assignments}) == 1:
            continue
        compressed = [name for name, found in zip(names, assignments, strict=True) if found is not None]
        message = (
            f"{', '.join(names)} share one weight, of which {', '.join(compressed)} is compressed on its own: "
            "they are no longer tied, and a checkpoint will hold both"
        )
        warnings.warn(message, CompressedFormatWarning, stacklevel=3)
        model_config: Any = getattr(model, "config", None)
        if getattr(model_config, "tie_word_embeddings", False):
            # Otherwise the next from_pretrained would tie them again, and overwrite one with the other.
            model_config.tie_word_embeddings = False


def _treatment(assignment: Assignment) -> Any:
    """What of an assignment decides the tensors, whichever group and target led to it."""
    return assignment.scheme, assignment.format, assignment.sparsity


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, child name) at which each module sits."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                places[id(module)].append((parent, child))
    return places


def _plain_module(module: CompressedModule, weight: nn.Parameter) -> nn.Module:
    plain: nn.Module
    if isinstance(module, CompressedLinear):
        plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        plain._parameters["bias"] = module._parameters["bias"]
    else:
        assert isinstance(module, CompressedEmbedding)
        plain = nn.Embedding(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta")
    plain.weight = weight
    return plain.train(module.training)
