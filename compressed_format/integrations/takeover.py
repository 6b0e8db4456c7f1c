"""This library's quantizer in the place of transformers' own for ``compressed-tensors``, and out of it again."""

from __future__ import annotations

import threading
import warnings
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.import_utils import is_compressed_tensors_available

from compressed_format.compression.unserved import unserved
from compressed_format.config import QuantizationConfig, QuantizationStatus
from compressed_format.errors import CompressedFormatWarning, ConfigError, Problem, UnsupportedFormatError
from compressed_format.integrations.quantization_config import CompressedTensorsConfig
from compressed_format.integrations.quantizer import CompressedFormatQuantizer

__all__ = ["disable", "enable"]

_NAME = "compressed-tensors"
# What was found in the two tables under that name, while this library's stands there.
_found: dict[str, Any] = {}
_switching = threading.RLock()


def enable() -> AbstractContextManager[None]:
    """See :func:`compressed_format.enable_transformers`."""
    with _switching:
        switched_on = not _found
        if switched_on:
            _found.update({table: entries.get(_NAME) for table, entries in _tables().items()})
            tables = _tables()
            tables["quantizer"][_NAME] = _quantizer
            tables["config"][_NAME] = CompressedTensorsConfig
        return _Enabled(switched_on)


def disable() -> None:
    """See :func:`compressed_format.disable_transformers`."""
    with _switching:
        for table, entries in _tables().items():
            if not _found or entries.get(_NAME) not in (_quantizer, CompressedTensorsConfig):
                continue  # nothing was changed, or somebody else has changed it since
            if _found[table] is None:
                del entries[_NAME]
            else:
                entries[_NAME] = _found[table]
        _found.clear()


class _Enabled(AbstractContextManager[None]):
    """A block in which transformers is taken over; of several at a time, as in threads, the last to end undoes it."""

    _entered: ClassVar[list[_Enabled]] = []

    def __init__(self, switched_on: bool) -> None:
        self._switched_on = switched_on

    def __enter__(self) -> None:
        with _switching:
            self._entered.append(self)

    def __exit__(self, *exception: object) -> None:
        with _switching:
            self._entered.remove(self)
            if not self._switched_on:
                return
            if self._entered:
                self._entered[0]._switched_on = True
            else:
                disable()


def _tables() -> dict[str, MutableMapping[str, Any]]:
    """Where transformers looks for what stands behind a ``quant_method``."""
    return {"quantizer": AUTO_QUANTIZER_MAPPING, "config": AUTO_QUANTIZATION_CONFIG_MAPPING}


def _quantizer(quantization_config: Any, *, pre_quantized: bool = True, **kwargs: Any) -> Any:
    """The quantizer for a checkpoint: this library's, or transformers' own where that one has to do."""
    problems = _not_served(quantization_config) if pre_quantized else []
    if not problems:
        return CompressedFormatQuantizer(quantization_config, pre_quantized=pre_quantized, **kwargs)
    if not is_compressed_tensors_available():
        message = (
            "this checkpoint is not served, and compressed-tensors, with which transformers could load it, is not "
            "installed:"
        )
        raise UnsupportedFormatError(message, problems)
    listed = "; ".join(str(problem) for problem in problems)
    message = f"transformers' own quantizer loads this checkpoint, because it cannot be run packed here: {listed}"
    warnings.warn(message, CompressedFormatWarning, stacklevel=2)
    given = CompressedTensorsConfig.of(quantization_config)
    config = _found["config"].from_dict(given.to_dict())
    for name in ("dequantize", "use_optimized_inference"):
        setattr(config, name, getattr(given, name))
    return _found["quantizer"](config, pre_quantized=pre_quantized, **kwargs)


def _not_served(quantization_config: Any) -> list[Problem]:
    if isinstance(quantization_config, QuantizationConfig):
        return unserved(quantization_config)
    try:
        config, _ = QuantizationConfig.from_checkpoint(CompressedTensorsConfig.of(quantization_config).to_dict())
    except ConfigError as error:
        return list(error.problems) or [Problem("", error.message)]
    if config.quantization_status is QuantizationStatus.DECOMPRESSED:
        return [Problem("quantization_status", "is decompressed, so the weights are stored dense beside their scales")]
    return unserved(config)
