"""Mixtures of experts as targets see them: each projection of each expert is a Linear of its own, as it is in files.

In memory one module may hold the weights of all experts, stacked along a first dimension. It is recognised by what it
says of itself, not by its class.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

__all__ = ["ExpertStack", "expert_stack"]

_LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class ExpertStack(NamedTuple):
    """A module that holds the weights of ``num_experts`` experts; each expert has the ``projections``."""

    num_experts: int
    projections: tuple[str, ...]

    def names(self, module: str) -> Iterator[tuple[int, str, str]]:
        """Expert, projection, and the name that both have in a checkpoint, below the name of the ``module``."""
        for expert in range(self.num_experts):
            for projection in self.projections:
                yield expert, projection, f"{module}.{expert}.{projection}".lstrip(".")


def expert_stack(module: Any) -> ExpertStack | None:
    """What ``module`` holds, if it is a stack of experts: dense as transformers builds it, or compressed."""
    # Nearly no module is one, and torch's take long to say that they lack an attribute.
    kind: Any = type(module)
    if _has_plain_attributes(kind):
        own = vars(module)
        if "down_proj" not in own["_parameters"] and "expert_stack" not in own:
            return None
    known = getattr(module, "expert_stack", None)
    if isinstance(known, ExpertStack):
        return known
    if not all(hasattr(module, flag) for flag in _LAYOUT_FLAGS):
        return None
    parameters = getattr(module, "_parameters", None)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if not isinstance(parameters, Mapping) or any(
        parameters.get(name) is None or parameters[name].dim() != 3 for name in (first, "down_proj")
    ):
        return None
    up = ("gate_proj", "up_proj") if module.has_gate else ("up_proj",)
    return ExpertStack(parameters["down_proj"].shape[0], (*up, "down_proj"))


@cache
def _has_plain_attributes(kind: Any) -> bool:
    """Whether objects of this class are modules of torch which find attributes as torch's own do, not in others."""
    owner = next((base for base in kind.__mro__ if "__getattr__" in vars(base)), object)
    return owner.__name__ == "Module" and owner.__module__ == "torch.nn.modules.module"
