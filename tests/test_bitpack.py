"""The bits of packed codes: written out by hand, and from any codes to words and back."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from compressed_format.bitpack import (
    pack_codes,
    packed_words,
    unpack_codes,
    unpack_word_aligned_codes,
    word_aligned_words,
)
from tests.checks import assert_same_bits

shapes = st.lists(st.integers(0, 4), min_size=1, max_size=2).flatmap(
    lambda head: st.integers(0, 70).map(lambda size: (*head, size))
)


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, dtype=torch.int8, generator=generator)


def word(bits: str) -> int:
    """An int32 from 32 digits, most significant first."""
    value = int(bits.replace(" ", ""), 2)
    assert len(bits.replace(" ", "")) == 32
    return value - (1 << 32) if value >> 31 else value


# By hand -------------------------------------------------------------------------------------------------------------


def test_eight_codes_of_4_bits_are_one_word() -> None:
    codes = torch.tensor([[-8, -7, -1, 0, 1, 2, 6, 7]], dtype=torch.int8)
    # Offset binary 0 1 7 8 9 10 14 15, the first code in the lowest four bits.
    packed = torch.tensor([[word("1111 1110 1010 1001 1000 0111 0001 0000")]], dtype=torch.int32)
    assert_same_bits(pack_codes(codes, 4), packed)
    assert_same_bits(unpack_codes(packed, 4, 8), codes)
    assert_same_bits(unpack_word_aligned_codes(packed, 4, 8), codes)


def test_eleven_codes_of_3_bits_straddle_two_words() -> None:
    codes = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3, -4, 3, 1]], dtype=torch.int8)
    # Offset binary 0 1 2 3 4 5 6 7 0 7 5: of the last one, 101, two bits end the first word and one starts the second.
    packed = torch.tensor(
        [[word("01 111 000 111 110 101 100 011 010 001 000"), word("0000000000000000000000000000000 1")]],
        dtype=torch.int32,
    )
    assert_same_bits(pack_codes(codes, 3), packed)
    assert_same_bits(unpack_codes(packed, 3, 11), codes)


def test_eleven_codes_of_3_bits_aligned_with_words() -> None:
    codes = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3, -4, 3, 1]], dtype=torch.int8)
    packed = torch.tensor(
        [[word("00 111 000 111 110 101 100 011 010 001 000"), word("00000000000000000000000000000 101")]],
        dtype=torch.int32,
    )
    assert_same_bits(unpack_word_aligned_codes(packed, 3, 11), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (1, [-1, 0, 0, -1, -1, 0, -1, 0, 0], "1 1010 0110"),
        (2, [-2, -1, 0, 1, 1], "11 11 10 01 00"),
        (5, [-16, 15, 0, -1], "01111 10000 11111 00000"),
        (6, [-32, 31, 0], "100000 111111 000000"),
        (7, [-64, 63, 0], "1000000 1111111 0000000"),
        (8, [-128, 127, 0], "10000000 11111111 00000000"),
    ],
)
def test_other_widths(bits: int, codes: list[int], expected: str) -> None:
    """The first code is in the lowest bits, and what is left of the word is zero."""
    digits = expected.replace(" ", "")
    packed = torch.tensor([word(digits.rjust(32, "0"))], dtype=torch.int32)
    assert_same_bits(pack_codes(torch.tensor(codes, dtype=torch.int8), bits), packed)
    assert_same_bits(unpack_codes(packed, bits, len(codes)), torch.tensor(codes, dtype=torch.int8))


@pytest.mark.parametrize(
    ("size", "bits", "dense", "aligned"),
    [
        (16, 3, 2, 2),
        (11, 3, 2, 2),
        (10, 3, 1, 1),
        (32, 3, 3, 4),
        (32, 5, 5, 6),
        (32, 7, 7, 8),
        (33, 4, 5, 5),
        (0, 6, 0, 0),
    ],
)
def test_numbers_of_words(size: int, bits: int, dense: int, aligned: int) -> None:
    assert packed_words(size, bits) == dense
    assert word_aligned_words(size, bits) == aligned


# In general ----------------------------------------------------------------------------------------------------------


@given(shape=shapes, bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_unpacking_inverts_packing(shape: tuple[int, ...], bits: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*shape[:-1], packed_words(shape[-1], bits))
    assert_same_bits(unpack_codes(packed, bits, shape[-1]), codes)


@given(shape=shapes, bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_each_bit_is_where_the_layout_says(shape: tuple[int, ...], bits: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed).flatten(0, -2) if len(shape) > 1 else random_codes((1, *shape), bits, seed)
    rows = pack_codes(codes, bits).tolist()
    for row, words in zip(codes.tolist(), rows, strict=True):
        bit_string = sum((value & 0xFFFFFFFF) << (32 * index) for index, value in enumerate(words))
        assert bit_string == sum((code + (1 << (bits - 1))) << (bits * index) for index, code in enumerate(row))


@given(rows=st.integers(1, 4), size=st.integers(1, 70), bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_words_are_those_of_the_peer(rows: int, size: int, bits: int, seed: int) -> None:
    codes = random_codes((rows, size), bits, seed)
    packed = pack_codes(codes, bits)
    assert_same_bits(packed, pack_to_int32(codes, bits))
    assert_same_bits(unpack_from_int32(packed, bits, codes.shape), codes)


@given(shape=shapes, bits=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_the_word_aligned_layout(shape: tuple[int, ...], bits: int, seed: int) -> None:
    codes = random_codes(shape, bits, seed).flatten(0, -2) if len(shape) > 1 else random_codes((1, *shape), bits, seed)
    per_word = 32 // bits
    rows = []
    for row in codes.tolist():
        chunks = [row[start : start + per_word] for start in range(0, len(row), per_word)]
        rows.append(
            [sum((code + (1 << (bits - 1))) << (bits * index) for index, code in enumerate(chunk)) for chunk in chunks]
        )
    packed = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), word_aligned_words(shape[-1], bits))
    assert_same_bits(unpack_word_aligned_codes(packed.to(torch.int32), bits, shape[-1]), codes)
    if 32 % bits == 0:
        assert_same_bits(pack_codes(codes, bits), packed.to(torch.int32))


@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_out_of_range_never_reaches_a_neighbour(bits: int) -> None:
    codes = torch.tensor([[0, 127, 0, -128, 0]], dtype=torch.int8)
    assert unpack_codes(pack_codes(codes, bits), bits, 5)[0, ::2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_single_word_of_any_stride(bits: int) -> None:
    """A dimension of size one may have any stride, and the transpose of a slice has a strange one."""
    codes = random_codes((1, 3), bits)
    padded = torch.cat([pack_codes(codes, bits), torch.zeros(1, 2, dtype=torch.int32)], dim=1)
    assert padded[:, :1].T.stride(-1) == 3
    assert_same_bits(unpack_codes(padded[:, :1].T, bits, 3), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_meta_tensors_have_the_shapes(bits: int) -> None:
    packed = pack_codes(torch.empty(3, 21, dtype=torch.int8, device="meta"), bits)
    assert packed.shape == (3, packed_words(21, bits))
    assert unpack_codes(packed, bits, 21).shape == (3, 21)
