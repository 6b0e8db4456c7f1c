"""A checkpoint compressed as it streams is what the model would be, tensor for tensor, in every format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressed_format import (
    QuantizationConfig,
    compress_checkpoint,
    decompress_checkpoint,
    load_compressed,
    open_checkpoint,
)
from compressed_format.checkpoint import read_checkpoint
from compressed_format.compression.weights import compressed_tensors
from compressed_format.config import resolve_targets
from compressed_format.errors import (
    CalibrationError,
    CheckpointError,
    CompressedFormatWarning,
    QuantizationError,
    TargetError,
    UnsupportedFormatError,
)
from compressed_format.streaming import units
from compressed_format.streaming.architecture import Architecture
from tests.checks import assert_same_bits
from tests.models import read_tensors, recorded_warnings

pytestmark = pytest.mark.filterwarnings("ignore:.*will not serve the result")

Tensors = dict[str, torch.Tensor]

ROWS, COLUMNS = 150, 128
FP8 = {"num_bits": 8, "type": "float"}
INT8 = {"num_bits": 8, "type": "int"}
GROUPS: dict[str, dict[str, Any]] = {
    "int4 group asymmetric": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": False}},
    "int3 group": {"weights": {"num_bits": 3, "group_size": 64}},
    "int3 channel asymmetric": {"weights": {"num_bits": 3, "strategy": "channel", "symmetric": False}},
    "int4 tensor asymmetric": {"weights": {"num_bits": 4, "strategy": "tensor", "symmetric": False}},
    "int4 group mse": {"weights": {"num_bits": 4, "group_size": 32, "observer": "mse"}},
    "FP8 tensor mse": {"weights": {**FP8, "strategy": "tensor", "observer": "mse"}},
    "W8A8": {
        "weights": {**INT8, "strategy": "channel"},
        "input_activations": {**INT8, "strategy": "token", "dynamic": True},
    },
    "FP8 tensor": {"weights": {**FP8, "strategy": "tensor"}},
    "FP8 block": {"weights": {**FP8, "strategy": "block", "block_structure": [32, 48]}},
    "2:4 dense": {"sparsity": "2:4"},
    "2:4 FP8": {"weights": {**FP8, "strategy": "channel"}, "sparsity": "2:4"},
}
BITMASK = {"format": "sparse-bitmask", "targets": ["Linear"], "sparsity_structure": "unstructured"}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"config_groups": {"g": {"targets": ["Linear"], **group}}} for name, group in GROUPS.items()},
    "sparse-bitmask": {"sparsity_config": BITMASK},
    "sparse-bitmask FP8": {
        "config_groups": {"g": {"targets": ["Linear"], "weights": {**FP8, "strategy": "tensor"}}},
        "sparsity_config": BITMASK,
    },
}
SPARSE = ("2:4 dense", "2:4 FP8", "sparse-bitmask", "sparse-bitmask FP8")


def dense_tensors(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        return (values * (torch.rand(shape, generator=generator) > 0.3)).to(dtype)

    return {
        "model.embed_tokens.weight": matrix(40, COLUMNS),
        "model.layers.0.mlp.up_proj.weight": matrix(ROWS, COLUMNS),
        "model.layers.0.mlp.up_proj.bias": matrix(ROWS),
        "model.layers.0.mlp.down_proj.weight": matrix(COLUMNS, 256),
        "model.layers.0.mlp.gate.weight": matrix(8, COLUMNS),
        "model.layers.0.input_layernorm.weight": matrix(COLUMNS),
        "model.layers.10.mlp.up_proj.weight": matrix(ROWS, COLUMNS),
        "model.layers.2.mlp.up_proj.weight": matrix(1, COLUMNS),
        "model.steps": torch.tensor([3, 1, 2]),
        "model.empty": torch.empty(0, 4),
    }


def saved(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = saved(tmp_path / "dense", dense_tensors())
    (folder / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-05, "z": [1, 2]}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def small_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slabs to a weight, and several units to a large one."""
    monkeypatch.setattr(units, "_SLAB_BYTES", 8 * 1024)
    monkeypatch.setattr("compressed_format.streaming.units.UNIT_BYTES", 16 * 1024)
    monkeypatch.setattr("compressed_format.streaming.job_builder.UNIT_BYTES", 16 * 1024)


def expected_tensors(tensors: Tensors, config: QuantizationConfig) -> Tensors:
    """What each weight becomes when it is compressed whole."""
    kinds = {
        name.removesuffix(".weight"): "Embedding" if "embed" in name else "Linear"
        for name, tensor in tensors.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }
    expected = dict(tensors)
    for module, assignment in resolve_targets(kinds, config).assignments.items():
        found = compressed_tensors(expected.pop(f"{module}.weight"), assignment, module)
        expected |= {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}
    return expected


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_as_if_each_weight_were_whole_and_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = dense_tensors(dtype)
    source, packed, dense = saved(tmp_path / "a", tensors), tmp_path / "b", tmp_path / "c"
    config = QuantizationConfig.from_dict(CONFIGS[name])
    compress_checkpoint(source, packed, config, workers=2)
    expected = expected_tensors(tensors, config)
    found = read_tensors(packed)
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert_same_bits(found[key], tensor, key)
    decompress_checkpoint(packed, dense)
    modules = open_checkpoint(packed).modules
    back = read_tensors(dense)
    assert sorted(back) == sorted(tensors)
    for key, tensor in tensors.items():
        module = modules[key.rpartition(".")[0]]
        compressed = key.endswith(".weight") and module.assignment is not None
        assert_same_bits(back[key], module.dense(dtype=dtype) if compressed else tensor, key)


@pytest.mark.usefixtures("small_slabs")
def test_the_same_bytes_with_any_number_of_workers(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 5):
        compress_checkpoint(source, tmp_path / str(workers), "W4A16", workers=workers, max_shard_size=20_000)
    first, *others = (tmp_path / str(workers) for workers in (1, 2, 5))
    names = sorted(path.name for path in first.iterdir())
    assert any(name.startswith("model-00002-of-") for name in names)
    for other in others:
        assert sorted(path.name for path in other.iterdir()) == names
        assert all((other / name).read_bytes() == (first / name).read_bytes() for name in names)


def test_layout_of_files(source: Path, tmp_path: Path) -> None:
    """Data starts at a multiple of 64; whatever is a multiple of 64 bytes long comes first, layer by layer."""
    compress_checkpoint(source, tmp_path / "out", CONFIGS["int4 group asymmetric"])
    checkpoint = read_checkpoint(tmp_path / "out")
    specs = [checkpoint.spec(name) for name in checkpoint]
    assert specs[0].start % 64 == 0
    odd = [spec.nbytes % 64 != 0 for spec in specs]
    assert odd == sorted(odd)
    assert any(odd)
    whole = [name for name in checkpoint if checkpoint.spec(name).nbytes % 64 == 0 and "up_proj.weight_packed" in name]
    assert whole == [f"model.layers.{layer}.mlp.up_proj.weight_packed" for layer in (0, 2, 10)]
    sizes = [torch.empty(0, dtype=checkpoint[name].dtype).element_size() for name in checkpoint]
    rest = sizes[odd.index(True) :]
    assert rest == sorted(rest, reverse=True)


def test_config_and_other_files(source: Path, tmp_path: Path) -> None:
    compress_checkpoint(source, tmp_path / "out", "W4A16")
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    written = after.pop("quantization_config")
    assert list(after.items()) == list(before.items())
    assert written["ignore"] == ["model.layers.0.mlp.gate"]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    decompress_checkpoint(tmp_path / "out", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == before


def test_routers_are_reached_by_their_exact_name_only(source: Path, tmp_path: Path) -> None:
    config = QuantizationConfig.from_dict(
        {
            "config_groups": {
                "all": {"targets": ["Linear"], "weights": {**FP8, "strategy": "channel"}},
                "router": {"targets": ["model.layers.0.mlp.gate"], "weights": {**INT8, "strategy": "channel"}},
            }
        }
    )
    compress_checkpoint(source, tmp_path / "out", config)
    assert read_tensors(tmp_path / "out")["model.layers.0.mlp.gate.weight_packed"].dtype == torch.int32


def test_one_file_to_one_file(source: Path, tmp_path: Path) -> None:
    packed, dense = tmp_path / "packed.safetensors", tmp_path / "dense.safetensors"
    compress_checkpoint(source / "model.safetensors", packed, "W8A16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "packed.safetensors"]
    reader = open_checkpoint(packed)
    assert reader.config is not None
    assert reader.modules["model.layers.0.mlp.up_proj"].quantized().shape == (ROWS, COLUMNS)
    model = nn.ModuleDict({"up_proj": nn.Linear(COLUMNS, ROWS, bias=False, device="meta")})
    save_file({"up_proj.weight": torch.ones(ROWS, COLUMNS)}, tmp_path / "small.safetensors")
    compress_checkpoint(tmp_path / "small.safetensors", tmp_path / "loaded.safetensors", "W8A16")
    loaded = load_compressed(tmp_path / "loaded.safetensors", model=model)["up_proj"]
    torch.testing.assert_close(loaded(torch.eye(COLUMNS)), torch.ones(COLUMNS, ROWS), atol=0.01, rtol=0)
    decompress_checkpoint(packed, dense)
    assert open_checkpoint(dense).config is None
    assert open_checkpoint(dense)["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_progress_ends_with_all_bytes(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    compress_checkpoint(source, tmp_path / "out", "W4A16", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert (
        seen[-1][0] == seen[-1][1] == sum(read_checkpoint(source).spec(name).nbytes for name in read_checkpoint(source))
    )


def test_a_weight_of_eight_bits_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    saved(tmp_path / "src", {**dense_tensors(), name: torch.zeros(64, 64).to(torch.float8_e4m3fn)})
    with pytest.raises(QuantizationError, match=r"q_proj: its weight has dtype torch\.float8_e4m3fn"):
        compress_checkpoint(tmp_path / "src", tmp_path / "out", "W4A16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["embed", "ties"])
def test_a_tied_head_without_a_tensor_is_left_alone(dtype: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "tied", dense_tensors())
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    weights = {"num_bits": 8, "strategy": "channel"}
    groups = {"linears": {"targets": ["Linear"], "weights": weights}}
    if dtype == "embed":
        groups["embedding"] = {"targets": ["Embedding", "lm_head"], "weights": weights}
    with recorded_warnings() as texts:
        compress_checkpoint(folder, tmp_path / "out", {"config_groups": groups})
    ignore = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    if dtype == "embed":
        assert "lm_head" not in ignore
        assert not any("lm_head" in text for text in texts)
    else:
        assert "lm_head" in ignore
        assert any("lm_head: shares the weight of model.embed_tokens, which stays dense" in text for text in texts)


NOT_FINITE = "model.layers.0.mlp.up_proj.weight: holds nan at index [140, 7]"


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize("name", ["int4 group asymmetric", "int4 tensor asymmetric", "FP8 block"])
def test_a_weight_that_is_not_finite_is_named_and_the_job_can_go_on(name: str, source: Path, tmp_path: Path) -> None:
    tensors = dense_tensors()
    tensors["model.layers.0.mlp.up_proj.weight"][140, 7] = torch.nan
    bad = saved(tmp_path / "bad", tensors)
    with pytest.raises(QuantizationError) as caught:
        compress_checkpoint(bad, tmp_path / "out", CONFIGS[name], workers=1)
    assert NOT_FINITE in str(caught.value)
    assert not (tmp_path / "out").exists()


def refused(source: Path, tmp_path: Path, config: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        compress_checkpoint(source, tmp_path / "out", config)
    assert not list(tmp_path.glob("out*"))


def test_what_headers_tell_is_refused_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    def group(**fields: Any) -> dict[str, Any]:
        return {"config_groups": {"g": {"targets": ["Linear"], **fields}}}

    refused(source, tmp_path, group(weights={"num_bits": 4, "group_size": 80}), QuantizationError, "does not divide")
    static = group(weights={**FP8, "strategy": "tensor"}, input_activations={**FP8, "strategy": "tensor"})
    refused(source, tmp_path, static, CalibrationError, "compress\\(model, config, calibration")
    refused(source, tmp_path, "nothing", Exception, "W4A16")
    nowhere = {"config_groups": {"g": {"targets": ["re:nothing"], "weights": INT8}}}
    refused(source, tmp_path, nowhere, TargetError, "reaches no weight")


def test_what_is_compressed_is_not_compressed_again(source: Path, tmp_path: Path) -> None:
    compress_checkpoint(source, tmp_path / "once", "W4A16")
    refused(tmp_path / "once", tmp_path, "W4A16", CheckpointError, "is compressed already")
    with pytest.raises(CheckpointError, match="is not compressed"):
        decompress_checkpoint(source, tmp_path / "out")


def test_a_source_that_changes_ends_the_job(source: Path, tmp_path: Path) -> None:
    def touch(done: int, total: int) -> None:
        file = source / "model.safetensors"
        file.write_bytes(file.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressed_format.streaming.job_builder.UNIT_BYTES", 1)
        with pytest.raises(CheckpointError, match="has changed since the job was planned"):
            compress_checkpoint(source, tmp_path / "out", "W4A16", workers=1, progress=touch)
    assert not (tmp_path / "out").exists()


def test_who_would_not_serve_the_result_is_told_before_or_refused(source: Path, tmp_path: Path) -> None:
    config = CONFIGS["int3 group"]
    with pytest.raises(
        UnsupportedFormatError, match=r"config_groups.g: SGLang .* must have 4 or 8 bits, not 3 \(CF\d+\)"
    ):
        compress_checkpoint(source, tmp_path / "out", config, consumers=["sglang"])
    assert not list(tmp_path.glob("out*"))
    with recorded_warnings() as texts:
        compress_checkpoint(source, tmp_path / "out", config)
    assert [text.partition(":")[0] for text in texts] == ["sglang", "llama.cpp"]
    with recorded_warnings() as texts:
        compress_checkpoint(source, tmp_path / "served", "W4A16", consumers=["vllm", "sglang"])
    assert texts == []


def fused(transposed: bool, interleaved: bool) -> tuple[Tensors, Tensors]:
    """Experts as they are stacked, and each projection of each of them."""
    experts, inner, hidden = 3, 32, 64
    one_by_one = {}
    stacks: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(experts):
        gate, up = torch.randn(2, inner, hidden).to(torch.bfloat16)
        down = torch.randn(hidden, inner).to(torch.bfloat16)
        place = f"model.layers.0.mlp.experts.{expert}"
        one_by_one |= {f"{place}.gate_proj": gate, f"{place}.up_proj": up, f"{place}.down_proj": down}
        both = torch.stack([gate, up], dim=1).flatten(0, 1) if interleaved else torch.cat([gate, up])
        stacks["gate_up_proj"].append(both.T if transposed else both)
        stacks["down_proj"].append(down.T if transposed else down)
    stacked = {f"model.layers.0.mlp.experts.{name}": torch.stack(parts) for name, parts in stacks.items()}
    return stacked, one_by_one


@pytest.mark.usefixtures("small_slabs")
@pytest.mark.parametrize(("transposed", "interleaved"), [(False, False), (True, False), (True, True), (False, True)])
def test_stacked_experts_are_written_one_by_one(transposed: bool, interleaved: bool, tmp_path: Path) -> None:
    stacked, one_by_one = fused(transposed, interleaved)
    folder = saved(tmp_path / "fused", {**stacked, "model.layers.0.mlp.gate.weight": torch.randn(3, 64)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compressed_format.streaming.weights.INTERLEAVED", frozenset({"in-turn"}))
        patch.setattr("compressed_format.streaming.targets.find_spec", lambda name: None)
        model_type = "in-turn" if interleaved else "other"
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        config = QuantizationConfig.from_dict(CONFIGS["int4 group asymmetric"])
        compress_checkpoint(folder, tmp_path / "out", config)
    found = read_tensors(tmp_path / "out")
    dense = {f"{name}.weight": weight for name, weight in one_by_one.items()}
    expected = expected_tensors(dense, config)
    assert sorted(found) == sorted([*expected, "model.layers.0.mlp.gate.weight"])
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)


def test_experts_told_apart_are_refused_and_partly_compressed_ones_are_all_one_by_one(tmp_path: Path) -> None:
    stacked, one_by_one = fused(False, False)
    folder = saved(tmp_path / "fused", stacked)
    weights = {"num_bits": 4, "group_size": 32}
    apart = {"config_groups": {"g": {"targets": ["re:.*experts.1.down_proj"], "weights": weights}}}
    refused(folder, tmp_path, apart, TargetError, "compressed alike")
    partly = {"config_groups": {"g": {"targets": ["re:.*down_proj"], "weights": weights}}}
    compress_checkpoint(folder, tmp_path / "out", partly)
    found = read_tensors(tmp_path / "out")
    assert_same_bits(
        found["model.layers.0.mlp.experts.2.up_proj.weight"], one_by_one["model.layers.0.mlp.experts.2.up_proj"]
    )
    assert "model.layers.0.mlp.experts.2.down_proj.weight_packed" in found


def test_kv_scheme_is_passed_on_with_a_warning(source: Path, tmp_path: Path) -> None:
    config = {**CONFIGS["FP8 tensor"], "kv_cache_scheme": {**FP8, "strategy": "tensor"}}
    with pytest.warns(CompressedFormatWarning, match="no k_scale or v_scale"):
        compress_checkpoint(source, tmp_path / "out", config)


def test_an_architecture_that_nobody_knows_is_told(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    with recorded_warnings() as texts:
        compress_checkpoint(source, tmp_path / "out", "W4A16")
    assert any("'nobody-knows' is no architecture that transformers builds here" in text for text in texts)


def test_tensors_of_no_checkpoint_are_told(source: Path, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, source / "consolidated.safetensors")
    with pytest.warns(CompressedFormatWarning, match=r"consolidated.safetensors: is no part of the checkpoint"):
        compress_checkpoint(source, tmp_path / "out", "W4A16")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]


def test_scales_of_activations_go_with_the_config_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", {"lin.weight": torch.ones(4, 8), "lin.input_scale": torch.ones(1)})
    group = {"targets": ["Linear"], "input_activations": {**INT8, "strategy": "tensor"}}
    config = {"config_groups": {"g": group}, "format": "dense", "quantization_status": "compressed"}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    decompress_checkpoint(folder, tmp_path / "out")
    assert list(read_tensors(tmp_path / "out")) == ["lin.weight"]


def test_what_the_architecture_says_of_a_module_decides_over_its_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = dense_tensors() | {"a.attn_norm.weight": torch.ones(8, 128), "b.table.weight": torch.ones(8, 128)}
    folder = saved(tmp_path / "odd", tensors)
    classes = {"a.attn_norm": ("Linear", "Module"), "b.table": ("Embedding", "Module")}
    known = Architecture(classes, {}, {}, {}, (), ())
    monkeypatch.setattr("compressed_format.streaming.targets.architecture_of", lambda source: known)
    with recorded_warnings() as texts:
        compress_checkpoint(folder, tmp_path / "out", "W8A8")
    found = read_tensors(tmp_path / "out")
    assert found["a.attn_norm.weight"].dtype == torch.int8
    assert found["b.table.weight"].dtype == torch.float32
    assert any("a.attn_norm: looks like neither Linear nor Embedding by its name" in text for text in texts)
    assert any("b.table: looks like a Linear by its name, and is of the class Embedding" in text for text in texts)
