"""The number formats that checkpoints of this kind hold: one table, and the way from a name to a torch dtype.

Importing this module imports no torch; :func:`torch_dtype` does, on its first call.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from frozendict import frozendict

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "DTYPES_BY_SAFETENSORS_CODE", "DType", "torch_dtype"]


@dataclass(frozen=True)
class DType:
    """One number format. ``largest`` is the largest finite value; ``name`` is torch's name without ``torch.``."""

    name: str
    bits: int
    safetensors_code: str
    largest: float
    is_float: bool


DTYPES: frozendict[str, DType] = frozendict(
    {
        dtype.name: dtype
        for dtype in (
            DType("float64", 64, "F64", 1.7976931348623157e308, True),
            DType("float32", 32, "F32", 3.4028234663852886e38, True),
            DType("float16", 16, "F16", 65504.0, True),
            DType("bfloat16", 16, "BF16", 3.3895313892515355e38, True),
            DType("float8_e4m3fn", 8, "F8_E4M3", 448.0, True),
            DType("float8_e5m2", 8, "F8_E5M2", 57344.0, True),
            DType("float8_e8m0fnu", 8, "F8_E8M0", 2.0**127, True),
            DType("int64", 64, "I64", 2**63 - 1, False),
            DType("int32", 32, "I32", 2**31 - 1, False),
            DType("int16", 16, "I16", 2**15 - 1, False),
            DType("int8", 8, "I8", 127, False),
            DType("uint64", 64, "U64", 2**64 - 1, False),
            DType("uint32", 32, "U32", 2**32 - 1, False),
            DType("uint16", 16, "U16", 2**16 - 1, False),
            DType("uint8", 8, "U8", 255, False),
            DType("bool", 8, "BOOL", 1, False),
            DType("complex64", 64, "C64", 3.4028234663852886e38, True),
        )
    }
)

DTYPES_BY_SAFETENSORS_CODE: frozendict[str, DType] = frozendict(
    {dtype.safetensors_code: dtype for dtype in DTYPES.values()}
)


@cache
@cache
def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as ``"bfloat16"`` or ``"torch.bfloat16"``.

    Raises ``KeyError`` for a name that is not in :data:`DTYPES`; nothing else is ever looked up in torch.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name.removeprefix("torch.")].name)
    return dtype
