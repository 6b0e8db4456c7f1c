"""The JSON Schema says what the models say, as far as JSON Schema can."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from compressed_format.config import (
    PRESETS,
    CompressionFormat,
    QuantizationConfig,
    QuantizationStrategy,
    json_schema,
)
from compressed_format.errors import ConfigError, Problem

SCHEMA_FOLDER = Path(__file__).parents[2] / "schema"
SCHEMA_FILE = SCHEMA_FOLDER / "quantization_config.schema.json"
EXAMPLES = sorted((SCHEMA_FOLDER / "examples").glob("*.json"))
VALIDATOR = Draft202012Validator(json_schema())

INT4 = {"num_bits": 4, "group_size": 32}
FP8 = {"type": "float", "strategy": "channel"}


def test_the_file_in_the_tree_is_up_to_date() -> None:
    printed = subprocess.run(
        [sys.executable, "-W", "error", "-m", "compressed_format.config.schema"], capture_output=True, check=True
    )
    assert printed.stdout.decode() == SCHEMA_FILE.read_text(encoding="utf-8")
    assert json.loads(printed.stdout) == json_schema()


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(json_schema())
    assert json_schema()["$schema"].endswith("draft/2020-12/schema")


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    root = dict(schema)
    parts = root.pop("$defs")
    yield root
    yield from parts.values()


def test_every_property_is_described() -> None:
    for part in _objects(json_schema()):
        assert part["additionalProperties"] is False
        for name, schema in part["properties"].items():
            assert schema["description"].endswith("."), name
    for schema in json_schema()["properties"]["config_groups"]["properties"].values():
        assert schema["description"].endswith(".")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 12


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    VALIDATOR.validate(raw)
    assert raw["$schema"] == "../quantization_config.schema.json"
    assert (path.parent / raw["$schema"]).resolve() == SCHEMA_FILE
    config = QuantizationConfig.from_file(path)
    assert QuantizationConfig.from_dict(config.to_dict()) == config
    assert config == QuantizationConfig.from_dict(raw)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_is_written_is_valid(name: str) -> None:
    VALIDATOR.validate(QuantizationConfig.preset(name).to_dict())
    VALIDATOR.validate({"config_groups": {name.lower(): ["Linear"]}})


def _weights(**fields: Any) -> dict[str, Any]:
    return _group(weights=fields)


def _group(**fields: Any) -> dict[str, Any]:
    return {"config_groups": {"a": {"targets": ["Linear"]} | fields}}


def _top(**fields: Any) -> dict[str, Any]:
    return {"config_groups": {}} | fields


WRONG = [
    {},
    [],
    {"config_groups": []},
    {"config_groups": {"W4A17": ["Linear"]}},
    {"config_groups": {"W4A16": []}},
    {"config_groups": {"W4A16": "Linear"}},
    {"config_groups": {"a": {}}},
    _top(ignor=[]),
    _top(ignore="lm_head"),
    _top(ignore=[1]),
    _top(ignore=[".*x"]),
    _top(ignore=[""]),
    _top(format="bogus"),
    _top(format="marlin-24"),
    _top(quant_method="gptq"),
    _top(quantization_status="done"),
    _top(version=1),
    _top(global_compression_ratio="2"),
    _top(kv_cache_scheme={"strategy": "channel"}),
    _top(kv_cache_scheme=3),
    _top(sparsity_config={"targets": []}),
    _top(sparsity_config={"format": "pack-quantized"}),
    _top(sparsity_config={"format": "sparse-24-bitmask", "sparsity_structure": "4:8"}),
    _top(transform_config={"config_groups": {"R": {}}}),
    _top(transform_config={"config_groups": {"R": {"type": "hadamard", "apply": [{"targets": []}]}}}),
    _top(moe_sparsity_config={"method": "drop", "num_experts": []}),
    {"kv_cache_scheme": {}},
    _group(target=["x"]),
    _group(targets=[]),
    _group(targets="Linear"),
    _group(sparsity="2:5"),
    _group(format="mixed-precision"),
    _group(format="sparse-24-bitmask"),
    _group(format="pack-quantized"),
    _group(format="dense", weights=INT4),
    _group(format="pack-quantized", weights=FP8),
    _group(format="int-quantized", weights=FP8),
    _group(format="float-quantized", weights=INT4),
    _group(format="float-quantized", weights=FP8 | {"num_bits": 6}),
    _group(format="naive-quantized", weights=FP8 | {"num_bits": 4}),
    _group(format="nvfp4-pack-quantized", weights={"type": "float", "num_bits": 4, "group_size": 32}),
    _group(format="mxfp4-pack-quantized", weights={"type": "float", "num_bits": 4, "group_size": 16}),
    _group(format="mxfp6-pack-quantized", weights={"type": "float", "num_bits": 4, "group_size": 32}),
    _group(format="mxfp8-quantized", weights={"type": "float", "num_bits": 6, "group_size": 32}),
    _group(input_activations={"strategy": "block", "block_structure": [1, 1]}),
    _group(input_activations={"group_size": -1}),
    _group(input_activations={"group_size": 4, "actorder": "static"}),
    _group(output_activations={"strategy": "channel"}),
    _weights(num_bits=0),
    _weights(num_bits=9),
    _weights(num_bits="4"),
    _weights(num_bits=4.5),
    _weights(num_bits=True),
    _weights(num_bits=None),
    _weights(type="float", num_bits=5),
    _weights(type="Int"),
    _weights(symmetric=1),
    _weights(symmetric=None),
    _weights(group_size=0),
    _weights(group_size=-2),
    _weights(group_size="4"),
    _weights(strategy="gruop"),
    _weights(strategy="group"),
    _weights(strategy="group", group_size=None),
    _weights(strategy="group", group_size=-1),
    _weights(strategy="tensor_group"),
    _weights(strategy="channel", group_size=4),
    _weights(strategy="token", dynamic=True),
    _weights(strategy="attn_head"),
    _weights(strategy="block"),
    _weights(strategy="block", block_structure=None),
    _weights(strategy="block", block_structure=[0, 1]),
    _weights(strategy="block", block_structure="1x"),
    _weights(block_structure=[1, 1]),
    _weights(dynamic=True),
    _weights(dynamic=1),
    _weights(actorder="group", group_size=4),
    _weights(actorder=True, group_size=4),
    _weights(actorder="static"),
    _weights(actorder="static", strategy="channel"),
    _weights(scale_dtype="float7"),
    _weights(zp_dtype="torch.int32", symmetric=False),
    _weights(zp_dtype="torch.int8", symmetric=False, type="float"),
    _weights(observer=1),
    _weights(observer_kwargs=None),
    _weights(grup_size=4),
    _group(sparsity="2:4") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    _group(input_activations={"strategy": "token"}),
    _group(input_activations={"strategy": "tensor", "dynamic": "local"}),
    _group(input_activations={"strategy": "attn_head", "dynamic": True}),
    _group(input_activations={"dynamic": "sometimes"}),
]


@pytest.mark.parametrize("raw", WRONG, ids=json.dumps)
def test_both_refuse(raw: Any) -> None:
    assert not VALIDATOR.is_valid(raw)
    with pytest.raises(ConfigError):
        QuantizationConfig.from_dict(raw)


RIGHT = [
    {"kv_cache_scheme": {"type": "float"}},
    _top(sparsity_config={}, transform_config=None, ignore=None, format=None),
    _top(ignore=["re:^a[^b]*$", "lm_head"]),
    _group(sparsity="2:4", weights=None, format="dense"),
    _group(sparsity="2:4") | {"sparsity_config": {}},
    _group(sparsity=None) | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    {"config_groups": {"W4A16": ["Linear"]}, "sparsity_config": {"format": "sparse-24-bitmask"}},
    _weights(group_size=128.0),
    _weights(strategy=None, group_size=None),
    _weights(strategy="channel", group_size=-1),
    _weights(strategy="block", block_structure="128x128"),
    _weights(actorder="weight", group_size=4),
    _weights(actorder=False),
    _weights(zp_dtype="int8", symmetric=False),
    _group(format="mxfp8-quantized", weights={"type": "float", "group_size": 32, "scale_dtype": "uint8"}),
    _group(input_activations={"group_size": 4, "dynamic": True}),
]


@pytest.mark.parametrize("raw", RIGHT, ids=json.dumps)
def test_both_take(raw: Any) -> None:
    VALIDATOR.validate(raw)
    QuantizationConfig.from_dict(raw)


ARGS = st.fixed_dictionaries(
    {},
    optional={
        "num_bits": st.sampled_from([0, 1, 4, 6, 8, 9, "4", 4.0]),
        "type": st.sampled_from(["int", "float", "INT"]),
        "symmetric": st.sampled_from([True, False, None]),
        "group_size": st.sampled_from([None, -2, -1, 0, 16, 32, 64]),
        "strategy": st.sampled_from([None, "Group", *(strategy.value for strategy in QuantizationStrategy)]),
        "block_structure": st.sampled_from([None, [1, 2], "2x2", [0, 0], "x"]),
        "dynamic": st.sampled_from([True, False, "local", None]),
        "actorder": st.sampled_from([None, False, True, "static", "weight", "group"]),
        "scale_dtype": st.sampled_from([None, "torch.uint8", "uint9"]),
        "zp_dtype": st.sampled_from([None, "torch.int8", "float8_e4m3fn", "torch.int32"]),
        "grup_size": st.just(1),
    },
)
GROUPS = st.fixed_dictionaries(
    {"targets": st.sampled_from([["Linear"], ["re:.*"], [], ["*"]])},
    optional={
        "weights": st.one_of(st.none(), ARGS),
        "input_activations": st.one_of(st.none(), ARGS),
        "output_activations": st.one_of(st.none(), ARGS),
        "format": st.sampled_from([None, *(format.value for format in CompressionFormat)]),
        "sparsity": st.sampled_from([None, "2:4", "2:5"]),
    },
)


@given(ARGS)
def test_both_agree_on_weights(fields: dict[str, Any]) -> None:
    _agree(_weights(**fields))


@given(GROUPS)
def test_both_agree_on_groups(fields: dict[str, Any]) -> None:
    _agree({"config_groups": {"a": fields}})


def _agree(raw: dict[str, Any]) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        QuantizationConfig.from_dict(raw)
    except ConfigError as error:
        problems = error.problems
    # That no format at all fits is said by the models alone.
    if not problems or not all("no format fits" in problem.message for problem in problems):
        assert VALIDATOR.is_valid(raw) == (not problems), problems
