"""``load_compressed``: a checkpoint as a model that runs from the packed tensors, mapped from the files."""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressed_format.checkpoint import TensorSpec
from compressed_format.checkpoint.collection import collection_paused
from compressed_format.compression.attached_config import attach_config, tell_library
from compressed_format.config import QuantizationConfig
from compressed_format.config.json_text import parse_json, read_bytes
from compressed_format.dtypes import torch_dtype
from compressed_format.errors import CheckpointError, CompressedFormatWarning, Problem
from compressed_format.loading.fitting import dtype_misfit
from compressed_format.loading.skeleton import Skeleton
from compressed_format.model_origin import diffusers_class_name, is_transformers_model
from compressed_format.modules.base import frozen_parameter
from compressed_format.modules.module_table import ModuleTable
from compressed_format.reading import CheckpointReader, open_checkpoint
from compressed_format.renaming import module_names, rename_modules

__all__ = ["load_compressed"]


def load_compressed(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    allow_unknown: bool = False,
    **from_pretrained: Any,
) -> nn.Module:
    """Load the checkpoint folder ``path``; its weights stay packed, in memory and while they run.

    Without ``model``, transformers builds the architecture that ``config.json`` names, and ``from_pretrained`` goes
    to its ``from_pretrained``. Where ``config.json`` has a ``_class_name``, as in the folders of a pipeline, diffusers
    builds it, and takes nothing further. With ``model``, that module is filled and returned; it may have been built on
    the meta device, and ``path`` may be a single file whose metadata hold the config. ``dtype`` is that of everything
    uncompressed and of activations (default: as stored); codes and scales stay as they are in the file. On the CPU,
    tensors are mapped, not copied. ``allow_unknown`` reads a config whose groups have keys with values that nobody here
    knows; without it they are errors.

    Values are not read, however large the tensors are, but for the few that native code relies on, such as
    ``weight_shape``, ``weight_g_idx`` and bitmasks. Each module checks its scales when it is first used, and raises
    :class:`FormatError` for one that is not finite; :func:`check` validates everything in advance.

    Raises :class:`CheckpointError` with every missing, unexpected, misshapen or mistyped tensor;
    :class:`UnsupportedFormatError` for what could not be run correctly, by feature and module; :class:`ConfigError`
    for a config that means nothing. Nothing is ever left as it was initialised; a ``model`` with which this has failed
    is half swapped, and has to be built anew.
    """
    if device is not None and from_pretrained.get("device_map") is not None:
        raise TypeError("load_compressed got both device and device_map: a model that is spread over devices stays so")
    path = Path(path)
    content = _config_content(path) if model is None else {}
    if model is None and diffusers_class_name(content) is None:
        from compressed_format.integrations.pretrained import load_pretrained

        config, problems = QuantizationConfig.from_checkpoint(path, allow_unknown=allow_unknown)
        for problem in problems:
            warnings.warn(str(problem), CompressedFormatWarning, stacklevel=2)
        loaded = load_pretrained(path, config, dtype=dtype, **from_pretrained)
    else:
        if from_pretrained:
            unused = ", ".join(sorted(from_pretrained))
            reason = "with model=" if model is not None else "and this is a model of diffusers"
            raise TypeError(f"load_compressed got {unused}, which only transformers' from_pretrained takes, {reason}")
        with collection_paused():
            reader = open_checkpoint(path, allow_unknown=allow_unknown)
            for problem in reader.warnings:
                warnings.warn(str(problem), CompressedFormatWarning, stacklevel=2)
            loaded = _load_diffusers(reader, content, dtype) if model is None else _fill(model, reader, dtype)
    return loaded if device is None else loaded.to(device)


def _config_content(path: Path) -> Any:
    """What the ``config.json`` of a folder holds, if there is one."""
    file = path / "config.json"
    return parse_json(read_bytes(file), str(file)) if file.is_file() else {}


def _load_diffusers(reader: CheckpointReader, content: Any, dtype: torch.dtype | None) -> nn.Module:
    try:
        from compressed_format.integrations import diffusers
    except ImportError as error:
        message = (
            f"names {diffusers_class_name(content)}, a model of diffusers, which cannot be imported ({error}): "
            "install diffusers, or pass model="
        )
        raise CheckpointError(problems=[Problem(f"{reader.path / 'config.json'}: _class_name", message)]) from error
    uncompressed = [reader.spec(name) for name in reader if not name.endswith("_scale")]
    usual = _usual_dtype((torch_dtype(spec.dtype), math.prod(spec.shape)) for spec in uncompressed)
    model = diffusers.build(content, reader.path, dtype or usual)
    return _fill(model, reader, dtype, in_float32=diffusers.kept_in_float32(model))


def _fill(
    model: nn.Module,
    reader: CheckpointReader,
    dtype: torch.dtype | None,
    *,
    in_float32: frozenset[str] = frozenset(),
) -> nn.Module:
    """Put the tensors of ``reader`` into ``model``. What ``dtype`` would change becomes float32 instead where a part
    of the tensor's name is one of ``in_float32``.
    """
    checkpoint, config = reader.checkpoint, reader.config
    if config is None:
        config, _ = QuantizationConfig.from_checkpoint(reader.folder)  # which says what is missing
    names = {name: name for name in checkpoint}
    if is_transformers_model(model):
        from compressed_format.integrations.checkpoint_names import model_names

        names = model_names(model, checkpoint)
        config = rename_modules(config, module_names(names), keep=False)
    stored = {own: name for name, own in names.items()}

    def read(name: str) -> torch.Tensor:
        return checkpoint[stored[name]]

    skeleton = Skeleton(model, config, {own: checkpoint.spec(name) for own, name in stored.items()}, read=read)
    packed, placed = skeleton.packed, skeleton.placed
    problems = [*skeleton.problems, *skeleton.zero_point_problems(read)]
    expected = skeleton.modules.state()
    places: dict[int, list[str]] = defaultdict(list)
    for name, value in expected.items():
        places[id(value)].append(name)
    loaded: dict[str, torch.Tensor] = {}
    taken: set[str] = set()
    for name, recipe in skeleton.all_recipes(stored).items():
        loaded[name] = recipe.make([read(source) for source in recipe.sources])
        taken.update(recipe.sources)
    for name, stored_name in stored.items():
        if name in skeleton.explained or name in taken:
            continue
        if name in placed:
            loaded[name] = placed[name]
            continue
        problem = _misfit(checkpoint.spec(stored_name), expected.get(name), packed=name in packed)
        if problem is not None:
            problems.append(Problem(stored_name, problem))
        else:
            loaded[name] = checkpoint[stored_name]
    known = loaded.keys() | skeleton.explained | {names.get(problem.place, problem.place) for problem in problems}
    for tied in places.values():
        if known.isdisjoint(tied):
            problems.append(Problem(tied[0], "is missing from the checkpoint"))
        if len(tied) == 1:
            continue
        found = [name for name in tied if name in loaded]
        problems += [
            Problem(name, f"is not equal to {found[0]} in the checkpoint, and the model has one tensor for both")
            for name in found[1:]
            if not torch.equal(_comparable(loaded[name]), _comparable(loaded[found[0]]))
        ]
    for name, buffer in skeleton.modules.named_buffers():
        if buffer.is_meta and name not in expected:
            message = "is a non-persistent buffer on the meta device, which no checkpoint holds; build it on the CPU"
            problems.append(Problem(name, message))
    if problems:
        raise CheckpointError(f"{reader.path} does not fit the model:", problems)
    uncompressed = [name for name, tensor in loaded.items() if name not in packed and tensor.is_floating_point()]
    if dtype is not None:
        for name in uncompressed:
            exempt = not in_float32.isdisjoint(name.split("."))
            loaded[name] = loaded[name].to(torch.float32 if exempt else dtype)
    for tied in places.values():
        tensor = loaded.get(tied[0])
        if tensor is None:
            tensor = next((loaded[name] for name in tied if name in loaded), None)
        if tensor is not None and tensor is not expected[tied[0]]:
            _assign(skeleton.modules, tied, tensor)
    if dtype is None:
        # Where nothing is uncompressed, scales tell the dtype of the model they were found in.
        dtype = _usual_dtype(_sizes(loaded[name] for name in uncompressed)) or _usual_dtype(_sizes(loaded.values()))
    skeleton.finish(dtype)
    attach_config(model, skeleton.config)
    tell_library(model, skeleton.config)
    return model


def _misfit(stored: TensorSpec, value: Any, *, packed: bool) -> str | None:
    """Why a tensor of the checkpoint cannot become ``value`` in the model, or None."""
    if not isinstance(value, torch.Tensor):
        return "is in the checkpoint, but the model has no such tensor"
    if value.shape != tuple(stored.shape):
        return f"has shape {list(stored.shape)} in the checkpoint, and {list(value.shape)} in the model"
    return None if packed else dtype_misfit(stored, value.dtype)


def _usual_dtype(sizes: Iterable[tuple[torch.dtype, int]]) -> torch.dtype | None:
    """The dtype of most of the floats of 16 bits and more, of which ``sizes`` says how many; None without any."""
    counts: Counter[torch.dtype] = Counter()
    for dtype, size in sizes:
        if dtype.is_floating_point and dtype.itemsize >= 2:
            counts[dtype] += size
    return counts.most_common(1)[0][0] if counts else None


def _sizes(tensors: Iterable[torch.Tensor]) -> Iterable[tuple[torch.dtype, int]]:
    return ((tensor.dtype, tensor.numel()) for tensor in tensors)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor


def _assign(modules: ModuleTable, names: Iterable[str], tensor: torch.Tensor) -> None:
    """Put a loaded tensor in every place of one parameter or buffer, which stay one."""
    new: nn.Parameter | None = None
    for name in names:
        parent, _, child = name.rpartition(".")
        module = modules[parent]
        if child in module._buffers:
            module._buffers[child] = tensor
            continue
        old = module._parameters[child]
        if new is None:
            frozen = old is None or not old.requires_grad
            new = frozen_parameter(tensor) if frozen else nn.Parameter(tensor)
        module._parameters[child] = new
