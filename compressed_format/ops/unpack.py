"""``compressed_format::unpack_codes``: the int32 words of a file into int8 codes of 1 to 8 bits.

The definition is :func:`compressed_format.bitpack.unpack_codes`, or
:func:`~compressed_format.bitpack.unpack_word_aligned_codes` for the layout of older releases.
"""

from __future__ import annotations

import torch

from compressed_format import bitpack
from compressed_format.errors import OpArgumentError
from compressed_format.ops.definition import define_op

__all__ = ["unpack_codes"]


def _check(packed: torch.Tensor, bits: int, size: int, word_aligned: bool) -> None:
    if packed.dtype != torch.int32:
        raise OpArgumentError(f"unpack_codes: packed must be torch.int32, not {packed.dtype}")
    if packed.ndim == 0:
        raise OpArgumentError("unpack_codes: packed must have at least one dimension, that of words, but has none")
    if not 1 <= bits <= 8:
        raise OpArgumentError(f"unpack_codes: bits must lie in 1 to 8, not {bits}")
    if size < 0:
        raise OpArgumentError(f"unpack_codes: size must not be negative, not {size}")
    words = bitpack.word_aligned_words(size, bits) if word_aligned else bitpack.packed_words(size, bits)
    if packed.shape[-1] != words:
        message = f"must have {words} words a row for {size} codes of {bits} bits, not shape {list(packed.shape)}"
        raise OpArgumentError(f"unpack_codes: packed {message}")


def _reference(packed: torch.Tensor, bits: int, size: int, word_aligned: bool) -> torch.Tensor:
    unpack = bitpack.unpack_word_aligned_codes if word_aligned else bitpack.unpack_codes
    return unpack(packed, bits, size)


def _fake(packed: torch.Tensor, bits: int, size: int, word_aligned: bool) -> torch.Tensor:
    return packed.new_empty((*packed.shape[:-1], size), dtype=torch.int8)


unpack_codes = define_op(
    "unpack_codes", "Tensor packed, int bits, int size, bool word_aligned", _reference, _check, _fake
)
