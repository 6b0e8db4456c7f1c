"""``int-``, ``float-`` and ``naive-quantized``, and ``dense``: one stored value for each weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compressed_format.config import CompressionFormat, QuantizationArgs
from compressed_format.errors import FormatError, UnsupportedFormatError
from compressed_format.formats import FORMATS, format_named
from compressed_format.quantization import QuantizedWeight, dequantize, quantize
from tests.checks import assert_same_bits, hexadecimal

INT, FLOAT, NAIVE, DENSE = (
    FORMATS[name]
    for name in (
        CompressionFormat.INT_QUANTIZED,
        CompressionFormat.FLOAT_QUANTIZED,
        CompressionFormat.NAIVE_QUANTIZED,
        CompressionFormat.DENSE,
    )
)
ASYMMETRIC = QuantizationArgs(num_bits=8, strategy="channel", symmetric=False)
FLOAT8 = QuantizationArgs(num_bits=8, type="float", strategy="tensor")


def test_literal_bytes_of_int8() -> None:
    weight = QuantizedWeight(
        codes=torch.tensor([[-128, -1, 0], [1, 2, 127]], dtype=torch.int8),
        scale=torch.tensor([[1.0], [-0.5]], dtype=torch.float16),
        zero_point=torch.tensor([[-3], [7]], dtype=torch.int8),
    )
    tensors = INT.encode(weight, ASYMMETRIC)
    assert {name: hexadecimal(tensor) for name, tensor in tensors.items()} == {
        "weight": "80ff00" + "01027f",
        "weight_scale": "003c" + "00b8",
        "weight_zero_point": "fd" + "07",
    }


def test_literal_bytes_of_float8() -> None:
    values = torch.tensor([[1.0, -2.0, 448.0, 0.0, -0.0, 2.0**-9]])
    tensors = FLOAT.encode(QuantizedWeight(values.to(torch.float8_e4m3fn), torch.tensor([0.125])), FLOAT8)
    assert {name: hexadecimal(tensor) for name, tensor in tensors.items()} == {
        "weight": "38c07e008001",
        "weight_scale": "0000003e",
    }
    assert torch.equal(dequantize(FLOAT.decode(tensors, FLOAT8), FLOAT8), values / 8)


def test_literal_bytes_of_plain_values() -> None:
    tensors = DENSE.encode(QuantizedWeight(torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16)), None)
    assert {name: hexadecimal(tensor) for name, tensor in tensors.items()} == {"weight": "803f00c0"}
    decoded = DENSE.decode(tensors, None)
    assert decoded.scale is None
    assert_same_bits(dequantize(decoded, None), tensors["weight"])
    assert DENSE.tensor_specs((1, 2), None)["weight"].shape == (1, 2)
    stack = torch.zeros(2, 3, 4)
    assert DENSE.decode({"weight": stack}, None).codes is stack


@pytest.mark.parametrize("format", [INT, FLOAT, NAIVE])
def test_the_three_names_hold_the_same_tensors(format: object) -> None:
    quantized = quantize(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), ASYMMETRIC)
    tensors = format.encode(quantized, ASYMMETRIC)
    assert sorted(tensors) == ["weight", "weight_scale", "weight_zero_point"]
    assert_same_bits(dequantize(format.decode(tensors, ASYMMETRIC), ASYMMETRIC), dequantize(quantized, ASYMMETRIC))


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        ({"weight": None}, "lin.weight", "is missing; found weight_scale, weight_zero_point"),
        ({"weight_scale": None}, "lin.weight_scale", "is missing; found weight, weight_zero_point"),
        ({"weight_zero_point": None}, "lin.weight_zero_point", "is missing; found weight, weight_scale"),
        ({"weight": torch.zeros(2, 8)}, "lin.weight", "has dtype float32, expected int8"),
        ({"weight": torch.zeros(8, dtype=torch.int8)}, "lin.weight", r"has shape \[8\], expected a matrix"),
        ({"weight_scale": torch.ones(2)}, "lin.weight_scale", r"has shape \[2\], expected \[2, 1\]"),
        ({"weight_scale": torch.tensor([[1.0], [-torch.inf]])}, "lin.weight_scale", r"holds -inf at index \[1, 0\]"),
        ({"weight_zero_point": torch.ones(2, 1)}, "lin.weight_zero_point", "has dtype float32, expected int8"),
        ({"weight_g_idx": torch.zeros(8)}, "lin.weight_g_idx", "has dtype float32, expected int32"),
    ],
)  # fmt: skip
def test_tensors_that_contradict_the_format(changes: dict[str, torch.Tensor], place: str, message: str) -> None:
    tensors = INT.encode(quantize(torch.randn(2, 8), ASYMMETRIC), ASYMMETRIC) | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(FormatError, match=f"^{place}: {message}"):
        INT.decode(tensors, ASYMMETRIC, place="lin")


def test_codes_out_of_range() -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel")
    codes = torch.tensor([[0, 7], [-8, 8]], dtype=torch.int8)
    with pytest.raises(FormatError, match=r"^lin\.weight: holds the code 8 at index \[1, 1\], expected -8 to 7 for 4"):
        INT.encode(QuantizedWeight(codes, torch.ones(2, 1)), args, place="lin")


def test_codes_that_are_nan() -> None:
    codes = torch.tensor([[0.0, torch.nan]]).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match=r"^lin\.weight: holds the code nan at index \[0, 1\], expected a finite"):
        FLOAT.encode(QuantizedWeight(codes, torch.ones(1)), FLOAT8, place="lin")


def test_parts_of_a_weight_that_do_not_fit() -> None:
    quantized = quantize(torch.randn(2, 8), ASYMMETRIC)
    with pytest.raises(FormatError, match=r"^lin\.weight_scale: is missing"):
        INT.encode(replace(quantized, scale=None), ASYMMETRIC, place="lin")
    with pytest.raises(FormatError, match=r"^lin\.weight_zero_point: is missing"):
        INT.encode(replace(quantized, zero_point=None), ASYMMETRIC, place="lin")
    with pytest.raises(FormatError, match=r"^lin\.weight_zero_point: was given, but the scheme is symmetric"):
        INT.encode(quantized, QuantizationArgs(num_bits=8, strategy="channel"), place="lin")
    with pytest.raises(FormatError, match="the format int-quantized needs a weights scheme, found none"):
        INT.encode(quantized, None)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "lin.weight: is missing; found no tensors"),
        ({"weight": torch.zeros(2, 8, dtype=torch.int8)}, "lin.weight: has dtype int8, expected float16 or"),
        ({"weight": torch.zeros(8)}, r"lin.weight: has shape \[8\], expected \[any, any\]"),
        ({"weight": torch.zeros(())}, r"lin.weight: has shape \[\], expected \[any, any\]"),
    ],
)
def test_dense_weights_that_are_none(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        DENSE.decode(tensors, None, place="lin")


def test_empty_weights_are_read() -> None:
    tensors = {"weight": torch.zeros(0, 8, dtype=torch.int8), "weight_scale": torch.ones(0, 1)}
    args = QuantizationArgs(num_bits=8, strategy="channel")
    assert dequantize(INT.decode(tensors, args), args).shape == (0, 8)


@pytest.mark.parametrize("name", [name for name in CompressionFormat if name not in FORMATS])
def test_formats_without_an_entry_are_refused_by_name(name: CompressionFormat) -> None:
    with pytest.raises(
        UnsupportedFormatError, match=rf"^model\.lin: the format {name.value} cannot be read or written"
    ):
        format_named(name, "model.lin")


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_go_by_their_own_names(name: CompressionFormat) -> None:
    assert format_named(name).name is name
