"""Compressed model checkpoints: configs authored in JSON, packed safetensors, and modules that run straight from them.

Names are imported when they are first used: ``import compressed_format`` alone imports neither torch nor pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module. A sorted closed table; `__all__` is its keys.
_EXPORTS = {
    "CalibrationError": "errors",
    "CheckpointError": "errors",
    "CheckpointExistsError": "errors",
    "CheckpointLockedError": "errors",
    "CheckpointReader": "reading",
    "CompressedEmbedding": "modules.linear",
    "CompressedExperts": "modules.experts",
    "CompressedFormatError": "errors",
    "CompressedFormatWarning": "errors",
    "CompressedLinear": "modules.linear",
    "ConfigError": "errors",
    "Difference": "comparison",
    "Finding": "checking",
    "FormatError": "errors",
    "Inspection": "inspection",
    "OpArgumentError": "errors",
    "Problem": "errors",
    "QuantizationArgs": "config",
    "QuantizationConfig": "config",
    "QuantizationError": "errors",
    "QuantizationScheme": "config",
    "QuantizedWeight": "quantization",
    "Report": "checking",
    "TargetError": "errors",
    "UnsupportedFormatError": "errors",
    "backend_info": "ops",
    "check": "checking",
    "compress": "compression.in_place",
    "compress_checkpoint": "streaming",
    "decompress": "compression.in_place",
    "decompress_checkpoint": "streaming",
    "dequantize": "quantization",
    "diff_checkpoints": "comparison",
    "disable_transformers": "takeover",
    "enable_transformers": "takeover",
    "inspect_checkpoint": "inspection",
    "load_compressed": "load",
    "open_checkpoint": "reading",
    "quantize": "quantization",
    "resolve_targets": "config",
    "save_compressed": "save",
}

__all__ = sorted(_EXPORTS)

if TYPE_CHECKING:
    from compressed_format.checking import Finding, Report, check
    from compressed_format.comparison import Difference, diff_checkpoints
    from compressed_format.compression.in_place import compress, decompress
    from compressed_format.config import QuantizationArgs, QuantizationConfig, QuantizationScheme, resolve_targets
    from compressed_format.errors import (
        CalibrationError,
        CheckpointError,
        CheckpointExistsError,
        CheckpointLockedError,
        CompressedFormatError,
        CompressedFormatWarning,
        ConfigError,
        FormatError,
        OpArgumentError,
        Problem,
        QuantizationError,
        TargetError,
        UnsupportedFormatError,
    )
    from compressed_format.inspection import Inspection, inspect_checkpoint
    from compressed_format.load import load_compressed
    from compressed_format.modules.experts import CompressedExperts
    from compressed_format.modules.linear import CompressedEmbedding, CompressedLinear
    from compressed_format.ops import backend_info
    from compressed_format.quantization import QuantizedWeight, dequantize, quantize
    from compressed_format.reading import CheckpointReader, open_checkpoint
    from compressed_format.save import save_compressed
    from compressed_format.streaming import compress_checkpoint, decompress_checkpoint
    from compressed_format.takeover import disable_transformers, enable_transformers


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("compressed_format")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
