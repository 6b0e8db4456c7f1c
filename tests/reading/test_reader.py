"""``open_checkpoint``: every file that any release wrote, stored, quantized and dense, and nothing read early."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compressed_format import decompress_checkpoint, open_checkpoint
from compressed_format.errors import CheckpointError, ConfigError, FormatError, UnsupportedFormatError
from tests.checks import GOLDEN, assert_same_bits, byte_view, golden_cases, golden_tensor
from tests.models import read_tensors, recorded_warnings

FOLDERS = {f"{folder.parent.name}/{folder.name}": folder for folder in sorted(GOLDEN.glob("*/*/")) if folder.is_dir()}
BARE = [name for name, folder in FOLDERS.items() if not (folder / "config.json").exists()]
MX = [name for name in FOLDERS if "mxfp" in name or "nvfp" in name]


def decompressed(name: str) -> torch.Tensor | None:
    """What the release itself makes of the weight, where it does."""
    release, case = name.split("/")
    found = golden_cases(release).get(case, {}).get("decompressed")
    return golden_tensor(found) if found and "hex" in found else None


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in (*MX, *BARE)])
def test_every_release(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name]
    with recorded_warnings():
        reader = open_checkpoint(folder)
    stored = read_tensors(folder)
    assert sorted(reader) == sorted(tensor for module in reader.modules.values() for tensor in full_names(module))
    compressed = [module for module in reader.modules.values() if module.assignment is not None]
    assert compressed
    for module in compressed:
        for suffix, tensor in module.raw().items():
            assert_same_bits(tensor, stored[f"{module.name}.{suffix}"], suffix)
        whole = module.dense()
        assert whole.shape == module.shape
        expected = decompressed(name)
        if expected is not None:
            assert_same_bits(whole, expected.to(whole.dtype), name)
        rows = whole.shape[0]
        for part in ((0, rows), (1, rows - 1), (rows - 1, rows), (2, 2)):
            assert_same_bits(module.dense(rows=part), whole[part[0] : part[1]], f"{name} {part}")
    with recorded_warnings():
        decompress_checkpoint(folder, tmp_path / "dense")
    dense = read_tensors(tmp_path / "dense")
    for module in compressed:
        assert_same_bits(dense[f"{module.name}.weight"], module.dense(dtype=dense[f"{module.name}.weight"].dtype))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


@pytest.mark.parametrize("name", BARE)
def test_tensors_without_a_config_are_raw_and_nothing_else(name: str, tmp_path: Path) -> None:
    reader = open_checkpoint(FOLDERS[name])
    assert reader.config is None
    for stored, tensor in read_tensors(FOLDERS[name]).items():
        assert_same_bits(reader[stored], tensor)
    with pytest.raises(CheckpointError, match="no quantization_config says how"):
        decompress_checkpoint(FOLDERS[name], tmp_path / "dense")


def full_names(module: Any) -> list[str]:
    return [f"{module.name}.{suffix}" if module.name else suffix for suffix in module.tensors]


@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_marlin_is_decoded_whole(strategy: str, tmp_path: Path) -> None:
    tensors = read_tensors(FOLDERS[f"v0.14.0.1_legacy/marlin24_4_{strategy}_64x256"])
    weights = {"num_bits": 4, "strategy": strategy, "group_size": 128 if strategy == "group" else None}
    group = {"targets": ["Linear"], "weights": weights, "format": "marlin-24"}
    folder = save(
        tmp_path / "a",
        tensors,
        quantization_config={"config_groups": {"g": group}, "format": "marlin-24", "ignore": ["head"]},
    )
    module = open_checkpoint(folder).modules["lin"]
    assert module.shape == (64, 256)
    assert_same_bits(module.dense(rows=(3, 40)), module.dense()[3:40])
    decompress_checkpoint(folder, tmp_path / "dense")
    assert_same_bits(read_tensors(tmp_path / "dense")["lin.weight"], module.dense())


@pytest.mark.parametrize("name", MX)
def test_what_cannot_be_decoded_is_opened_and_refused_by_name(name: str, tmp_path: Path) -> None:
    with recorded_warnings():
        reader = open_checkpoint(FOLDERS[name])
    module = next(module for module in reader.modules.values() if module.assignment is not None)
    assert module.raw().keys() == module.tensors.keys()
    with pytest.raises(UnsupportedFormatError, match="cannot be read or written yet"):
        module.dense()
    with pytest.raises(UnsupportedFormatError), recorded_warnings():
        decompress_checkpoint(FOLDERS[name], tmp_path / "dense")


def save(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_arrays_of_numpy_have_the_same_bytes(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
            torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
        )
    }  # fmt: skip
    tensors["empty"] = torch.empty(0, 5)
    tensors["scalar"] = torch.tensor(3.5)
    reader = open_checkpoint(save(tmp_path / "dense", tensors), framework="np")
    for name, tensor in tensors.items():
        array = reader[name]
        assert isinstance(array, np.ndarray)
        assert array.shape == tuple(tensor.shape)
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert array.tobytes() == bytes(byte_view(tensor).tolist())
        assert array.flags.aligned


NO_TORCH = """
import sys
from compressed_format import open_checkpoint
reader = open_checkpoint({path!r}, framework="np")
module = reader.modules["lin"]
assert module.assignment is not None and sorted(module.tensors) == sorted(module.raw())
print(reader["lin.weight_scale"].dtype, "torch" in sys.modules)
"""


def test_numpy_needs_no_torch() -> None:
    program = NO_TORCH.format(path=str(GOLDEN / "v0.20.0" / "int8_channel_token"))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["bfloat16", "False"]


def test_without_ml_dtypes_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "dense", {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    reader = open_checkpoint(folder, framework="np")
    assert reader["b"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"a: is bfloat16, .*compressed-format\[numpy\]"):
        reader["a"]


def test_nothing_is_mapped_before_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[str] = []
    from compressed_format.checkpoint.shard_file import ShardFile

    really = ShardFile.map
    monkeypatch.setattr(ShardFile, "map", lambda shard: (mapped.append(shard.name), really(shard))[1])
    reader = open_checkpoint(GOLDEN / "v0.20.0" / "int8_channel_token")
    assert reader.config is not None
    assert [module.kind for module in reader.modules.values()] == ["Linear", "Linear"]
    assert reader.modules["lin"].nbytes > 0
    assert "int-quantized" in repr(reader)
    assert mapped == []
    reader.modules["lin"].quantized(rows=(0, 1))
    assert mapped == ["model.safetensors"]


def test_a_checkpoint_that_is_not_compressed(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    reader = open_checkpoint(save(tmp_path / "dense", {"lin.weight": weight, "step": torch.tensor(1)}, model_type="x"))
    assert reader.config is None
    module = reader.modules["lin"]
    assert module.shape == (6, 4)
    assert_same_bits(module.dense(rows=(2, 5), dtype=torch.float64), weight[2:5].double())
    for ask, message in (
        (lambda: module.quantized(), "is not compressed"),
        (lambda: module.dense(groups=(0, 1)), "has no groups"),
        (lambda: module.dense(rows=(4, 7)), "rows 4 to 7 were asked for"),
        (lambda: reader.modules[""].dense(), "has no weight"),
    ):
        with pytest.raises(FormatError, match=message):
            ask()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="framework"):
        open_checkpoint(tmp_path, framework="tf")  # type: ignore[arg-type]
    folder = save(tmp_path / "a", {"lin.weight": torch.ones(2, 2)}, quantization_config=[1])
    with pytest.raises(ConfigError, match="must be an object"):
        open_checkpoint(folder)
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors", metadata={"quantization_config": "{"})
    with pytest.raises(ConfigError, match="is no JSON"):
        open_checkpoint(tmp_path / "b.safetensors")


@pytest.mark.parametrize("make", [Path.mkdir, lambda file: file.symlink_to(file.name), os.mkfifo])
def test_a_config_that_is_no_file_is_not_as_good_as_none(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = save(tmp_path / "a", {"lin.weight": torch.ones(2, 2)})
    make(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is a folder, a device, a pipe or a dead link"):
        open_checkpoint(folder)


def test_tensors_that_contradict_the_config_are_named(tmp_path: Path) -> None:
    source = FOLDERS["v0.20.0/int8_channel_token"]
    config = json.loads((source / "config.json").read_text())
    tensors = read_tensors(source)
    del tensors["lin.weight_scale"]
    folder = save(tmp_path / "a", tensors, **config)
    module = open_checkpoint(folder).modules["lin"]
    with pytest.raises(FormatError, match=r"lin\.weight_scale: is missing"):
        module.dense()
    with pytest.raises(FormatError, match=r"lin\.weight_scale: is missing"):
        decompress_checkpoint(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
