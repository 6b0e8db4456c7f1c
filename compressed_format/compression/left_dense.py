"""What no target of any config can reach although it is much of a model: told with its share of the bytes."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from compressed_format.config import TargetResolution
from compressed_format.config.experts import expert_stack
from compressed_format.config.modules import list_modules
from compressed_format.errors import Problem

__all__ = ["left_dense", "spared_routers"]

# Below this, it is position embeddings and the like.
_WORTH_TELLING = 0.01
# What chooses among experts is a small part of them.
_LARGE_FOR_ROUTERS = 0.05


def left_dense(model: nn.Module, ignored: Container[str]) -> list[Problem]:
    """Matrices and stacks of them that ``model`` holds neither in Linear or Embedding modules nor in experts that can
    be compressed, if they are a hundredth of its bytes or more. Routers and torch's own layers do not count."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    found: dict[str, str] = {}
    size = 0
    for module in list_modules(model):
        kind = type(module.module)
        own = module.name in ignored or module.is_compressible or module.is_router or module.module is None
        if own or kind.__module__.startswith("torch.") or expert_stack(module.module) is not None:
            continue
        for name, parameter in module.module._parameters.items():
            if parameter is not None and parameter.dim() >= 2 and "Conv1D" not in module.classes:
                found[f"{module.name}.{name}".lstrip(".")] = f"{kind.__name__}.{name} {list(parameter.shape)}"
                size += parameter.nbytes
    if not found or size < total * _WORTH_TELLING:
        return []
    kinds = list(dict.fromkeys(found.values()))
    others = ", …" if len(kinds) > 3 else ""
    message = (
        f"{len(found)} parameters ({', '.join(kinds[:3])}{others}) stay dense, {size / total:.0%} of the model's "
        "bytes: they are in no Linear, and their module computes with them in its own way"
    )
    return [Problem(next(iter(found)) + (", …" if len(found) > 1 else ""), message)]


def spared_routers(model: nn.Module, resolution: TargetResolution) -> list[Problem]:
    """Linear modules that targets pass over as routers by their names, if they are a twentieth of the bytes or more:
    then they may be none."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    sizes = {
        module.name: sum(parameter.nbytes for parameter in module.module.parameters())
        for module in list_modules(model)
        if module.module is not None
        and module.is_compressible
        and module.is_router
        and module.name not in resolution.assignments
        and module.name not in resolution.ignored
    }
    size = sum(sizes.values())
    if not sizes or size < total * _LARGE_FOR_ROUTERS:
        return []
    message = (
        f"{len(sizes)} Linear modules are taken for routers by their names and stay dense, {size / total:.0%} of the "
        "model's bytes; name them in full as targets to compress them, or list them in ignore"
    )
    return [Problem(next(iter(sizes)) + (", …" if len(sizes) > 1 else ""), message)]
