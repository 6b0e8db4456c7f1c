"""Tensors that are split between processes, put together again for the one that saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from compressed_format.errors import CheckpointError, FormatError, Problem
from compressed_format.modules.base import CompressedModule

__all__ = ["first_process_alone", "gather_to_first", "gathered", "problems_of_all", "problems_of_whole"]


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is split between processes, which must all ask for it; a plain tensor is that itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    split: Any = tensor.detach()
    if split.dtype == torch.float8_e4m3fn:
        # As bytes, because not every backend knows every dtype.
        parts = split.to_local().view(torch.uint8)
        shape, stride = split.shape, split.stride()
        split = DTensor.from_local(
            parts, split.device_mesh, split.placements, run_check=False, shape=shape, stride=stride
        )
    whole: torch.Tensor = split.full_tensor()
    return whole.view(tensor.dtype)


def gather_to_first(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All of each tensor, on the CPU of the first process; empty in the others, which have to take part."""
    first = dist.get_rank() == 0
    whole = {}
    for name, tensor in tensors.items():
        found = gathered(tensor)
        if first:
            whole[name] = found.detach().cpu()
    return whole


def first_process_alone(action: Callable[[], None]) -> None:
    """Run ``action`` in the first process, while the others wait; all of them raise what it raises."""
    failed: list[Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failed = [error]
    # Not every error can be sent.
    told: list[Any] = [None if failed[0] is None else (type(failed[0]).__name__, str(failed[0]))]
    dist.broadcast_object_list(told, src=0)
    if failed[0] is not None:
        raise failed[0]
    if told[0] is not None:
        name, message = told[0]
        raise CheckpointError(f"the first process could not save the model: {name}: {message}")


def problems_of_all(problems: list[Problem]) -> list[Problem]:
    """What each process has found wrong with its part, known to all, so that none of them goes on alone."""
    found: list[list[tuple[str, str]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, [(problem.place, problem.message) for problem in problems])
    return [Problem(*problem) for problem in dict.fromkeys(problem for part in found for problem in part)]


def problems_of_whole(name: str, module: CompressedModule, check: Callable[[], object]) -> list[Problem]:
    """What ``check`` finds wrong with ``module`` while that has all of its tensors, which are sharded otherwise.

    ``check`` raises :class:`FormatError`; what it puts in the place of the tensors is lost, and a problem too.
    """
    held = dict(module._parameters)
    for suffix, value in held.items():
        if value is not None:
            module._parameters[suffix] = nn.Parameter(gathered(value).detach(), requires_grad=False)
    whole = dict(module._parameters)
    try:
        check()
    except FormatError as error:
        return list(error.problems)
    else:
        same = whole.keys() == module._parameters.keys() and all(
            value is module._parameters[suffix] for suffix, value in whole.items()
        )
        message = (
            "is stored in an older layout, which is re-encoded as it is loaded; load it in one process and save it"
        )
        return [] if same else [Problem(name, message)]
    finally:
        module._parameters.clear()
        module._parameters.update(held)
