"""The modules of a model as targets see them: names and classes. A model is anything with ``named_modules()``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["NamedModule", "counts_as_linear", "list_modules"]

_COMPRESSIBLE = frozenset({"Linear", "Embedding"})
_ROUTER = re.compile(r"Router|Gating|Gate(?![a-z])")


@dataclass(frozen=True)
class NamedModule:
    """One module: its full name, its class and base classes (most derived first), and itself where there is one."""

    name: str
    classes: tuple[str, ...]
    module: Any = None

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


def list_modules(model_or_names: Any) -> list[NamedModule]:
    """The modules of a model, or those that names describe, in their order.

    Names are a mapping from a module's name to the name of its class, or the names of its class and base classes
    with the most derived first; or just an iterable of names, which all count as Linear.
    """
    if hasattr(model_or_names, "named_modules"):
        known: dict[type, tuple[str, ...]] = {}
        modules = []
        for name, module in model_or_names.named_modules():
            kind = type(module)
            if kind not in known:
                known[kind] = _class_names(kind)
            # Modules that compressed-tensors itself put into a model are no targets.
            if "InternalModule" not in known[kind]:
                modules.append(NamedModule(name, known[kind], module))
        return modules
    if isinstance(model_or_names, Mapping):
        return [NamedModule(name, _given_classes(classes)) for name, classes in model_or_names.items()]
    if isinstance(model_or_names, str) or not isinstance(model_or_names, Iterable):
        raise TypeError(f"expected a model, a mapping or names, not {type(model_or_names).__name__}")
    return [NamedModule(name, ("Linear",)) for name in model_or_names]


def counts_as_linear(module: NamedModule) -> bool:
    """Whether readers of a checkpoint look for a scheme of this module as for a Linear; routers are such."""
    own = module.classes[0] if module.classes else ""
    return "Linear" in module.classes or ("ExpertMLP" not in own and _ROUTER.search(own) is not None)


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
