"""Configs: how each module of a model is compressed, authored by hand or found in a checkpoint. Needs no torch."""

from compressed_format.config.args import QuantizationArgs
from compressed_format.config.config import FORMAT_VERSION, QuantizationConfig
from compressed_format.config.presets import PRESETS
from compressed_format.config.schema_builder import json_schema
from compressed_format.config.scheme import QuantizationScheme
from compressed_format.config.sparsity import MoESparsityConfig, SparsityConfig
from compressed_format.config.targets import Assignment, TargetResolution, expand_ignore, resolve_targets
from compressed_format.config.transform import TransformArgs, TransformConfig, TransformScheme
from compressed_format.config.words import (
    ActivationOrdering,
    CompressionFormat,
    MoESparsityMethod,
    QuantizationStatus,
    QuantizationStrategy,
    QuantizationType,
    TransformLocation,
    TransformType,
)

__all__ = [
    "FORMAT_VERSION",
    "PRESETS",
    "ActivationOrdering",
    "Assignment",
    "CompressionFormat",
    "MoESparsityConfig",
    "MoESparsityMethod",
    "QuantizationArgs",
    "QuantizationConfig",
    "QuantizationScheme",
    "QuantizationStatus",
    "QuantizationStrategy",
    "QuantizationType",
    "SparsityConfig",
    "TargetResolution",
    "TransformArgs",
    "TransformConfig",
    "TransformLocation",
    "TransformScheme",
    "TransformType",
    "expand_ignore",
    "json_schema",
    "resolve_targets",
]
