"""The config that a compressed model carries, for this library and for the one that the model comes from."""

from __future__ import annotations

from typing import Any

from torch import nn

from compressed_format.config import QuantizationConfig
from compressed_format.model_origin import is_diffusers_model, is_transformers_model

__all__ = ["attach_config", "config_of", "forget_config", "tell_library"]

_CONFIG_ATTRIBUTE = "compressed_format_config"


def attach_config(model: nn.Module, config: QuantizationConfig) -> None:
    """Remember with which config ``model`` was compressed or loaded."""
    setattr(model, _CONFIG_ATTRIBUTE, config)


def config_of(model: nn.Module) -> QuantizationConfig | None:
    """The config with which ``model`` was compressed or loaded, or None."""
    config = getattr(model, _CONFIG_ATTRIBUTE, None)
    return config if isinstance(config, QuantizationConfig) else None


def tell_library(model: nn.Module, config: QuantizationConfig) -> None:
    """Give a model of transformers what ``from_pretrained`` gives a quantized one, so that it saves itself as one; and
    one of diffusers likewise."""
    if is_transformers_model(model):
        from compressed_format.integrations.quantizer import attach_quantizer

        attach_quantizer(model, config)
    elif is_diffusers_model(model):
        from compressed_format.integrations import diffusers

        diffusers.attach(model)


def forget_config(model: nn.Module) -> None:
    """The inverse of :func:`attach_config` and :func:`tell_library`: ``model`` is a plain one again."""
    if hasattr(model, _CONFIG_ATTRIBUTE):
        delattr(model, _CONFIG_ATTRIBUTE)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    if is_diffusers_model(model):
        from compressed_format.integrations import diffusers

        diffusers.detach(model)
    elif is_transformers_model(model):
        from compressed_format.integrations.tied_weights import restore_ties

        restore_ties(model)
