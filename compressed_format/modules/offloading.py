"""accelerate: modules whose ``forward`` runs under its hooks, and whose tensors it may keep in memory or on disk.

``dispatch_model``, ``cpu_offload``, ``disk_offload`` and transformers' ``device_map`` all attach hooks to modules. A
hook that offloads leaves tensors on the meta device and reads them from its ``weights_map`` for each forward. Here a
module gets its tensors back for a while, is replaced together with its hook, and has other tensors kept for it.

accelerate is optional, and not imported before a module carries a hook of its.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType, MethodType
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from compressed_format.errors import CheckpointError, FormatError, Problem

__all__ = [
    "hand_over",
    "is_kept_around",
    "is_offloaded",
    "means_parameter",
    "offloaded_state",
    "onloaded",
    "original_forward",
]

# Python modules that take parameters from `getattr(module, name)`, to move and to replace them: accelerate's; torch's
# and transformers' that do so with tensors split between processes.
_MOVERS = frozenset(
    {
        "accelerate.utils.modeling",
        "accelerate.utils.other",
        "torch.distributed.fsdp._fully_shard._fsdp_param",
        "transformers.core_model_loading",
    }
)


def means_parameter(caller: FrameType) -> bool:
    """Whether whoever reads ``module.weight`` means the parameter of that name, and not the weight it stands for.

    It is ``get_parameter``, or one of the movers. accelerate would cast the codes of an offloaded weight to the dtype
    of the dense one, and move that in their place.
    """
    return caller.f_code is nn.Module.get_parameter.__code__ or caller.f_globals.get("__name__") in _MOVERS


class _Store:
    """Where a hook finds the tensors that it keeps for a module: entries of a mapping under a common prefix."""

    def __init__(self, weights_map: Any) -> None:
        self._prefix = ""
        while hasattr(weights_map, "dataset") and hasattr(weights_map, "prefix"):
            self._prefix = weights_map.prefix + self._prefix
            weights_map = weights_map.dataset
        self._entries = weights_map

    def read(self, name: str, held: torch.Tensor, place: str) -> torch.Tensor:
        """The tensor that stands behind ``held``, in the dtype of that.

        Raises :class:`FormatError` where it is another tensor: accelerate itself casts whatever it finds.
        """
        try:
            value = self._value(self._prefix + name)
        except (KeyError, OSError, RuntimeError, SafetensorError) as error:
            message = f"was offloaded by accelerate, and cannot be read back: {type(error).__name__}: {error}"
            raise CheckpointError(problems=[Problem(place, message)]) from error
        wide = all(tensor.is_floating_point() and tensor.element_size() >= 2 for tensor in (value, held))
        if value.shape != held.shape or not (wide or value.dtype == held.dtype):
            message = (
                f"was offloaded by accelerate as {_described(value)}, but the model has {_described(held)}; "
                "the folder holds the tensors of another model: offload to an empty one"
            )
            raise FormatError(problems=[Problem(place, message)])
        return value.to(held.dtype)

    def location(self, name: str) -> tuple[object, ...]:
        """What is equal for two tensors that are kept as one."""
        name = self._prefix + name
        entry = self._on_disk(name)
        if entry is None:
            value = self._entries.get(name)
            return (name,) if value is None or value.numel() == 0 else (value.data_ptr(), value.dtype, value.shape)
        return entry.get("safetensors_file", self._entries.save_folder), entry.get("weight_name", name)

    def _on_disk(self, name: str) -> Mapping[str, Any] | None:
        if not hasattr(self._entries, "index") or name in self._entries.state_dict:
            return None
        found: Mapping[str, Any] | None = self._entries.index.get(name)
        return found

    def _value(self, name: str) -> torch.Tensor:
        """A tensor as it is kept, on the CPU; one on disk is mapped, where accelerate would copy it to a device."""
        entry = self._on_disk(name)
        if entry is None:
            value: torch.Tensor = self._entries[name]
            return value
        if entry.get("safetensors_file") is not None:
            with safe_open(entry["safetensors_file"], framework="pt") as file:
                return cast(torch.Tensor, file.get_tensor(entry.get("weight_name", name)))
        dtype, shape = getattr(torch, entry["dtype"]), torch.Size(entry["shape"])
        file_name = str(Path(self._entries.save_folder) / f"{name}.dat")
        mapped = torch.from_file(file_name, shared=False, size=shape.numel() * dtype.itemsize, dtype=torch.uint8)
        return mapped.view(dtype).reshape(shape)

    def replace(self, dropped: Iterable[str], added: Mapping[str, torch.Tensor], place: str) -> None:
        """Keep ``added`` from now on, and no longer ``dropped``. Files in the folder are added, never changed."""
        entries = self._entries
        if isinstance(entries, dict):
            in_memory, index = entries, None
        else:
            in_memory, index = entries.state_dict, entries.index
            if any(self._prefix + name in index for name in {*dropped, *added}) or not in_memory:
                self._write(added, place)
                for name in set(dropped) - added.keys():
                    index.pop(self._prefix + name, None)
                entries.all_keys = [*dict.fromkeys((*in_memory, *index))]
                return
        for name in dropped:
            in_memory.pop(self._prefix + name, None)
        in_memory.update({self._prefix + name: tensor.detach().to("cpu") for name, tensor in added.items()})
        if index is not None:
            entries.all_keys = [*dict.fromkeys((*in_memory, *index))]

    def _write(self, tensors: Mapping[str, torch.Tensor], place: str) -> None:
        if not tensors:
            return
        folder = self._entries.save_folder
        if folder is None:
            message = (
                "is on disk, and needs a place there for its new tensors; pass offload_folder= to from_pretrained "
                "(offload_dir= to dispatch_model), or a device_map that keeps it in memory"
            )
            raise CheckpointError(problems=[Problem(place, message)])
        named = {self._prefix + name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            # A name of its own: other tensors of this module may be read from a file until these are written.
            descriptor, file = tempfile.mkstemp(".safetensors", self._prefix, folder)
            os.close(descriptor)
            save_file(named, file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(problems=[Problem(str(folder), f"cannot be written: {error}")]) from error
        for name, tensor in named.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._entries.index[name] = {"safetensors_file": file, "weight_name": name, "dtype": dtype}


def original_forward(module: nn.Module) -> Any:
    """The function behind ``module.forward``, seen through a hook of accelerate; None if the object has another one."""
    own = vars(module).get("forward")
    if own is None:
        return type(module).forward
    if isinstance(own, partial) and getattr(own.func, "__module__", "") == "accelerate.hooks":
        own = vars(module).get("_old_forward")
    # Removing a hook leaves the bound method of the class on the object.
    return own.__func__ if isinstance(own, MethodType) and own.__self__ is module else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's tensors are on the meta device, and a hook of its own has them."""
    return _store_of(module) is not None and any(_is_meta(value) for value in module._parameters.values())


def is_kept_around(model: nn.Module, name: str) -> bool:
    """Whether the hook of a module around the module ``name`` keeps its tensors, and loads them all at once."""
    module = model.get_submodule(name)
    held = [suffix for suffix, value in module._parameters.items() if _is_meta(value)]
    return bool(held) and _store_of(module) is None and _store_above(model, f"{name}.{held[0]}") is not None


@contextmanager
def onloaded(module: nn.Module, place: str) -> Iterator[None]:
    """Within it, ``module`` holds the values of the tensors that are offloaded; afterwards they are offloaded again.

    What has been replaced meanwhile is kept where the others were. A module that is not offloaded stays as it is.
    """
    store = _store_of(module)
    held = {name: value for name, value in module._parameters.items() if value is not None and value.is_meta}
    if store is None or not held:
        yield
        return
    loaded = {
        name: nn.Parameter(store.read(name, value, f"{place}.{name}"), requires_grad=value.requires_grad)
        for name, value in held.items()
    }
    module._parameters.update(loaded)
    done = False
    try:
        yield
        done = True
    finally:
        now = module._parameters
        now.update({name: held[name] for name, value in loaded.items() if now.get(name) is value})
        if done:
            _offload(module, store, held, place)


def hand_over(module: nn.Module, successor: nn.Module, place: str) -> None:
    """Put the hook of ``module`` on ``successor``, whose tensors are then kept where those of ``module`` were."""
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module

    store = _store_of(module)
    held = {name for name, value in module._parameters.items() if _is_meta(value)}
    if store is not None and held:
        devices = set(_offloading(hook).original_devices.values()) - {torch.device("meta")}
        values = {name: value for name, value in successor._parameters.items() if value is not None}
        store.replace(held - values.keys(), {name: value for name, value in values.items() if not value.is_meta}, place)
        # The hook remembers where it finds tensors as it is attached, and puts them back there when it is removed.
        home = next(iter(devices), torch.device("meta"))
        for name, value in values.items():
            if value.device != home and not value.is_meta:
                successor._parameters[name] = nn.Parameter(value.to(home), requires_grad=value.requires_grad)
    for part in _parts(hook):
        # It keeps a copy of a tied weight on each device, for as long as the hook lives.
        for dense in module._parameters.values():
            if dense is not None and not dense.is_meta:
                (getattr(part, "tied_params_map", None) or {}).pop(dense.data_ptr(), None)
    add_hook_to_module(successor, hook)


def offloaded_state(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``state``, a state dict of ``model``, with the values of the tensors that accelerate has offloaded.

    They are those that accelerate keeps in memory, or mapped from disk; tensors that are kept as one are one. Tensors
    on the meta device that nobody keeps stay there.
    """
    values = dict(state)
    found: dict[tuple[object, ...], torch.Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_meta:
            continue
        keeper = _store_above(model, name)
        if keeper is not None:
            store, relative = keeper
            key = store.location(relative)
            if key not in found:
                found[key] = store.read(relative, tensor, name)
            values[name] = found[key]
    return values


def _store_above(model: nn.Module, name: str) -> tuple[_Store, str] | None:
    """Who keeps the tensor ``name``, and under which name: its module's hook, or that of a module around it."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        store = _store_of(model.get_submodule(".".join(parts[:depth])))
        if store is not None:
            return store, ".".join(parts[depth:])
    return None


def _store_of(module: nn.Module) -> _Store | None:
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return None
    hook = _offloading(hook)
    return None if hook is None or hook.weights_map is None else _Store(hook.weights_map)


def _offloading(hook: Any) -> Any:
    """The part of a hook that offloads, or None."""
    return next((part for part in _parts(hook) if getattr(part, "offload", False) is True), None)


def _parts(hook: Any) -> tuple[Any, ...]:
    return tuple(getattr(hook, "hooks", (hook,)))


def _offload(module: nn.Module, store: _Store, held: Iterable[str], place: str) -> None:
    """Keep every tensor of ``module`` in ``store``, which has kept those named ``held``."""
    values = {name: value for name, value in module._parameters.items() if value is not None}
    added = {name: value for name, value in values.items() if not value.is_meta}
    store.replace(set(held) - values.keys(), added, place)
    for name, value in added.items():
        module._parameters[name] = nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)


def _is_meta(value: torch.Tensor | None) -> bool:
    return value is not None and value.is_meta


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
