"""The ``quantization_config`` that transformers carries from a checkpoint to the quantizer, and into a saved model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationMethod

__all__ = ["METHOD", "CompressedTensorsConfig"]

METHOD = "compressed_format"
"""The name under which ``load_compressed`` asks transformers for the quantizer."""


@register_quantization_config(METHOD)
class CompressedTensorsConfig(transformers.CompressedTensorsConfig):
    """A ``quantization_config`` as transformers carries it; writes itself as it was given, and as compressed-tensors.

    It has the name of transformers' own class because ``from_pretrained`` compares names, and is one of its kind so
    that ``dequantize=True`` is taken over from an argument. Unlike that, it needs no compressed-tensors.
    """

    def __init__(self, **content: Any) -> None:
        # Not that of transformers' class, which has compressed-tensors validate the content.
        given: Any = content.get("quant_method")
        self.quant_method = given if given == METHOD else QuantizationMethod.COMPRESSED_TENSORS
        self.quantization_config = None
        self.dequantize = False
        self.use_optimized_inference = False
        self.authored = True  # by whoever wrote it as it is here, not by compressed-tensors
        self._content = {**content, "quant_method": "compressed-tensors"}

    @classmethod
    def of(cls, given: Any) -> CompressedTensorsConfig:
        """The config out of anything that ``quantization_config=`` may be given, or a checkpoint has."""
        if isinstance(given, cls):
            return given
        config = cls(**(given if isinstance(given, Mapping) else given.to_dict()))
        if isinstance(given, transformers.CompressedTensorsConfig):
            config.take_loading_attributes(given)
            config.authored = False
            if config._content.get("format") == "dense":
                # What that class says when it is given no format.
                del config._content["format"]
        return config

    def take_loading_attributes(self, other: Any) -> None:
        """Be loaded as ``other`` says: dequantized or not."""
        for name, value in other.get_loading_attributes().items():
            setattr(self, name, value)

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return dict(self._content)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
