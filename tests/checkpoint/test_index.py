"""Checkpoints with an index: that it and the shards agree, and that neither leads astray."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressed_format.checkpoint import read_checkpoint
from compressed_format.errors import CheckpointError

RawFile = Callable[..., bytes]
Holds = Callable[..., bool]
INDEX = "model.safetensors.index.json"


def _edit_index(folder: Path, **changes: Any) -> None:
    """Set entries of the weight map, or remove those that are ``None``."""
    index = json.loads((folder / INDEX).read_text())
    weight_map = index["weight_map"] | changes
    index["weight_map"] = {name: file for name, file in weight_map.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


def test_a_shard_in_a_folder_below(sharded: Path, holds: Holds) -> None:
    (sharded / "below").mkdir()
    file = "model-00001-of-00003.safetensors"
    (sharded / file).rename(sharded / "below" / file)
    _edit_index(sharded, a=f"below/{file}")
    assert holds(sharded, {name: torch.ones(4) for name in "abc"})


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "below/../../x.safetensors",
        "/etc/x.safetensors",
        "./x.safetensors",
        "below//x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        "",
        ".",
        "..",
        "pytorch_model.bin",
        "/dev/zero",
        3,
        None,
        ["x.safetensors"],
    ],
)
def test_names_that_an_index_must_not_hold(name: Any, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name, "b": name}}))
    with pytest.raises(CheckpointError, match=r"weight_map\.a: ") as caught:
        read_checkpoint(tmp_path)
    assert len(caught.value.problems) == (1 if isinstance(name, str) else 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read"),
        (b"[]", "a JSON list"),
        (b"{}", "weight_map: must be"),
        (b'{"weight_map": ["a"]}', "weight_map: must be"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
        (b'{"weight_map": {"a": "\\ud800.safetensors"}}', "Unicode"),
        (b'{"weight_map": {"a": "\xff.safetensors"}}', "UTF-8"),
        (b'{"weight_map": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"weight_map": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_an_index_that_cannot_be_read(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(text)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


def test_an_index_longer_than_any_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(CheckpointError, match="100000001 bytes"):
        read_checkpoint(tmp_path)


def test_an_empty_index(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {}}')
    assert len(read_checkpoint(tmp_path)) == 0


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device", "loop", "dangling link"])
def test_shards_that_are_no_files(kind: str, sharded: Path) -> None:
    path = sharded / "model-00002-of-00003.safetensors"
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling link":
        path.symlink_to("nothing")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(sharded)
    assert [problem.place for problem in caught.value.problems] == [path.name]


def test_a_pipe_that_took_the_place_of_a_file(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the name and the opening: it must neither wait nor be read."""
    path = sharded / "model-00002-of-00003.safetensors"
    status = path.stat()
    path.unlink()
    os.mkfifo(path)
    original = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **more: status if self == path else original(self, **more))
    with pytest.raises(CheckpointError, match="a pipe"):
        read_checkpoint(sharded)


def test_index_and_shards_disagree(sharded: Path) -> None:
    _edit_index(sharded, a=None, b="model-00003-of-00003.safetensors", d="model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(sharded)
    _edit_index(sharded, b="model-00002-of-00003.safetensors")
    assert [str(problem) for problem in caught.value.problems] == [
        f"model-00001-of-00003.safetensors: a: is here, and not in {INDEX}",
        f"{INDEX}: weight_map.b: is not in model-00003-of-00003.safetensors",
        f"{INDEX}: weight_map.d: is not in model-00001-of-00003.safetensors",
    ]


def test_a_tensor_in_another_shard_as_well(sharded: Path) -> None:
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, sharded / "model-00001-of-00003.safetensors")
    with pytest.raises(CheckpointError, match=r"b: is here, and .* says 'model-00002-of-00003.safetensors'"):
        read_checkpoint(sharded)


def test_all_shards_are_checked(sharded: Path) -> None:
    for number in (1, 3):
        (sharded / f"model-0000{number}-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(sharded)
    assert len(caught.value.problems) == 2
