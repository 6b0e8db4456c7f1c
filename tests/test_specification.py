"""The specification says what the library does: every worked example, table of fields and name of a format in it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compressed_format.activations import activation_group_size, fake_quantize_activations
from compressed_format.config import (
    PRESETS,
    CompressionFormat,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationType,
    SparsityConfig,
    resolve_targets,
)
from compressed_format.dtypes import DTYPES_BY_SAFETENSORS_CODE, torch_dtype
from compressed_format.errors import UnsupportedFormatError
from compressed_format.formats import FORMATS, SPARSITY_FORMATS, PackQuantized, format_named, pack_layout
from compressed_format.quantization import QuantizedWeight, dequantize, quantize

PAGE = (Path(__file__).parents[1] / "schema" / "README.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
BLOCKS = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)]
TABLES: dict[str, Any] = {
    "The whole: QuantizationConfig": QuantizationConfig,
    "A group: QuantizationScheme": QuantizationScheme,
    "One tensor: QuantizationArgs": QuantizationArgs,
    "Sparsity and transforms": SparsityConfig,
}


def examples(key: str) -> list[Any]:
    return [pytest.param(block, id=block["example"]) for block in BLOCKS if key in block]


def dtype_of(code: str) -> torch.dtype:
    return torch_dtype(DTYPES_BY_SAFETENSORS_CODE[code].name)


def spread(values: Any) -> Any:
    """Values as the page lists them, written out where it says only what differs from ``fill``."""
    if not isinstance(values, dict):
        return values
    flat = [values["fill"]] * math.prod(values["shape"])
    for index, value in values["at"].items():
        flat[int(index)] = value
    return flat


def numbers(values: Any, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    tensor = torch.tensor(spread(values), dtype=dtype)
    return tensor.reshape(values["shape"]) if isinstance(values, dict) else tensor


def stored(entry: dict[str, Any]) -> torch.Tensor:
    text = entry["hex"] if "hex" in entry else " ".join(spread(entry))
    content = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
    return content.view(dtype_of(entry["dtype"])).reshape(entry["shape"])


def as_bytes(tensor: torch.Tensor) -> list[int]:
    # A copy, because a dimension of size one may have any stride, and a view as bytes wants the last one to be 1.
    flat: list[int] = tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist()
    return flat


def assert_values(actual: torch.Tensor, expected: Any) -> None:
    assert torch.equal(actual.to(torch.float64), numbers(expected))


def args_of(example: dict[str, Any], key: str = "args") -> QuantizationArgs:
    """The args of an example, read as from a file, where ``actorder`` may be ``group``."""
    group = {"targets": ["Linear"], "weights" if key == "args" else "input_activations": example[key]}
    config, _ = QuantizationConfig.from_checkpoint({"config_groups": {"group_0": group}})
    scheme = config.config_groups["group_0"]
    args = scheme.weights if key == "args" else scheme.input_activations
    assert args is not None
    return args


def quantized_weight(example: dict[str, Any]) -> QuantizedWeight:
    weight = numbers(example["weight"], dtype_of(example["dtype"]))
    if "args" not in example:
        return QuantizedWeight(weight)
    g_idx = torch.tensor(example["g_idx"], dtype=torch.int32) if "g_idx" in example else None
    return quantize(weight, args_of(example), g_idx=g_idx)


def encode(example: dict[str, Any]) -> dict[str, torch.Tensor]:
    args = args_of(example) if "args" in example else None
    tensors = FORMATS[CompressionFormat(example["format"])].encode(quantized_weight(example), args)
    if "sparsity" in example:
        values = tensors.pop("weight")
        tensors |= SPARSITY_FORMATS[CompressionFormat(example["sparsity"])].encode(values)
    return tensors


def decode(example: dict[str, Any]) -> QuantizedWeight:
    tensors = {suffix: stored(entry) for suffix, entry in example["tensors"].items()}
    args = args_of(example) if "args" in example else None
    if "sparsity" in example:
        sparsity = SPARSITY_FORMATS[CompressionFormat(example["sparsity"])]
        parts = {
            suffix: tensors.pop(suffix)
            for suffix in ("shape", "compressed", "bitmask", "row_offsets")
            if suffix in tensors
        }
        tensors["weight"] = sparsity.decode(parts)
    entry = FORMATS[CompressionFormat(example["format"])]
    if isinstance(entry, PackQuantized):
        packed, columns = tensors["weight_packed"], tensors["weight_shape"].tolist()[-1]
        layout = pack_layout(packed, args.num_bits, columns, version=example.get("version"))
        return entry.decode(tensors, args, layout=layout)
    return entry.decode(tensors, args)


@pytest.mark.parametrize("example", examples("weight"))
def test_quantizing_and_encoding_gives_the_listed_bytes(example: dict[str, Any]) -> None:
    tensors = encode(example)
    assert sorted(tensors) == sorted(example["tensors"])
    for suffix, entry in example["tensors"].items():
        expected = stored(entry)
        assert tensors[suffix].dtype == expected.dtype, suffix
        assert tensors[suffix].shape == expected.shape, suffix
        assert as_bytes(tensors[suffix]) == as_bytes(expected), suffix


@pytest.mark.parametrize("example", examples("tensors"))
def test_decoding_gives_the_listed_codes_and_values(example: dict[str, Any]) -> None:
    quantized = decode(example)
    assert_values(quantized.codes, example.get("codes", example["dequantized"]))
    for name, found in (("scale", quantized.scale), ("zero_point", quantized.zero_point)):
        if name in example:
            assert found is not None
            assert_values(found, example[name])
    if "g_idx" in example:
        assert quantized.g_idx is not None
        assert_values(quantized.g_idx, example["g_idx"])
    dense = dequantize(quantized, args_of(example) if "args" in example else None)
    assert dense.dtype == dtype_of(example["dtype"])
    assert_values(dense, example["dequantized"])


@pytest.mark.parametrize("example", examples("read_only"))
def test_what_is_read_only_is_not_written(example: dict[str, Any]) -> None:
    args, quantized = args_of(example), decode(example)
    entry = FORMATS[CompressionFormat(example["format"])]
    if entry.name is CompressionFormat.MARLIN_24:
        with pytest.raises(UnsupportedFormatError, match="read, not written"):
            entry.encode(quantized, args)
    else:
        written = entry.encode(quantized, args)
        assert as_bytes(written["weight_packed"]) != as_bytes(stored(example["tensors"]["weight_packed"]))


@pytest.mark.parametrize("example", examples("activations"))
def test_activations_are_rounded_to_the_listed_values(example: dict[str, Any]) -> None:
    args, dtype = args_of(example, "activations"), dtype_of(example["dtype"])
    scale = numbers(example["static_scale"], dtype) if "static_scale" in example else None
    output = fake_quantize_activations(
        numbers(example["input"], dtype),
        scale,
        None,
        args.num_bits,
        args.type is QuantizationType.FLOAT,
        args.symmetric,
        activation_group_size(args),
    )
    assert output.dtype == dtype
    assert_values(output, example["output"])


@pytest.mark.parametrize("example", examples("config"))
def test_a_hand_written_config_becomes_the_listed_file(example: dict[str, Any]) -> None:
    config = QuantizationConfig.from_dict(example["config"])
    assert config.to_dict() == example["written"]
    assert QuantizationConfig.from_checkpoint(example["written"]) == (config, ())
    resolution = resolve_targets(list(example["modules"]), config)
    assignments = {name: resolution.assignments.get(name) for name in example["modules"]}
    assert {name: found and found.group for name, found in assignments.items()} == example["modules"]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_shuffles_of_marlin_24_are_those_that_the_page_describes(bits: int) -> None:
    rows, columns, group_size = 128, 64, 8
    generator = torch.Generator().manual_seed(bits)
    packed = torch.randint(-(2**31), 2**31, (columns // 32, rows * bits // 2), dtype=torch.int64, generator=generator)
    pairs = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE])  # the first column of a quad, plus 4 times the second
    quads = pairs[torch.randint(0, 6, (rows * columns // 16, 4), generator=generator)]
    meta = (quads << torch.tensor([0, 4, 8, 12])).sum(dim=-1)
    scale = torch.rand(columns // group_size, rows, generator=generator).to(torch.float16)
    tensors = {
        "weight_packed": packed.to(torch.int32),
        "meta": meta.to(torch.int16).reshape(columns // 32, 2 * rows),
        "scale_packed": scale,
    }
    args = QuantizationArgs(num_bits=bits, group_size=group_size)
    found = FORMATS[CompressionFormat.MARLIN_24].decode(tensors, args)

    codes = torch.zeros(rows, columns, dtype=torch.int8)
    for n in range(rows):
        for k in range(columns // 2):
            c, r = n % 64, k % 16
            t = 4 * (2 * (c // 16) + (c % 16) // 8) + (r % 8) // 2
            m, h, i = c % 4, (c % 8) // 4, r % 2 + 2 * (r // 8)
            if bits == 4:
                word, place = 4 * t + m, [0, 2, 4, 6, 1, 3, 5, 7].index(4 * h + i)
            else:
                word, place = 2 * (4 * t + m) + h, [0, 2, 1, 3].index(i)
            value = int(packed[k // 16, (n // 64) * 1024 * bits // 32 + word])
            code = (value >> (place * bits)) % 2**bits - 2 ** (bits - 1)
            c = k // 8
            moved = 64 * (n // 64) + 2 * (n % 2) + (n % 8) // 4 + 32 * ((n % 4) // 2) + 4 * ((n % 64) // 8)
            if moved % 2 == 0 and c % 2 == 1:
                moved, c = moved + 1, c - 1
            elif moved % 2 == 1 and c % 2 == 0:
                moved, c = moved - 1, c + 1
            quad = int(meta[(c // 2) * 2 * rows + 2 * moved + c % 2]) >> (4 * (k // 2 % 4))
            codes[n, 4 * (k // 2) + (quad >> 2 * (k % 2)) % 4] = code
    assert torch.equal(found.codes, codes)
    order = [8 * x + y for x in range(rows // 8) for y in (0, 4, 1, 5, 2, 6, 3, 7)]
    assert found.scale is not None
    assert torch.equal(found.scale[order].T, scale)


def test_every_block_is_an_example_and_checked() -> None:
    kinds = ("tensors", "activations", "config")
    assert all("example" in block and any(kind in block for kind in kinds) for block in BLOCKS)
    assert len({block["example"] for block in BLOCKS}) == len(BLOCKS)


@pytest.mark.parametrize("name", [*FORMATS, *SPARSITY_FORMATS])
def test_every_format_has_a_section_and_an_example(name: CompressionFormat) -> None:
    assert sum(f"`{name}`" in heading for heading in HEADINGS) == 1
    assert any(name in (block.get("format"), block.get("sparsity")) for block in BLOCKS)


def test_every_other_format_is_named_as_refused() -> None:
    refused = re.findall(r"^\| `([\w-]+)` \|", section("Named and refused"), re.MULTILINE)
    others = set(CompressionFormat) - {*FORMATS, *SPARSITY_FORMATS, CompressionFormat.MIXED_PRECISION}
    assert set(refused) == others
    for name in refused:
        with pytest.raises(UnsupportedFormatError, match=name):
            format_named(CompressionFormat(name))


@pytest.mark.parametrize("heading", TABLES)
def test_the_tables_of_fields_are_those_of_the_models(heading: str) -> None:
    model = TABLES[heading]
    documented: dict[str, str] = {}
    for names, default in re.findall(r"^\| (`[^|]*`) \|[^|]*\| ([^|]*) \|", section(heading), re.MULTILINE):
        documented |= dict.fromkeys(re.findall(r"`(\w+)`", names), default)
    assert documented.keys() == model.model_fields.keys() - model.derived
    for name, default in documented.items():
        field = model.model_fields[name]
        expected = field.get_default(call_default_factory=True)
        expected = list(expected) if isinstance(expected, tuple) else expected
        assert default == ("required" if field.is_required() else f"`{json.dumps(expected, default=dict)}`"), name


def test_the_table_of_presets_is_complete_and_right() -> None:
    rows = re.findall(r"^\| (`[A-Z].*?) \|.*\| `([\w-]+)` \|$", section("Presets"), re.MULTILINE)
    documented = {name: format for names, format in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented == {name: QuantizationConfig.preset(name).format.value for name in PRESETS}


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADINGS}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= anchors


def section(heading: str) -> str:
    """The text below a heading, up to the next one."""
    assert HEADINGS.count(heading) == 1, heading
    text = PAGE.split(f"# {heading}\n", 1)[1]
    return re.split(r"^#+ ", text, maxsplit=1, flags=re.MULTILINE)[0]
