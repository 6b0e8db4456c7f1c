"""Which library a model comes from, told without importing any: a model is of a library only if that is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["diffusers_class_name", "is_diffusers_model", "is_transformers_model"]


def is_diffusers_model(model: Any) -> bool:
    """Whether ``model`` is of a class of diffusers."""
    library = sys.modules.get("diffusers.models.modeling_utils")
    return library is not None and isinstance(model, library.ModelMixin)


def is_transformers_model(model: Any) -> bool:
    """Whether ``model`` is of a class of transformers, or derived from one."""
    library = sys.modules.get("transformers.modeling_utils")
    return library is not None and isinstance(model, library.PreTrainedModel)


def diffusers_class_name(content: Any) -> str | None:
    """The class that the parsed ``config.json`` of a model of diffusers names; None for the config of any other."""
    if not isinstance(content, Mapping) or "model_type" in content or "architectures" in content:
        return None
    name = content.get("_class_name")
    return name if isinstance(name, str) else None
