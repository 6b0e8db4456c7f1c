"""Finding a checkpoint, and its mapped tensors."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressed_format.checkpoint import read_checkpoint, shard_file, write_checkpoint
from compressed_format.errors import CheckpointError

RawFile = Callable[..., bytes]
Holds = Callable[..., bool]
INDEX = "model.safetensors.index.json"


def test_a_folder_with_one_file(tmp_path: Path, tensors: dict[str, torch.Tensor], holds: Holds) -> None:
    save_file(tensors, tmp_path / "model.safetensors", metadata={"by": "safetensors"})
    (tmp_path / "other.safetensors").write_bytes(b"not looked at")
    assert holds(tmp_path, tensors)
    checkpoint = read_checkpoint(str(tmp_path))
    assert checkpoint.files == ("model.safetensors",)
    assert checkpoint.metadata == {"by": "safetensors"}
    assert checkpoint.path == checkpoint.folder == tmp_path
    assert repr(checkpoint) == f"Checkpoint({str(tmp_path)!r}, 4 tensors in 1 files)"


def test_one_file_of_any_name(tmp_path: Path, tensors: dict[str, torch.Tensor], holds: Holds) -> None:
    save_file(tensors, tmp_path / "any.safetensors")
    assert holds(tmp_path, tensors)
    assert holds(tmp_path / "any.safetensors", tensors)
    assert read_checkpoint(tmp_path / "any.safetensors").folder == tmp_path


def test_shards(sharded: Path, holds: Holds) -> None:
    expected = {name: torch.ones(4) for name in "abc"}
    assert holds(sharded, expected)
    assert holds(sharded / INDEX, expected)
    checkpoint = read_checkpoint(sharded)
    assert checkpoint.names == tuple(checkpoint) == ("a", "b", "c")
    assert checkpoint.files == tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
    assert checkpoint.spec("b").file == "model-00002-of-00003.safetensors"
    assert holds(sharded / checkpoint.files[0], {"a": torch.ones(4)})


def test_mapping(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(tmp_path / "out", tensors)
    checkpoint = read_checkpoint(tmp_path / "out")
    spec = checkpoint.spec("a.weight_packed")
    assert (spec.dtype, spec.shape, spec.file, spec.nbytes) == ("int32", (2, 16), "model.safetensors", 128)
    assert "b.weight" in checkpoint
    assert "c.weight" not in checkpoint
    assert 3 not in checkpoint
    assert len(checkpoint) == len(list(checkpoint.values())) == 4
    assert checkpoint == checkpoint
    assert checkpoint != read_checkpoint(tmp_path / "out")
    assert len({checkpoint}) == 1
    with pytest.raises(KeyError):
        checkpoint["c.weight"]
    with pytest.raises(KeyError):
        checkpoint.spec("c.weight")


def test_metadata_of_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors", metadata={"x": "first", "y": "only"})
    save_file({"b": torch.ones(1)}, tmp_path / "2.safetensors", metadata={"x": "second", "z": "last"})
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    assert read_checkpoint(tmp_path).metadata == {"x": "first", "y": "only", "z": "last"}


def test_tensors_are_mapped_when_asked_for_and_outlive_everything(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[str] = []
    original = shard_file.ShardFile.map

    def watched(self: shard_file.ShardFile) -> Any:
        mapped.append(self.name)
        return original(self)

    monkeypatch.setattr(shard_file.ShardFile, "map", watched)
    checkpoint = read_checkpoint(sharded)
    assert mapped == []
    first, again = checkpoint["b"], checkpoint["b"]
    assert mapped == ["model-00002-of-00003.safetensors"]
    assert first.data_ptr() == again.data_ptr()
    del checkpoint, again
    gc.collect()
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert torch.equal(first, torch.ones(4))


def test_writing_into_a_tensor_never_reaches_the_file(sharded: Path) -> None:
    before = (sharded / "model-00001-of-00003.safetensors").read_bytes()
    tensor = read_checkpoint(sharded)["a"]
    tensor.fill_(7)
    assert torch.equal(tensor, torch.full((4,), 7.0))
    assert (sharded / "model-00001-of-00003.safetensors").read_bytes() == before


def test_each_tensor_has_a_storage_of_its_own(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(tmp_path / "out", tensors)
    checkpoint = read_checkpoint(tmp_path / "out")
    for name, tensor in checkpoint.items():
        assert tensor.storage_offset() == 0
        assert tensor.untyped_storage().nbytes() == checkpoint.spec(name).nbytes


def test_tensors_at_odd_places(tmp_path: Path, raw_file: RawFile) -> None:
    header = {
        "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "odd": {"dtype": "I32", "shape": [2], "data_offsets": [1, 9]},
        "empty": {"dtype": "F64", "shape": [3, 0], "data_offsets": [9, 9]},
        "scalar": {"dtype": "C64", "shape": [], "data_offsets": [9, 17]},
    }
    numbers = torch.tensor([1, -2], dtype=torch.int32)
    scalar = torch.tensor(1 + 2j, dtype=torch.complex64)
    data = b"\x05" + numbers.numpy().tobytes() + scalar.numpy().tobytes()
    (tmp_path / "x.safetensors").write_bytes(raw_file(header, data))
    checkpoint = read_checkpoint(tmp_path)
    assert torch.equal(checkpoint["pad"], torch.tensor([5], dtype=torch.uint8))
    assert torch.equal(checkpoint["odd"], numbers)
    assert checkpoint["odd"].data_ptr() % 4 == 0
    assert checkpoint["empty"].shape == (3, 0)
    assert torch.equal(checkpoint["scalar"], scalar)


@pytest.mark.parametrize("change", ["truncate", "replace", "remove"])
def test_a_file_that_changed_is_not_mapped(sharded: Path, change: str) -> None:
    checkpoint = read_checkpoint(sharded)
    path = sharded / checkpoint.files[0]
    content = path.read_bytes()
    if change == "truncate":
        os.truncate(path, 10)
    else:
        path.rename(sharded / "moved")
        if change == "replace":
            path.write_bytes(content)
    with pytest.raises(CheckpointError, match="no such file" if change == "remove" else "has changed"):
        checkpoint["a"]


def test_the_working_directory_may_change(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded)
    checkpoint = read_checkpoint(".")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(checkpoint["a"], torch.ones(4))


def test_links_as_in_the_cache_of_hugging_face(sharded: Path, tmp_path: Path, holds: Holds) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, path in enumerate(sharded.iterdir()):
        path.rename(tmp_path / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../blobs/{number}")
    (tmp_path / "link").symlink_to("snapshot")
    assert holds(tmp_path / "link", {name: torch.ones(4) for name in "abc"})


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        read_checkpoint(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"none of model\.safetensors, model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "loop")
    for name in ("a\0b", "a\ud800b", "x" * 300):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_checkpoint(tmp_path / name)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors: name one"):
        read_checkpoint(tmp_path)


def test_pickle_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").touch()
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin may hold a pickle.*convert it"):
            read_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"is no \.safetensors file$"):
        read_checkpoint(tmp_path / "config.json")


def test_an_unfinished_save_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(tmp_path / "out", tensors)
    (tmp_path / "out").rename(tmp_path / "out.partial")
    (tmp_path / "link").symlink_to("out.partial")
    for path in ("out.partial", "link", "out.partial/model.safetensors", "link/model.safetensors"):
        with pytest.raises(CheckpointError, match="unfinished save"):
            read_checkpoint(tmp_path / path)


def test_a_file_that_cannot_be_opened(sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated, because permissions do not bind the superuser."""

    def refuse(path: Any, _: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shard_file.os, "open", refuse)
        with pytest.raises(CheckpointError, match=f"{INDEX}: cannot be read: Permission denied") as caught:
            read_checkpoint(sharded)
    assert isinstance(caught.value.__cause__.__cause__, PermissionError)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((20).to_bytes(8, "little") + b"{}".ljust(20))
    status = path.stat()
    os.truncate(path, 20)
    monkeypatch.setattr(shard_file.os, "fstat", lambda _: status)
    with pytest.raises(CheckpointError, match="became shorter"):
        read_checkpoint(path)


def test_reading_headers_imports_no_torch(sharded: Path) -> None:
    program = (
        "import sys; from compressed_format.checkpoint import read_checkpoint; "
        f"print(len(read_checkpoint({str(sharded)!r})), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["3", "False"]


def test_equal_to_the_reference(tmp_path: Path, tensors: dict[str, torch.Tensor], holds: Holds) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    assert holds(tmp_path, load_file(tmp_path / "model.safetensors"))
