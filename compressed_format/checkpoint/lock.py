"""One writer at a time: an exclusive lock on a name, which dies with its process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compressed_format.checkpoint import syscalls
from compressed_format.checkpoint.disk_errors import blaming
from compressed_format.errors import CheckpointLockedError, Problem

__all__ = ["locked"]

_held: set[int] = set()


def _let_go_in_child() -> None:
    """A forked worker must not keep the lock of a parent that is killed. Closing alone does not unlock the parent's."""
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def locked(partial: Path) -> Iterator[None]:
    """Hold the exclusive lock on the name ``partial``. Raises :class:`CheckpointLockedError` without waiting."""
    path = Path(f"{partial}.lock")
    with blaming(path, "cannot be locked"):
        descriptor = _lock(path)
    if descriptor is None:
        message = "another process is writing this checkpoint; wait for it, or choose another destination"
        raise CheckpointLockedError(problems=[Problem(str(partial), message)])
    _held.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _held:  # and not in a child that was forked meanwhile: the lock is its parent's
            _held.discard(descriptor)
            with suppress(OSError):  # the lock itself is gone in any case, and a left-over file does no harm
                syscalls.unlock(descriptor, path)


def _lock(path: Path) -> int | None:
    while True:
        descriptor = syscalls.open_lock(path)
        try:
            mine = syscalls.try_lock(descriptor)
            if mine and _is_still(path, os.fstat(descriptor)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not mine:
            return None
        # The writer before us removed the file after we had opened it: what we locked is no one's lock any more.


def _is_still(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), status)
    except FileNotFoundError:
        return False
