"""What differs between two checkpoints, and by how much: tensors, values, config; raw or dequantized."""

from compressed_format.comparison.checkpoints import diff_checkpoints
from compressed_format.comparison.difference import (
    ABSENT,
    Difference,
    KeyDifference,
    StoredAs,
    TensorDifference,
    ValueDifference,
)

__all__ = [
    "ABSENT",
    "Difference",
    "KeyDifference",
    "StoredAs",
    "TensorDifference",
    "ValueDifference",
    "diff_checkpoints",
]
