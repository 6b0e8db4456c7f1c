"""The dtype in which a model computes, which libraries take for that of its first float.

With packed weights, that may be float8 codes, or scales of another dtype than the model's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from compressed_format.modules.base import CompressedModule

__all__ = ["computing_dtype", "say_computing_dtype"]


def computing_dtype(model: nn.Module, spared: Iterable[str] = ()) -> torch.dtype | None:
    """The dtype of the first float among the parameters, a compressed module's being that of its weight.

    Parameters with one of ``spared`` in their names do not count. None for a model that has no others.
    """
    for name, module in model.named_modules():
        if isinstance(module, CompressedModule):
            dtype: torch.dtype = module.dtype
            return dtype
        for suffix, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not any(part in f"{name}.{suffix}" for part in spared):
                own: torch.dtype = parameter.dtype
                return own
    return None


def say_computing_dtype(model: nn.Module) -> None:
    """Have ``dtype`` of a compressed model of transformers, and of every model within it, say in which it computes.

    ``save_pretrained`` writes it, and the next load gives it to all that is dense. It is a property, which only a class
    can have: the classes of these models get one of their own, which for models that are not compressed is what it was.
    """
    import transformers

    inherited: Any = transformers.PreTrainedModel.dtype

    def dtype(self: Any) -> Any:
        found = computing_dtype(self)
        return inherited.fget(self) if found is None else found

    for part in model.modules():
        kind: Any = type(part)
        if isinstance(part, transformers.PreTrainedModel) and "dtype" not in vars(kind):
            kind.dtype = property(dtype)
