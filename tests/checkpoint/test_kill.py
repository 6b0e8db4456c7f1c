"""Killed at any system call of a save, a process leaves the destination as it was, or complete."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from compressed_format.checkpoint import read_checkpoint, write_checkpoint
from compressed_format.errors import CheckpointError

if TYPE_CHECKING:
    from tests.checkpoint.conftest import DiskCalls

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # The child runs no code that could wait for a thread of this process.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

Tensors = dict[str, torch.Tensor]
OLD = {"old": torch.arange(5)}


def _save(destination: Path, tensors: Tensors) -> None:
    write_checkpoint(destination, tensors, files={"code/x.py": b"pass"}, max_shard_size=200, overwrite=True)


def _killed_at(number: int, destination: Path, tensors: Tensors, disk_calls: DiskCalls) -> None:
    """Save in a child that kills itself right before the call of that number."""

    def kill(at: int, _: str) -> None:
        if at == number:
            os.kill(os.getpid(), signal.SIGKILL)

    disk_calls.record.clear()
    child = os.fork()
    if child == 0:
        try:
            disk_calls.before = kill
            _save(destination, tensors)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("before", [{}, OLD], ids=["new", "overwriting"])
def test_killed_before_each_call(
    before: Tensors, tmp_path: Path, tensors: Tensors, disk_calls: DiskCalls, holds: Callable[..., bool]
) -> None:
    def reset(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if before:
            _save(folder / "out", before)
        disk_calls.record.clear()
        return folder / "out"

    _save(reset("counted"), tensors)
    names = disk_calls.names.copy()
    published = names.index("exchange" if before else "rename", names.index("write"))
    for number in range(len(names)):
        target = reset(str(number))
        _killed_at(number, target, tensors, disk_calls)
        if number > published:
            assert holds(target, tensors)
        elif before:
            assert holds(target, before)
        else:
            assert not target.exists()
        partial = target.with_name("out.partial")
        if partial.exists():
            with pytest.raises(CheckpointError, match="unfinished save"):
                read_checkpoint(partial)
        _save(target, tensors)
        assert holds(target, tensors)
        assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_killed_twice(tmp_path: Path, tensors: Tensors, disk_calls: DiskCalls, holds: Callable[..., bool]) -> None:
    """The second writer, too, dies over what the first one left."""
    for number in (12, 2, 7):
        _killed_at(number, tmp_path / "out", tensors, disk_calls)
    assert not (tmp_path / "out").exists()
    _save(tmp_path / "out", tensors)
    assert holds(tmp_path / "out", tensors)
