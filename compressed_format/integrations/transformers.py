"""transformers: its names for the tensors of checkpoints, and the weights that its models tie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from compressed_format.errors import CheckpointError, Problem
from compressed_format.linear import compressed_modules

__all__ = ["checkpoint_names", "model_names", "retie"]


def checkpoint_names(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The checkpoint's name of each entry of a transformers model's state dict.

    Follows the conversions with which the model was loaded backwards. Raises :class:`CheckpointError` where one of
    them rearranges the values of a tensor instead of renaming it: a packed tensor cannot follow that.
    """
    from transformers.core_model_loading import revert_weight_conversion

    # Tensors without values stand in: only names matter, and each keeps its identity through a renaming.
    stand_ins = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    reverted = revert_weight_conversion(model, dict(stand_ins))
    by_identity = {id(tensor): name for name, tensor in reverted.items()}
    names = {name: by_identity.get(id(tensor)) for name, tensor in stand_ins.items()}
    lost = [name for name, renamed in names.items() if renamed is None]
    if lost:
        message = "is rearranged by transformers when it is saved, which is not served yet"
        raise CheckpointError("the model cannot be saved:", [Problem(name, message) for name in lost])
    return {name: renamed for name, renamed in names.items() if renamed is not None}


def model_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """For each name of a stored tensor, the one that transformers will give it as it loads it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    prefix = model.base_model_prefix
    # The prefix of the base model is judged by the tensors that exist before modules are swapped.
    state = dict(model.state_dict())
    for name in stored:
        module, _, suffix = name.rpartition(".")
        for prefixed in (module, f"{prefix}.{module}", module.removeprefix(f"{prefix}.")):
            if f"{prefixed}.weight" in state:
                state.setdefault(f"{prefixed}.{suffix}", state[f"{prefixed}.weight"])
    return {name: rename_source_key(name, renamings, [], prefix, state)[0] for name in stored}


def retie(model: Any) -> None:
    """Make transformers tie the tensors of compressed modules, where these share a weight, and no others of theirs."""
    compressed = compressed_modules(model)
    tied: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        places = target.rpartition(".")[0], source.rpartition(".")[0]
        own, other = (compressed.get(place) for place in places)
        if own is None and other is None:
            tied[target] = source
        elif own is not None and other is not None:
            for suffix, parameter in own._parameters.items():
                if parameter is not None and parameter is other._parameters.get(suffix):
                    tied[f"{places[0]}.{suffix}"] = f"{places[1]}.{suffix}"
    if tied != model.all_tied_weights_keys:
        model.all_tied_weights_keys = tied
        # Asked again whenever transformers ties anew, as when embeddings are resized.
        model._tied_weights_keys = dict(tied)
