"""Configs of existing models: every vintage is read, and what is odd about it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compressed_format.config import (
    ActivationOrdering,
    CompressionFormat,
    QuantizationConfig,
    QuantizationStatus,
    TransformType,
)
from compressed_format.errors import CheckpointError, ConfigError, Problem

DATA = Path(__file__).parent / "data"
GOLDEN = sorted((DATA / "golden").glob("*.json"))

W4A16 = {"num_bits": 4, "strategy": "group", "group_size": 128}


def read(weights: Any = None, *, allow_unknown: bool = False, **top: Any) -> tuple[QuantizationConfig, dict[str, str]]:
    raw: dict[str, Any] = {"config_groups": {"g": {"targets": ["Linear"], "weights": weights or W4A16}}, **top}
    config, warnings = QuantizationConfig.from_checkpoint(raw, allow_unknown=allow_unknown)
    return config, {problem.place: problem.message for problem in warnings}


def weights_of(fields: dict[str, Any]) -> Any:
    config, warnings = read(fields)
    assert not warnings
    return config.config_groups["g"].weights


def errors(raw: Any, **options: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        QuantizationConfig.from_checkpoint(raw, **options)
    return {problem.place: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_configs(path: Path) -> None:
    config, warnings = QuantizationConfig.from_checkpoint(path)
    assert warnings == ()
    raw = json.loads(path.read_text())["quantization_config"]
    assert config.version == raw["version"]
    assert config.format == raw.get("format", "dense")
    for name, group in raw.get("config_groups", {}).items():
        assert config.config_groups[name].format == group["format"]
        for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"):
            assert getattr(config.config_groups[name].weights, field) == group["weights"][field]
    assert QuantizationConfig.from_checkpoint(config.to_dict()) == (config, ())


@pytest.mark.parametrize("path", sorted(DATA.glob("*.json")), ids=lambda path: path.stem)
def test_all_vintages_round_trip(path: Path) -> None:
    config, warnings = QuantizationConfig.from_checkpoint(path)
    assert warnings == ()
    assert QuantizationConfig.from_checkpoint(config.to_dict()) == (config, ())
    assert hash(config) == hash(QuantizationConfig.from_checkpoint(path)[0])


def test_current_releases() -> None:
    mixed, _ = QuantizationConfig.from_checkpoint(DATA / "mixed_nvfp4_fp8_0.20.json")
    assert mixed.format is CompressionFormat.MIXED_PRECISION
    inputs = mixed.config_groups["group_1"].input_activations
    assert inputs is not None
    assert (inputs.dynamic, inputs.observer) == ("local", "static_minmax")
    cached, _ = QuantizationConfig.from_checkpoint(DATA / "fp8_kv_cache_0.20.json")
    assert cached.kv_cache_scheme is not None
    rotated, _ = QuantizationConfig.from_checkpoint(DATA / "rotated_0.20.json")
    assert rotated.transform_config is not None
    assert rotated.transform_config.config_groups["R4"].type is TransformType.RANDOM_HADAMARD


def test_what_the_peer_no_longer_reads() -> None:
    ordered, _ = QuantizationConfig.from_checkpoint(DATA / "w4a16_act_order_0.14.json")
    weights = ordered.config_groups["group_0"].weights
    assert weights is not None
    assert weights.actorder is ActivationOrdering.GROUP
    assert ordered.to_dict()["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    marlin, _ = QuantizationConfig.from_checkpoint(DATA / "marlin24_0.9.json")
    assert marlin.config_groups["group_0"].format is CompressionFormat.MARLIN_24
    assert (marlin.ignore, marlin.quant_method) == ((), "compressed-tensors")
    sparse, _ = QuantizationConfig.from_checkpoint(DATA / "golden" / "v0.14.0.1_legacy__sparse24_model_only.json")
    assert sparse.config_groups == {}
    assert sparse.sparsity_config is not None
    assert sparse.sparsity_config.format is CompressionFormat.SPARSE_24_BITMASK


def test_keys_that_have_gone() -> None:
    old, _ = QuantizationConfig.from_checkpoint(DATA / "w8a8_0.9.json")
    assert (old.quantization_status, old.version) == (QuantizationStatus.FROZEN, None)
    assert old.sparsity_config is None
    assert old.extra == {"run_compressed": True}
    assert old.to_dict()["run_compressed"] is True
    assert "version" not in old.to_dict()


@pytest.mark.parametrize(
    ("spelled", "means"),
    [
        ({"num_bits": "4", "group_size": "128"}, {"num_bits": 4, "group_size": 128}),
        ({"num_bits": 4.0, "type": "INT", "symmetric": "false"}, {"num_bits": 4, "symmetric": False}),
        ({"num_bits": True}, {"num_bits": 1}),
        ({"symmetric": 0, "dynamic": 0}, {"symmetric": False, "dynamic": False}),
        ({"strategy": "Channel"}, {"strategy": "channel"}),
        ({"group_size": -1}, {"strategy": "channel", "group_size": None}),
        ({"strategy": "block", "block_structure": "128X128"}, {"block_structure": (128, 128)}),
        ({"actorder": False}, {"actorder": None}),
        ({"actorder": True, "group_size": 8}, {"actorder": ActivationOrdering.GROUP}),
        ({"actorder": "dynamic", "group_size": 8}, {"actorder": ActivationOrdering.GROUP}),
        ({"actorder": "Weight", "group_size": 8}, {"actorder": ActivationOrdering.STATIC}),
        (
            {"observer_kwargs": None, "zp_dtype": "torch.int8", "symmetric": False},
            {"observer_kwargs": {}, "zp_dtype": None},
        ),
    ],
)
def test_values_are_read_as_their_writers_meant_them(spelled: dict[str, Any], means: dict[str, Any]) -> None:
    weights = weights_of(spelled)
    assert {name: getattr(weights, name) for name in means} == means


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"num_bits": 33}, "num_bits"),
        ({"dynamic": True}, "dynamic"),
        ({"strategy": "attn_head"}, "strategy"),
        ({"actorder": "static"}, "actorder"),
        ({"symmetric": False, "zp_dtype": "torch.int32"}, "zp_dtype"),
    ],
)
def test_what_means_nothing_is_a_warning(fields: dict[str, Any], place: str) -> None:
    _, warnings = read(fields)
    assert list(warnings) == [f"config_groups.g.weights.{place}"]


def test_more_that_means_nothing() -> None:
    config, warnings = read(format="bogus", quant_method="sparseml", global_compression_ratio=float("inf"))
    assert list(warnings) == ["format", "quant_method", "global_compression_ratio"]
    assert config.format is CompressionFormat.PACK_QUANTIZED
    assert config.global_compression_ratio is None
    config, warnings = read(format="fakequant", ignore=[".*lm_head"])
    assert list(warnings) == ["ignore[0]"]
    assert config.format is CompressionFormat.PACK_QUANTIZED
    _, warnings = read({"type": "float", "num_bits": 4, "group_size": 64})
    assert list(warnings) == ["config_groups.g.weights"]
    odd = {"symmetric": False, "zp_dtype": "torch.int32"}
    assert read(odd)[0].to_dict()["config_groups"]["g"]["weights"]["zp_dtype"] == "torch.int32"


@pytest.mark.parametrize(
    "fields",
    [{"num_bits": 4.5}, {"num_bits": None}, {"type": "float", "num_bits": 16}, {"group_size": 0}, {"dynamic": "true"}],
)
def test_what_cannot_be_decoded_is_an_error(fields: dict[str, Any]) -> None:
    assert errors({"config_groups": {"g": {"targets": ["Linear"], "weights": fields}}})


def test_a_format_for_all_groups() -> None:
    for given, format in [("int-quantized", "int-quantized"), ("mixed-precision", "pack-quantized")]:
        config, warnings = read(format=given)
        assert (config.format, warnings) == (format, {})
    config, _ = QuantizationConfig.from_checkpoint({"config_groups": {"W4A8": ["Linear"]}})
    assert config.format is CompressionFormat.INT_QUANTIZED
    uncompressed, warnings = read(format="dense", quantization_status="frozen")
    assert uncompressed.format is CompressionFormat.DENSE
    assert list(warnings) == ["format"]
    compressed, warnings = read(format="dense")
    assert compressed.format is CompressionFormat.PACK_QUANTIZED
    assert list(warnings) == ["format"]


def test_sparsity_has_formats_of_its_own() -> None:
    raw = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "pack-quantized", "targets": ["Linear"]}}
    assert list(errors(raw)) == ["sparsity_config.format"]


def test_groups_that_mix_formats_are_an_error_in_any_file() -> None:
    raw = {"config_groups": {"g": {"targets": ["Linear"], "weights": W4A16, "format": "mixed-precision"}}}
    assert list(errors(raw)) == ["config_groups.g.format"]


def test_unknown_keys_in_groups() -> None:
    empty = W4A16 | {"novelty": None, "others": [], "text": "", "object": {}}
    config, warnings = read(empty, version="0.21.0")
    assert list(warnings) == [f"config_groups.g.weights.{key}" for key in ("novelty", "others", "text", "object")]
    assert "written by version 0.21.0" in warnings["config_groups.g.weights.novelty"]
    assert config.config_groups["g"].weights == weights_of(W4A16)

    full = {"config_groups": {"g": {"targets": ["Linear"], "weights": W4A16 | {"novelty": 7}, "sparsity": "2:4"}}}
    found = errors(full | {"version": "0.21.0"})
    assert list(found) == ["config_groups.g.sparsity", "config_groups.g.weights.novelty"]
    assert "the value 7, written by version 0.21.0" in found["config_groups.g.weights.novelty"]
    assert "in a file that names no version" in errors(full)["config_groups.g.weights.novelty"]
    config, tolerated = QuantizationConfig.from_checkpoint(full, allow_unknown=True)
    assert [problem.place for problem in tolerated] == list(found)
    assert config.config_groups["g"].sparsity is None


def test_unknown_keys_at_the_top() -> None:
    config, warnings = read(producer={"name": ["x", None]}, extra=3, deep=float("nan"))
    assert config.extra == {"producer": {"name": ("x", None)}, "extra": 3, "deep": None}
    assert list(warnings) == ["deep"]
    assert config.to_dict()["producer"] == {"name": ["x", None]}
    assert QuantizationConfig.from_checkpoint(config.to_dict()) == (config, ())
    _, warnings = read(ignored=["lm_head"])
    assert warnings == {"ignored": "unknown key, did you mean ignore?"}


def test_where_the_config_stands(tmp_path: Path) -> None:
    bare = {"config_groups": {"W4A16": ["Linear"]}}
    expected = QuantizationConfig.from_checkpoint(bare)
    for whole in (
        {"quantization_config": bare},
        {"text_config": {"quantization_config": bare}},
        {"quantization_config": None, "compression_config": bare},
    ):
        assert QuantizationConfig.from_checkpoint(whole) == expected
        for name in ("config.json", "params.json"):
            path = tmp_path / name
            path.write_text(json.dumps(whole))
            assert QuantizationConfig.from_checkpoint(path) == expected
            assert QuantizationConfig.from_checkpoint(str(tmp_path)) == expected
            path.unlink()
    (tmp_path / "x.json").write_text(json.dumps(bare))
    assert QuantizationConfig.from_checkpoint(tmp_path / "x.json") == expected
    with pytest.raises(CheckpointError, match=r"neither config\.json nor params\.json"):
        QuantizationConfig.from_checkpoint(tmp_path)
    for missing in (tmp_path / "missing", "\0"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            QuantizationConfig.from_checkpoint(missing)


def test_a_folder_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        QuantizationConfig.from_checkpoint(tmp_path)


def test_what_is_no_config_of_this_format(tmp_path: Path) -> None:
    assert "is not compressed" in errors({"model_type": "llama"})["quantization_config"]
    assert "must be an object" in errors({"quantization_config": [1]})["quantization_config"]
    assert "must be an object" in errors({"text_config": 3, "compression_config": "x"})["quantization_config"]
    assert 'a checkpoint of "gptq"' in errors({"quantization_config": {"quant_method": "gptq"}})["config_groups"]
    assert list(errors({"quant_method": "compressed-tensors", "config_groups": None})) == ["config_groups"]
    assert list(errors(3)) == list(errors(None)) == [""]
    path = tmp_path / "config.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json: 1 problem in the config:"):
        QuantizationConfig.from_checkpoint(path)


def test_warnings_are_problems() -> None:
    _, warnings = QuantizationConfig.from_checkpoint({"config_groups": {"W4A16": []}})
    assert warnings == (Problem("config_groups.W4A16", "is empty, so the group applies to nothing"),)


def test_an_unknown_empty_key_of_a_group_is_kept_and_not_written_back() -> None:
    raw = QuantizationConfig.preset("W4A16").to_dict()
    raw["config_groups"]["group_0"]["weights"]["future"] = None
    config, problems = QuantizationConfig.from_checkpoint(raw)
    assert config.unknown == {"config_groups.group_0.weights.future": None}
    assert [problem.place for problem in problems] == ["config_groups.group_0.weights.future"]
    assert "future" not in json.dumps(config.to_dict())
    assert config.replace(ignore=("lm_head",)).unknown == config.unknown
    assert hash(config) != hash(QuantizationConfig.preset("W4A16"))
