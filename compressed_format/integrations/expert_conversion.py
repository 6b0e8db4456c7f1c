"""Experts on their way between a checkpoint and transformers: stacked as they are loaded, one by one as they are saved.

transformers asks each of its weight conversions whether a tensor is its own, and hands it the tensors that are. These
know their tensors by name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter

from compressed_format.integrations.checkpoint_names import own_names, projection_names
from compressed_format.loading.fused_experts import Recipe
from compressed_format.modules.experts import CompressedExpertLinear, CompressedExperts
from compressed_format.modules.offloading import onloaded

__all__ = ["ConversionByName", "StackExperts", "remember_conversions"]


class _Nothing(ConversionOps):
    """A conversion must have an operation; those here work on names, which an operation is not told."""

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        return input_dict


class ConversionByName(WeightConverter):
    """A conversion that collects tensors by their names, and of which each of its results has a copy."""

    pattern = "tensors of compressed_format"
    """What it says that it has found in the name of a tensor that is its own."""

    def __init__(self) -> None:
        super().__init__(self.pattern, self.pattern, [_Nothing()])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # transformers copies a conversion for every tensor that it takes.
        new = copy(self)
        new.collected_tensors, new.layer_targets = defaultdict(list), defaultdict(set)
        return new

    def add_tensor(self, target_key: str, source_key: str, source_pattern: str, future: Any) -> None:
        self.collected_tensors[source_key].append(future)
        self.layer_targets[target_key].add(source_key)


class StackExperts(ConversionByName):
    """Makes the tensors of ``recipes`` while ``model`` is loaded.

    ``names`` has the model's name of each tensor of the checkpoint, that of an expert being
    ``<stack>.<expert>.<projection>.<suffix>``.
    """

    def __init__(self, model: Any, recipes: Mapping[str, Recipe], names: Mapping[str, str]) -> None:
        super().__init__()
        self.recipes, self.names, self.prefix = recipes, names, model.base_model_prefix
        self.called = {stack: found for stack, (_, found) in projection_names(model).items()}
        self.projections = {
            stack: {stored: own for own, stored in found.items()} for stack, found in self.called.items()
        }
        self.stacks = {target.rsplit(".", 2)[0] for target in recipes}
        # What is made of the same tensors is made together, under the name of the first of it.
        self.first: dict[str, str] = {}
        self.together: dict[str, list[str]] = defaultdict(list)
        for target, recipe in recipes.items():
            first = self.first.setdefault(recipe.sources[0], target)
            self.first.update(dict.fromkeys(recipe.sources, first))
            self.together[first].append(target)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        for own in own_names(source_key, self.prefix, self.projections):
            if own in self.first:
                self._was_used = True
                return self.first[own], self.pattern
        for own in own_names(source_key, self.prefix, self.projections):
            # What nobody takes keeps its name, where transformers' conversions might give it that of dense experts.
            stack, *rest = own.rsplit(".", 3)
            if stack in self.stacks and len(rest) == 3 and rest[0].isdigit():
                return own, self.pattern
        return source_key, None

    def convert(self, layer_name: str, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        found = {self.names[name]: tensors[0] for name, tensors in self.materialize_tensors().items()}
        recipes = {target: self.recipes[target] for target in self.together[layer_name]}
        return {target: recipe.make([found[name] for name in recipe.sources]) for target, recipe in recipes.items()}

    def reverse_transform(self) -> ConversionByName:
        return _UnstackExperts(self.called)


class _UnstackExperts(ConversionByName):
    """Takes the compressed experts of a model's state dict apart."""

    def __init__(self, called: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__()
        self.called = called

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        parts = source_key.rsplit(".", 2)
        if len(parts) < 3 or parts[1] not in self.called.get(parts[0], ()):
            return source_key, None
        # As the first expert is called, for releases before 5.23 rename what comes out of here, and not the results.
        return f"{parts[0]}.0.{self.called[parts[0]][parts[1]]}.{parts[2]}", self.pattern

    def convert(self, layer_name: str, model: Any = None, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        ((name, (tensor,)),) = self.materialize_tensors().items()
        place, _, suffix = name.rpartition(".")
        stack, _, projection = place.rpartition(".")
        module = model.get_submodule(place)
        assert isinstance(module, CompressedExpertLinear)
        parent, called = layer_name.rsplit(".", 3)[0], self.called[stack][projection]
        # How many of the values without zeros are an expert's, its bitmask tells, which may be offloaded.
        with onloaded(module, place) if suffix == "compressed" else nullcontext():
            parts = module.checkpoint_parts(place, {suffix: tensor})
        return {f"{parent}.{expert}.{called}.{suffix}": part[suffix] for expert, part in enumerate(parts.values())}


def remember_conversions(model: Any) -> None:
    """Have ``model`` saved by the conversions of its class and, where its experts are compressed, by ours."""
    known = getattr(model, "_weight_conversions", None)
    compressed = any(isinstance(module, CompressedExperts) for module in model.modules())
    if not compressed and not any(isinstance(found, StackExperts) for found in known or ()):
        return
    usual = [found for found in get_model_conversion_mapping(model, add_legacy=False) if not _adds_prefix(found)]
    if known is not None:
        # Conversions that were not used while packed experts were loaded are missing.
        patterns = {tuple(found.source_patterns) for found in known}
        usual = [
            *(found for found in known if not isinstance(found, StackExperts)),
            *(
                found
                for found in usual
                if isinstance(found, WeightConverter) and tuple(found.source_patterns) not in patterns
            ),
        ]
    # The last one is asked first when a model is saved.
    model._weight_conversions = [*usual, *([StackExperts(model, {}, {})] if compressed else [])]


def _adds_prefix(conversion: Any) -> bool:
    return isinstance(conversion, PrefixChange)
