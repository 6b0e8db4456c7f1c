"""What no target of any config can reach although it is much of a model: told with its share of the bytes."""

from __future__ import annotations

from collections.abc import Container

from torch import nn

from compressed_format.config.experts import expert_stack
from compressed_format.config.modules import list_modules
from compressed_format.errors import Problem

__all__ = ["left_dense"]

# Below this, it is position embeddings and the like.
_WORTH_TELLING = 0.01


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
