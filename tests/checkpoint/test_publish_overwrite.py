"""All or nothing: replacing what is there, also while it is mapped, and where it cannot be done."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from compressed_format.checkpoint import read_checkpoint, syscalls, write_checkpoint
from compressed_format.errors import (
    CheckpointError,
)
from tests.checkpoint.saves import OLD, content_of, save

if TYPE_CHECKING:
    from tests.checkpoint.conftest import DiskCalls

Holds = Callable[..., bool]
Tensors = dict[str, torch.Tensor]


def test_overwriting_replaces_everything(tmp_path: Path, tensors: Tensors, holds: Holds) -> None:
    target = tmp_path / "out"
    save(target, OLD)
    (target / "more").mkdir()
    (target / "more" / "file").touch()
    write_checkpoint(target, tensors, overwrite=True)
    assert holds(target, tensors)
    assert list(content_of(tmp_path)) == ["out", "out/model.safetensors"]


def test_saving_over_the_folder_that_is_mapped(tmp_path: Path, tensors: Tensors, holds: Holds) -> None:
    target = tmp_path / "out"
    save(target, tensors)
    checkpoint = read_checkpoint(target)
    held = dict(checkpoint)
    held["b.weight"] += 1
    save(target, held, overwrite=True)
    changed = tensors | {"b.weight": tensors["b.weight"] + 1}
    assert holds(target, changed)
    assert all(torch.equal(held[name], changed[name]) for name in changed)
    save(target, checkpoint, overwrite=True)
    assert holds(target, changed)  # what is in this process's memory, the change included


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_exchange(
    code: int, tmp_path: Path, tensors: Tensors, disk_calls: DiskCalls, holds: Holds
) -> None:
    target = tmp_path / "out"
    save(target, OLD)
    disk_calls.record.clear()

    def refuse(_: int, name: str) -> None:
        if name == "exchange":
            raise OSError(code, os.strerror(code))

    disk_calls.before = refuse
    with pytest.raises(CheckpointError, match="cannot be overwritten, because this file system cannot exchange"):
        save(target, tensors, overwrite=True)
    assert "create_file" not in disk_calls.names
    assert holds(target, OLD)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    save(tmp_path / "new", tensors, overwrite=True)  # nothing to overwrite, so nothing to exchange
    assert holds(tmp_path / "new", tensors)


def test_a_mount_point_is_not_replaced(tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    save(target, OLD)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == target)
    with pytest.raises(CheckpointError, match="mount point"):
        save(target, tensors, overwrite=True)


class _Library:
    """A C library with some of the calls, which do what the real one does, or fail."""

    def __init__(self, *names: str, code: int = 0) -> None:
        for name in names:
            setattr(self, name, self._call)
        self.code = code
        self.calls: list[tuple[Any, ...]] = []

    def _call(self, *args: Any) -> int:
        self.calls.append(args)
        ctypes.set_errno(self.code)
        return -1 if self.code else 0


def test_which_call_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = tmp_path / "a", tmp_path / "b"
    names = tuple(os.fsencode(path) for path in paths)

    def use(library: Any) -> Any:
        monkeypatch.setattr(syscalls.ctypes, "CDLL", lambda *_, **__: library)
        syscalls.exchange(*paths)
        (call,) = library.calls
        return [getattr(argument, "value", argument) for argument in call]

    assert use(_Library("renameat2", "renamex_np", "syscall")) == [-100, names[0], -100, names[1], 2]
    assert use(_Library("renamex_np")) == [*names, 2]
    monkeypatch.setattr(syscalls.sys, "platform", "linux")
    monkeypatch.setattr(syscalls.platform, "machine", lambda: "aarch64")
    assert use(_Library("syscall")) == [276, -100, names[0], -100, names[1], 2]
    monkeypatch.setattr(syscalls.platform, "machine", lambda: "unheard-of")
    with pytest.raises(OSError, match="no call that exchanges"):
        use(_Library("syscall"))
    with pytest.raises(OSError, match="Invalid cross-device link") as caught:
        use(_Library("renameat2", code=errno.EXDEV))
    assert (caught.value.filename, caught.value.filename2) == tuple(map(str, paths))


def test_the_raw_call_exchanges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a C library older than the call."""
    real = ctypes.CDLL(None, use_errno=True)

    class Old:
        syscall = staticmethod(real.syscall)

    monkeypatch.setattr(syscalls.ctypes, "CDLL", lambda *_, **__: Old())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").touch()
    syscalls.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").is_file()
    assert (tmp_path / "b").is_dir()
