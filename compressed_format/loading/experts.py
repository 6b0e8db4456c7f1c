"""How the tensors that a checkpoint holds for each expert, or for all of them fused, become stacked ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from compressed_format.compression.experts import (
    Assignments,
    compressed_projection,
    compressed_stack,
    projection_shape,
    stacked_weight,
)
from compressed_format.config import Assignment
from compressed_format.config.experts import ExpertStack
from compressed_format.dtypes import torch_dtype
from compressed_format.errors import Problem
from compressed_format.formats.base import FLOAT_DTYPES, StoredTensor, TensorSpec
from compressed_format.loading.fitting import Fit, FitTable
from compressed_format.loading.fused_experts import Recipe, Stored, split_fused
from compressed_format.modules.experts import CompressedExpertLinear, CompressedExperts, stack_tensors

__all__ = ["StackedExperts", "dense_recipes", "stack_experts"]


@dataclass(frozen=True)
class StackedExperts:
    """Compressed experts on the meta device, and how their tensors are made; or what does not fit."""

    module: CompressedExperts | None
    recipes: Mapping[str, Recipe]
    # Zero points that the scheme has none of: the assignment, and the rows of the weight.
    needless: Mapping[str, tuple[Assignment, int]]
    explained: frozenset[str]
    problems: list[Problem]


def stack_experts(
    name: str, module: nn.Module, stack: ExpertStack, assignments: Assignments, stored: Stored, fit_table: FitTable
) -> StackedExperts:
    """The compressed experts that take the place of ``module``, which is ``name`` in the model."""
    fused = split_fused(name, module, stack, assignments, stored)
    if fused.problems:
        return _refused(name, module, stored, fused.problems)
    projections: dict[str, CompressedExpertLinear] = {}
    recipes: dict[str, Recipe] = {}
    needless: dict[str, tuple[Assignment, int]] = {}
    problems: list[Problem] = []
    for projection, assignment in assignments.items():
        shape = projection_shape(module, projection)
        fits = []
        for expert in range(stack.num_experts):
            place = f"{name}.{expert}.{projection}"
            found = fused.stored.get(place) or stored.get(place, {})
            fits.append(_fit(place, assignment, found, shape, fit_table))
            if assignment is not None:
                needless |= {f"{place}.{suffix}": (assignment, shape[0]) for suffix in fits[-1].needless}
        wrong = _problems(name, projection, fits)
        if wrong:
            problems += wrong
            continue
        tensors = {}
        for suffix in fits[0].tensors:
            target = f"{name}.{projection}.{suffix}"
            alike = [fit.tensors[suffix] for fit in fits]
            sizes = max(tuple(tensor.shape) for tensor in alike)
            tensors[suffix] = torch.empty((stack.num_experts, *sizes), dtype=torch_dtype(alike[0].dtype), device="meta")
            recipes[target] = fused.recipes.get(target) or Recipe(
                tuple(f"{name}.{expert}.{projection}.{suffix}" for expert in range(stack.num_experts)),
                partial(stack_tensors, suffix),
            )
        projections[projection] = compressed_projection(module, projection, stack, tensors, assignment)
    if problems:
        return _refused(name, module, stored, problems)
    return StackedExperts(compressed_stack(module, stack, projections), recipes, needless, frozenset(), [])


def _refused(name: str, module: nn.Module, stored: Stored, problems: list[Problem]) -> StackedExperts:
    """A stack of which nothing more is to be said before its ``problems`` are gone."""
    inside = {place: tensors for place, tensors in stored.items() if f"{place}.".startswith(f"{name}.")}
    explained = {f"{place}.{suffix}" for place, tensors in inside.items() for suffix in tensors}
    explained |= {f"{name}.{own}" for own in module._parameters}
    return StackedExperts(None, {}, {}, frozenset(explained), problems)


def dense_recipes(name: str, module: nn.Module, stack: ExpertStack) -> dict[str, Recipe]:
    """How the parameters of uncompressed experts are made of those that are stored one by one."""

    def make(projections: tuple[str, ...], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        stacked = [torch.stack(list(tensors[start :: len(projections)])) for start in range(len(projections))]
        return stacked_weight(module, stacked)

    up = stack.projections[:-1]
    parameters = {"up_proj" if len(up) == 1 else "gate_up_proj": up, "down_proj": ("down_proj",)}
    return {
        f"{name}.{parameter}": Recipe(
            tuple(f"{full}.weight" for _, projection, full in stack.names(name) if projection in projections),
            partial(make, projections),
        )
        for parameter, projections in parameters.items()
    }


def _fit(
    place: str,
    assignment: Assignment | None,
    stored: Mapping[str, StoredTensor],
    shape: tuple[int, int],
    fit_table: FitTable,
) -> Fit:
    if assignment is not None:
        return fit_table.fit(place, assignment, stored, shape, shape[0])
    weight = stored.get("weight")
    if weight is None:
        return Fit({}, frozenset(), [Problem(f"{place}.weight", "is missing from the checkpoint")])
    problem = TensorSpec(FLOAT_DTYPES, shape).problem(torch_dtype(weight.dtype), tuple(weight.shape))
    return Fit({"weight": weight}, frozenset(), [Problem(f"{place}.weight", problem)] if problem else [])


def _problems(name: str, projection: str, fits: list[Fit]) -> list[Problem]:
    """What is wrong with the tensors of one projection, said once for all experts of whom it is true."""
    alike: dict[tuple[str, str], list[str]] = {}
    for expert, fit in enumerate(fits):
        for problem in fit.problems:
            suffix = problem.place.rpartition(".")[2]
            # Where the message names the expert, it names the first one of whom it is true.
            message = problem.message.replace(f"{name}.{expert}.", f"{name}.<expert>.")
            alike.setdefault((suffix, message), []).append(problem.place)
    if not alike:
        for suffix in {suffix for fit in fits for suffix in fit.tensors}:
            found = {None if (one := fit.tensors.get(suffix)) is None else one.dtype for fit in fits}
            if len(found) > 1:
                kinds = " and ".join(sorted(str(kind) for kind in found))
                message = f"is {kinds} in one expert and another, and cannot be stacked"
                alike[suffix, message] = [f"{name}.0.{projection}.{suffix}"]
    return [
        Problem(places[0], message + (f" (the same for {len(places) - 1} more experts)" if len(places) > 1 else ""))
        for (_, message), places in alike.items()
    ]
