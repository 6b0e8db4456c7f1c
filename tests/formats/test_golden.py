"""Every file that a released version wrote is decoded, and what the current one writes is written bit for bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_format.errors import UnsupportedFormatError
from compressed_format.formats import FORMATS, SPARSITY_FORMATS, format_named, pack_layout
from compressed_format.formats.module import module_tensor_specs
from compressed_format.quantization import QuantizedWeight, dequantize, quantize
from tests.checks import (
    GOLDEN,
    assert_same_bits,
    assert_same_tensors,
    golden_cases,
    golden_mask,
    golden_tensors,
    golden_weight,
)

CURRENT = "v0.20.0"
WORD_ALIGNED = "v0.17.1_wordaligned"
OLDER = "v0.13.0_mxfp4bug"
LEGACY = "v0.14.0.1_legacy"

ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "bias")


def quantized_cases(directory: str, *, served: bool) -> list[Any]:
    """The cases of a directory whose format is (or is not) one that can be decoded."""
    return [
        pytest.param(case, id=name)
        for name, case in golden_cases(directory).items()
        if case["config"] and case["config"].get("config_groups") and (_format(case) in FORMATS) == served
        if served == (_weights(case).scale_dtype is None)
    ]


def _scheme(case: dict[str, Any]) -> QuantizationScheme:
    config, _ = QuantizationConfig.from_checkpoint(case["config"])
    return config.config_groups["group_0"]


def _weights(case: dict[str, Any]) -> QuantizationArgs:
    weights = _scheme(case).weights
    assert weights is not None
    return weights


def _format(case: dict[str, Any]) -> CompressionFormat:
    config, _ = QuantizationConfig.from_checkpoint(case["config"])
    return config.format_of(_scheme(case))


def _dtype(case: dict[str, Any]) -> torch.dtype:
    return getattr(torch, case["dtype"].removeprefix("torch."))


def _weight_tensors(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in golden_tensors(case).items() if name not in ACTIVATIONS}


def _decompressed(case: dict[str, Any]) -> torch.Tensor:
    entry = case["decompressed"]
    return torch.tensor(entry["values"], dtype=torch.float64).to(_dtype(entry)).reshape(case["shape"])


def test_every_current_format_has_golden_vectors() -> None:
    formats = {_format(case.values[0]) for case in quantized_cases(CURRENT, served=True)}
    assert formats == {
        CompressionFormat.PACK_QUANTIZED,
        CompressionFormat.INT_QUANTIZED,
        CompressionFormat.FLOAT_QUANTIZED,
        CompressionFormat.NAIVE_QUANTIZED,
    }


@pytest.mark.parametrize("case", quantized_cases(CURRENT, served=True))
def test_writes_the_bytes_of_the_current_release(case: dict[str, Any]) -> None:
    args = _weights(case)
    weight = golden_weight(*case["shape"], dtype=_dtype(case))
    encoded = FORMATS[_format(case)].encode(quantize(weight, args), args, place="lin")
    assert_same_tensors(encoded, _weight_tensors(case))


@pytest.mark.parametrize("case", quantized_cases(CURRENT, served=True))
def test_scales_of_the_current_release(case: dict[str, Any]) -> None:
    args = _weights(case)
    quantized = quantize(golden_weight(*case["shape"], dtype=_dtype(case)), args)
    for name, actual in (("scale", quantized.scale), ("zp", quantized.zero_point)):
        dtype, shape, values = case["raw_qparams"][name]
        if actual is None:
            assert args.symmetric
            assert not any(values)
        else:
            assert_same_bits(actual, torch.tensor(values).to(_dtype({"dtype": dtype})).reshape(shape))


@pytest.mark.parametrize(
    "case",
    quantized_cases(CURRENT, served=True)
    + quantized_cases(WORD_ALIGNED, served=True)
    + quantized_cases(OLDER, served=True),
)
def test_decodes_to_the_values_of_the_release(case: dict[str, Any]) -> None:
    args, format = _weights(case), FORMATS[_format(case)]
    tensors, kwargs = _weight_tensors(case), {}
    if _format(case) is CompressionFormat.PACK_QUANTIZED:
        columns = tensors["weight_shape"].tolist()[-1]
        version = case["config"]["version"]
        kwargs["layout"] = pack_layout(tensors["weight_packed"], args.num_bits, columns, version=version)
    decoded = format.decode(tensors, args, place="lin", **kwargs)
    weight = golden_weight(*case["shape"], dtype=_dtype(case))
    assert_same_bits(decoded.codes, quantize(weight, args).codes)
    if "error" in case["decompressed"]:
        # The release writes this case and cannot read it: what it means is computed by hand.
        rows, columns = args.block_structure or (1, args.group_size)
        scale, zero_point = (
            torch.zeros(())
            if values is None
            else values.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)
            for values in (decoded.scale, decoded.zero_point)
        )
        scale = scale[: weight.shape[0], : weight.shape[1]]
        expected = (decoded.codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale
    else:
        expected = _decompressed(case)
    assert_same_bits(dequantize(decoded, args), expected + 0.0)


def test_what_the_current_release_writes_and_cannot_read_back() -> None:
    failing = [name for name, case in golden_cases(CURRENT).items() if "error" in case["decompressed"]]
    assert failing == ["pack4_group8_asym"]
    tensors = golden_tensors(golden_cases(CURRENT)["pack4_group8_asym"])
    args = _weights(golden_cases(CURRENT)["pack4_group8_asym"])
    decoded = FORMATS[CompressionFormat.PACK_QUANTIZED].decode(tensors, args)
    assert decoded.zero_point.tolist() == [[1, 0], [-1, -2], [-1, 1], [-1, -1]]
    # Row 0: scales 0.349609375 and 0.37890625, zero points 1 and 0; the first code is -8.
    assert dequantize(decoded, args)[0, 0].item() == torch.tensor(-9 * 0.349609375, dtype=torch.bfloat16).item()


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_word_aligned_files_differ_from_dense_ones(bits: int) -> None:
    """The word-aligned cases prove something only as long as reading them as dense ones would be wrong."""
    name = "pack5_channel_asym_o5_i13" if bits == 5 else f"pack{bits}_channel_sym"
    case = golden_cases(WORD_ALIGNED)[name]
    assert _format(case) is CompressionFormat.PACK_QUANTIZED
    aligned, dense = (golden_tensors(golden_cases(release)[name]) for release in (WORD_ALIGNED, CURRENT))
    assert not torch.equal(aligned["weight_packed"], dense["weight_packed"])


@pytest.mark.parametrize("case", [*quantized_cases(CURRENT, served=False), *quantized_cases(OLDER, served=False)])
def test_nvfp4_and_mx_are_refused(case: dict[str, Any]) -> None:
    args = _weights(case)
    with pytest.raises(UnsupportedFormatError, match=r"^model\.lin: .*(cannot be quantized or run yet|not one of)"):
        quantize(golden_weight(*case["shape"]), args, place="model.lin")
    format = _format(case)
    if format not in FORMATS:
        with pytest.raises(UnsupportedFormatError, match=f"model.lin: the format {format.value} cannot be read"):
            format_named(format, "model.lin")
    else:  # 0.13 stored MXFP8 under the name of another format
        with pytest.raises(UnsupportedFormatError, match="cannot be quantized or run yet"):
            FORMATS[format].decode(_weight_tensors(case), args, place="lin")


@pytest.mark.parametrize("case", quantized_cases(CURRENT, served=True))
def test_tensors_of_a_module_are_those_of_the_file(case: dict[str, Any]) -> None:
    specs = module_tensor_specs(_scheme(case), _format(case), None, tuple(case["shape"]), case["shape"][0])
    tensors = golden_tensors(case)
    tensors.pop("bias", None)
    assert sorted(specs) == sorted(tensors)
    for name, spec in specs.items():
        assert spec.problem(tensors[name].dtype, tuple(tensors[name].shape)) is None, name


# Legacy --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("sparse_bitmask_bfloat16", torch.bfloat16),
        ("sparse_bitmask_float32", torch.float32),
        ("sparse_bitmask_fp8", torch.float8_e4m3fn),
    ],
)
def test_sparse_bitmask(name: str, dtype: torch.dtype) -> None:
    mask = (torch.arange(64) % 3 == 1).reshape(4, 16)
    mask[2] = False
    weight = torch.where(mask, golden_weight(4, 16), torch.zeros(())).to(dtype)
    tensors = golden_tensors(golden_cases(LEGACY)[name])
    tensors.pop("bias", None)
    format = SPARSITY_FORMATS[CompressionFormat.SPARSE_BITMASK]
    assert_same_tensors(format.encode(weight, place="lin"), tensors)
    assert_same_bits(format.decode(tensors, place="lin"), weight)


@pytest.mark.parametrize("name", ["sparse24_bf16", "sparse24_model_only"])
def test_sparse_24_bitmask(name: str) -> None:
    weight = torch.where(golden_mask(4, 16), golden_weight(4, 16), torch.zeros(())).to(torch.bfloat16)
    tensors = golden_tensors(golden_cases(LEGACY)[name])
    format = SPARSITY_FORMATS[CompressionFormat.SPARSE_24_BITMASK]
    assert_same_tensors(format.encode(weight, place="lin"), tensors)
    assert_same_bits(format.decode(tensors, place="lin"), weight)


def test_float8_codes_under_a_2_of_4_bitmask() -> None:
    case = golden_cases(LEGACY)["fp8dyn_plus_sparse24"]
    config, _ = QuantizationConfig.from_checkpoint(case["config"])
    args, format = _weights(case), SPARSITY_FORMATS[CompressionFormat.SPARSE_24_BITMASK]
    assert config.sparsity_config.format is CompressionFormat.SPARSE_24_BITMASK
    tensors = golden_tensors(case)
    weight = torch.where(golden_mask(4, 16), golden_weight(4, 16), torch.zeros(())).to(torch.bfloat16)
    quantized = quantize(weight, args)
    assert_same_bits(quantized.scale, tensors["weight_scale"])
    codes = format.decode(tensors, place="lin")
    assert_same_bits(codes, quantized.codes)
    scale = tensors.pop("weight_scale")
    assert_same_tensors(format.encode(codes, place="lin"), tensors)
    decoded = FORMATS[CompressionFormat.FLOAT_QUANTIZED].decode({"weight": codes, "weight_scale": scale}, args)
    assert_same_bits(dequantize(decoded, args), codes.to(torch.bfloat16) * scale)


def test_columns_in_another_order_than_their_groups() -> None:
    case = golden_cases(LEGACY)["pack4_group8_gidx"]
    args, format = _weights(case), FORMATS[CompressionFormat.PACK_QUANTIZED]
    tensors = golden_tensors(case)
    weight = golden_weight(4, 16)
    decoded = format.decode(tensors, args, place="lin")
    g_idx = decoded.g_idx
    assert g_idx is not None
    assert_same_bits(g_idx, tensors["weight_g_idx"])
    quantized = quantize(weight, args, g_idx=g_idx)
    assert_same_tensors(format.encode(quantized, args, place="lin"), tensors)
    by_hand = torch.stack(
        [decoded.codes[:, column] * decoded.scale[:, int(g_idx[column])] for column in range(16)], dim=1
    )
    assert_same_bits(dequantize(decoded, args), by_hand)
    assert (by_hand - weight).abs().max() < decoded.scale.max()
    in_order = torch.arange(16) // 8
    assert not torch.equal(g_idx, in_order)


def test_columns_ordered_by_activations_in_place() -> None:
    """``actorder: weight`` leaves no trace; its scales were found in another order of columns and come as given."""
    case = golden_cases(LEGACY)["pack4_group8_actweight"]
    args, format = _weights(case), FORMATS[CompressionFormat.PACK_QUANTIZED]
    tensors = golden_tensors(case)
    decoded = format.decode(tensors, args, place="lin")
    assert decoded.g_idx is None
    quantized = quantize(golden_weight(4, 16), args, scale=tensors["weight_scale"])
    assert_same_tensors(format.encode(quantized, args, place="lin"), tensors)
    assert_same_bits(dequantize(decoded, args), decoded.codes * decoded.scale.repeat_interleave(8, dim=1))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("marlin24_4_channel_64x256", QuantizationArgs(num_bits=4, strategy="channel")),
        ("marlin24_4_group_64x256", QuantizationArgs(num_bits=4, strategy="group", group_size=128)),
    ],
)
def test_marlin_24(name: str, args: QuantizationArgs) -> None:
    tensors = golden_tensors(golden_cases(LEGACY)[name])
    masked = torch.where(golden_mask(64, 256), golden_weight(64, 256), torch.zeros(())).to(torch.float16)
    decoded = FORMATS[CompressionFormat.MARLIN_24].decode(tensors, args, place="lin")
    expected = quantize(masked, args)
    assert_same_bits(decoded.scale, expected.scale)
    assert_same_bits(decoded.codes, expected.codes)
    assert_same_bits(dequantize(decoded, args), dequantize(expected, args))


@pytest.mark.parametrize("directory", [CURRENT, WORD_ALIGNED, OLDER, LEGACY])
def test_checkpoints_hold_what_golden_json_says(directory: str) -> None:
    folders = [path for path in sorted((GOLDEN / directory).iterdir()) if path.is_dir()]
    assert folders
    for folder in folders:
        case = golden_cases(directory)[folder.name]
        expected = {f"lin.{suffix}": tensor for suffix, tensor in golden_tensors(case).items()}
        stored = load_file(folder / "model.safetensors")
        assert_same_tensors({name: tensor for name, tensor in stored.items() if not name.startswith("head.")}, expected)
        if case["config"]:
            config = json.loads((folder / "config.json").read_text())
            assert config["quantization_config"] == case["config"]


def test_an_older_release_repeats_the_bytes_of_the_current_one() -> None:
    """Where no layout changed, files by 0.13 and 0.17 are those that are written today."""
    formats = {CompressionFormat.PACK_QUANTIZED, CompressionFormat.INT_QUANTIZED, CompressionFormat.FLOAT_QUANTIZED}
    compared = 0
    for case in [*quantized_cases(OLDER, served=True), *quantized_cases(WORD_ALIGNED, served=True)]:
        golden, args = case.values[0], _weights(case.values[0])
        if _format(golden) in formats and 32 % args.num_bits == 0:
            weight = golden_weight(*golden["shape"], dtype=_dtype(golden))
            encoded = FORMATS[_format(golden)].encode(quantize(weight, args), args)
            assert_same_tensors(encoded, _weight_tensors(golden))
            compared += 1
    assert compared > 40


def test_a_decoded_weight_is_encoded_to_the_same_bytes() -> None:
    for case in quantized_cases(CURRENT, served=True):
        golden, args = case.values[0], _weights(case.values[0])
        tensors, format = _weight_tensors(golden), FORMATS[_format(golden)]
        decoded = format.decode(tensors, args)
        assert isinstance(decoded, QuantizedWeight)
        assert decoded.shape == torch.Size(golden["shape"])
        assert_same_tensors(format.encode(decoded, args), tensors)
