"""Weights that several modules share, and what becomes of that when not all of them are quantized alike."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from compressed_format.compression.modules import treatment
from compressed_format.config import TargetResolution
from compressed_format.errors import CompressedFormatWarning

__all__ = ["announce_broken_ties", "tied_weights"]


def tied_weights(model: nn.Module) -> dict[str, tuple[str, ...]]:
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
