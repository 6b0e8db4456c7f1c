"""The names that transformers gives tensors in a checkpoint and in memory, for packed tensors too.

transformers renames tensors as it loads, and rearranges some. Packed tensors can follow a new name; of the
rearrangements, only those of experts mean anything to them, and these are stacked and unstacked by name here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from compressed_format.config.experts import ExpertStack, expert_stack
from compressed_format.errors import CheckpointError, Problem
from compressed_format.modules.experts import unstacked_state

__all__ = [
    "StoredTensors",
    "checkpoint_names",
    "model_names",
    "own_names",
    "projection_names",
    "renamed_experts",
    "stored_tensors",
]


class StoredTensors(NamedTuple):
    """A model's tensors under the names of a checkpoint, and for each name of the model the checkpoint's."""

    tensors: dict[str, torch.Tensor]
    names: dict[str, str]


def stored_tensors(model: Any, tensors: Mapping[str, torch.Tensor], packed: Iterable[str]) -> StoredTensors:
    """What a checkpoint of a transformers model holds, out of ``tensors`` by the names of the model.

    Those of each expert go by ``<stack>.<expert>.<projection>.<suffix>``. Follows the conversions with which the model
    was loaded backwards. Raises :class:`CheckpointError` where one of them rearranges the values of one of ``packed``.
    """
    from transformers.core_model_loading import revert_weight_conversion

    projections = projection_names(model)
    of_experts = [name for name in tensors if _stack_of(name) in projections]
    others = {name: tensor for name, tensor in tensors.items() if _stack_of(name) not in projections}
    reverted: dict[str, torch.Tensor] = dict(revert_weight_conversion(model, others))
    by_identity = {id(tensor): stored for stored, tensor in reverted.items()}
    names = {name: by_identity[id(tensor)] for name, tensor in others.items() if id(tensor) in by_identity}
    lost = [name for name in packed if name in others and name not in names]
    if lost:
        message = "is rearranged by transformers when it is saved, which packed tensors cannot follow"
        raise CheckpointError("the model cannot be saved:", [Problem(name, message) for name in lost])
    # Renamings that reach an expert reach all of a stack alike, and asking for one of them is asking little.
    for stack, (experts, called) in projections.items():
        place = f"{stack}.0.{called['down_proj']}.weight"
        (stored,) = revert_weight_conversion(model, {place: torch.empty(0, device="meta")})
        parent = stored.rsplit(".", 3)[0]
        for expert, projection, module in experts.names(stack):
            names[f"{module}.weight"] = f"{parent}.{expert}.{called[projection]}.weight"
    for name in of_experts:
        module, _, suffix = name.rpartition(".")
        names[name] = f"{names[f'{module}.weight'].removesuffix('weight')}{suffix}"
        reverted[names[name]] = tensors[name]
    return StoredTensors(reverted, names)


def checkpoint_names(model: Any) -> dict[str, str]:
    """The checkpoint's name of each tensor of ``model``, those of experts one by one; see :func:`stored_tensors`."""
    state = unstacked_state(model)
    # Tensors without values stand in: only names matter, and each keeps its identity through a renaming.
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    return stored_tensors(model, stand_ins, ()).names


def model_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """For each name of a stored tensor, the one that it has in ``model``, before experts are stacked."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix = model.base_model_prefix
    # The prefix of the base model is judged by the tensors that exist before modules are swapped.
    state = dict(model.state_dict())
    projections = {
        stack: {stored: own for own, stored in found.items()} for stack, (_, found) in projection_names(model).items()
    }
    names = {}
    for name in stored:
        renamed = rename_source_key(name, renamings, [])[0]
        places = _prefixed(renamed, prefix)
        for place in places:
            if place in state:
                continue
            module = place.rpartition(".")[0]
            weight = state.get(f"{module}.weight")
            if weight is not None:
                state[place] = weight
            elif projections and (module in projections or _stack_of(place) in projections):
                state[place] = state[next(iter(state))]
        if any(place in state for place in places[1:] if place != renamed):
            renamed = rename_source_key(renamed, [], [], prefix, state)[0]  # the renamings are behind it
        names[name] = _with_projection(renamed, projections) if projections else renamed
    return names


def projection_names(model: Any) -> dict[str, tuple[ExpertStack, dict[str, str]]]:
    """For each module that holds a stack of experts: its projections, and what each is called in a checkpoint.

    transformers' own conversion of the dense weights is asked. Where a class keeps its experts stacked in files too,
    the names are those of the projections, which is what readers of compressed experts look for.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stacks = {name: stack for name, module in model.named_modules() if (stack := expert_stack(module)) is not None}
    if not stacks:
        return {}
    # One expert with one row for each projection tells where they go.
    dense: dict[str, torch.Tensor] = {}
    for name, stack in stacks.items():
        rows = torch.arange(len(stack.projections), dtype=torch.float32, device="cpu").reshape(1, -1, 1)
        first = "gate_up_proj" if len(stack.projections) == 3 else "up_proj"
        dense[f"{name}.{first}"], dense[f"{name}.down_proj"] = rows[:, :-1], rows[:, -1:]
    with _default_conversions(model):
        reverted = revert_weight_conversion(model, dense)
    called = {name: {own: own for own in stack.projections} for name, stack in stacks.items()}
    tails = {}
    for stored, tensor in reverted.items():
        parts = stored.split(".")
        if tensor.numel() == 1 and len(parts) > 3 and parts[-3] == "0" and parts[-1] == "weight":
            tails[".".join(parts[:-3]), int(tensor)] = parts[-2]
    for name, stack in stacks.items():
        leaf = name.rpartition(".")[2]
        parents = [parent for parent, _ in tails if _same_place(parent, name, leaf)]
        for number, own in enumerate(stack.projections):
            found = {tails.get((parent, number), own) for parent in parents}
            if len(found) == 1:
                called[name][own] = found.pop()
    return {name: (stacks[name], called[name]) for name in stacks}


def _same_place(parent: str, stack: str, leaf: str) -> bool:
    """Whether a stack's name in a checkpoint can be that of ``stack``: layer numbers and the last part stay."""
    numbers = [part for part in stack.split(".") if part.isdigit()]
    return [part for part in parent.split(".") if part.isdigit()] == numbers and parent.rpartition(".")[2] == leaf


def _stack_of(name: str) -> str:
    """The stack that holds the expert whose tensor ``name`` would be, if it is one's."""
    return name.rsplit(".", 3)[0]


def _with_projection(name: str, projections: Mapping[str, Mapping[str, str]]) -> str:
    """``name`` with the projection of an expert, if it is of one, replaced as ``projections`` of its stack says."""
    parts = name.rsplit(".", 3)
    if len(parts) < 4 or parts[0] not in projections or not parts[1].isdigit():
        return name
    parts[2] = projections[parts[0]].get(parts[2], parts[2])
    return ".".join(parts)


def own_names(name: str, prefix: str, projections: Mapping[str, Mapping[str, str]]) -> tuple[str, ...]:
    """What a tensor may be called in a model whose base model is ``prefix``, by what transformers' renamings call it.

    ``projections`` has the model's name of each projection by the checkpoint's, for each stack.
    """
    return tuple(_with_projection(place, projections) for place in _prefixed(name, prefix))


def renamed_experts(model: Any, names: Iterable[str]) -> set[str]:
    """What transformers calls the tensors ``names`` of single experts, which go by the model's names for them."""
    called = {stack: found for stack, (_, found) in projection_names(model).items()}
    return {_with_projection(name, called) for name in names}


def _prefixed(name: str, prefix: str) -> tuple[str, ...]:
    return name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")


@contextmanager
def _default_conversions(model: Any) -> Iterator[None]:
    """Within the context, ``model`` saves as its class does, whatever it was loaded from."""
    known = model.__dict__.pop("_weight_conversions", None)
    try:
        yield
    finally:
        if known is not None:
            model._weight_conversions = known
