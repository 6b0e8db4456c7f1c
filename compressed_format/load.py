"""``load_compressed``: a checkpoint as a model that runs from the packed tensors, mapped from the files."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressed_format.checkpoint import read_checkpoint
from compressed_format.compression import attach_config
from compressed_format.config import QuantizationConfig
from compressed_format.errors import CheckpointError, CompressedFormatWarning, Problem
from compressed_format.skeleton import Skeleton

__all__ = ["load_compressed"]


def load_compressed(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **from_pretrained: Any,
) -> nn.Module:
    """Load the checkpoint folder ``path``; its weights stay packed, in memory and while they run.

    Without ``model``, transformers builds the architecture that ``config.json`` names, and ``from_pretrained`` goes
    to its ``from_pretrained``. With ``model``, that module is filled and returned; it may have been built on the meta
    device. ``dtype`` is that of everything uncompressed and of activations (default: as stored); codes and scales
    stay as they are in the file. On the CPU, tensors are mapped, not copied.

    Raises :class:`CheckpointError` with every missing, unexpected, misshapen or mistyped tensor;
    :class:`UnsupportedFormatError` for what could not be run correctly, by feature and module; :class:`ConfigError`
    for a config that means nothing. Nothing is ever left as it was initialised.
    """
    path = Path(path)
    config, problems = QuantizationConfig.from_checkpoint(path)
    for problem in problems:
        warnings.warn(str(problem), CompressedFormatWarning, stacklevel=2)
    if model is None:
        from compressed_format.integrations.transformers import load_pretrained

        loaded = load_pretrained(path, config, dtype=dtype, **from_pretrained)
    else:
        if from_pretrained:
            unused = ", ".join(sorted(from_pretrained))
            raise TypeError(
                f"load_compressed got {unused}, which only transformers' from_pretrained takes, with model="
            )
        loaded = _fill(model, path, config, dtype)
    return loaded if device is None else loaded.to(device)


def _fill(model: nn.Module, path: Path, config: QuantizationConfig, dtype: torch.dtype | None) -> nn.Module:
    checkpoint = read_checkpoint(path)
    skeleton = Skeleton(model, config, {name: checkpoint.spec(name) for name in checkpoint})
    problems = [*skeleton.problems]
    expected = model.state_dict(keep_vars=True)
    shared: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(value), []).append(name)
    loaded: dict[str, torch.Tensor] = {}
    for name in checkpoint:
        if name not in expected:
            if name not in skeleton.explained:
                problems.append(Problem(name, "is in the checkpoint, but the model has no such tensor"))
            continue
        value, stored = expected[name], checkpoint.spec(name)
        if tuple(value.shape) != tuple(stored.shape):
            message = f"has shape {list(stored.shape)} in the checkpoint, and {list(value.shape)} in the model"
            if name not in skeleton.explained:
                problems.append(Problem(name, message))
            continue
        tensor = checkpoint[name]
        if value.is_floating_point() != tensor.is_floating_point():
            problems.append(Problem(name, f"has dtype {stored.dtype} in the checkpoint, expected {value.dtype}"))
            continue
        if dtype is not None and tensor.is_floating_point() and name not in skeleton.packed:
            tensor = tensor.to(dtype)
        loaded[name] = tensor
    for name, value in expected.items():
        twins = shared.get(id(value), [name])
        if name not in loaded and name not in skeleton.explained and not any(twin in loaded for twin in twins):
            problems.append(Problem(name, "is missing from the checkpoint"))
    persistent = set(expected)
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name not in persistent:
            message = "is a non-persistent buffer on the meta device, which no checkpoint holds; build it on the CPU"
            problems.append(Problem(name, message))
    if problems:
        raise CheckpointError(f"{path} does not fit the model:", problems)
    _assign(model, loaded, expected, shared)
    skeleton.finish(dtype)
    attach_config(model, skeleton.config)
    return model


def _assign(
    model: nn.Module,
    loaded: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    shared: Mapping[int, list[str]],
) -> None:
    """Put the loaded tensors in place; parameters that were one object stay one."""
    for name, tensor in loaded.items():
        value = expected[name]
        if isinstance(value, nn.Parameter):
            parameter = nn.Parameter(tensor, requires_grad=value.requires_grad)
            for twin in shared[id(value)]:
                parent, _, child = twin.rpartition(".")
                model.get_submodule(parent)._parameters[child] = parameter
        else:
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._buffers[child] = tensor
