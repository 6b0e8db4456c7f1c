"""What the tests of the job engine share: the system calls of all its threads, one at a time, on record."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from compressed_format.checkpoint import syscalls
from compressed_format.streaming import work
from tests.checkpoint.conftest import DISK_CALLS

WRITES = ("write", "write_at", "set_size")
JOB_CALLS = (*DISK_CALLS, "open_file", "write_at", "set_size", "open_source", "read_at", "free_bytes")


@dataclass
class JobCalls:
    """A record of all calls as (name, path, further arguments), and what is to happen around each."""

    record: list[tuple[str, Path, tuple[Any, ...]]] = field(default_factory=list)
    before: Callable[[int, str, Path], None] = lambda *_: None
    after: Callable[[str, Path], None] = lambda *_: None

    def last(self, names: str | tuple[str, ...], path: Path, before: int | None = None) -> int:
        """The number of the last call of one of ``names`` for a path, before that of number ``before``."""
        names = (names,) if isinstance(names, str) else names
        return max(at for at, call in enumerate(self.record[:before]) if call[0] in names and call[1] == path)


@pytest.fixture
def job_calls(monkeypatch: pytest.MonkeyPatch) -> JobCalls:
    calls = JobCalls()
    one_at_a_time = threading.RLock()  # sync_folder calls sync

    def watch(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def watched(first: Path | int, *args: Any) -> Any:
            with one_at_a_time:
                path = Path(f"/proc/self/fd/{first}").readlink() if isinstance(first, int) else first
                copied = tuple(bytes(arg) if isinstance(arg, memoryview) else arg for arg in args)
                calls.record.append((name, path, copied))
                calls.before(len(calls.record) - 1, name, path)
                result = original(first, *args)
                calls.after(name, path)
                return result

        return watched

    for name in JOB_CALLS:
        monkeypatch.setattr(syscalls, name, watch(name, getattr(syscalls, name)))
    return calls


@pytest.fixture
def note_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished units are synced and noted as soon as may be."""
    monkeypatch.setattr(work, "_SYNC_SECONDS", 0.0)
