"""The modules of a model as targets see them: names and classes. A model is anything with ``named_modules()``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from compressed_format.config.experts import expert_stack

__all__ = ["ROUTERS", "NamedModule", "counts_as_linear", "list_modules"]

ROUTERS = frozenset({"gate", "gating", "router", "shared_expert_gate", "wg"})
"""What the modules are called that choose among experts: the last part of their name, or the one before it."""

_COMPRESSIBLE = frozenset({"Linear", "Embedding"})
_OF_EXPERT = re.compile(r"(.+\.experts)\.\d+\.[^.]+", re.ASCII)
_ROUTER = re.compile(r"Router|Gating|Gate(?![a-z])")


@dataclass(frozen=True)
class NamedModule:
    """One module: its full name, its class and base classes (most derived first), and itself where there is one.

    ``stack`` is the name of the module that holds the weights of all experts, for a projection of one of them.
    """

    name: str
    classes: tuple[str, ...]
    module: Any = None
    stack: str | None = None

    @property
    def is_compressible(self) -> bool:
        """Whether its weight can be compressed: it is a Linear or an Embedding."""
        return not _COMPRESSIBLE.isdisjoint(self.classes)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of its own parameters with two or more dimensions, as far as they are known."""
        parameters = getattr(self.module, "_parameters", None)
        if not isinstance(parameters, Mapping):
            return ()
        return tuple(name for name, parameter in parameters.items() if _dimensions(parameter) >= 2)

    @property
    def is_router(self) -> bool:
        """Whether it chooses among experts, as far as its name and class tell."""
        own = self.classes[0] if self.classes else ""
        parts = self.name.split(".")[-2:]
        return _is_router_class(own) or not ROUTERS.isdisjoint(parts[-1:]) or parts[0] == "router"


def list_modules(model_or_names: Any) -> list[NamedModule]:
    """The modules of a model, or those that names describe, in their order.

    Names are a mapping from a module's name to the name of its class, or the names of its class and base classes
    with the most derived first; or just an iterable of names, which all count as Linear.
    """
    if hasattr(model_or_names, "named_modules"):
        known: dict[type, tuple[str, ...]] = {}
        modules: list[NamedModule] = []
        stacks: list[str] = []
        for name, module in model_or_names.named_modules():
            kind = type(module)
            if kind not in known:
                known[kind] = _class_names(kind)
            # Modules that compressed-tensors itself put into a model are no targets.
            if "InternalModule" in known[kind]:
                continue
            if stacks and name.startswith(stacks[-1]):
                continue  # the parts of a compressed stack
            modules.append(NamedModule(name, known[kind], module))
            stack = expert_stack(module)
            if stack is not None:
                stacks.append(f"{name}.")
                modules += [NamedModule(found, ("Linear",), stack=name) for *_, found in stack.names(name)]
        return modules
    if isinstance(model_or_names, Mapping):
        return [
            NamedModule(name, _given_classes(classes), stack=_stack_by_name(name))
            for name, classes in model_or_names.items()
        ]
    if isinstance(model_or_names, str) or not isinstance(model_or_names, Iterable):
        raise TypeError(f"expected a model, a mapping or names, not {type(model_or_names).__name__}")
    return [NamedModule(name, ("Linear",)) for name in model_or_names]


def counts_as_linear(module: NamedModule) -> bool:
    """Whether readers of a checkpoint look for a scheme of this module as for a Linear; routers are such."""
    own = module.classes[0] if module.classes else ""
    return "Linear" in module.classes or _is_router_class(own)


@cache
def _is_router_class(name: str) -> bool:
    return "ExpertMLP" not in name and _ROUTER.search(name) is not None


def _stack_by_name(name: str) -> str | None:
    """The module that holds all experts, for the name of a part of one of them."""
    match = _OF_EXPERT.fullmatch(name)
    return None if match is None else match[1]


def _given_classes(classes: str | Sequence[str]) -> tuple[str, ...]:
    return _with_aliases((classes,) if isinstance(classes, str) else classes)


def _class_names(kind: type) -> tuple[str, ...]:
    """The classes a target can name: those derived from torch's Module, or all where there is no such base."""
    bases = kind.__mro__
    root = next((base for base in bases if base.__name__ == "Module" and base.__module__.startswith("torch.")), object)
    names = [base.__name__ for base in bases if issubclass(base, root) and base is not object]
    return _with_aliases(names)


def _with_aliases(names: Sequence[str]) -> tuple[str, ...]:
    # vLLM's linear layers derive from LinearBase and are meant by "Linear".
    return (*names, "Linear") if "LinearBase" in names and "Linear" not in names else tuple(names)


def _dimensions(parameter: Any) -> int:
    try:
        return int(parameter.dim())
    except Exception:  # parameters that have not been materialized raise exceptions of their own
        return 0
