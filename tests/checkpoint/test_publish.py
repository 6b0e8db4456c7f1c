"""All or nothing: the order of the system calls, and which destinations may be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from compressed_format.checkpoint import publish, syscalls, write_checkpoint
from compressed_format.checkpoint.publish import publishing
from compressed_format.errors import (
    CheckpointError,
    CheckpointExistsError,
)
from tests.checkpoint.saves import OLD, content_of, prepare, save

if TYPE_CHECKING:
    from tests.checkpoint.conftest import DiskCalls

Holds = Callable[..., bool]
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("before", ["nothing", "empty folder", "checkpoint", "file"])
def test_nothing_is_renamed_before_it_is_on_the_disk(
    before: str, tmp_path: Path, tensors: Tensors, disk_calls: DiskCalls
) -> None:
    target, partial = tmp_path / "out", tmp_path / "out.partial"
    prepare(target, before)
    disk_calls.record.clear()
    save(target, tensors, overwrite=True)
    record = disk_calls.record
    publication = "rename" if before in ("nothing", "empty folder") else "exchange"
    (published,) = (at for at, (name, args) in enumerate(record) if name == publication and args == (partial, target))

    def last(name: str, path: Path) -> int:
        return max(at for at, call in enumerate(record) if call[:1] == (name,) and call[1][0] == path)

    files = [partial / name for name in content_of(target) if (target / name).is_file()]
    folders = [partial, partial / "code"]
    assert len(files) == 5
    for path in files:
        assert last("write", path) < last("sync", path) < last("close", path) < published
    for folder in folders:
        inside = [last("create_file", path) for path in files if path.parent == folder]
        assert max(inside) < last("sync_folder", folder) < published
    assert last("make_folder", partial / "code") < last("sync_folder", partial)
    assert record[published + 1] == ("sync_folder", (tmp_path,))
    after = [name for name, _ in record[published + 2 :]]
    assert after == (["sync"] if publication == "rename" else ["sync", "remove"])  # the folder's own sync, within


def test_made_parents_are_synced(tmp_path: Path, disk_calls: DiskCalls) -> None:
    save(tmp_path / "a" / "b" / "out", OLD)
    assert disk_calls.record.index(("sync_folder", (tmp_path,))) < disk_calls.names.index("create_file")
    assert ("sync_folder", (tmp_path / "a",)) in disk_calls.record


def test_an_occupied_destination(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / ".hidden").touch()
    (tmp_path / "file").touch()
    content = content_of(tmp_path)
    for name in ("folder", "file"):
        with pytest.raises(CheckpointExistsError, match=rf"{name}: already holds something.*overwrite=True"):
            save(tmp_path / name, tensors)
        with pytest.raises(FileExistsError):
            save(tmp_path / name, tensors)
    assert content_of(tmp_path) == content


def test_a_destination_that_fills_up_meanwhile(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def save(overwrite: bool) -> None:
        with publishing(target, overwrite=overwrite) as folder:
            with folder.create("new") as append:
                append(b"new")
            target.mkdir()
            (target / "other").touch()

    with pytest.raises(CheckpointExistsError):
        save(overwrite=False)
    assert content_of(tmp_path) == {"out": None, "out/other": b""}
    shutil.rmtree(target)
    save(overwrite=True)
    assert content_of(tmp_path) == {"out": None, "out/new": b"new"}


@pytest.mark.parametrize("link_to", ["folder", "empty", "missing"])
def test_a_link_is_followed(link_to: str, tmp_path: Path, tensors: Tensors, holds: Holds) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if link_to != "missing":
        prepare(elsewhere / "real", "checkpoint" if link_to == "folder" else "empty folder")
    link = tmp_path / "link"
    link.symlink_to("elsewhere/real")
    if link_to == "folder":
        with pytest.raises(CheckpointExistsError, match="elsewhere/real"):
            save(link, tensors)
    save(link, tensors, overwrite=link_to == "folder")
    assert link.is_symlink()
    assert holds(elsewhere / "real", tensors)
    assert [path.name for path in elsewhere.iterdir()] == ["real"]


def test_destinations_that_cannot_be(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    content = content_of(tmp_path)
    cases = {"x.partial": "choose another", "file/out": "Not a directory", "file/a/out": "Not a directory"}
    cases |= {"loop": "symbolic links", "x" * 250: "File name too long"}
    cases |= {"a\0b": "cannot be the name of a folder", "a\ud800b": "cannot be the name of a folder"}
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / name, tensors)
    assert content_of(tmp_path) == content


def test_a_destination_in_the_working_directory(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch, holds: Holds
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint("out/", tensors)
    assert holds(tmp_path / "out", tensors)


def test_a_parent_that_someone_else_makes_meanwhile(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch, holds: Holds
) -> None:
    original = syscalls.make_folder

    def late(path: Path) -> None:
        if path.name == "parent":
            original(path)
        original(path)

    monkeypatch.setattr(syscalls, "make_folder", late)
    save(tmp_path / "parent" / "out", tensors)
    assert holds(tmp_path / "parent" / "out", tensors)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_left_overs_of_a_dead_writer(kind: str, tmp_path: Path, tensors: Tensors, holds: Holds) -> None:
    partial = tmp_path / "out.partial"
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").touch()
    if kind == "folder":
        (partial / "deep").mkdir(parents=True)
        (partial / "model.safetensors").write_bytes(b"half")
    elif kind == "file":
        partial.write_bytes(b"an overwritten file")
    else:
        partial.symlink_to("precious")
    (tmp_path / "out.partial.lock").touch()
    save(tmp_path / "out", tensors)
    assert holds(tmp_path / "out", tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]
    assert (tmp_path / "precious" / "data").exists()


def test_public_names() -> None:
    assert publish.__all__ == sorted(publish.__all__)
    assert syscalls.__all__ == sorted(syscalls.__all__)
