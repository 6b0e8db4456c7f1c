"""``compress``: replace what a config targets with compressed modules; ``decompress``: put plain modules back."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressed_format.calibrate import calibrate_activations, needs_calibration
from compressed_format.compression.attached_config import attach_config, forget_config, tell_library
from compressed_format.compression.experts import compress_experts, observable_experts, plain_experts
from compressed_format.compression.modules import check_modules, compress_module, plain_module, treatment
from compressed_format.compression.plan import plan_compression
from compressed_format.compression.ties import announce_broken_ties, tied_weights
from compressed_format.config import PRESETS, QuantizationConfig, QuantizationScheme, TargetResolution
from compressed_format.errors import (
    CalibrationError,
    ConfigError,
    Problem,
    QuantizationError,
    TargetError,
    UnsupportedFormatError,
)
from compressed_format.model_origin import is_transformers_model
from compressed_format.modules.base import CompressedModule, compressed_modules
from compressed_format.modules.experts import CompressedExpertLinear, CompressedExperts
from compressed_format.modules.offloading import hand_over, is_kept_around, is_offloaded, onloaded
from compressed_format.renaming import module_names, rename_modules

__all__ = ["compress", "decompress", "places_of_modules", "read_config"]

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
    needs it. Every token then goes through every expert, so that those which none is routed to have scales too.
    ``progress`` is called with the number of modules done and their total. Where transformers gives modules other names
    in memory than in its checkpoints, ``config`` may speak of either.

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
    resolution, modules, stacks = plan = plan_compression(model, rename_modules(config, names, keep=False))
    config = rename_modules(config, names, keep=True)
    experts = plan.experts()
    targeted = plan.targeted(experts)
    check_modules(targeted, resolution)
    with observable_experts({name: (module, stack) for name, (module, stack, _) in stacks.items()}, experts):
        activation_scales = _activation_scales(model, targeted, resolution, calibration)
    # No name here may hold a dense module: its weight goes as soon as it is replaced.
    del experts, targeted
    ties = tied_weights(model)
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


def decompress(model: nn.Module) -> nn.Module:
    """Replace the compressed modules of ``model`` with plain ``nn.Linear`` and ``nn.Embedding``, in place.

    Weights are dequantized bit for bit as compressed-tensors does, in each module's ``dtype``; activations are no
    longer rounded. Tied weights stay tied. A transformers model forgets that it was quantized.
    """
    if isinstance(model, (CompressedModule, CompressedExperts)):
        raise TargetError("cannot be replaced in place, for it is the model itself; put it into an nn.Sequential")
    _refuse_offloaded(model)
    places = places_of_modules(model)
    dense: dict[Any, nn.Parameter] = {}
    for experts in [module for module in model.modules() if isinstance(module, CompressedExperts)]:
        stack = plain_experts(experts)
        for parent, child in places[id(experts)]:
            setattr(parent, child, stack)
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
    forget_config(model)
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


def _model_names(model: nn.Module) -> dict[str, str]:
    """The name in ``model`` of each module by its name in a checkpoint, from which transformers' may differ."""
    if not is_transformers_model(model):
        return {}
    from compressed_format.integrations.checkpoint_names import checkpoint_names

    return {stored: own for own, stored in module_names(checkpoint_names(model)).items()}


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


def places_of_modules(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every (parent, child name) at which each module sits."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                places[id(module)].append((parent, child))
    return places
