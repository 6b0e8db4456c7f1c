"""What transformers knows of a checkpoint's architecture: classes, names, experts and ties, from its config alone.

The model is built on the meta device, by code of transformers only; what a checkpoint brings along is never run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from frozendict import frozendict
from transformers.core_model_loading import revert_weight_conversion

from compressed_format.config.experts import expert_stack
from compressed_format.config.modules import list_modules
from compressed_format.integrations.checkpoint_names import checkpoint_names, model_names, projection_names
from compressed_format.integrations.pretrained import model_class, refuse_more_layers_than
from compressed_format.renaming import module_names
from compressed_format.streaming.architecture import Architecture, ExpertLayout

__all__ = ["known_architecture"]


def known_architecture(folder: Path, tensors: Iterable[str]) -> Architecture | None:
    """The architecture that ``config.json`` in ``folder`` names, for a checkpoint of ``tensors``; None where
    transformers has none of that name, or cannot build it."""
    names = tuple(tensors)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        refuse_more_layers_than(len(names), config, folder)
        with torch.device("meta"):
            model = _build(config)
        model.tie_weights()
    except Exception:  # whatever a config that nobody has checked makes of a class that was not made for it
        return None
    return _described(model, names)


def _build(config: Any) -> Any:
    found = model_class(config, {})
    return found(config) if issubclass(found, transformers.PreTrainedModel) else found.from_config(config)


def _described(model: Any, tensors: tuple[str, ...]) -> Architecture:
    names = module_names(model_names(model, tensors))
    stacks = _stacks(model, names)
    modules = {module.name: module for module in list_modules(model)}
    classes = {stored: modules[own].classes for stored, own in names.items() if own in modules}
    of_tensors = dict(zip(model_names(model, tensors).values(), tensors, strict=True))
    usual = module_names(checkpoint_names(model))
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and modules[name].is_compressible:
            owners[id(weight)].append(name)
    stored_names = {own: stored for stored, own in names.items()}
    tied: dict[str, str] = {}
    missing: list[str] = []
    for sharing in owners.values():
        present = [name for name in sharing if f"{name}.weight" in of_tensors]
        for name in sharing:
            if name not in present:
                stored = usual.get(name, name)
                classes.setdefault(stored, modules[name].classes)
                if present:
                    tied[stored] = stored_names[present[0]]
                else:
                    missing.append(stored)
    return Architecture(
        frozendict(classes),
        frozendict(names),
        frozendict(stacks),
        frozendict(tied),
        tuple(missing),
        _stacked_in_files(model),
    )


def _stacked_in_files(model: Any) -> tuple[str, ...]:
    found = []
    for name, module in model.named_modules():
        stack = expert_stack(module)
        if stack is not None:
            # What transformers makes of one expert with one row for each projection, when it saves it.
            up = "gate_up_proj" if len(stack.projections) == 3 else "up_proj"
            rows = torch.zeros(1, len(stack.projections), 1, device="cpu")
            dense = {f"{name}.{up}": rows[:, :-1], f"{name}.down_proj": rows[:, -1:]}
            if any(stored.endswith(f".{up}") for stored in revert_weight_conversion(model, dense)):
                found.append(name)
    return tuple(found)


def _stacks(model: Any, names: Mapping[str, str]) -> dict[str, ExpertLayout]:
    called = {}
    with suppress(Exception):  # conversions of other releases; the names of the projections are then those of memory
        called = {name: found for name, (_, found) in projection_names(model).items()}
    modules = dict(model.named_modules())
    found = {}
    for stored, own in names.items():
        module = modules.get(own)
        stack = expert_stack(module)
        if module is not None and stack is not None:
            same = {projection: projection for projection in stack.projections}
            found[stored] = ExpertLayout(
                stack, bool(module.is_transposed), not module.is_concatenated, frozendict(called.get(own, same))
            )
    return found
