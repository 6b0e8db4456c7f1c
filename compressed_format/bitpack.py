"""Sub-byte storage: codes of 1 to 8 bits in rows of little-endian int32 words; plain torch, defining the bytes.

A code ``q`` of ``b`` bits lies in ``[-2**(b-1), 2**(b-1) - 1]`` and is stored in offset binary, ``q + 2**(b-1)``.
The *dense* layout (``schema/README.md``, "pack-quantized") views the words of a row as one bit string, least
significant bit first; element ``i`` occupies bits ``[i*b, (i+1)*b)`` and may straddle two words. The *word-aligned*
layout, which files by compressed-tensors up to 0.17.1 have at 3, 5, 6 and 7 bits, puts ``32 // b`` elements into each
word and leaves its top bits zero. Where ``b`` divides 32 the two are the same.
"""

from __future__ import annotations

import torch

__all__ = [
    "pack_codes",
    "packed_words",
    "unpack_codes",
    "unpack_word_aligned_codes",
    "word_aligned_words",
]


def packed_words(size: int, bits: int) -> int:
    """The number of int32 words that hold ``size`` codes of ``bits`` bits in the dense layout."""
    return -(-size * bits // 32)


def word_aligned_words(size: int, bits: int) -> int:
    """The number of int32 words that hold ``size`` codes of ``bits`` bits in the word-aligned layout."""
    return -(-size // (32 // bits))


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int8 ``codes`` ``[..., n]`` into int32 ``[..., ceil(n * bits / 32)]``, dense layout, padding bits zero.

    Codes must lie in the range of ``bits``: a bit outside it is dropped, never spilled into a neighbour.
    """
    size = codes.shape[-1]
    words = packed_words(size, bits)
    if codes.numel() == 0:
        return codes.new_zeros((*codes.shape[:-1], words), dtype=torch.int32)
    if 8 % bits == 0:
        return _pack_bytes(codes, bits, words)
    # Eight codes fill exactly `bits` bytes, at most seven here, so they come together in one int64.
    groups = -(-size // 8)
    columns = _offset_binary(codes, bits, groups * 8).unflatten(-1, (groups, 8))
    joined = codes.new_zeros((*codes.shape[:-1], groups), dtype=torch.int64)
    for index in range(8):
        joined |= columns[..., index].to(torch.int64) << (index * bits)
    stored = joined.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    packed = codes.new_zeros((*codes.shape[:-1], words * 4), dtype=torch.uint8)
    used = min(words * 4, groups * bits)
    packed[..., :used] = stored[..., :used]
    return packed.view(torch.int32)


def unpack_codes(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: int32 ``[..., words]`` to int8 codes ``[..., size]``."""
    if packed.numel() == 0:
        return packed.new_zeros((*packed.shape[:-1], size), dtype=torch.int8)
    if 8 % bits == 0:
        return _unpack_bytes(packed, bits, size)
    groups = -(-size // 8)
    stored = _bytes_of_words(packed)
    stored = torch.nn.functional.pad(stored, (0, groups * bits - stored.shape[-1])).unflatten(-1, (groups, bits))
    joined = packed.new_zeros((*packed.shape[:-1], groups, 8), dtype=torch.uint8)
    joined[..., :bits] = stored
    values = joined.view(torch.int64).squeeze(-1)
    codes = packed.new_empty((*packed.shape[:-1], groups, 8), dtype=torch.uint8)
    for index in range(8):
        codes[..., index] = (values >> (index * bits)) & ((1 << bits) - 1)
    # In uint8 the offset wraps around, which is the two's complement of the negative codes.
    codes -= 1 << (bits - 1)
    return codes.flatten(-2)[..., :size].contiguous().view(torch.int8)


def unpack_word_aligned_codes(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Codes ``[..., size]`` out of the word-aligned layout: int32 ``[..., ceil(size / (32 // bits))]`` to int8."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=packed.device) * bits
    codes = ((packed.to(torch.int64) & 0xFFFFFFFF).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (codes - (1 << (bits - 1))).to(torch.int8).flatten(-2)[..., :size].contiguous()


def _pack_bytes(codes: torch.Tensor, bits: int, words: int) -> torch.Tensor:
    """:func:`pack_codes` for widths that divide a byte, in which no code straddles two of them."""
    per_byte = 8 // bits
    columns = _offset_binary(codes, bits, words * 4 * per_byte).unflatten(-1, (words * 4, per_byte))
    packed = codes.new_zeros((*codes.shape[:-1], words * 4), dtype=torch.uint8)
    for index in range(per_byte):
        packed |= columns[..., index] << (index * bits)
    return packed.view(torch.int32)


def _unpack_bytes(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """:func:`unpack_codes` for widths that divide a byte."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = _bytes_of_words(packed).unsqueeze(-1) >> shifts
    if bits < 8:
        codes &= (1 << bits) - 1
    codes -= 1 << (bits - 1)
    return codes.flatten(-2)[..., :size].contiguous().view(torch.int8)


def _offset_binary(codes: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Codes as ``bits`` unsigned bits in uint8, each row padded with zeros to ``size``."""
    unsigned = codes.view(torch.uint8) + (1 << (bits - 1))
    if bits < 8:
        unsigned &= (1 << bits) - 1
    return torch.nn.functional.pad(unsigned, (0, size - codes.shape[-1]))


def _bytes_of_words(packed: torch.Tensor) -> torch.Tensor:
    # A single column counts as contiguous whatever its stride, but a view as bytes wants a stride of 1.
    if packed.stride(-1) != 1:
        packed = packed.clone(memory_format=torch.contiguous_format)
    return packed.view(torch.uint8)
