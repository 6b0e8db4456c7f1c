"""All or nothing: each system call failing, interrupts, and what is left after them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from compressed_format.checkpoint import syscalls
from compressed_format.errors import (
    CheckpointError,
    CompressedFormatWarning,
)
from tests.checkpoint.saves import OLD, content_of, prepare, save

if TYPE_CHECKING:
    from tests.checkpoint.conftest import DiskCalls

Holds = Callable[..., bool]
Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("before", ["nothing", "empty folder", "checkpoint", "file", "left-over", "no parent"])
def test_each_call_fails_once(
    before: str, code: int, tmp_path: Path, tensors: Tensors, disk_calls: DiskCalls, holds: Holds
) -> None:
    place = tmp_path / "place"
    target = place / "parent" / "out" if before == "no parent" else place / "out"

    def reset() -> dict[str, bytes | None]:
        disk_calls.before = lambda *_: None
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        prepare(target, before)
        content = content_of(place)
        if before == "left-over":
            (place / "out.partial").mkdir()
            (place / "out.partial" / "model.safetensors").write_bytes(b"half")
        disk_calls.record.clear()
        return content

    reset()
    save(target, tensors, overwrite=True)
    calls = list(disk_calls.record)
    assert len(calls) > 25
    for number, (name, args) in enumerate(calls):
        content = reset()

        def fail(at: int, called: str, number: int = number, name: str = name) -> None:
            if at == number:
                assert called == name
                raise OSError(code, os.strerror(code))

        disk_calls.before = fail
        if name == "remove" and number == len(calls) - 1:
            with pytest.warns(CompressedFormatWarning, match="cannot be removed wholly"):
                save(target, tensors, overwrite=True)
        else:
            with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
                save(target, tensors, overwrite=True)
            assert isinstance(caught.value.__cause__, OSError)
            assert str(place) in str(caught.value)
            left = content_of(place)
            if name == "remove":  # the left-over itself could not be removed
                left = {key: value for key, value in left.items() if not key.startswith("out.partial")}
            assert left == content, (number, name, args)
        save(target, tensors, overwrite=True)
        assert holds(target, tensors)
        assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted_at_each_call(
    interrupt: type[BaseException], tmp_path: Path, tensors: Tensors, disk_calls: DiskCalls, holds: Holds
) -> None:
    target = tmp_path / "out"
    save(target, OLD)
    disk_calls.record.clear()
    save(tmp_path / "other", tensors)
    count = len(disk_calls.record)
    for number in range(count):

        def fail(at: int, _: str, number: int = number) -> None:
            if at == number:
                raise interrupt

        disk_calls.record.clear()
        disk_calls.before = fail
        with pytest.raises(interrupt):
            save(target, tensors, overwrite=True)
        assert holds(target, OLD)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("before", ["nothing", "empty folder", "checkpoint"])
def test_interrupted_right_after_the_rename(
    before: str, tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call was made and did not come back: only the disk knows."""
    target = tmp_path / "out"
    prepare(target, before)
    content = content_of(tmp_path)
    for name in ("rename", "exchange"):
        original = getattr(syscalls, name)
        done: list[bool] = []

        def interrupted(
            source: Path, to: Path, original: Callable[..., None] = original, done: list[bool] = done
        ) -> None:
            original(source, to)
            if to == target and not done:
                done.append(True)
                raise KeyboardInterrupt

        monkeypatch.setattr(syscalls, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(target, tensors, overwrite=True)
    assert content_of(tmp_path) == content


def test_what_was_replaced_survives_when_it_cannot_be_put_back(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch, holds: Holds
) -> None:
    target = tmp_path / "out"
    save(target, OLD)
    original = syscalls.exchange

    def only_forth(source: Path, to: Path) -> None:
        if source == target:
            raise OSError(errno.EIO, "broken")
        original(source, to)

    def sync_folder(path: Path) -> None:
        if path == tmp_path:
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(syscalls, "exchange", only_forth)
    monkeypatch.setattr(syscalls, "sync_folder", sync_folder)
    with pytest.raises(CheckpointError, match="broken"):
        save(target, tensors, overwrite=True)
    assert holds(target, tensors)
    (tmp_path / "out.partial").rename(tmp_path / "kept")
    assert holds(tmp_path / "kept", OLD)
