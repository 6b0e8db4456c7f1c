"""A checkpoint compressed without its model holds what the model, compressed in memory, would be saved as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from compressed_format import (
    compress,
    compress_checkpoint,
    decompress_checkpoint,
    load_compressed,
    save_compressed,
)
from compressed_format.errors import UnsupportedFormatError
from tests.checks import assert_same_bits
from tests.integrations.every_model import FORMATS, KINDS, Kind
from tests.models import read_tensors, recorded_warnings

pytestmark = pytest.mark.filterwarnings("ignore:.*will not serve the result")

# One for each way of cutting a weight: rows with packed zero points, blocks, and values with a bitmask.
CASES = ("W4A16 asymmetric", "FP8_BLOCK", "2:4 FP8")


def quantization_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


@pytest.fixture(scope="module", params=KINDS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, type, Path]:
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("dense") / "model"
    model = kind.build().to(torch.bfloat16)
    model.save_pretrained(folder)
    return kind, type(model), folder


@pytest.mark.filterwarnings("ignore:this checkpoint is sparse")
@pytest.mark.parametrize("format", CASES)
def test_as_if_the_model_had_been_compressed(format: str, dense: tuple[Kind, Any, Path], tmp_path: Path) -> None:
    kind, model_class, folder = dense
    config = FORMATS[format].config(kind)
    streamed, saved = tmp_path / "streamed", tmp_path / "saved"
    with recorded_warnings() as texts:
        compress_checkpoint(folder, streamed, config)
    assert not [text for text in texts if "architecture" in text]
    model = model_class.from_pretrained(folder, dtype=torch.bfloat16)
    save_compressed(compress(model, config), saved)
    found, expected = read_tensors(streamed), read_tensors(saved)
    assert sorted(found) == sorted(expected)
    source = read_tensors(folder)
    for name, tensor in expected.items():
        # transformers keeps a few tensors in float32, which a checkpoint that streams has as they were.
        copied = name in source and tensor.dtype.itemsize > 1
        assert_same_bits(found[name], source[name] if copied else tensor, name)
    for part in (quantization_config(streamed), quantization_config(saved)):
        part["ignore"] = sorted(part["ignore"])
    assert quantization_config(streamed)["config_groups"] == quantization_config(saved)["config_groups"]
    assert set(quantization_config(streamed)["ignore"]) == set(quantization_config(saved)["ignore"])


@pytest.mark.parametrize("kind", ["Llama", "Llama, tied, embedding and head quantized", "Mixtral", "GPT-OSS", "Llava"])
def test_loaded_and_decompressed(kind: str, tmp_path: Path) -> None:
    """What was streamed runs as the model in memory does, and its decompressed twin is that model's."""
    source = KINDS[kind]
    folder, streamed, back = tmp_path / "dense", tmp_path / "streamed", tmp_path / "back"
    model = source.build()
    model.save_pretrained(folder)
    config = FORMATS["W4A16"].config(source)
    compress_checkpoint(folder, streamed, config)
    loaded, inputs = load_compressed(streamed), source.inputs()
    model = compress(type(model).from_pretrained(folder), config)
    with torch.no_grad():
        expected = model(**inputs)[0]
        assert torch.equal(loaded(**inputs)[0], expected)
    if kind == "GPT-OSS":
        with pytest.raises(UnsupportedFormatError, match="from stacked tensors only"):
            decompress_checkpoint(streamed, back)
        return
    decompress_checkpoint(streamed, back)
    with torch.no_grad():
        found = type(model).from_pretrained(back)(**inputs)[0]
    torch.testing.assert_close(found, expected)


def memory_names(folder: Path, model: Any) -> None:
    """Save the parameters as they are called in memory, experts stacked, as programs do that bypass save_pretrained."""
    folder.mkdir()
    model.config.save_pretrained(folder)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["Qwen3-MoE", "DeepSeek-V3"])
def test_experts_that_are_stacked_in_the_file(kind: str, tmp_path: Path) -> None:
    source = KINDS[kind]
    model = source.build()
    memory_names(tmp_path / "fused", model)
    assert any(tensor.dim() == 3 for tensor in read_tensors(tmp_path / "fused").values())
    config = FORMATS["W4A16 asymmetric"].config(source)
    compress_checkpoint(tmp_path / "fused", tmp_path / "streamed", config)
    with recorded_warnings():  # no source folder is known
        save_compressed(compress(model, config), tmp_path / "saved")
    found, expected = read_tensors(tmp_path / "streamed"), read_tensors(tmp_path / "saved")
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)


@pytest.mark.parametrize("kind", ["Llama", "Llama, tied", "Mixtral", "Qwen3-MoE", "GPT-OSS", "Qwen2.5-VL", "T5"])
def test_names_alone_tell_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = KINDS[kind]
    source.build().save_pretrained(tmp_path / "dense")
    config = FORMATS["W4A16"].config(source)
    compress_checkpoint(tmp_path / "dense", tmp_path / "known", config)
    monkeypatch.setattr("compressed_format.streaming.targets.find_spec", lambda name: None)
    with recorded_warnings():  # of names that only the model has
        compress_checkpoint(tmp_path / "dense", tmp_path / "unknown", config)
    found, expected = read_tensors(tmp_path / "unknown"), read_tensors(tmp_path / "known")
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert_same_bits(found[name], tensor, name)


def test_disagreements_are_told_and_the_architecture_decides(tmp_path: Path) -> None:
    """GPT-2's layers are named like Linear modules, and hold their weights the other way round."""
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    tensors = read_tensors(tmp_path / "dense")
    save_file({**tensors, "extra.proj.weight": torch.ones(8, 32)}, tmp_path / "dense" / "model.safetensors")
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "group_size": 32}}
    with recorded_warnings() as texts:
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", {"config_groups": {"g": group}})
    assert any("looks like a Linear by its name, and is of the class Conv1D" in text for text in texts)
    assert any("extra.proj: is no module of the architecture in config.json" in text for text in texts)
    found = read_tensors(tmp_path / "out")
    assert [name for name in found if name.endswith("weight_packed")] == ["extra.proj.weight_packed"]
