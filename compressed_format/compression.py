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
    QuantizationConfig,
    QuantizationScheme,
    TargetResolution,
    resolve_targets,
)
from compressed_format.errors import (
    CalibrationError,
    CompressedFormatWarning,
    ConfigError,
    Problem,
    QuantizationError,
    TargetError,
    UnsupportedFormatError,
)
from compressed_format.expert_compression import (
    compress_experts,
    dense_stacks,
    expert_linears,
    observable_experts,
    plain_experts,
    projection_assignments,
)
from compressed_format.experts import CompressedExpertLinear, CompressedExperts
from compressed_format.left_dense import left_dense
from compressed_format.linear import CompressedModule, compressed_modules
from compressed_format.model_origin import is_diffusers_model, is_transformers_model
from compressed_format.module_compression import check_modules, compress_module, plain_module, treatment
from compressed_format.offloading import hand_over, is_kept_around, is_offloaded, onloaded
from compressed_format.renaming import module_names, rename_modules
from compressed_format.unserved import transposed_layers

__all__ = [
    "announce_broken_ties",
    "attach_config",
    "compress",
    "config_of",
    "decompress",
    "places_of_modules",
    "planned",
    "read_config",
    "tell_library",
]

_CONFIG_ATTRIBUTE = "compressed_format_config"

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
    needs it. ``progress`` is called with the number of modules done and their total. Where transformers gives modules
    other names in memory than in its checkpoints, ``config`` may speak of either.

    Everything that can go wrong is looked for before the first module is touched, and one error lists it all: group
    sizes that do not divide, number formats that cannot be quantized, modules without data, NaN. One module is
    compressed at a time, so that memory stays within the dense model and a layer. A module that appears in several
    places stays shared; weights tied across modules stay tied where all of them are quantized alike, and a warning
    says so where they are not. A config that reaches no module at all is a :class:`TargetError`.
    """
    config = read_config(config)
    if compressed_modules(model):
        raise QuantizationError("the model holds compressed modules already; decompress() it first")
    names = _model_names(model)
    resolution = planned(model, rename_modules(config, names, keep=False))
    config = rename_modules(config, names, keep=True)
    modules = {name: module for name, module in model.named_modules() if name in resolution.assignments}
    stacks = {
        name: (module, stack, assignments)
        for name, (module, stack) in dense_stacks(model).items()
        if (assignments := projection_assignments(name, stack, resolution))
    }
    linears: dict[str, nn.Linear] = {}
    for name, (module, stack, _) in stacks.items():
        linears |= expert_linears(module, stack, name)
    targeted = {**modules, **{name: linear for name, linear in linears.items() if name in resolution.assignments}}
    check_modules(targeted, resolution)
    observed = {name: (module, stack) for name, (module, stack, _) in stacks.items()}
    with observable_experts(observed, linears):
        activation_scales = _activation_scales(model, targeted, resolution, calibration)
    # No name here may hold a dense module: its weight goes as soon as it is replaced.
    del observed, linears, targeted
    ties = _tied_weights(model)
    announce_broken_ties(model, ties, resolution)
    places = places_of_modules(model)
    tied: dict[Any, CompressedModule] = {}
    total = len(modules) + len(stacks)
    compressed: nn.Module
    for done, name in enumerate([*modules, *stacks], start=1):
        if name in modules:
            assignment = resolution.assignments[name]
            at = places.pop(id(modules[name]))
            dense = modules.pop(name)
            with onloaded(dense, name):
                compressed = compress_module(dense, assignment, activation_scales.pop(name, {}), name)
            hand_over(dense, compressed, name)
            del dense
            if name in ties:
                compressed.share_weight(tied.setdefault((ties[name], treatment(assignment)), compressed))
        else:
            at = places.pop(id(stacks[name][0]))
            compressed = compress_experts(*stacks.pop(name), name, activation_scales)
        for parent, child in at:
            setattr(parent, child, compressed)
        if progress is not None:
            progress(done, total)
    attach_config(model, config)
    tell_library(model, config)
    return model


def planned(model: nn.Module, config: QuantizationConfig) -> TargetResolution:
    """What ``config`` makes of the modules of ``model``, with a warning for each thing that it may not mean.

    Raises :class:`TargetError` if it reaches none.
    """
    resolution = resolve_targets(model, config)
    ignored = resolution.ignored
    found = [*transposed_layers(model, ignored), *left_dense(model, ignored), *resolution.warnings]
    if not resolution.assignments:
        raise TargetError("the config reaches no module of this model, so nothing would be compressed:", found)
    for problem in found:
        warnings.warn(str(problem), CompressedFormatWarning, stacklevel=3)
    if config.kv_cache_scheme is not None:
        message = (
            "kv_cache_scheme: passed on to the saved config, but no k_scale or v_scale is computed; "
            "runtimes will use a scale of 1"
        )
        warnings.warn(message, CompressedFormatWarning, stacklevel=3)
    return resolution


def decompress(model: nn.Module) -> nn.Module:
    """Replace the compressed modules of ``model`` with plain ``nn.Linear`` and ``nn.Embedding``, in place.

    Weights are dequantized bit for bit as compressed-tensors does, in each module's ``dtype``; activations are no
    longer rounded. Tied weights stay tied. A transformers model forgets that it was quantized.
    """
    if isinstance(model, CompressedModule):
        raise TargetError("cannot be replaced in place, for it is the model itself; put it into an nn.Sequential")
    _refuse_offloaded(model)
    places = places_of_modules(model)
    dense: dict[Any, nn.Parameter] = {}
    for experts in [module for module in model.modules() if isinstance(module, CompressedExperts)]:
        for parent, child in places[id(experts)]:
            setattr(parent, child, plain_experts(experts))
    for name, module in compressed_modules(model).items():
        key = id(module._parameters[module._weight_name]), module.dtype
        if is_offloaded(module):
            # What is offloaded is kept for each module by itself, and one at a time is in memory.
            with onloaded(module, name):
                plain = plain_module(module, nn.Parameter(module.dequantized_weight(), requires_grad=True))
        else:
            if key not in dense:
                dense[key] = nn.Parameter(module.dequantized_weight(), requires_grad=True)
            plain = plain_module(module, dense[key])
        hand_over(module, plain, name)
        for parent, child in places[id(module)]:
            setattr(parent, child, plain)
    _forget_config(model)
    return model


def _refuse_offloaded(model: nn.Module) -> None:
    """Raise :class:`UnsupportedFormatError` for modules whose dense weights could not take the place of packed ones."""
    problems = []
    for name, module in compressed_modules(model).items():
        experts = isinstance(module, CompressedExpertLinear) and is_offloaded(module)
        if experts or is_kept_around(model, name):
            what = "stacked experts" if experts else "a part of the block around it"
            message = (
                f"is offloaded by accelerate as {what}; remove its hooks first, or load the model without offloading"
            )
            problems.append(Problem(name, message))
    if problems:
        raise UnsupportedFormatError("the model cannot be decompressed:", problems)


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
        message = f"a config is a QuantizationConfig, a mapping, a path or a preset's name, not {found}"
        raise ConfigError(message) from error
    if isinstance(config, str) and config.upper() in PRESETS:
        return QuantizationConfig.preset(config)
    if isinstance(config, str) and not path.suffix and len(path.parts) == 1 and not os.path.lexists(path):
        return QuantizationConfig.preset(config)  # says which presets there are
    return QuantizationConfig.from_file(path)


def attach_config(model: nn.Module, config: QuantizationConfig) -> None:
    """Remember with which config ``model`` was compressed or loaded."""
    setattr(model, _CONFIG_ATTRIBUTE, config)


def config_of(model: nn.Module) -> QuantizationConfig | None:
    """The config with which ``model`` was compressed or loaded, or None."""
    config = getattr(model, _CONFIG_ATTRIBUTE, None)
    return config if isinstance(config, QuantizationConfig) else None


def _model_names(model: nn.Module) -> dict[str, str]:
    """The name in ``model`` of each module by its name in a checkpoint, from which transformers' may differ."""
    if not is_transformers_model(model):
        return {}
    from compressed_format.integrations.checkpoint_names import checkpoint_names

    return {stored: own for own, stored in module_names(checkpoint_names(model)).items()}


def tell_library(model: nn.Module, config: QuantizationConfig) -> None:
    """Give a model of transformers what ``from_pretrained`` gives a quantized one, so that it saves itself as one; and
    one of diffusers likewise."""
    if is_transformers_model(model):
        from compressed_format.integrations.quantizer import attach_quantizer

        attach_quantizer(model, config)
    elif is_diffusers_model(model):
        from compressed_format.integrations import diffusers

        diffusers.attach(model)


def _forget_config(model: nn.Module) -> None:
    if hasattr(model, _CONFIG_ATTRIBUTE):
        delattr(model, _CONFIG_ATTRIBUTE)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if is_diffusers_model(model):
        from compressed_format.integrations import diffusers

        diffusers.detach(model)
    elif is_transformers_model(model):
        from compressed_format.integrations.transformers import restore_ties

        restore_ties(model)


def _activation_scales(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
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
        counted = f"{first} has" if len(static) == 1 else f"{len(static)} modules ({first}, …) have"
        raise CalibrationError(
            f"{counted} static activation scales, which need data: "
            "pass calibration=, an iterable of model inputs, or make the activations dynamic"
        )
    return calibrate_activations(model, static, calibration)


def _tied_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each module whose weight is a parameter elsewhere too: all who have it, parameters of other names in full."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for suffix, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(name if suffix == "weight" else f"{name}.{suffix}".lstrip("."))
    return {name: tuple(names) for names in owners.values() if len(names) > 1 for name in names}


def announce_broken_ties(model: nn.Module, ties: Mapping[str, tuple[str, ...]], resolution: TargetResolution) -> None:
    """Say which weights shared by several modules stop being shared, because they are not all quantized alike."""
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for names in dict.fromkeys(ties.values()):
        assignments = [resolution.assignments.get(name) for name in names]
        if len({None if found is None else treatment(found) for found in assignments}) == 1:
            continue
        compressed = [name for name, found in zip(names, assignments, strict=True) if found is not None]
        message = (
            f"{', '.join(names)} share one weight, of which {', '.join(compressed)} is compressed on its own: "
            "they are no longer tied, and a checkpoint will hold both"
        )
        warnings.warn(message, CompressedFormatWarning, stacklevel=3)
        model_config: Any = getattr(model, "config", None)
        if embeddings.intersection(names) and getattr(model_config, "tie_word_embeddings", False):
            # Otherwise the next from_pretrained would tie them again, and overwrite one with the other.
            model_config.tie_word_embeddings = False


def places_of_modules(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, child name) at which each module sits."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                places[id(module)].append((parent, child))
    return places
