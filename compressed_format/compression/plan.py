"""What a config makes of a model, found before anything of the model is changed.

Compressing in memory and compressing while a model loads start from the same plan.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from torch import nn

from compressed_format.compression.experts import Assignments, dense_stacks, expert_linears, projection_assignments
from compressed_format.compression.left_dense import left_dense, spared_routers
from compressed_format.compression.unserved import transposed_layers
from compressed_format.config import QuantizationConfig, TargetResolution, resolve_targets
from compressed_format.config.experts import ExpertStack
from compressed_format.errors import CompressedFormatWarning, Problem, TargetError

__all__ = ["Plan", "PlannedStack", "plan_compression", "unscaled_caches"]


class PlannedStack(NamedTuple):
    """A module that holds a layer's experts, and what becomes of each of their projections."""

    module: nn.Module
    stack: ExpertStack
    assignments: Assignments


class Plan(NamedTuple):
    """The modules that are replaced: ``modules`` one by one, and ``stacks`` of experts, by their names."""

    resolution: TargetResolution
    modules: dict[str, nn.Module]
    stacks: dict[str, PlannedStack]

    def experts(self) -> dict[str, nn.Linear]:
        """Every projection of every expert as a Linear of its own, whose weight is a view of the stack's."""
        linears: dict[str, nn.Linear] = {}
        for name, (module, stack, _) in self.stacks.items():
            linears |= expert_linears(module, stack, name)
        return linears

    def targeted(self, experts: dict[str, nn.Linear]) -> dict[str, nn.Module]:
        """All that is compressed, module by module; ``experts`` are those of :meth:`experts`."""
        assigned = self.resolution.assignments
        return {**self.modules, **{name: linear for name, linear in experts.items() if name in assigned}}


def plan_compression(model: nn.Module, config: QuantizationConfig) -> Plan:
    """What ``config`` makes of the modules of ``model``, with a warning for each thing that it may not mean.

    Raises :class:`TargetError` if it reaches none, or tells the experts of one layer apart.
    """
    resolution = resolve_targets(model, config)
    ignored = resolution.ignored
    told = (*transposed_layers(model, ignored), *left_dense(model, ignored), *spared_routers(model, resolution))
    found = [*told, *resolution.warnings]
    if not resolution.assignments:
        raise TargetError("the config reaches no module of this model, so nothing would be compressed:", found)
    for problem in (*found, *unscaled_caches(config)):
        warnings.warn(str(problem), CompressedFormatWarning, stacklevel=3)
    modules = {name: module for name, module in model.named_modules() if name in resolution.assignments}
    stacks = {
        name: PlannedStack(module, stack, assignments)
        for name, (module, stack) in dense_stacks(model).items()
        if (assignments := projection_assignments(name, stack, resolution))
    }
    return Plan(resolution, modules, stacks)


def unscaled_caches(config: QuantizationConfig) -> list[Problem]:
    """What a user should know who asks for a quantized key-value cache: nothing here computes its scales."""
    if config.kv_cache_scheme is None:
        return []
    message = "passed on to the saved config, but no k_scale or v_scale is computed; runtimes will use a scale of 1"
    return [Problem("kv_cache_scheme", message)]
