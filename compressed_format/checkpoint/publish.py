"""All or nothing: a folder of files appears under its name complete and on the disk, or not at all.

The protocol::

    lock      <destination>.partial.lock      one writer at a time, and the lock dies with its process
    fill      <destination>.partial           whatever a dead writer left there is thrown away first
    sync      each file, then each folder
    rename    partial to destination          or exchange the two, when the destination is to be replaced
    sync      the folder above both
    remove    what was replaced, and the lock

The lock is a file beside the partial folder and not the partial folder itself, because that one changes its name
on the way: after the exchange ``<destination>.partial`` is the old checkpoint, and after a rename it is free for
anyone. The lock covers the name throughout.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compressed_format.checkpoint import syscalls
from compressed_format.errors import (
    CheckpointError,
    CheckpointExistsError,
    CheckpointLockedError,
    CompressedFormatWarning,
    Problem,
)

__all__ = ["PARTIAL_SUFFIX", "PartialFolder", "publishing"]

PARTIAL_SUFFIX = ".partial"


class PartialFolder:
    """The folder of an unfinished save, held under its lock.

    ``path`` is where it is; its files are made by :meth:`create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._folders = [path]

    @contextmanager
    def create(self, name: str) -> Iterator[Callable[[bytes | memoryview], None]]:
        """A new file, as a function that appends to it; on the disk when the context ends.

        ``name`` is relative, with forward slashes, and must have passed
        :func:`~compressed_format.checkpoint.index.file_name_problem`. Raises :class:`CheckpointError`.
        """
        path = self.path.joinpath(*name.split("/"))
        for folder in reversed(path.relative_to(self.path).parents[:-1]):
            if self.path / folder not in self._folders:
                with _blaming(self.path / folder, "cannot be made"):
                    syscalls.make_folder(self.path / folder)
                self._folders.append(self.path / folder)
        with _blaming(path, "cannot be made"):
            descriptor = syscalls.create_file(path)

        def append(data: bytes | memoryview) -> None:
            rest = memoryview(data)
            with _blaming(path, "cannot be written"):
                while rest:
                    rest = rest[syscalls.write(descriptor, rest) :]

        try:
            yield append
            with _blaming(path, "cannot be synced to the disk"):
                syscalls.sync(descriptor)
        except BaseException:
            with suppress(OSError):
                syscalls.close(descriptor)
            raise
        with _blaming(path, "cannot be closed"):
            syscalls.close(descriptor)

    def sync_folders(self) -> None:
        """Bring the names of all files to the disk."""
        for folder in reversed(self._folders):
            with _blaming(folder, "cannot be synced to the disk"):
                syscalls.sync_folder(folder)


@contextmanager
def publishing(destination: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[PartialFolder]:
    """A folder to fill, which becomes ``destination`` when the context ends without an exception.

    A symbolic link is followed: what it points to is replaced. Folders above are made as needed. Raises
    :class:`CheckpointExistsError` when the destination holds anything and ``overwrite`` is false,
    :class:`CheckpointLockedError` when another writer is at it, and :class:`CheckpointError` for whatever the disk
    refuses. After any exception, also one from the caller's block, the destination is as it was before.
    """
    try:
        target = Path(os.path.realpath(destination))
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise _error(Path(destination), f"cannot be the name of a folder: {error}") from error
    if target.name.endswith(PARTIAL_SUFFIX):
        raise _error(target, f"names that end in {PARTIAL_SUFFIX} are those of unfinished saves: choose another")
    _refuse_occupied(target, overwrite)
    partial = Path(f"{target}{PARTIAL_SUFFIX}")
    with _parents(target.parent), _locked(partial):
        occupied = _refuse_occupied(target, overwrite)  # again: the writer before us may just have published
        with _blaming(partial, "is left from an unfinished save and cannot be removed"):
            syscalls.remove(partial)
        with _blaming(partial, "cannot be made"):
            syscalls.make_folder(partial)
            ours = partial.stat()
        was_folder = False
        try:
            if occupied:
                _refuse_without_exchange(target, partial)
            folder = PartialFolder(partial)
            yield folder
            folder.sync_folders()
            occupied = _refuse_occupied(target, overwrite)  # and again, after what may have been hours
            was_folder = not occupied and target.is_dir()
            with _blaming(target, "cannot be published"):
                _move(partial, target, exchange=occupied)
            with _blaming(target.parent, "cannot be synced to the disk"):
                syscalls.sync_folder(target.parent)
        except BaseException:
            # What was published is asked of the disk: an interrupt may come between a call and a note that it was made.
            with suppress(OSError):
                if _is_same(target, ours):
                    _move(target, partial, exchange=occupied)
                    if was_folder:
                        syscalls.make_folder(target)
            with suppress(OSError):
                if _is_same(partial, ours):  # and not what the destination held
                    syscalls.remove(partial)
            raise
        if occupied:
            try:
                syscalls.remove(partial)
            except OSError as error:
                message = f"{partial}: what was replaced cannot be removed wholly: {error.strerror or error}"
                warnings.warn(
                    message, CompressedFormatWarning, stacklevel=4
                )  # above: contextlib, the writer, its caller


def _move(source: Path, target: Path, *, exchange: bool) -> None:
    if exchange:
        syscalls.exchange(source, target)
    else:
        syscalls.rename(source, target)


def _is_same(path: Path, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.lstat(), status)
    except FileNotFoundError:
        return False


def _refuse_occupied(target: Path, overwrite: bool) -> bool:
    """Whether the destination holds anything, which is an error unless it may be overwritten."""
    with _blaming(target, "cannot be read"):
        try:
            occupied = not stat.S_ISDIR(target.stat().st_mode) or any(target.iterdir())
        except FileNotFoundError:
            return False
    if occupied and not overwrite:
        message = "already holds something; choose another destination, or pass overwrite=True to replace it whole"
        raise CheckpointExistsError(problems=[Problem(str(target), message)])
    return occupied


def _refuse_without_exchange(target: Path, partial: Path) -> None:
    """Try the exchange on two empty folders, so that hours of writing do not end with the refusal."""
    if target.is_mount():
        raise _error(target, "is a mount point and cannot be replaced: choose a folder in it")
    probes = partial / "a", partial / "b"
    for probe in probes:
        with _blaming(probe, "cannot be made"):
            syscalls.make_folder(probe)
    with _blaming(target, "cannot be overwritten, because this file system cannot exchange two folders in one step"):
        syscalls.exchange(*probes)
    for probe in probes:
        with _blaming(probe, "cannot be removed"):
            syscalls.remove_folder(probe)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make ``folder`` and those above it as needed, and remove them again should the context fail."""
    with _blaming(folder, "cannot be read"):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            with _blaming(path, "cannot be made"):
                with suppress(FileExistsError):  # someone else made it just now
                    syscalls.make_folder(path)
                    made.append(path)
                syscalls.sync_folder(path.parent)
        yield
    except BaseException:
        with suppress(OSError):
            for path in reversed(made):
                syscalls.remove_folder(path)
        raise


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the exclusive lock on the name ``partial``."""
    path = Path(f"{partial}.lock")
    with _blaming(path, "cannot be locked"):
        descriptor = _lock(path)
    if descriptor is None:
        message = "another process is writing this checkpoint; wait for it, or choose another destination"
        raise CheckpointLockedError(problems=[Problem(str(partial), message)])
    try:
        yield
    finally:
        with suppress(OSError):  # the lock itself is gone in any case, and a left-over file does no harm
            syscalls.unlock(descriptor, path)


def _lock(path: Path) -> int | None:
    while True:
        descriptor = syscalls.open_lock(path)
        try:
            mine = syscalls.try_lock(descriptor)
            if mine and _is_same(path, os.fstat(descriptor)):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if not mine:
            return None
        # The writer before us removed the file after we had opened it: what we locked is no one's lock any more.


@contextmanager
def _blaming(path: Path, what: str) -> Iterator[None]:
    """Turn an ``OSError`` into a :class:`CheckpointError` that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise _error(path, f"{what}: {error.strerror or error}") from error


def _error(path: Path, message: str) -> CheckpointError:
    return CheckpointError(problems=[Problem(str(path), message)])
