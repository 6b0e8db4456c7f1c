"""Stored tensors as arrays of numpy, on the file's own memory; no torch is imported."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from frozendict import frozendict

from compressed_format.checkpoint import Checkpoint
from compressed_format.errors import CheckpointError, Problem

__all__ = ["array"]

# What numpy itself has no type for, by the name that ml_dtypes has for it.
_EXTRA_TYPES = frozendict(
    {
        "bfloat16": "bfloat16",
        "float8_e4m3fn": "float8_e4m3fn",
        "float8_e5m2": "float8_e5m2",
        "float8_e8m0fnu": "float8_e8m0fnu",
    }
)


def array(checkpoint: Checkpoint, name: str) -> npt.NDArray[Any]:
    """The tensor ``name`` as an array, mapped where it is aligned to its items, else copied.

    Raises ``KeyError`` for a name that is not there, and :class:`CheckpointError` for a dtype that only ``ml_dtypes``
    has, where that is not installed.
    """
    spec = checkpoint.spec(name)
    found = np.frombuffer(checkpoint.data(name), dtype=_numpy_type(spec.dtype, name)).reshape(spec.shape)
    return found if found.flags.aligned else found.copy()


def _numpy_type(dtype: str, name: str) -> Any:
    if dtype not in _EXTRA_TYPES:
        return np.dtype(dtype).newbyteorder("<")
    try:
        import ml_dtypes
    except ImportError as error:
        message = f"is {dtype}, for which numpy needs ml_dtypes: pip install 'compressed-format[numpy]'"
        raise CheckpointError(problems=[Problem(name, message)]) from error
    return np.dtype(getattr(ml_dtypes, _EXTRA_TYPES[dtype]))
