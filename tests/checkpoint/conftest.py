"""What the tests of checkpoints share: comparing bytes, building files by hand, watching the system calls."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from compressed_format.checkpoint import read_checkpoint, syscalls, write_checkpoint

# Everything that reaches the disk, in the order of the protocol; the lock's calls are tested on their own.
DISK_CALLS = ("remove", "make_folder", "create_file", "write", "sync", "close", "sync_folder", "exchange", "rename")


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (t.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(one, other)


@pytest.fixture(name="same_bits", scope="session")
def _same_bits() -> Callable[[torch.Tensor, torch.Tensor], bool]:
    return same_bits


@pytest.fixture(scope="session")
def raw_file() -> Callable[..., bytes]:
    """A safetensors file with any header: an object, or text that stands for itself."""

    def build(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return (len(text) if length is None else length).to_bytes(8, "little") + text + data

    return build


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight_packed": torch.arange(32, dtype=torch.int32).reshape(2, 16),
        "a.weight_shape": torch.tensor([2, 128]),
        "a.weight_scale": torch.tensor([0.5, 2.0], dtype=torch.bfloat16),
        "b.weight": torch.linspace(0, 1, 48).reshape(3, 16),
    }


@pytest.fixture
def holds(same_bits: Callable[[torch.Tensor, torch.Tensor], bool]) -> Callable[..., bool]:
    """Whether the checkpoint at a path holds exactly these tensors."""

    def check(path: Path, expected: dict[str, torch.Tensor]) -> bool:
        found = read_checkpoint(path)
        return set(found) == set(expected) and all(same_bits(found[name], expected[name]) for name in expected)

    return check


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with tensors a, b and c, one a shard."""
    write_checkpoint(tmp_path / "sharded", {name: torch.ones(4) for name in "abc"}, max_shard_size=1)
    return tmp_path / "sharded"


@dataclass
class DiskCalls:
    """A record of all calls, and whatever is to happen before the call of a given number instead of it."""

    record: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    before: Callable[[int, str], None] = lambda *_: None

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.record]


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> DiskCalls:
    calls = DiskCalls()

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(*args: Any) -> Any:
            calls.record.append((name, tuple(_path_of(arg) for arg in args)))
            calls.before(len(calls.record) - 1, name)
            return original(*args)

        return watched

    for name in DISK_CALLS:
        monkeypatch.setattr(syscalls, name, watch(name, getattr(syscalls, name)))
    return calls


def _path_of(argument: Any) -> Any:
    """A descriptor's path, so that the record tells which file was synced."""
    return Path(f"/proc/self/fd/{argument}").readlink() if isinstance(argument, int) else argument
