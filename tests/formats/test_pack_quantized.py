"""``pack-quantized``: literal bytes, the two layouts of its past, and tensors that contradict each other."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressed_format.bitpack import pack_codes, packed_words, word_aligned_words
from compressed_format.config import ActivationOrdering, CompressionFormat, QuantizationArgs
from compressed_format.errors import FormatError, UnsupportedFormatError
from compressed_format.formats import FORMATS, PackLayout, PackQuantized, TensorSpec, pack_layout
from compressed_format.quantization import QuantizedWeight, dequantize, quantize
from tests.checks import assert_same_bits, assert_same_tensors, hexadecimal

PACK = FORMATS[CompressionFormat.PACK_QUANTIZED]
CHANNEL = QuantizationArgs(num_bits=4, strategy="channel")
GROUP_ASYMMETRIC = QuantizationArgs(num_bits=4, strategy="group", group_size=4, symmetric=False)


def tensors_of(args: QuantizationArgs, shape: tuple[int, ...] = (2, 8)) -> dict[str, torch.Tensor]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return PACK.encode(quantize(weight, args), args, place="lin")


def test_literal_bytes() -> None:
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1, 0, 1], [7, 6, 5, 4, 3, 2, 1, 0, -1, -2]], dtype=torch.int8)
    scale = torch.tensor([[1.5, 0.5, 0.25], [2.0, 1.0, -4.0]], dtype=torch.bfloat16)
    zero_point = torch.tensor([[-8, 7, 0], [1, -1, 2]], dtype=torch.int8)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=4, symmetric=False)
    tensors = PACK.encode(QuantizedWeight(codes, scale, zero_point), args)
    assert {name: hexadecimal(tensor) for name, tensor in tensors.items()} == {
        # Offset binary 0 1 2 3 4 5 6 7 | 8 9, then 15 14 13 12 11 10 9 8 | 7 6: two words a row, low nibble first.
        "weight_packed": "10325476" + "98000000" + "efcdab89" + "67000000",
        "weight_scale": "c03f" + "003f" + "803e" + "0040" + "803f" + "80c0",
        "weight_shape": "0200000000000000" + "0a00000000000000",
        # Down the rows, one word for each group: 0 9, 15 7 and 8 10.
        "weight_zero_point": "90000000" + "7f000000" + "a8000000",
    }
    assert tensors["weight_zero_point"].shape == (1, 3)
    decoded = PACK.decode(tensors, args)
    assert_same_bits(decoded.codes, codes)
    assert_same_bits(decoded.zero_point, zero_point)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize("leading", [(), (2,)])
def test_zero_points_have_the_strides_of_plain_rows(bits: int, strategy: str, leading: tuple[int, ...]) -> None:
    """What is written to a file is viewed as bytes, which takes a last stride of 1 even where a size is 1."""
    sizes = {
        "group_size": 16 if strategy == "group" else None,
        "block_structure": (2, 3) if strategy == "block" else None,
    }
    args = QuantizationArgs(num_bits=bits, strategy=strategy, symmetric=False, **sizes)
    for name, tensor in tensors_of(args, (*leading, 3, 16)).items():
        assert tensor.stride() == torch.empty(tensor.shape).stride(), name


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), bits=st.integers(1, 8), symmetric=st.booleans())
def test_word_aligned_files(rows: int, columns: int, bits: int, symmetric: bool) -> None:
    """The layout of releases before 0.18, made from codes here; its zero points are word-aligned down the rows."""
    args = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=symmetric)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    quantized = quantize(weight, args)
    tensors = {
        "weight_packed": word_aligned(quantized.codes, bits),
        "weight_scale": quantized.scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        tensors["weight_zero_point"] = word_aligned(quantized.zero_point.T.contiguous(), bits).T.contiguous()
    for name, spec in PackQuantized.word_aligned_specs((rows, columns), args).items():
        assert spec.problem(tensors[name].dtype, tuple(tensors[name].shape)) is None
    decoded = PackQuantized().decode(tensors, args, layout=PackLayout.WORD_ALIGNED)
    assert_same_bits(dequantize(decoded, args), dequantize(quantized, args))
    assert_same_tensors(PACK.encode(decoded, args), PACK.encode(quantized, args))


def word_aligned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    per_word, offset = 32 // bits, 1 << (bits - 1)
    rows = [
        [
            sum((code + offset) << (bits * place) for place, code in enumerate(row[start : start + per_word]))
            for start in range(0, len(row), per_word)
        ]
        for row in codes.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32)


# Which layout --------------------------------------------------------------------------------------------------------

DENSE_WORDS, ALIGNED_WORDS = (
    torch.tensor([[-1, -1]], dtype=torch.int32),
    torch.tensor([[0x3FFFFFFF] * 2], dtype=torch.int32),
)


@pytest.mark.parametrize(
    ("packed", "version", "layout"),
    [
        # 16 codes of 3 bits are two words either way; a set bit 30 or 31 rules the word-aligned layout out.
        (ALIGNED_WORDS, "0.20.0", PackLayout.DENSE),
        (ALIGNED_WORDS, "0.18.0", PackLayout.DENSE),
        (ALIGNED_WORDS, "0.18", PackLayout.DENSE),
        (ALIGNED_WORDS, "1.0.0.dev3", PackLayout.DENSE),
        (ALIGNED_WORDS, "0.17.1", PackLayout.WORD_ALIGNED),
        (ALIGNED_WORDS, "0.9.4", PackLayout.WORD_ALIGNED),
        (ALIGNED_WORDS, None, PackLayout.WORD_ALIGNED),
        (ALIGNED_WORDS, "unknown", PackLayout.WORD_ALIGNED),
        (DENSE_WORDS, "0.20.0", PackLayout.DENSE),
        (DENSE_WORDS, "0.17.1", PackLayout.DENSE),
        (DENSE_WORDS, None, PackLayout.DENSE),
    ],
)
def test_layout_where_both_have_as_many_words(packed: torch.Tensor, version: str | None, layout: PackLayout) -> None:
    assert pack_layout(packed, 3, 16, version=version) is layout


@pytest.mark.parametrize(("bits", "columns"), [(3, 32), (5, 32), (7, 32), (6, 80)])
@pytest.mark.parametrize("version", [None, "0.17.1", "0.20.0"])
def test_layout_where_the_number_of_words_decides(bits: int, columns: int, version: str | None) -> None:
    """Against what the version says, too: the number is in the file's own header."""
    dense, aligned = packed_words(columns, bits), word_aligned_words(columns, bits)
    assert dense < aligned
    for words, layout in ((dense, PackLayout.DENSE), (aligned, PackLayout.WORD_ALIGNED)):
        packed = torch.zeros(2, words, dtype=torch.int32)
        assert pack_layout(packed, bits, columns, version=version) is layout


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_widths_that_never_had_another_layout(bits: int) -> None:
    packed = torch.zeros(2, packed_words(16, bits), dtype=torch.int32)
    assert pack_layout(packed, bits, 16, version="0.17.1") is PackLayout.DENSE


def test_layout_of_a_tensor_without_values() -> None:
    assert pack_layout(torch.empty(1, 2, dtype=torch.int32, device="meta"), 3, 16, version=None) is PackLayout.DENSE


@pytest.mark.parametrize(
    ("words", "columns", "message"),
    [
        (3, 16, "lin.weight_packed: has 3 words a row, expected 2 for 16 codes of 3 bits"),
        (5, 32, r"expected 3 for 32 codes of 3 bits \(or 4 in the word-aligned layout of releases before 0\.18\)"),
    ],
)
def test_a_number_of_words_of_neither_layout(words: int, columns: int, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        pack_layout(torch.zeros(1, words, dtype=torch.int32), 3, columns, version=None, place="lin")


# Older files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["channel", "group", "tensor", "block"])
def test_zero_points_that_were_not_packed(strategy: str) -> None:
    """Releases up to 0.9.3 stored int8 zero points for every strategy."""
    sizes = {
        "group_size": 4 if strategy == "group" else None,
        "block_structure": (2, 3) if strategy == "block" else None,
    }
    args = QuantizationArgs(num_bits=4, strategy=strategy, symmetric=False, **sizes)
    quantized = quantize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), args)
    tensors = PACK.encode(quantized, args) | {"weight_zero_point": quantized.zero_point}
    assert_same_bits(dequantize(PACK.decode(tensors, args), args), dequantize(quantized, args))


def test_an_unset_group_order_is_none() -> None:
    args = replace_order(QuantizationArgs(num_bits=4, strategy="group", group_size=4))
    tensors = tensors_of(args)
    unset = tensors | {"weight_g_idx": torch.full((8,), -1, dtype=torch.int32)}
    assert PACK.decode(unset, args).g_idx is None
    assert PACK.decode(tensors, args).g_idx is None
    in_order = tensors | {"weight_g_idx": torch.tensor([0] * 4 + [1] * 4, dtype=torch.int32)}
    assert_same_bits(dequantize(PACK.decode(in_order, args), args), dequantize(PACK.decode(tensors, args), args))


def replace_order(args: QuantizationArgs) -> QuantizationArgs:
    """The args of a file whose columns were reordered, which only files can say."""
    return args.model_copy(update={"actorder": ActivationOrdering.GROUP})


def test_a_group_order_is_among_the_tensors_of_such_files_only() -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=4)
    assert "weight_g_idx" not in PACK.tensor_specs((2, 8), args)
    assert PACK.tensor_specs((2, 8), replace_order(args))["weight_g_idx"].shape == (8,)


# Contradictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        ({"weight_scale": None}, "lin.weight_scale", "is missing; found weight_packed, weight_shape, weight_zero"),
        ({"weight_packed": None}, "lin.weight_packed", "is missing; found weight_scale, weight_shape, weight_zero"),
        ({"weight_shape": None}, "lin.weight_shape", "is missing; found weight_packed, weight_scale, weight_zero"),
        ({"weight_zero_point": None}, "lin.weight_zero_point", "is missing"),
        ({"weight_scale": torch.ones(2, 3)}, "lin.weight_scale", r"has shape \[2, 3\], expected \[2, 2\]"),
        ({"weight_scale": torch.ones(2, 2).int()}, "lin.weight_scale", "has dtype int32, expected float16 or"),
        ({"weight_scale": torch.tensor([[1, 1], [1, torch.nan]])}, "lin.weight_scale", r"holds nan at index \[1, 1\]"),
        ({"weight_scale": torch.tensor([[1, torch.inf], [1, 1]])}, "lin.weight_scale", r"holds inf at index \[0, 1\]"),
        ({"weight_packed": torch.ones(2, 1)}, "lin.weight_packed", "has dtype float32, expected int32"),
        ({"weight_packed": torch.ones(2, 2).int()}, "lin.weight_packed", r"has shape \[2, 2\], expected \[2, 1\]"),
        ({"weight_packed": torch.ones(()).int()}, "lin.weight_(shape|packed)", "has shape|must be"),
        ({"weight_zero_point": torch.ones(2, 2).int()}, "lin.weight_zero_point", r"has shape \[2, 2\], expected \[1"),
        ({"weight_zero_point": torch.ones(2, 2)}, "lin.weight_zero_point", "has dtype float32, expected int32"),
        ({"weight_zero_point": torch.full((2, 2), 8).to(torch.int8)}, "lin.weight_zero_point", r"holds the code 8 at"),
        ({"weight_g_idx": torch.zeros(8)}, "lin.weight_g_idx", "has dtype float32, expected int32"),
        ({"weight_g_idx": torch.zeros(7).int()}, "lin.weight_g_idx", r"has shape \[7\], expected \[8\]"),
        ({"weight_g_idx": torch.full((8,), 2).int()}, "lin.weight_g_idx", "names groups 2 to 2, expected 0 to 1"),
        ({"weight_g_idx": torch.full((8,), -2).int()}, "lin.weight_g_idx", "names groups -2 to -2, expected 0 to 1"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_format(changes: dict[str, torch.Tensor], place: str, message: str) -> None:
    tensors = {name: value for name, value in (tensors_of(GROUP_ASYMMETRIC) | changes).items() if value is not None}
    with pytest.raises(FormatError, match=f"^{place}: {message}"):
        PACK.decode(tensors, GROUP_ASYMMETRIC, place="lin")


TERABYTES = 1 << 43


@pytest.mark.parametrize(
    "shape",
    [
        torch.tensor([TERABYTES, 8]),
        torch.tensor([2, TERABYTES]),
        torch.tensor([TERABYTES, TERABYTES]),
        torch.tensor([2, 33]),
        torch.tensor([2, 0]),
        torch.tensor([2, -8]),
        torch.tensor([-2, 8]),
        torch.tensor([1, 8]),
        torch.tensor([2, 9]),
        torch.tensor([2, 8, 1]),
        torch.tensor([2]),
        torch.tensor([[2, 8]]),
        torch.tensor([2.0, 8.0]),
        torch.tensor(16),
    ],
)
def test_a_weight_shape_that_contradicts_the_packed_words(shape: torch.Tensor) -> None:
    """Whatever it says, nothing of that size is made: sizes are bounded by the bytes that are there."""
    with pytest.raises(FormatError, match=r"^lin\.weight_(shape|packed): "):
        PACK.decode(tensors_of(CHANNEL) | {"weight_shape": shape}, CHANNEL, place="lin")


def test_a_weight_shape_of_the_wrong_group_count() -> None:
    """Seven columns fit one word as eight do, so it is the scales that tell."""
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=1)
    with pytest.raises(FormatError, match=r"^lin\.weight_scale: has shape \[2, 8\], expected \[2, 7\]"):
        PACK.decode(tensors_of(args) | {"weight_shape": torch.tensor([2, 7])}, args, place="lin")


def test_packed_words_without_rows() -> None:
    tensors = {
        "weight_packed": torch.zeros(1, dtype=torch.int32),
        "weight_shape": torch.tensor([8]),
        "weight_scale": torch.ones(1, 1),
    }
    with pytest.raises(FormatError, match=r"^lin\.weight_packed: has shape \[1\], expected a matrix"):
        PACK.decode(tensors, CHANNEL, place="lin")


def test_weights_without_columns_are_read() -> None:
    tensors = {
        "weight_packed": torch.zeros(3, 0, dtype=torch.int32),
        "weight_shape": torch.tensor([3, 0]),
        "weight_scale": torch.ones(3, 0),
    }
    assert dequantize(PACK.decode(tensors, CHANNEL), CHANNEL).shape == (3, 0)


def test_all_that_is_wrong_is_listed() -> None:
    tensors = tensors_of(GROUP_ASYMMETRIC)
    tensors |= {"weight_scale": torch.ones(1), "weight_zero_point": torch.ones(1)}
    with pytest.raises(FormatError) as caught:
        PACK.decode(tensors, GROUP_ASYMMETRIC, place="lin")
    assert [problem.place for problem in caught.value.problems] == ["lin.weight_scale", "lin.weight_zero_point"]


# What cannot be written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "code"), [(4, 8), (4, -9), (1, 1), (3, -5), (7, 64)])
def test_codes_out_of_range(bits: int, code: int) -> None:
    args = QuantizationArgs(num_bits=bits, strategy="channel")
    codes = torch.zeros(2, 8, dtype=torch.int8)
    codes[1, 3] = code
    half = 1 << (bits - 1)
    message = f"lin.weight: holds the code {code} at index [1, 3], expected {-half} to {half - 1} for {bits} bits"
    with pytest.raises(FormatError, match=f"^{re.escape(message)}"):
        PACK.encode(QuantizedWeight(codes, torch.ones(2, 1)), args, place="lin")


def test_parts_of_a_weight_that_do_not_fit() -> None:
    quantized = quantize(torch.randn(2, 8), GROUP_ASYMMETRIC)
    cases = {
        r"lin\.weight_scale: is missing": replace(quantized, scale=None),
        r"lin\.weight_scale: has shape \[2, 1\], expected \[2, 2\]": replace(quantized, scale=quantized.scale[:, :1]),
        r"lin\.weight_scale: holds nan": replace(quantized, scale=quantized.scale * torch.nan),
        r"lin\.weight_zero_point: is missing": replace(quantized, zero_point=None),
        r"lin\.weight_zero_point: holds the code 9": replace(quantized, zero_point=quantized.zero_point * 0 + 9),
        r"lin\.weight: has dtype float8_e4m3fn, expected int8": replace(
            quantized, codes=quantized.codes.to(torch.float8_e4m3fn)
        ),
        r"lin\.weight_g_idx: names groups 5 to 5": replace(quantized, g_idx=torch.full((8,), 5, dtype=torch.int32)),
    }
    for message, weight in cases.items():
        with pytest.raises(FormatError, match=f"^{message}"):
            PACK.encode(weight, GROUP_ASYMMETRIC, place="lin")


def test_zero_points_of_a_symmetric_scheme() -> None:
    quantized = quantize(torch.randn(2, 8), QuantizationArgs(num_bits=4, strategy="channel", symmetric=False))
    with pytest.raises(FormatError, match=r"^lin\.weight_zero_point: was given, but the scheme is symmetric"):
        PACK.encode(quantized, CHANNEL, place="lin")


def test_schemes_that_are_not_packed() -> None:
    quantized = quantize(torch.randn(2, 8), CHANNEL)
    with pytest.raises(FormatError, match="the format pack-quantized needs a weights scheme, found none"):
        PACK.encode(quantized, None)
    with pytest.raises(UnsupportedFormatError, match="holds integers of 1 to 8 bits, not float of 8 bits"):
        PACK.encode(quantized, QuantizationArgs(num_bits=8, type="float", strategy="channel"))


def test_encoding_never_changes_the_weight() -> None:
    quantized = quantize(torch.randn(3, 13), CHANNEL)
    before = quantized.codes.clone()
    tensors = PACK.encode(quantized, CHANNEL)
    assert_same_bits(quantized.codes, before)
    assert tensors["weight_scale"] is quantized.scale
    assert_same_bits(tensors["weight_packed"], pack_codes(before, 4))


def test_specs_of_older_releases() -> None:
    args = QuantizationArgs(num_bits=3, strategy="channel", symmetric=False)
    older = {name: [(spec.dtypes[0], spec.shape) for spec in specs] for name, specs in older_specs(args).items()}
    assert older["weight_packed"] == [(torch.int32, (40, 4))]
    assert older["weight_zero_point"] == [(torch.int32, (4, 1)), (torch.int8, (40, 1))]
    assert "weight_zero_point" not in older_specs(QuantizationArgs(num_bits=3, strategy="channel"))


def older_specs(args: QuantizationArgs) -> dict[str, list[TensorSpec]]:
    return PackQuantized.legacy_specs((40, 32), args)
