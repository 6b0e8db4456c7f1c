"""The modules of a model under all their names, listed once for a job that asks for them again and again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["ModuleTable"]

_STATE_METHODS = ("state_dict", "_save_to_state_dict", "get_extra_state")


class ModuleTable:
    """The modules of ``model`` as it was when this was made, but for those that are replaced here.

    Its keys are all names: of modules that were there, and of the parts of those that were put there since. A module
    that sits in several places has several names, and goes by the first of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules(remove_duplicate=False))
        first: dict[nn.Module, str] = {}
        self._names: dict[str, list[str]] = {}
        for name, module in self._modules.items():
            known = first.setdefault(module, name)
            self._names.setdefault(known, []).append(name)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """As :meth:`torch.nn.Module.named_modules`: each module once, in module order."""
        return zip(self._names, map(self._modules.__getitem__, self._names), strict=True)

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers of all modules, whatever has been put into these since."""
        for name, module in self.named_modules():
            if not module._buffers:
                continue
            for suffix, buffer in module._buffers.items():
                if buffer is not None:
                    yield f"{name}.{suffix}".lstrip("."), buffer

    def state(self) -> dict[str, torch.Tensor]:
        """As ``state_dict(keep_vars=True)`` of the model, which is asked itself where a class or a hook has a say."""
        plain: dict[type, bool] = {}
        state: dict[str, torch.Tensor] = {}
        for name, module in self._modules.items():
            kind = type(module)
            if kind not in plain:
                plain[kind] = all(getattr(kind, method) is getattr(nn.Module, method) for method in _STATE_METHODS)
            if not plain[kind] or module._state_dict_hooks or module._state_dict_pre_hooks:
                found: dict[str, torch.Tensor] = self._modules[""].state_dict(keep_vars=True)
                return found
            prefix = f"{name}." if name else ""
            for suffix, value in module._parameters.items():
                if value is not None:
                    state[prefix + suffix] = value
            if module._buffers:
                for suffix, buffer in module._buffers.items():
                    if buffer is not None and suffix not in module._non_persistent_buffers_set:
                        state[prefix + suffix] = buffer
        return state

    def names(self, name: str) -> list[str]:
        """All names of the module whose first name is ``name``. Raises ``KeyError``."""
        return self._names[name]

    def is_first_name(self, name: str) -> bool:
        """Whether ``name`` is the first name of a module that was there from the beginning."""
        return name in self._names

    def __getitem__(self, name: str) -> nn.Module:
        """The module that goes by ``name``, its first one or another. Raises ``KeyError``."""
        module: nn.Module = self._modules[name]
        return module

    def replace(self, name: str, successor: nn.Module) -> None:
        """Put ``successor`` into the model wherever the module is whose first name is ``name``."""
        for place in self._names[name]:
            parent, _, child = place.rpartition(".")
            # What nn.Module.__setattr__ does for the name of a child, without looking for other things of that name.
            self._modules[parent]._modules[child] = successor
            self._modules[place] = successor
            if successor._modules:
                self._modules.update(successor.named_modules(prefix=place, remove_duplicate=False))
