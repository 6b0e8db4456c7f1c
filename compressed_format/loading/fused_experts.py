"""Files that hold all experts of a layer in one tensor: ``experts.gate_up_proj_packed`` ``[E, 2O, words]`` and so on.

No release of compressed-tensors writes them, but programs do that save transformers' stacked parameters as they are.
Rows are output features: gate's before up's, or in turn where the model has them so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from compressed_format.blocks import block_shape
from compressed_format.compression.experts import Assignments, projection_shape
from compressed_format.config import Assignment
from compressed_format.config.experts import ExpertStack
from compressed_format.errors import Problem
from compressed_format.formats.base import StoredTensor

__all__ = ["FusedExperts", "Recipe", "Stored", "split_fused"]

Stored = Mapping[str, Mapping[str, StoredTensor]]
"""The tensors of a checkpoint by the names of the model: module, then suffix."""

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
_ACTIVATION_SUFFIXES = frozenset(f"{end}_{what}" for end in ("input", "output") for what in ("scale", "zero_point"))
_SHARED = frozenset({"weight_g_idx", *_ACTIVATION_SUFFIXES})


@dataclass(frozen=True)
class Recipe:
    """How one tensor of the model is made of tensors of the checkpoint, which go by the model's names for them."""

    sources: tuple[str, ...]
    make: Callable[[Sequence[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class FusedExperts:
    """Fused tensors as if they were stored expert by expert, and how the stacked ones are made of them."""

    stored: dict[str, dict[str, StoredTensor]] = field(default_factory=lambda: defaultdict(dict))
    recipes: dict[str, Recipe] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class _Slice:
    """What headers would tell of a tensor, if one expert's part of a fused one were stored for itself."""

    dtype: str
    shape: tuple[int, ...]


def split_fused(
    name: str, module: nn.Module, stack: ExpertStack, assignments: Assignments, stored: Stored
) -> FusedExperts:
    """What ``stored`` has of the stack ``name`` in fused tensors; nothing where experts are stored one by one."""
    fused = FusedExperts()
    for parameter, parts in _PARTS.items():
        if not set(parts) <= set(stack.projections):
            continue
        for suffix, source, tensor in _tensors_of(name, parameter, stored):
            if tensor.shape[:1] != (stack.num_experts,) and suffix != "weight_shape":
                found = list(tensor.shape)
                message = f"has shape {found}, expected one slice for each of the {stack.num_experts} experts"
                fused.problems.append(Problem(source, message))
                continue
            for index, projection in enumerate(parts):
                assignment = assignments.get(projection)
                shape = projection_shape(module, projection)
                interleaved = len(parts) > 1 and not module.is_concatenated
                obstacle = _obstacle(suffix, tensor, shape, assignment, len(parts), interleaved)
                if obstacle is not None:
                    message = f"cannot be split into {' and '.join(parts)}: {obstacle}; store experts one by one"
                    fused.problems.append(Problem(source, message))
                    break
                if suffix == "weight_shape":
                    make: Callable[..., torch.Tensor] = partial(_shapes, (stack.num_experts, *shape))
                    size: tuple[int, ...] = (2,)
                elif len(parts) == 1 or suffix in _SHARED or len(tensor.shape) < 3:
                    make, size = _whole, tuple(tensor.shape[1:])
                else:
                    make = partial(_rows, index, len(parts), interleaved)
                    size = (tensor.shape[1] // len(parts), *tensor.shape[2:])
                fused.recipes[f"{name}.{projection}.{suffix}"] = Recipe((source,), make)
                for expert in range(stack.num_experts):
                    fused.stored[f"{name}.{expert}.{projection}"][suffix] = _Slice(tensor.dtype, size)
    return fused


def _tensors_of(name: str, parameter: str, stored: Stored) -> Iterator[tuple[str, str, StoredTensor]]:
    """Suffix, full name and tensor of what is stored of a fused parameter, under either of its two names."""
    for suffix, tensor in stored.get(f"{name}.{parameter}", {}).items():
        yield suffix, f"{name}.{parameter}.{suffix}", tensor
    for full, tensor in stored.get(name, {}).items():
        rest = full.removeprefix(parameter)
        if rest == full or full == f"{parameter}_bias":
            continue
        of_activations = rest.removeprefix("_") in _ACTIVATION_SUFFIXES
        yield (rest.removeprefix("_") if of_activations else f"weight{rest}"), f"{name}.{full}", tensor


def _obstacle(
    suffix: str,
    tensor: StoredTensor,
    shape: tuple[int, int],
    assignment: Assignment | None,
    parts: int,
    interleaved: bool,
) -> str | None:
    """Why the rows of one projection are no rows of the tensor, or None where they are."""
    if parts == 1 or suffix in _SHARED or suffix == "weight_shape" or len(tensor.shape) < 3:
        return None
    if assignment is None or assignment.scheme is None or assignment.scheme.weights is None:
        return None if suffix == "weight" else "they are not quantized"
    args = assignment.scheme.weights
    if suffix == "weight_zero_point" and tensor.dtype == "int32":
        if interleaved or shape[0] * args.num_bits % 32:
            return f"its words hold zero points of both ({shape[0]} of {args.num_bits} bits each)"
    elif suffix in ("weight_scale", "weight_zero_point"):
        rows = block_shape(args, shape)[0]
        if rows > 1 and tensor.shape[1] > 1 and (interleaved or shape[0] % rows):
            return f"blocks of {rows} rows hold rows of both ({shape[0]} each)"
    return None if tensor.shape[1] % parts == 0 else f"it has {tensor.shape[1]} rows"


def _whole(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def _rows(index: int, parts: int, interleaved: bool, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    found = tensors[0][:, index::parts] if interleaved else tensors[0].chunk(parts, dim=1)[index]
    return found.contiguous()


def _shapes(shape: tuple[int, int, int], tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    # What is stored is the shape of both together, in one of several forms.
    experts, rows, columns = shape
    return torch.tensor([[rows, columns]] * experts, dtype=tensors[0].dtype, device=tensors[0].device)
