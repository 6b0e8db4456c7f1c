"""Hand-written configs: what they may leave out, what is wrong with them, and what is written."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationConfig as PeerConfig
from compressed_tensors.quantization import QuantizationScheme as PeerScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from frozendict import frozendict

from compressed_format.config import (
    FORMAT_VERSION,
    PRESETS,
    CompressionFormat,
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    SparsityConfig,
)
from compressed_format.config.formats import infer_format, infer_format_of_file
from compressed_format.errors import CheckpointError, ConfigError

INT4 = {"num_bits": 4, "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}


def group(**fields: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "weights": INT4} | fields


def config(**groups: Any) -> QuantizationConfig:
    return QuantizationConfig.from_dict({"config_groups": groups})


def problems(raw: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        QuantizationConfig.from_dict(raw)
    return {problem.place: problem.message for problem in caught.value.problems}


def test_the_style_of_a_problem() -> None:
    with pytest.raises(ConfigError) as caught:
        config(group_0={"targets": ["Linear"], "weights": {"num_bits": 4, "grup_size": 64}})
    assert str(caught.value) == "config_groups.group_0.weights.grup_size: unknown key, did you mean group_size?"


def test_all_problems_come_in_one_error() -> None:
    found = problems(
        {
            "config_groups": {
                "group_0": {
                    "targets": "Linear",
                    "weights": {"num_bits": "4", "strategy": "token", "dynamic": True, "actorder": "groop"},
                    "input_activations": {"strategy": "channel", "group_size": 32},
                    "format": "pack-quantised",
                },
                "W4A17": ["Linear"],
                "group_1": 7,
            },
            "ignore": ["re:(", 3],
            "kv_cache_scheme": {"num_bits": 9},
            "version": 20,
            "ingore": [],
        }
    )
    assert found == {
        "ingore": "unknown key, did you mean ignore?",
        "config_groups.group_0.targets": 'must be a list, not "Linear"; did you mean ["Linear"]?',
        "config_groups.group_0.weights.num_bits": 'must be an integer, not "4"',
        "config_groups.group_0.weights.strategy": '"token" is for activations; weights take tensor, channel, group, '
        "block, tensor_group",
        "config_groups.group_0.weights.dynamic": "must be false for weights, not true",
        "config_groups.group_0.weights.actorder": 'must be one of static, weight, not "groop"',
        "config_groups.group_0.input_activations.strategy": '"channel" is for weights; activations take token, tensor, '
        "group, tensor_group, attn_head",
        "config_groups.group_0.input_activations.group_size": "32 goes with strategy group or tensor_group, not with "
        "channel",
        "config_groups.group_0.format": found["config_groups.group_0.format"],
        "config_groups.W4A17": "a group that is a list of targets is named after a preset, did you mean W4A16?",
        "config_groups.group_1": "must be an object, not 7",
        "ignore[0]": found["ignore[0]"],
        "ignore[1]": "must be a string, not 3",
        "kv_cache_scheme.num_bits": "must be 1 to 8 for type int, not 9",
        "version": "must be a string, not 20",
    }
    assert found["config_groups.group_0.format"].endswith('not "pack-quantised"; did you mean pack-quantized?')
    assert found["ignore[0]"].startswith('"re:(" is no valid pattern')


@pytest.mark.parametrize(
    ("raw", "place", "words"),
    [
        ({}, "config_groups", "is missing"),
        ({"config_groups": None}, "config_groups", "must be an object, not null"),
        ({"config_groups": {"W4A16": "Linear"}}, "config_groups.W4A16", 'did you mean ["Linear"]?'),
        ({"config_groups": {"W4A16": []}}, "config_groups.W4A16", "applies to nothing"),
        ({"config_groups": {"whatever": ["Linear"]}}, "config_groups.whatever", "the presets are"),
        ({"config_groups": {"a": {}}}, "config_groups.a.targets", "is missing: The modules"),
        ({"config_groups": {"a": group(targets=[])}}, "config_groups.a.targets", "applies to nothing"),
        ({"config_groups": {"a": group(targets=[""])}}, "config_groups.a.targets[0]", "is empty"),
        ({"config_groups": {"a": group(targets=[".*q_proj"])}}, "config_groups.a.targets[0]", '"re:.*q_proj"'),
        ({"config_groups": {"a": group(targets=["re:" + "a" * 20000])}}, "config_groups.a.targets[0]", "20000"),
        ({"config_groups": {"a": group(format="mixed-precision")}}, "config_groups.a.format", "of its own"),
        ({"config_groups": {"a": group(format="marlin-24")}}, "config_groups.a.format", "only read"),
        ({"config_groups": {"a": group(format="sparse-24-bitmask")}}, "config_groups.a.format", 'sparsity "2:4"'),
        ({"config_groups": {"a": group(format="float-quantized")}}, "config_groups.a.format", "float8"),
        ({"config_groups": {"a": group(format="dense")}}, "config_groups.a.format", "as they are"),
        ({"config_groups": {"a": group(format="nvfp4-pack-quantized")}}, "config_groups.a.format", "groups of 16"),
        ({"config_groups": {"a": group(weights=None, format="pack-quantized")}}, "config_groups.a.format", "none"),
        ({"config_groups": {"a": group(weights=FP8, format="int-quantized")}}, "config_groups.a.format", "int"),
        ({"config_groups": {"a": group(weights=FP8, format="pack-quantized")}}, "config_groups.a.format", "int"),
        (
            {"config_groups": {"a": group(weights=FP8 | {"num_bits": 4}, format="naive-quantized")}},
            "config_groups.a.format",
            "float8",
        ),
        ({"config_groups": {"a": group()}, "format": "float-quantized"}, "format", "(config_groups.a)"),
        ({"config_groups": {"a": group()}, "format": "fakequant"}, "format", "must be one of"),
        ({"config_groups": {"a": group()}, "format": 4}, "format", "must be one of"),
        (
            {"config_groups": {"a": group(format="pack-quantized")}, "format": "int-quantized"},
            "format",
            "contradicts the formats of the groups (a: pack-quantized)",
        ),
        ({"config_groups": {"a": group(sparsity="2:5")}}, "config_groups.a.sparsity", 'must be "2:4"'),
        (
            {
                "config_groups": {"a": group(sparsity="2:4")},
                "sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]},
            },
            "sparsity_config",
            "leave one out",
        ),
        ({"config_groups": {}, "sparsity_config": {"format": "pack-quantized"}}, "sparsity_config.format", "sparse"),
        (
            {"config_groups": {}, "sparsity_config": {"format": "sparse-24-bitmask", "sparsity_structure": "4:8"}},
            "sparsity_config.sparsity_structure",
            '"2:4"',
        ),
        (
            {"config_groups": {"a": group(input_activations=INT4 | {"actorder": "static"})}},
            "config_groups.a.input_activations.actorder",
            "for weights",
        ),
        (
            {"config_groups": {"a": group(output_activations=INT8)}},
            "config_groups.a.output_activations.strategy",
            "for weights",
        ),
        ({"config_groups": {}, "kv_cache_scheme": INT8}, "kv_cache_scheme.strategy", "for weights"),
        ({"config_groups": {}, "quant_method": "gptq"}, "quant_method", "compressed-tensors"),
        ({"config_groups": {}, "quant_method": None}, "quant_method", "compressed-tensors"),
        ({"config_groups": {}, "quantization_status": "done"}, "quantization_status", "initialized"),
        ({"config_groups": {}, "global_compression_ratio": float("nan")}, "global_compression_ratio", "NaN"),
        ({"config_groups": {}, "global_compression_ratio": 10**400}, "global_compression_ratio", "bits"),
        ({"config_groups": {}, "extra": {}}, "extra", "unknown key"),
        ({"config_groups": {}, 3: 4}, "", "keys of an object are strings, not 3"),
        ({"config_groups": {3: 4}}, "config_groups", "keys of an object are strings, not 3"),
        (
            {"config_groups": {}, "transform_config": {"config_groups": {"R4": {"type": "hadamard", "aply": []}}}},
            "transform_config.config_groups.R4.aply",
            "did you mean apply?",
        ),
        ({"config_groups": {}, "moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config.num_experts", "miss"),
        (
            {"config_groups": {}, "moe_sparsity_config": {"method": "prune", "num_experts": ["3"]}},
            "moe_sparsity_config.num_experts[0]",
            "integer",
        ),
        ({"config_groups": {"a b": group(targets=[3])}}, 'config_groups["a b"].targets[0]', "must be a string"),
    ],
)
def test_what_is_wrong_is_named(raw: Any, place: str, words: str) -> None:
    found = problems(raw)
    assert list(found) == [place]
    assert words in found[place]


@pytest.mark.parametrize("raw", [[], None, "W4A16", 3])
def test_a_config_is_an_object(raw: Any) -> None:
    assert "a config must be an object" in problems(raw)[""]


def test_what_may_be_left_out() -> None:
    short = QuantizationConfig.from_dict(
        {"$schema": "../x.json", "config_groups": {"w4a16": ["Linear"]}, "ignore": None}
    )
    assert short.config_groups["w4a16"].weights == PRESETS["W4A16"].weights
    assert short.format is CompressionFormat.PACK_QUANTIZED
    assert (short.version, short.quantization_status) == (FORMAT_VERSION, QuantizationStatus.COMPRESSED)
    assert QuantizationConfig.from_dict({"kv_cache_scheme": {"type": "float"}}).config_groups == {}
    assert QuantizationConfig.from_dict({"config_groups": {}}).format is CompressionFormat.DENSE


def test_construction_from_objects() -> None:
    scheme = QuantizationScheme(targets=("Linear",), weights=QuantizationArgs(num_bits=4, group_size=128))
    assert QuantizationConfig(config_groups=frozendict(a=scheme)) == config(a=group())
    with pytest.raises(ConfigError, match=r"config_groups\.a\.weights\.dynamic"):
        QuantizationConfig(
            config_groups=frozendict(
                a={"targets": ["Linear"], "weights": QuantizationArgs(dynamic=True)}  # type: ignore[dict-item]
            )
        )
    with pytest.raises(ConfigError, match="unknown key"):
        QuantizationConfig(groups={})  # type: ignore[call-arg]


def test_schemes_and_args_of_their_own() -> None:
    assert QuantizationScheme(targets=["Linear"], sparsity="2:4").sparsity == "2:4"  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        QuantizationScheme(targets=(), weights={"num_bits": 0})  # type: ignore[arg-type]
    assert {problem.place for problem in caught.value.problems} == {"weights.num_bits", "targets"}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_are_the_peers(name: str) -> None:
    theirs = preset_name_to_scheme(name, ["Linear"]).model_dump(mode="json")
    for key in ("weights", "input_activations"):
        for field in ("observer", "zp_dtype"):
            (theirs[key] or {}).pop(field, None)
    assert PRESETS[name].to_dict() == theirs
    assert QuantizationConfig.preset(name.lower()).config_groups["group_0"].weights == PRESETS[name].weights


def test_all_presets_of_the_peer_are_there() -> None:
    assert set(PRESETS) == set(PRESET_SCHEMES)


@pytest.mark.parametrize("name", ["W4A17", "", None, 4])
def test_unknown_preset(name: Any) -> None:
    with pytest.raises(ConfigError, match="preset: must be one of"):
        QuantizationConfig.preset(name)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_formats_of_presets(name: str) -> None:
    scheme = PRESETS[name]
    peer = infer_module_format(torch.nn.Linear, preset_name_to_scheme(name, ["Linear"]))
    assert infer_format_of_file(scheme.weights, scheme.input_activations) == peer.value
    ours = QuantizationConfig.preset(name).format
    packed = name == "W4AFP8" or (name.endswith(("A8", "A4")) and name.startswith(tuple(f"W{n}" for n in range(2, 8))))
    assert ours == (CompressionFormat.PACK_QUANTIZED if packed else peer.value)
    assert QuantizationConfig.from_checkpoint({"config_groups": {name: ["Linear"]}})[0].format == peer.value


SCHEMES = [
    {"weights": weights, "input_activations": inputs}
    for weights in (
        None,
        INT4,
        INT8,
        FP8,
        FP8 | {"strategy": "group", "group_size": 32},
        FP8 | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        {"type": "float", "num_bits": 4, "group_size": 32},
        {"type": "float", "num_bits": 4, "group_size": 16, "strategy": "tensor_group"},
        {"type": "float", "num_bits": 4, "group_size": 64},
        {"type": "float", "num_bits": 6, "group_size": 32},
        {"num_bits": 1},
        {"num_bits": 8, "strategy": "block", "block_structure": [2, 2]},
    )
    for inputs in (None, TOKEN, TOKEN | {"type": "float"})
]


@pytest.mark.parametrize("fields", SCHEMES, ids=json.dumps)
def test_inferred_formats_are_the_peers(fields: dict[str, Any]) -> None:
    scheme = QuantizationScheme(targets=("Linear",), **fields)
    peer = infer_module_format(torch.nn.Linear, PeerScheme(targets=["Linear"], **fields))
    assert infer_format_of_file(scheme.weights, scheme.input_activations) == peer.value
    ours = infer_format(scheme.weights, scheme.input_activations)
    weights = scheme.weights
    narrow = weights is not None and weights.type == "int" and weights.num_bits < 8
    assert ours == ("pack-quantized" if narrow else peer.value)
    if weights is not None and weights.type == "float" and weights.group_size == 64:
        assert (
            "no format fits"
            in problems({"config_groups": {"a": {"targets": ["Linear"]} | fields}})["config_groups.a.weights"]
        )
    else:
        assert config(a={"targets": ["Linear"]} | fields).format == ours


def test_an_explicit_format_decides() -> None:
    whole = QuantizationConfig.from_dict({"config_groups": {"W4A8": ["Linear"]}, "format": "int-quantized"})
    assert whole.config_groups["W4A8"].format is CompressionFormat.INT_QUANTIZED
    own = config(a=group(weights=FP8, format="naive-quantized"), b=group(targets=["b"]))
    assert own.format is CompressionFormat.MIXED_PRECISION
    assert own.format_of(own.config_groups["a"]) is CompressionFormat.NAIVE_QUANTIZED


def test_top_level_format_counts_what_is_stored() -> None:
    attention = {"targets": ["LlamaAttention"], "input_activations": {"type": "float"}}
    both = config(a=group(weights=FP8, input_activations=TOKEN | {"type": "float"}), b=attention)
    assert both.format is CompressionFormat.FLOAT_QUANTIZED
    assert both.config_groups["b"].format is CompressionFormat.DENSE
    assert config(b=attention).format is CompressionFormat.DENSE
    mixed = QuantizationConfig.from_dict({"config_groups": {"a": group()}, "format": "mixed-precision"})
    assert mixed.format is CompressionFormat.PACK_QUANTIZED


def test_format_of_other_schemes() -> None:
    packed, mixed = config(a=group()), config(a=group(), b=group(targets=["b"], weights=FP8))
    int8 = QuantizationScheme(targets=("x",), weights=QuantizationArgs(**INT8))
    assert packed.format_of(int8) is CompressionFormat.PACK_QUANTIZED
    assert mixed.format_of(int8.replace(input_activations=TOKEN)) is CompressionFormat.INT_QUANTIZED
    assert packed.format_of(QuantizationScheme(targets=("x",))) is CompressionFormat.DENSE


def test_sparsity_moves_to_the_config() -> None:
    sparse = QuantizationConfig.from_dict(
        {
            "config_groups": {
                "a": group(targets=["re:.*mlp.*"], weights=None, sparsity="2:4"),
                "b": group(targets=["re:.*down.*", "model.mlp.up"]),
                "c": group(targets=["re:z.*", "Linear"]),
            },
            "ignore": ["lm_head"],
        }
    )
    assert sparse.config_groups["a"].sparsity is None
    assert sparse.sparsity_config == SparsityConfig(
        format=CompressionFormat.SPARSE_24_BITMASK,
        targets=("re:.*mlp.*",),
        ignore=("lm_head", "re:.*down.*", "model.mlp.up"),
        global_sparsity=0.5,
        sparsity_structure="2:4",
    )
    written = sparse.to_dict()
    assert all("sparsity" not in scheme for scheme in written["config_groups"].values())
    assert written["sparsity_config"] == {
        "format": "sparse-24-bitmask",
        "targets": ["re:.*mlp.*"],
        "ignore": ["lm_head", "re:.*down.*", "model.mlp.up"],
        "global_sparsity": 0.5,
        "sparsity_structure": "2:4",
        "registry_requires_subclass": False,
    }
    assert QuantizationConfig.from_dict(written) == sparse
    assert QuantizationConfig.from_checkpoint(written) == (sparse, ())


EVERYTHING = {
    "config_groups": {
        "attention": group(targets=["re:.*attn.*"], weights=FP8, input_activations=TOKEN | {"type": "float"}),
        "mlp": group(output_activations={"num_bits": 8}, weights=INT4 | {"actorder": "weight", "observer": "mse"}),
        "block": group(targets=["x"], weights={"type": "float", "strategy": "block", "block_structure": [2, 4]}),
        "MXFP8": ["y"],
    },
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"type": "float", "strategy": "attn_head"},
    "sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"], "global_sparsity": 0.3},
    "transform_config": {
        "config_groups": {
            "R4": {
                "type": "random-hadamard",
                "apply": [{"targets": "re:.*down_proj$", "location": "input"}],
                "head_dim": 64,
            }
        }
    },
    "moe_sparsity_config": {"method": "novice", "num_experts": [None, 3]},
    "global_compression_ratio": 2.5,
}


@pytest.mark.parametrize(
    "raw",
    [EVERYTHING, {"config_groups": {}}, *({"config_groups": {name: ["Linear"]}} for name in PRESETS)],
    ids=lambda raw: ",".join(raw["config_groups"])[:20],
)
def test_round_trips(raw: dict[str, Any], tmp_path: Path) -> None:
    first = QuantizationConfig.from_dict(raw)
    written = first.to_dict()
    assert json.loads(json.dumps(written)) == written
    again = QuantizationConfig.from_dict(written)
    assert again == first
    assert hash(again) == hash(first)
    assert QuantizationConfig.from_checkpoint(written) == (first, ())
    assert QuantizationConfig.from_checkpoint({"model_type": "x", "quantization_config": written}) == (first, ())
    first.to_file(tmp_path / "config.json")
    assert QuantizationConfig.from_file(tmp_path / "config.json") == first
    assert QuantizationConfig.from_checkpoint(tmp_path) == (first, ())
    assert pickle.loads(pickle.dumps(first)) == first == copy.deepcopy(first)
    assert first.replace() == first


@pytest.mark.parametrize(
    "raw",
    [EVERYTHING, {"config_groups": {}}, *({"config_groups": {name: ["Linear"]}} for name in PRESETS)],
    ids=lambda raw: ",".join(raw["config_groups"])[:20],
)
def test_the_peer_reads_what_is_written(raw: dict[str, Any]) -> None:
    ours = QuantizationConfig.from_dict(raw).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = PeerConfig.model_validate(copy.deepcopy(ours)).model_dump(mode="json")
    for name, scheme in ours["config_groups"].items():
        for key in ("weights", "input_activations", "output_activations"):
            (peer["config_groups"][name][key] or {}).pop("zp_dtype", None)
        assert peer["config_groups"][name] == scheme
    for key in ("format", "ignore", "quant_method", "quantization_status", "moe_sparsity_config"):
        assert peer[key] == ours[key]


def test_what_every_reader_needs_is_written() -> None:
    written = QuantizationConfig.from_dict(EVERYTHING).to_dict()
    assert written["format"] == "mixed-precision"
    assert all(scheme["format"] for scheme in written["config_groups"].values())
    allowed = {"num_bits", "type", "symmetric", "strategy", "group_size", "dynamic"}
    assert set(written["config_groups"]["attention"]["weights"]) == allowed
    assert set(written["config_groups"]["block"]["weights"]) == allowed | {"block_structure"}
    assert set(written["config_groups"]["mlp"]["weights"]) == allowed | {"actorder", "observer"}
    assert set(written["config_groups"]["MXFP8"]["weights"]) == allowed | {"scale_dtype"}
    plain = config(W4A16=["Linear"]).to_dict()
    assert (plain["sparsity_config"], plain["transform_config"]) == ({}, {})
    assert (plain["version"], plain["quantization_status"]) == (FORMAT_VERSION, "compressed")


def test_replace() -> None:
    first = config(W4A8=["Linear"])
    assert first.format is CompressionFormat.PACK_QUANTIZED
    assert first.replace(format="int-quantized").config_groups["W4A8"].format is CompressionFormat.INT_QUANTIZED
    assert first.replace(ignore=["lm_head"]).ignore == ("lm_head",)
    assert first.replace(config_groups={"FP8": ["Linear"]}).format is CompressionFormat.FLOAT_QUANTIZED
    with pytest.raises(ConfigError, match="version"):
        first.replace(version=3)


def test_what_a_checkpoint_says_survives_replace() -> None:
    odd = {"config_groups": {"a": group(weights=INT4 | {"dynamic": True})}, "hello": [1], "ignore": [".*", "re:("]}
    read, warned = QuantizationConfig.from_checkpoint(odd)
    assert len(warned) == 3
    assert read.replace(version="1").ignore == (".*", "re:(")
    again = read.replace(ignore=["x"])
    assert (again.extra, again.config_groups) == (read.extra, read.config_groups)


def test_files_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{\n  "config_groups": {"W4A16": ["Linear"],}\n}')
    with pytest.raises(ConfigError, match=r"broken\.json:2:\d+: is no valid JSON"):
        QuantizationConfig.from_file(path)
    path.write_bytes('{\n "größe": "'.encode() + b'\xff"}')
    with pytest.raises(ConfigError, match=r"broken\.json:2:12: is no valid JSON: byte 0xff is no UTF-8"):
        QuantizationConfig.from_file(path)


def test_a_file_is_named_in_the_headline(tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_text('{"config_groups": {"W4A16": ["Linear"]}, "ignore": "x", "version": 3}')
    with pytest.raises(ConfigError) as caught:
        QuantizationConfig.from_file(path)
    assert str(caught.value).startswith(f"{path}: 2 problems in the config:\n  ignore: must be a list")
    path.write_text('{"config_groups": {"W4A16": ["Linear"]}, "version": 3}')
    with pytest.raises(ConfigError, match=r"wrong\.json: 1 problem in the config:"):
        QuantizationConfig.from_file(path)


def test_repeated_keys(tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text('{"ignore": [{"a": 1, "a": 2, "a": 3}], "config_groups": {"W4A16": ["Linear"], "W4A16": ["x"]}}')
    with pytest.raises(ConfigError) as caught:
        QuantizationConfig.from_file(path)
    places = [problem.place for problem in caught.value.problems if "more than once" in problem.message]
    assert sorted(places) == ["config_groups.W4A16", "ignore[0].a"]
    path.write_text('{"config_groups": {"W4A16": ["Linear"]}, "version": "1", "version": "2"}')
    read, warned = QuantizationConfig.from_checkpoint(path)
    assert read.version == "2"
    assert [problem.place for problem in warned] == ["version"]


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "bom.json"
    path.write_bytes(b'\xef\xbb\xbf{"config_groups": {"W4A16": ["Linear"]}}')
    assert QuantizationConfig.from_file(path) == config(W4A16=["Linear"])


def test_files_that_cannot_be_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "missing.json", tmp_path, "\0"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            QuantizationConfig.from_file(path)
        with pytest.raises(CheckpointError, match="cannot be written"):
            config(W4A16=["Linear"]).to_file(path if path != tmp_path / "missing.json" else tmp_path / "a" / "b")
    monkeypatch.setattr("compressed_format.config.json_text._LARGEST_FILE", 10)
    (tmp_path / "large.json").write_text(" " * 11)
    with pytest.raises(CheckpointError, match="larger than 10 bytes"):
        QuantizationConfig.from_file(tmp_path / "large.json")
