"""Two checkpoints compared: as they are stored, and dequantized."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressed_format import QuantizationConfig
from compressed_format.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from compressed_format.comparison import ABSENT, KeyDifference, StoredAs, checkpoints, diff_checkpoints
from compressed_format.config import resolve_targets
from compressed_format.errors import CheckpointError, ConfigError
from compressed_format.formats import FORMATS
from compressed_format.quantization import dequantize, quantize
from compressed_format.reading import StoredModule

Tensors = dict[str, torch.Tensor]


def write(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, **options: Any) -> Path:
    files = {} if config is None else {"config.json": json.dumps(config).encode()}
    write_checkpoint(folder, tensors, files=files, **options)
    return folder


def quantized(folder: Path, dense: Tensors, weights: dict[str, Any]) -> Path:
    """The checkpoint of ``dense`` whose linear layers are compressed, written without any code of jobs."""
    config = QuantizationConfig.from_dict({"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}})
    names = {name.removesuffix(".weight"): "Linear" for name in dense if name.endswith("proj.weight")}
    tensors = {name: tensor for name, tensor in dense.items() if name.removesuffix(".weight") not in names}
    for name, assignment in resolve_targets(names, config).assignments.items():
        assert assignment.scheme is not None
        args = assignment.scheme.weights
        assert args is not None
        encoded = FORMATS[assignment.format].encode(quantize(dense[f"{name}.weight"], args), args)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in encoded.items()}
    return write(folder, tensors, {"hidden_size": 64, "quantization_config": config.to_dict()})


def dense_twin(folder: Path, source: Tensors, weights: dict[str, Any]) -> Path:
    """What ``quantized`` holds, as a dense checkpoint."""
    config = QuantizationConfig.from_dict({"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}})
    args = config.config_groups["g"].weights
    assert args is not None
    linear = {name for name in source if name.endswith("proj.weight")}
    tensors = {
        name: dequantize(quantize(tensor, args), args) if name in linear else tensor for name, tensor in source.items()
    }
    return write(folder, tensors, {"hidden_size": 64})


@pytest.fixture
def dense() -> Tensors:
    torch.manual_seed(0)
    return {
        "embed_tokens.weight": torch.randn(16, 64, dtype=torch.bfloat16),
        "up_proj.weight": torch.randn(96, 64, dtype=torch.bfloat16),
        "down_proj.weight": torch.randn(64, 96, dtype=torch.bfloat16),
        "down_proj.bias": torch.randn(64, dtype=torch.bfloat16),
        "norm.weight": torch.ones(64, dtype=torch.bfloat16),
    }


W4G32 = {"num_bits": 4, "group_size": 32}
W4G16 = {"num_bits": 4, "group_size": 16, "symmetric": False}
W3 = {"num_bits": 3, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [24, 40]}


def test_the_same_bytes_in_other_shards(tmp_path: Path, dense: Tensors) -> None:
    one = write(tmp_path / "one", dense, {"hidden_size": 64})
    other = write(tmp_path / "other", dict(reversed(dense.items())), {"hidden_size": 64}, max_shard_size=4000)
    found = diff_checkpoints(one, other)
    assert found.same
    assert (found.same_tensors, found.shared_tensors) == (5, 0)
    assert found.to_dict() == {
        "same": True, "first": str(one), "second": str(other), "dequantized": False, "only_in_first": {},
        "only_in_second": {}, "tensors": [], "metadata": [], "config": [], "same_tensors": 5, "shared_tensors": 0,
    }  # fmt: skip


def test_tensors_of_one_file_are_not_read(tmp_path: Path, dense: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the file's own identity counts as that: a copy is read, and so are tensors at other places of the file."""
    one = write(tmp_path / "one", dense, max_shard_size=4000)
    other = tmp_path / "other"
    shutil.copytree(one, other)
    linked = min(one.glob("*-of-*")).name
    (other / linked).unlink()
    os.link(one / linked, other / linked)
    read: list[str] = []
    really = Checkpoint.data
    monkeypatch.setattr(Checkpoint, "data", lambda self, name: read.append(name) or really(self, name))
    found = diff_checkpoints(one, other)
    assert found.same
    assert found.same_tensors == 5
    assert 0 < found.shared_tensors < 5
    assert len(read) == 2 * (5 - found.shared_tensors)
    read.clear()
    assert diff_checkpoints(one, one / ".").shared_tensors == 5
    assert read == []


def test_everything_that_can_differ(tmp_path: Path, dense: Tensors) -> None:
    changed = dict(dense)
    changed["norm.weight"] = dense["norm.weight"].float()
    changed["up_proj.weight"] = dense["up_proj.weight"][:90].contiguous()
    changed["down_proj.weight"] = dense["down_proj.weight"].clone()
    changed["down_proj.weight"][5, 7] += 2
    changed["lm_head.weight"] = changed.pop("embed_tokens.weight")
    one = write(tmp_path / "one", dense, {"hidden_size": 64, "rope": {"theta": 1e4, "on": True}, "layers": [1, 2]})
    config = {"hidden_size": 64, "rope": {"theta": 5e5, "on": 1}, "layers": [1, 2, 3], "new": None}
    other = write(tmp_path / "other", changed, config)
    found = diff_checkpoints(one, other)
    assert not found.same
    assert found.only_in_first == {"embed_tokens.weight": StoredAs("bfloat16", (16, 64))}
    assert found.only_in_second == {"lm_head.weight": StoredAs("bfloat16", (16, 64))}
    by_name = {tensor.name: tensor for tensor in found.tensors}
    assert set(by_name) == {"norm.weight", "up_proj.weight", "down_proj.weight"}
    assert by_name["up_proj.weight"].values is None
    assert by_name["up_proj.weight"].second == StoredAs("bfloat16", (90, 64))
    norm = by_name["norm.weight"]
    assert (norm.first.dtype, norm.second.dtype) == ("bfloat16", "float32")
    assert norm.values is not None
    assert (norm.values.differing, norm.values.max_abs) == (0, 0.0)
    down = by_name["down_proj.weight"].values
    assert down is not None
    assert (down.count, down.differing, down.first, down.unpaired) == (64 * 96, 1, (5, 7), 0)
    assert found.config == (
        KeyDifference("rope.theta", 1e4, 5e5),
        KeyDifference("rope.on", True, 1),
        KeyDifference("layers[2]", ABSENT, 3),
        KeyDifference("new", ABSENT, None),
    )
    assert found.same_tensors == 1
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["config"][3] == {"place": "new", "second": None}
    assert told["only_in_second"] == {"lm_head.weight": {"dtype": "bfloat16", "shape": [16, 64]}}


def test_packed_codes_are_counted_in_words(tmp_path: Path, dense: Tensors) -> None:
    one = quantized(tmp_path / "one", dense, W4G16)
    dense["up_proj.weight"][3] *= -1
    other = quantized(tmp_path / "other", dense, W4G16)
    found = {tensor.name: tensor.values for tensor in diff_checkpoints(one, other).tensors}
    assert set(found) == {"up_proj.weight_packed", "up_proj.weight_zero_point"}
    packed = found["up_proj.weight_packed"]
    assert packed is not None
    assert (packed.unit, packed.count, packed.first, packed.max_abs) == ("word", 96 * 8, (3, 0), None)
    assert packed.differing <= 8


@pytest.mark.parametrize("weights", [W4G32, W4G16, W3, FP8], ids=["W4", "asymmetric", "W3", "blocks"])
def test_a_compressed_checkpoint_and_its_dense_twin(
    weights: dict[str, Any], tmp_path: Path, dense: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the same when dequantized, and one changed value of the twin is found, wherever slabs end."""
    monkeypatch.setattr(checkpoints, "_SLAB_VALUES", 1000)
    one, other = quantized(tmp_path / "one", dense, weights), dense_twin(tmp_path / "other", dense, weights)
    found = diff_checkpoints(one, other, dequantize=True)
    assert found.same, found
    assert found.same_tensors == 5
    assert not diff_checkpoints(one, other).same
    with_change = dense_twin(tmp_path / "changed", dense, weights)
    tensors = {name: tensor.clone() for name, tensor in read_checkpoint(with_change).items()}
    tensors["up_proj.weight"][95, 63] = 100
    changed = write(tmp_path / "again", tensors, {"hidden_size": 64})
    (tensor,) = diff_checkpoints(one, changed, dequantize=True).tensors
    assert tensor.name == "up_proj.weight"
    assert tensor.first.format is not None
    assert tensor.second.format is None
    assert tensor.values is not None
    assert (tensor.values.differing, tensor.values.first) == (1, (95, 63))


def test_two_formats_against_each_other(tmp_path: Path, dense: Tensors) -> None:
    one, other = quantized(tmp_path / "one", dense, W4G32), quantized(tmp_path / "other", dense, FP8)
    found = diff_checkpoints(one, other, dequantize=True)
    assert found.config == found.metadata == ()
    assert found.only_in_first == found.only_in_second == {}
    up, down = sorted(found.tensors, key=lambda tensor: tensor.first.shape, reverse=True)
    assert (up.name, up.first) == ("up_proj.weight", StoredAs("bfloat16", (96, 64), "pack-quantized"))
    assert str(down.second) == "bfloat16 [64, 96] from naive-quantized"
    for tensor in (up, down):
        a, b = (dequantize(quantize(dense[tensor.name], args), args).double() for args in (_args(W4G32), _args(FP8)))
        assert tensor.values is not None
        assert tensor.values.max_abs == float((a - b).abs().max())
        expected = float(((a - b).square().sum() / a.square().sum()).sqrt())
        assert tensor.values.relative_rms == pytest.approx(expected, rel=1e-12)


def _args(weights: dict[str, Any]) -> Any:
    config = QuantizationConfig.from_dict({"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}})
    return config.config_groups["g"].weights


def test_weights_that_are_stored_alike_are_not_dequantized(
    tmp_path: Path, dense: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (quantized(tmp_path / name, dense, W4G32) for name in ("one", "other"))
    monkeypatch.setattr("compressed_format.reading.StoredModule.dense", None)
    assert diff_checkpoints(one, other, dequantize=True).same


def test_configs_are_compared_by_what_they_mean(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.ones(4)}
    scheme = {"targets": ["Linear", "re:.*x"], "weights": {"num_bits": 4, "group_size": 32}}
    config = {"quant_method": "compressed-tensors", "config_groups": {"g": scheme}, "ignore": ["a", "b"]}
    one = write(tmp_path / "one", tensors, {"hidden_size": 1, "quantization_config": config})
    spelled = {**scheme, "targets": ["re:.*x", "Linear"], "output_activations": None}
    spelled["weights"] = {"num_bits": "4", "group_size": 32, "type": "INT", "strategy": "group"}
    text_config = {"quantization_config": {**config, "config_groups": {"g": spelled}, "ignore": ["b", "a"]}}
    other = write(tmp_path / "other", tensors, {"hidden_size": 1, "text_config": text_config})
    places = [key.place for key in diff_checkpoints(one, other).config]
    assert places == ["text_config"]  # the place of the config, and nothing in it
    spelled["weights"]["num_bits"] = 8
    text_config["quantization_config"]["ignore"] = ["b", "c"]
    found = diff_checkpoints(
        one, write(tmp_path / "third", tensors, {"hidden_size": 1, "text_config": text_config})
    ).config
    assert found[1:] == (
        KeyDifference("quantization_config.config_groups.g.weights.num_bits", 4, 8),
        KeyDifference("quantization_config.ignore.a", "a", ABSENT),
        KeyDifference("quantization_config.ignore.c", ABSENT, "c"),
    )
    # One that means nothing is compared as it stands.
    text_config["quantization_config"]["config_groups"]["g"]["weights"] = {"num_bits": 99}
    broken = write(tmp_path / "broken", tensors, {"hidden_size": 1, "text_config": text_config})
    found = diff_checkpoints(one, broken).config
    assert KeyDifference("quantization_config.config_groups.g.weights.num_bits", 4, 99) in found


def test_metadata_and_the_config_in_it(tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}
    tensors = {"norm.weight": torch.ones(4)}
    names = [tmp_path / f"{number}.safetensors" for number in range(2)]
    save_file(tensors, names[0], metadata={"format": "pt", "by": "me", "quantization_config": json.dumps(config)})
    config["config_groups"] = {"W8A16": ["Linear"]}
    save_file(tensors, names[1], metadata={"format": "pt", "quantization_config": json.dumps(config)})
    found = diff_checkpoints(*names)
    assert found.metadata == (KeyDifference("by", "me", ABSENT),)
    assert {key.place.rpartition(".")[2] for key in found.config} == {"W4A16", "W8A16"}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must be a JSON object"):
        diff_checkpoints(*names)


def test_a_config_on_one_side_only(tmp_path: Path) -> None:
    scheme = {"quantization_config": {"config_groups": {"W4A16": ["Linear"]}}}
    bare = write(tmp_path / "bare", {"a": torch.ones(1)}, scheme)
    none = write(tmp_path / "none", {"a": torch.ones(1)})
    assert diff_checkpoints(bare, none, dequantize=True).same
    assert [key.place for key in diff_checkpoints(bare, none).config] == ["quantization_config"]
    one = write(tmp_path / "one", {"a": torch.ones(1)})
    other = write(tmp_path / "other", {"a": torch.ones(1)}, {"hidden_size": 1})
    assert diff_checkpoints(one, other).config == (KeyDifference("config.json", ABSENT, "is there"),)


def test_a_config_nested_deeply(tmp_path: Path) -> None:
    deep = "[" * 900 + "%s" + "]" * 900
    for name in "ab":
        write(tmp_path / name, {"x": torch.ones(1)})
        (tmp_path / name / "config.json").write_text('{"deep": ' + deep % ord(name) + "}")
    (key,) = diff_checkpoints(tmp_path / "a", tmp_path / "b").config
    assert (key.first, key.second) == (97, 98)


def test_what_cannot_be_read(tmp_path: Path, dense: Tensors) -> None:
    one = write(tmp_path / "one", dense)
    with pytest.raises(CheckpointError, match="there is no such file"):
        diff_checkpoints(one, tmp_path / "none")


def test_memory_is_bounded_by_pieces_and_slabs(tmp_path: Path, dense: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = quantized(tmp_path / "one", dense, W4G16), quantized(tmp_path / "other", dense, FP8)
    monkeypatch.setattr(checkpoints, "_SLAB_VALUES", 3000)
    sizes: list[int] = []
    really = StoredModule.dense

    def watched(self: StoredModule, **part: Any) -> torch.Tensor:
        made = really(self, **part)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(StoredModule, "dense", watched)
    diff_checkpoints(one, other, dequantize=True)
    assert len(sizes) > 4
    assert max(sizes) <= 3000
    # Raw: two files of 16 MB that differ everywhere, of which the file's own memory does not count.
    for number in (1, 2):
        write(tmp_path / str(number), {"a": torch.full((2**23,), number, dtype=torch.bfloat16)})
    tracemalloc.start()
    try:
        (tensor,) = diff_checkpoints(tmp_path / "1", tmp_path / "2").tensors
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tensor.values is not None
    assert tensor.values.differing == 2**23
    assert peak < 16e6


def test_progress(tmp_path: Path, dense: Tensors) -> None:
    one, other = quantized(tmp_path / "one", dense, W4G16), dense_twin(tmp_path / "other", dense, W4G16)
    told: list[tuple[int, int]] = []
    diff_checkpoints(one, other, dequantize=True, progress=lambda done, total: told.append((done, total)))
    total = sum(read_checkpoint(one).spec(name).nbytes for name in read_checkpoint(one))
    assert [entry[1] for entry in told] == [total] * 6
    done = [entry[0] for entry in told]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, total)


def test_what_cannot_be_compared_one_by_one(tmp_path: Path, dense: Tensors) -> None:
    """Other shapes when dequantized; words beside numbers; codes of other dtypes."""
    one = quantized(tmp_path / "one", dense, W4G32)
    dense["up_proj.weight"] = dense["up_proj.weight"][:48].contiguous()
    other = quantized(tmp_path / "other", dense, W4G32)
    (tensor,) = diff_checkpoints(one, other, dequantize=True).tensors
    assert (tensor.name, tensor.second.shape, tensor.values) == ("up_proj.weight", (48, 64), None)
    for dtype in (torch.int8, torch.int32):
        write(tmp_path / str(dtype), {"x.weight_zero_point": torch.ones(3, dtype=dtype)})
    (tensor,) = diff_checkpoints(tmp_path / "torch.int8", tmp_path / "torch.int32").tensors
    assert (tensor.first.dtype, tensor.second.dtype, tensor.values) == ("int8", "int32", None)


def test_the_same_codes_under_scales_of_another_dtype(tmp_path: Path, dense: Tensors) -> None:
    one = quantized(tmp_path / "one", dense, W4G32)
    tensors = {
        name: tensor.float() if name.endswith("_scale") else tensor for name, tensor in read_checkpoint(one).items()
    }
    config = json.loads((one / "config.json").read_text())
    other = write(tmp_path / "other", tensors, config)
    found = diff_checkpoints(one, other, dequantize=True)
    assert {tensor.name for tensor in found.tensors} == {"up_proj.weight", "down_proj.weight"}
    assert {(tensor.first.dtype, tensor.second.dtype) for tensor in found.tensors} == {("bfloat16", "float32")}


def test_a_file_that_vanishes_meanwhile(tmp_path: Path, dense: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = write(tmp_path / "one", dense), write(tmp_path / "other", dense)

    def read_and_remove(path: Path) -> Checkpoint:
        checkpoint = read_checkpoint(path)
        if path == other:
            (path / "model.safetensors").unlink()
        return checkpoint

    monkeypatch.setattr(checkpoints, "read_checkpoint", read_and_remove)
    with pytest.raises(CheckpointError, match="there is no such file"):
        diff_checkpoints(one, other)
