"""The formats: each translates between a :class:`~compressed_format.quantization.QuantizedWeight` and named tensors.

:data:`FORMATS` and :data:`SPARSITY_FORMATS` are closed tables. A format whose name is known but that has no entry
(NVFP4 and MX) is refused by :func:`format_named`.
"""

from __future__ import annotations

from frozendict import frozendict

from compressed_format.config import CompressionFormat
from compressed_format.errors import Problem, UnsupportedFormatError
from compressed_format.formats.base import Format, TensorSpec
from compressed_format.formats.dense import Dense
from compressed_format.formats.marlin_24 import Marlin24
from compressed_format.formats.naive_quantized import NaiveQuantized
from compressed_format.formats.pack_quantized import PackLayout, PackQuantized, pack_layout
from compressed_format.formats.sparse import Sparse24Bitmask, SparseBitmask, prune_2_of_4

__all__ = [
    "FORMATS",
    "SPARSITY_FORMATS",
    "Format",
    "Marlin24",
    "PackLayout",
    "PackQuantized",
    "Sparse24Bitmask",
    "SparseBitmask",
    "TensorSpec",
    "format_named",
    "pack_layout",
    "prune_2_of_4",
]

FORMATS: frozendict[CompressionFormat, Format] = frozendict(
    {
        entry.name: entry
        for entry in (
            Dense(),
            NaiveQuantized(CompressionFormat.INT_QUANTIZED),
            NaiveQuantized(CompressionFormat.FLOAT_QUANTIZED),
            NaiveQuantized(CompressionFormat.NAIVE_QUANTIZED),
            PackQuantized(),
            Marlin24(),
        )
    }
)

SPARSITY_FORMATS: frozendict[CompressionFormat, SparseBitmask | Sparse24Bitmask] = frozendict(
    {entry.name: entry for entry in (SparseBitmask(), Sparse24Bitmask())}
)


def format_named(name: CompressionFormat, place: str = "") -> Format:
    """The format called ``name``. Raises :class:`UnsupportedFormatError`, naming ``place``, if it has no entry."""
    if name not in FORMATS:
        served = ", ".join(entry.value for entry in FORMATS)
        message = f"the format {name.value} cannot be read or written yet; served are {served}"
        raise UnsupportedFormatError(problems=[Problem(place, message)])
    return FORMATS[name]
