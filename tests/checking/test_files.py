"""The files of a checkpoint: what cannot be read at all, headers, indices, and what lies beside the weights."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressed_format import check
from compressed_format.checking import chunks
from compressed_format.checkpoint import write_checkpoint
from tests.checking.checkpoints import DOWN, UP, found, save
from tests.models import edit_config, edit_tensors, read_tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "m")


@pytest.fixture
def sharded(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "sharded"
    config = (folder / "config.json").read_bytes()
    write_checkpoint(target, read_tensors(folder), files={"config.json": config}, max_shard_size=8192)
    assert found(target) == []
    return target


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def edit_index(folder: Path, **changes: Any) -> None:
    index = json.loads(index_of(folder).read_text())
    index_of(folder).write_text(json.dumps(index | changes))


@pytest.mark.parametrize("name", ["nothing", "nothing.json", "nothing.safetensors", "a\0b", "x" * 5000])
def test_a_path_that_is_not_there(tmp_path: Path, name: str) -> None:
    report = check(tmp_path / name)
    assert (report.exit_code, [finding.code for finding in report.findings]) == (2, ["CF001"])


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("words")
    os.mkfifo(tmp_path / "pipe.json")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "empty").mkdir()
    for name in ("readme.md", "pipe.json", "pipe.safetensors", "empty"):
        report = check(tmp_path / name)
        assert (report.exit_code, {finding.code for finding in report.findings}) == (2, {"CF001"}), name


def test_an_unfinished_save(folder: Path, tmp_path: Path) -> None:
    folder.rename(tmp_path / "m.partial")
    report = check(tmp_path / "m.partial")
    assert [finding.code for finding in report.findings] == ["CF001"]
    assert "unfinished save" in report.errors[0].message


@pytest.mark.parametrize("length", [0, 7, 8, 9, 200, -1])
def test_a_file_that_is_cut_off(folder: Path, length: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:length])
    report = check(folder)
    assert {finding.code for finding in report.errors} == {"CF002"}
    assert report.exit_code == 1


def test_all_headers_and_the_config_are_looked_at(sharded: Path) -> None:
    """One broken header does not hide another one, nor what is wrong with the config."""
    shards = sorted(sharded.glob("*.safetensors"))
    for shard in shards[:2]:
        shard.write_bytes(b"broken")
    edit_config(sharded, quantization_config={"quantization_status": "frozen"})
    assert sorted(code for code, _ in found(sharded)) == ["CF002", "CF002", "CF105"]


def test_index_and_shards(sharded: Path) -> None:
    index = json.loads(index_of(sharded).read_text())
    weight_map = index["weight_map"]
    name = f"{UP}.weight_packed"
    other = next(file for file in weight_map.values() if file != weight_map[name])
    place = "model.safetensors.index.json"
    for changed, expected in (
        ({key: file for key, file in weight_map.items() if key != name}, ("CF004", f"{weight_map[name]}: {name}")),
        (weight_map | {"ghost": other}, ("CF004", f"{place}: weight_map.ghost")),
        (weight_map | {"ghost": "../model.safetensors"}, ("CF003", f"{place}: weight_map.ghost")),
        (weight_map | {"ghost": "model.bin"}, ("CF003", f"{place}: weight_map.ghost")),
        (weight_map | {"ghost": "gone.safetensors"}, ("CF003", "gone.safetensors")),
        ([], ("CF003", f"{place}: weight_map")),
    ):
        edit_index(sharded, weight_map=changed)
        assert found(sharded)[:1] == [expected]
    edit_index(sharded, weight_map=weight_map | {name: other})
    assert {code for code, _ in found(sharded)} == {"CF004"}
    index_of(sharded).write_text("{")
    assert found(sharded) == [("CF003", place)]


def test_total_size(sharded: Path) -> None:
    edit_index(sharded, metadata={"total_size": 12})
    assert found(sharded) == [("CF005", "model.safetensors.index.json: metadata.total_size")]
    held = sum(tensor.nbytes for tensor in read_tensors(sharded).values())
    assert f"take {held} bytes" in check(sharded).warnings[0].message
    edit_index(sharded, metadata={})
    assert found(sharded) == []


def test_an_index_beside_a_single_file(folder: Path) -> None:
    weight_map = dict.fromkeys(read_tensors(folder), "model.safetensors")
    index_of(folder).write_text(json.dumps({"weight_map": weight_map}))
    assert found(folder) == []
    index_of(folder).write_text(json.dumps({"weight_map": weight_map | {"ghost": "model.safetensors"}}))
    assert [code for code, _ in found(folder)] == ["CF004"]


def test_what_lies_beside_the_weights(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "ran",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    (folder / "modeling.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    edit_config(folder, auto_map={"AutoModel": "modeling.Model"})
    report = check(folder)
    assert [finding.code for finding in report.findings] == ["CF006", "CF007", "CF008", "CF008"]
    assert not (folder / "ran").exists()


def test_a_single_file(folder: Path) -> None:
    """It has the config of its folder, and is not to blame for what else is there."""
    save_file({"x": torch.zeros(1)}, folder / "other.safetensors")
    assert found(folder / "model.safetensors") == []
    edit_tensors(folder, drop=(f"{UP}.weight_scale",))
    (folder / "other.safetensors").unlink()
    assert found(folder / "model.safetensors") == [("CF201", f"{UP}.weight_scale")]
    (folder / "config.json").unlink()
    assert found(folder) == [("CF103", DOWN)]  # the first in the file


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    save_file({"lin.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    report = check(tmp_path)
    assert [finding.code for finding in report.findings] == ["CF104"]
    assert report.ok


def test_a_file_that_shrinks_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, opened = folder / "model.safetensors", chunks.open_source

    def shrunk(path: Path) -> int:
        os.truncate(file, file.stat().st_size - 4096)
        return opened(path)

    monkeypatch.setattr(chunks, "open_source", shrunk)
    report = check(folder)
    assert "CF009" in {finding.code for finding in report.errors}
    assert {finding.place for finding in report.errors} == {"model.safetensors"}


def test_a_config_that_is_no_file(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert [code for code, _ in found(folder)] == ["CF101"]


def test_tied_weights(folder: Path) -> None:
    head = read_tensors(folder)["lm_head.weight"]
    edit_config(folder, tie_word_embeddings=True)
    assert found(folder) == [("CF215", "lm_head")]
    edit_tensors(folder, **{"model.embed_tokens.weight": head})
    report = check(folder)
    assert (report.exit_code, [finding.code for finding in report.findings]) == (0, ["CF216"])
    assert check(folder, quick=True).findings == ()
    edit_tensors(folder, drop=("lm_head.weight",))
    assert check(folder).findings == ()
    edit_config(folder, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    assert found(folder) == [("CF217", "config.json")]


def test_cache_scales(folder: Path) -> None:
    attention = "model.layers.0.self_attn"
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    edit_config(folder, quantization_config={"kv_cache_scheme": scheme})
    edit_tensors(folder, **{f"{attention}.k_scale": torch.ones(1), f"{attention}.v_scale": torch.ones(1)})
    assert found(folder) == []
    edit_tensors(folder, **{f"{attention}.k_scale": torch.zeros(1)})
    assert found(folder) == [("CF302", f"{attention}.k_scale")]
    edit_tensors(folder, drop=(f"{attention}.k_scale",))
    assert found(folder) == [("CF213", f"{attention}.k_scale")]
    edit_tensors(folder, **{f"{attention}.k_scale": torch.ones(2)})
    assert found(folder) == [("CF203", f"{attention}.k_scale")]


def test_experts_in_one_tensor(folder: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    edit_tensors(
        folder, **{f"{name}_packed": torch.zeros(4, 8, 8, dtype=torch.int32), f"{name}_scale": torch.ones(4, 8, 2)}
    )
    (finding,) = check(folder).warnings
    assert finding.code == "CF214"
    assert "1 more" in finding.message
    assert "CF414" in dict(found(folder, consumers=["vllm"]))
