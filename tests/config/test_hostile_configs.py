"""Whatever the input, nothing but this library's own exceptions comes out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compressed_format.config import PRESETS, QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_format.errors import CheckpointError, CompressedFormatError, ConfigError

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.sampled_from(["Linear", "re:.*", "re:(", "pack-quantized", "group", "float", "W4A16", 10**500, "\ud800"]),
)
KEYS = st.one_of(
    st.sampled_from(
        [
            *QuantizationConfig.model_fields,
            *QuantizationScheme.model_fields,
            *QuantizationArgs.model_fields,
            *PRESETS,
            "$schema",
        ]
    ),
    st.text(max_size=4),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5))
)

VALID = [
    {"config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32, "actorder": None}}}},
    {
        "config_groups": {"FP8": ["re:.*"], "b": {"targets": ["x"], "sparsity": "2:4", "format": "dense"}},
        "kv_cache_scheme": {"type": "float"},
        "ignore": ["lm_head"],
    },
    {
        "config_groups": {},
        "sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]},
        "transform_config": {
            "config_groups": {"R": {"type": "hadamard", "apply": [{"targets": "x", "location": "input"}]}}
        },
        "moe_sparsity_config": {"method": "prune", "num_experts": [1, None]},
    },
]


def survives(raw: Any) -> None:
    for way in (QuantizationConfig.from_dict, QuantizationConfig.from_checkpoint):
        try:
            read = way(raw)
        except CompressedFormatError as error:
            str(error)
            continue
        config, warnings = (read, ()) if isinstance(read, QuantizationConfig) else read
        assert all(str(problem) for problem in warnings)
        json.dumps(config.to_dict(), allow_nan=False)
        hash(config)
        # Empty keys that nobody knows are kept and not written.
        assert QuantizationConfig.from_checkpoint(config.to_dict())[0] == config.replace(unknown={})


@given(JSON)
def test_any_json(raw: Any) -> None:
    survives(raw)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_valid_configs_with_something_else_somewhere(data: st.DataObject) -> None:
    raw = json.loads(json.dumps(data.draw(st.sampled_from(VALID))))
    for _ in range(data.draw(st.integers(1, 3))):
        parent = raw
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            key = data.draw(st.sampled_from(keys)) if keys else None
            if key is not None and isinstance(parent[key], (dict, list)) and data.draw(st.booleans()):
                parent = parent[key]
                continue
            break
        value = data.draw(JSON)
        if isinstance(parent, dict):
            parent[data.draw(KEYS) if key is None or data.draw(st.booleans()) else key] = value
        elif key is None:
            parent.append(value)
        else:
            parent[key] = value
    survives(raw)


class Rude:
    """An object that cannot even be printed or compared."""

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


def _cycle() -> dict[str, Any]:
    loop: dict[str, Any] = {}
    loop["a"] = [loop]
    return loop


ODD_VALUES: list[Any] = [
    Rude(),
    object(),
    b"bytes",
    {1, 2},
    10**10000,
    -(10**10000),
    math.nan,
    math.inf,
    1e300,
    1j,
    "\ud800",
    "re:\ud800",
    "re:" + "(" * 5000,
    "re:" + "(" * 5000 + ")" * 5000,
    "re:(?P<a>x)(?P<a>y)",
    "re:[[:alpha:]]",
    "re:a{e<=1}",
    "re:a{99999999999}",
    "re:a{" + "9" * 5000 + "}",
    "re:(a{9999}){9999}",
    "+-4",
    "--4",
    _cycle(),
    [Rude()],
    {"x": Rude()},
    {3: 4},
    {(1,): 2},
    range(3),
    Rude,
]


@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_odd_values_everywhere(value: Any) -> None:
    survives(value)
    for field in [*QuantizationConfig.model_fields, "novelty"]:
        survives({"config_groups": {"W4A16": ["Linear"]}, field: value})
    for field in [*QuantizationScheme.model_fields, "novelty"]:
        survives({"config_groups": {"a": {"targets": ["Linear"], field: value}}})
    for field in [*QuantizationArgs.model_fields, "novelty"]:
        survives({"config_groups": {"a": {"targets": ["Linear"], "weights": {field: value}}}})
    survives({"config_groups": {"a": value, "W4A16": [value]}, "ignore": [value, "x"]})
    survives({"quantization_config": value})
    survives({"text_config": {"quantization_config": value}})
    with pytest.raises(ConfigError):
        QuantizationArgs(num_bits=value if not isinstance(value, float) else "x")
    survives({"config_groups": {"a": {"targets": ["Linear"], "weights": {"observer_kwargs": {"deep": value}}}}})


FILES: list[tuple[bytes, str]] = [
    (b"", "no valid JSON"),
    (b"\xff\xfe{\x00}\x00", "no UTF-8"),
    (b"\x80", "no UTF-8"),
    (b"[" * 1_000_000, "nested too deeply"),
    (b'{"a":' * 1_000_000, "nested too deeply"),
    (b'{"config_groups": ' + b"9" * 100_000 + b"}", "a number of 100000 digits"),
    (b'{"config_groups": {"W4A16": ["Linear"]}} trailing', "Extra data"),
    (b'{"config_groups": {"W4A16": [NaN]}}', "must be a string, not NaN"),
    (b'{"config_groups": {"a": {"targets": [-Infinity]}}}', "must be a string, not -Infinity"),
    (b'{"config_groups": {"a": {"targets": ["x"], "weights": {"num_bits": 1e999}}}}', "not Infinity"),
    (b'{"config_groups": {"a": {"targets": ["x"], "weights": {"num_bits": 1' + b"0" * 300 + b"}}}}", "bits"),
    (b'{"config_groups": {"a": {"targets": ["x"], "\\ud800": 1}}}', "unknown key"),
    (b"null", "must be an object, not null"),
    (b'"text"', "must be an object"),
    (b"\x00", "no valid JSON"),
]


@pytest.mark.parametrize(("content", "words"), FILES, ids=range(len(FILES)))
@pytest.mark.parametrize(
    "way", [QuantizationConfig.from_file, QuantizationConfig.from_checkpoint], ids=["file", "model"]
)
def test_hostile_files(tmp_path: Path, way: Callable[[Path], Any], content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        way(path)
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


@given(st.binary(max_size=60))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    for way in (QuantizationConfig.from_file, QuantizationConfig.from_checkpoint):
        with pytest.raises((ConfigError, CheckpointError)):
            way(path)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 5000, 5, None, b"bytes", {}], ids=range(7))
@pytest.mark.parametrize(
    "way", [QuantizationConfig.from_file, QuantizationConfig.from_checkpoint], ids=["file", "model"]
)
def test_hostile_paths(way: Callable[[Any], Any], path: Any) -> None:
    with pytest.raises((ConfigError, CheckpointError)):
        way(path)


def test_infinity_elsewhere_in_a_models_config_is_none_of_our_business(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"time_step_limit": [0.0, Infinity], "quantization_config": {"config_groups": {"W4A16": ["x"]}}}')
    assert QuantizationConfig.from_checkpoint(path)[1] == ()


def test_extra_is_bounded() -> None:
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    raw = {"config_groups": {"W4A16": ["Linear"]}, "deep": deep}
    with pytest.raises(ConfigError, match="nested more than 64 levels deep"):
        QuantizationConfig.from_checkpoint(raw)


def test_extra_cannot_hide_a_field() -> None:
    scheme = {"W4A16": ["Linear"]}
    with pytest.raises(ConfigError, match=r"extra\.format"):
        QuantizationConfig(config_groups=scheme, extra={"format": "dense"})  # type: ignore[arg-type]
