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
    offset_binary = (codes.to(torch.int64) + (1 << (bits - 1))) & ((1 << bits) - 1)
    # 32 consecutive codes fill exactly `bits` words, so the places at which codes straddle words repeat with that
    # period: packing is then `32` vector operations on columns, instead of one operation for each bit.
    blocks = -(-size // 32)
    offset_binary = torch.nn.functional.pad(offset_binary, (0, blocks * 32 - size))
    columns = offset_binary.unflatten(-1, (blocks, 32))
    packed = codes.new_zeros((*codes.shape[:-1], blocks, bits), dtype=torch.int64)
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        packed[..., word] |= columns[..., index] << shift
        if shift + bits > 32:
            packed[..., word + 1] |= columns[..., index] >> (32 - shift)
    packed &= 0xFFFFFFFF
    return _low_words(packed).flatten(-2)[..., :words].contiguous()


def unpack_codes(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """The inverse of :func:`pack_codes`: int32 ``[..., words]`` to int8 codes ``[..., size]``."""
    if packed.numel() == 0:
        return packed.new_zeros((*packed.shape[:-1], size), dtype=torch.int8)
    if 8 % bits == 0:
        return _unpack_bytes(packed, bits, size)
    blocks = -(-size // 32)
    words = packed.to(torch.int64) & 0xFFFFFFFF
    words = torch.nn.functional.pad(words, (0, blocks * bits - words.shape[-1])).unflatten(-1, (blocks, bits))
    codes = packed.new_empty((*packed.shape[:-1], blocks, 32), dtype=torch.int8)
    for index in range(32):
        word, shift = divmod(index * bits, 32)
        column = words[..., word] >> shift
        if shift + bits > 32:
            column |= words[..., word + 1] << (32 - shift)
        codes[..., index] = (column & ((1 << bits) - 1)) - (1 << (bits - 1))
    return codes.flatten(-2)[..., :size].contiguous()


def unpack_word_aligned_codes(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """Codes ``[..., size]`` out of the word-aligned layout: int32 ``[..., ceil(size / (32 // bits))]`` to int8."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=packed.device) * bits
    codes = ((packed.to(torch.int64) & 0xFFFFFFFF).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return (codes - (1 << (bits - 1))).to(torch.int8).flatten(-2)[..., :size].contiguous()


def _pack_bytes(codes: torch.Tensor, bits: int, words: int) -> torch.Tensor:
    """:func:`pack_codes` for widths that divide a byte: codes never straddle, so bytes do, an eighth of the memory."""
    per_byte = 8 // bits
    padding = words * 4 * per_byte - codes.shape[-1]
    offset_binary = codes.view(torch.uint8) + (1 << (bits - 1))
    if bits < 8:
        offset_binary &= (1 << bits) - 1
    columns = torch.nn.functional.pad(offset_binary, (0, padding)).unflatten(-1, (words * 4, per_byte))
    packed = codes.new_zeros((*codes.shape[:-1], words * 4), dtype=torch.uint8)
    for index in range(per_byte):
        packed |= columns[..., index] << (index * bits)
    return packed.view(torch.int32)


def _unpack_bytes(packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    """:func:`unpack_codes` for widths that divide a byte."""
    # Flat, because a dimension of size one may have any stride, and a view as bytes wants the last one to be 1.
    packed = packed.clone(memory_format=torch.contiguous_format) if packed.numel() == 1 else packed
    stored = packed.reshape(-1).view(torch.uint8).reshape(*packed.shape[:-1], packed.shape[-1] * 4)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = stored.unsqueeze(-1) >> shifts
    if bits < 8:
        codes &= (1 << bits) - 1
    # In uint8 the offset wraps around, which is the two's complement of the negative codes.
    codes -= 1 << (bits - 1)
    return codes.flatten(-2)[..., :size].contiguous().view(torch.int8)


def _low_words(values: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of each int64 as an int32 with the same bits."""
    return torch.where(values > 0x7FFFFFFF, values - (1 << 32), values).to(torch.int32)
