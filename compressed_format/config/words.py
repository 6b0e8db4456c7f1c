"""The closed vocabularies of a config. Every member equals the string that stands in a file."""

from __future__ import annotations

from enum import Enum

__all__ = [
    "ActivationOrdering",
    "CompressionFormat",
    "MoESparsityMethod",
    "QuantizationStatus",
    "QuantizationStrategy",
    "QuantizationType",
    "TransformLocation",
    "TransformType",
    "Word",
]


class Word(str, Enum):
    """A string out of a closed list; ``str()`` and formatting give the string itself on every Python."""

    __str__ = str.__str__

    def __format__(self, format_spec: str) -> str:
        return str.__format__(self, format_spec)


class QuantizationType(Word):
    """What the bits of a quantized value mean."""

    INT = "int"
    FLOAT = "float"


class QuantizationStrategy(Word):
    """Which values share one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TOKEN = "token"
    TENSOR_GROUP = "tensor_group"
    ATTN_HEAD = "attn_head"


class ActivationOrdering(Word):
    """In which order a calibration went through the columns of a weight.

    ``STATIC`` (a file may also say ``"weight"``) leaves no trace in the tensors. ``GROUP`` (also ``"dynamic"`` or
    ``true``) was written up to release 0.18 and comes with a ``weight_g_idx``; it is read, never authored.
    """

    STATIC = "static"
    GROUP = "group"


class CompressionFormat(Word):
    """How the tensors of a module are laid out. ``MIXED_PRECISION`` only says that the groups differ."""

    DENSE = "dense"
    SPARSE_BITMASK = "sparse-bitmask"
    SPARSE_24_BITMASK = "sparse-24-bitmask"
    INT_QUANTIZED = "int-quantized"
    FLOAT_QUANTIZED = "float-quantized"
    NAIVE_QUANTIZED = "naive-quantized"
    PACK_QUANTIZED = "pack-quantized"
    MARLIN_24 = "marlin-24"
    MIXED_PRECISION = "mixed-precision"
    NVFP4_PACK_QUANTIZED = "nvfp4-pack-quantized"
    MXFP4_PACK_QUANTIZED = "mxfp4-pack-quantized"
    MXFP6_PACK_QUANTIZED = "mxfp6-pack-quantized"
    MXFP8_QUANTIZED = "mxfp8-quantized"


class QuantizationStatus(Word):
    """How far the modules of a model had come when the config was written."""

    INITIALIZED = "initialized"
    CALIBRATION = "calibration"
    FROZEN = "frozen"
    COMPRESSED = "compressed"
    DECOMPRESSED = "decompressed"


class MoESparsityMethod(Word):
    """What became of the experts that a model gave up."""

    PRUNE = "prune"
    NOVICE = "novice"


class TransformType(Word):
    """Which matrix a transform multiplies by."""

    HADAMARD = "hadamard"
    RANDOM_HADAMARD = "random-hadamard"
    RANDOM_MATRIX = "random-matrix"


class TransformLocation(Word):
    """Where at a module a transform is applied."""

    INPUT = "input"
    WEIGHT_INPUT = "weight_input"
    WEIGHT_OUTPUT = "weight_output"
    OUTPUT = "output"
    K_CACHE = "k_cache"
    Q_ATTN = "q_attn"
