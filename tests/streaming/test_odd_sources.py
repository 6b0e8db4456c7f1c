"""Sources that are odd and not wrong pass; those that cannot be passed on as they are end in typed errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressed_format import compress_checkpoint
from compressed_format.errors import CheckpointError, CompressedFormatWarning, QuantizationError
from compressed_format.streaming.outputs import layer_order
from tests.checkpoint.saves import content_of
from tests.checks import assert_same_bits
from tests.models import read_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*will not serve the result")

CONFIG = {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}}}


def dense(folder: Path, **more: torch.Tensor) -> Path:
    folder.mkdir()
    save_file({"layers.0.up_proj.weight": torch.eye(8), **more}, folder / "model.safetensors")
    return folder


def test_names_of_any_kind(tmp_path: Path) -> None:
    names = ("²", "a.1²3.weight", "l.٣.weight", f"l.{'9' * 5000}.b", "weight", "", ".", "..weight", "__metadata")
    tensors = {name: torch.full((4,), float(number)) for number, name in enumerate(names)}
    compress_checkpoint(dense(tmp_path / "source", **tensors), tmp_path / "out", CONFIG)
    found = read_tensors(tmp_path / "out")
    for name, tensor in tensors.items():
        assert_same_bits(found[name], tensor, name)


def test_the_tenth_layer_follows_the_ninth() -> None:
    names = ["l.9.a", "l.10.a", "l.010.b", "l.11.a", f"l.{'1' * 5000}.a", "l.a", "m.2", "m.2.a"]
    found = names[::-1]
    found.sort(key=layer_order)
    assert found == names


def test_a_config_that_utf_8_cannot_hold_stays_what_it_is(tmp_path: Path) -> None:
    source = dense(tmp_path / "source")
    (source / "config.json").write_text('{"name": "\\ud800", "other": "é"}')
    compress_checkpoint(source, tmp_path / "out", CONFIG)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content.pop("quantization_config")["format"] == "pack-quantized"
    assert content == {"name": "\ud800", "other": "é"}


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["folder", "dead link"])
def test_a_config_that_is_no_file(make: object, tmp_path: Path) -> None:
    source = dense(tmp_path / "source")
    assert callable(make)
    make(source / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: is a folder, a device, a pipe or a dead link"):
        compress_checkpoint(source, tmp_path / "out", CONFIG)


def test_weights_that_are_codes_are_no_weights_to_compress(tmp_path: Path) -> None:
    codes = torch.eye(8).to(torch.float8_e4m3fn)
    source = dense(tmp_path / "source", **{"layers.0.down_proj.weight": codes})
    with pytest.raises(QuantizationError, match=r"layers\.0\.down_proj: its weight has dtype torch\.float8_e4m3fn"):
        compress_checkpoint(source, tmp_path / "out", CONFIG)
    compress_checkpoint(source, tmp_path / "out", {**CONFIG, "ignore": ["re:.*down_proj"]})
    assert_same_bits(read_tensors(tmp_path / "out")["layers.0.down_proj.weight"], codes, "codes")


def test_a_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    embedding = torch.eye(8)
    source = dense(tmp_path / "source", **{"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()})
    (source / "config.json").write_text('{"tie_word_embeddings": true}')
    with pytest.warns(CompressedFormatWarning, match=r"^lm_head: is stored, though .* ties it to model\.embed_tokens"):
        compress_checkpoint(source, tmp_path / "out", CONFIG)
    alike = {"config_groups": {"g": {**CONFIG["config_groups"]["g"], "targets": ["Linear", "Embedding"]}}}
    compress_checkpoint(source, tmp_path / "alike", alike)  # warnings are errors here
    compress_checkpoint(source, tmp_path / "ignored", {**CONFIG, "ignore": ["lm_head"]})


def test_an_index_stands_for_its_folder(tmp_path: Path) -> None:
    source = dense(tmp_path / "source")
    index = {"metadata": {}, "weight_map": {"layers.0.up_proj.weight": "model.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "config.json").write_text('{"hidden_size": 8}')
    (source / "tokenizer.json").write_text("{}")
    compress_checkpoint(source, tmp_path / "folder", CONFIG)
    compress_checkpoint(source / "model.safetensors.index.json", tmp_path / "index", CONFIG)
    assert content_of(tmp_path / "index") == content_of(tmp_path / "folder")
    assert sorted(content_of(tmp_path / "index")) == ["config.json", "model.safetensors", "tokenizer.json"]
