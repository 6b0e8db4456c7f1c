"""All or nothing: one writer at a time."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compressed_format.checkpoint import syscalls
from compressed_format.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointLockedError,
)
from tests.checkpoint.saves import OLD, content_of, save

Holds = Callable[..., bool]
Tensors = dict[str, torch.Tensor]


def test_a_second_writer_is_refused(tmp_path: Path, tensors: Tensors, holds: Holds) -> None:
    target = tmp_path / "out"
    started, finish = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        started.set()
        assert finish.wait(60)

    writer = threading.Thread(target=save, args=(target, tensors), kwargs={"progress": wait})
    writer.start()
    try:
        assert started.wait(60)
        content = content_of(tmp_path)
        for overwrite in (False, True):
            with pytest.raises(CheckpointLockedError, match=rf"{target}\.partial: another process"):
                save(target, OLD, overwrite=overwrite)
        save(tmp_path / "other", OLD)
        shutil.rmtree(tmp_path / "other")
        assert content_of(tmp_path) == content
    finally:
        finish.set()
        writer.join()
    assert holds(target, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_writer_before_published_while_we_came(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch, holds: Holds
) -> None:
    """It removes its lock file after we have opened it: the lock on that is worth nothing, and its result stands."""
    target = tmp_path / "out"
    original = syscalls.open_lock
    opened: list[Path] = []

    def open_lock(path: Path) -> int:
        descriptor = original(path)
        opened.append(path)
        if len(opened) == 1:
            monkeypatch.setattr(syscalls, "open_lock", original)
            path.rename(tmp_path / "aside")  # so that the writer before us locks another file
            (tmp_path / "aside").unlink()
            save(target, OLD)
            monkeypatch.setattr(syscalls, "open_lock", open_lock)
        return descriptor

    monkeypatch.setattr(syscalls, "open_lock", open_lock)
    with pytest.raises(CheckpointExistsError):
        save(target, tensors)
    assert len(opened) == 2
    assert holds(target, OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_locks(tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(syscalls.fcntl, "flock", refuse)
    with pytest.raises(CheckpointError, match=r"out\.partial\.lock: cannot be locked: No locks available"):
        save(tmp_path / "out", tensors)


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path, tensors: Tensors) -> None:
    (tmp_path / "out.partial.lock").symlink_to("elsewhere")
    with pytest.raises(CheckpointError, match="cannot be locked"):
        save(tmp_path / "out", tensors)
    assert not (tmp_path / "elsewhere").exists()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    descriptor = syscalls.open_lock(lock)
    assert syscalls.try_lock(descriptor)
    shared = os.dup(descriptor)  # what a fork does to it
    syscalls.unlock(descriptor, lock)
    assert not lock.exists()
    held = os.open(f"/proc/self/fd/{shared}", os.O_RDWR)
    assert syscalls.try_lock(held)
    os.close(held)
    os.close(shared)
