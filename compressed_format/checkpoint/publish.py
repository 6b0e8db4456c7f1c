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

A job that can be resumed writes down what it has done in ``<destination>.partial.job``. While that file is there, a
partial folder is worth something: it outlives a failure, is filled further by the next resumable writer, and is never
thrown away by any other.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from compressed_format.checkpoint import syscalls
from compressed_format.checkpoint.disk_errors import blaming, disk_error
from compressed_format.checkpoint.lock import locked
from compressed_format.checkpoint.partial_folder import JOB_SUFFIX, PARTIAL_SUFFIX, PartialFolder
from compressed_format.errors import CheckpointError, CheckpointExistsError, CompressedFormatWarning, Problem

__all__ = ["JOB_SUFFIX", "PARTIAL_SUFFIX", "PartialFolder", "publishing", "refuse_occupied"]


@contextmanager
def publishing(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    resumable: bool = False,
    single_file: str | None = None,
) -> Iterator[PartialFolder]:
    """A folder to fill, which becomes ``destination`` when the context ends without an exception.

    A symbolic link is followed: what it points to is replaced. Folders above are made as needed. With
    ``single_file`` it is the file of that name in the folder which becomes the destination, and nothing else.

    Raises :class:`CheckpointExistsError` when the destination holds anything and ``overwrite`` is false,
    :class:`CheckpointLockedError` when another writer is at it, and :class:`CheckpointError` for whatever the disk
    refuses, or when the folder is that of a job which can be resumed and ``resumable`` is false. After any exception,
    also one from the caller's block, the destination is as it was before; with ``resumable`` the folder is kept
    if its job file is there then.
    """
    refuse_occupied(destination, overwrite=overwrite, single_file=single_file is not None)
    target = _resolved(destination)
    partial = Path(f"{target}{PARTIAL_SUFFIX}")
    with _parents(target.parent), locked(partial):
        occupied = _is_occupied(
            target, overwrite, single_file is not None
        )  # again: the writer before us may have published
        folder = PartialFolder(partial)
        if not folder.kept:
            folder.clear()
        elif not resumable:
            raise disk_error(
                partial,
                f"holds a job that was begun and can go on: finish it by the same call that began it, or remove "
                f"{partial.name} and {folder.job.name} to give it up",
            )
        subject = partial if single_file is None else partial / single_file
        ours: os.stat_result | None = None
        was_folder = False
        try:
            if occupied:
                _refuse_without_exchange(target, partial)
            yield folder
            folder.sync_folders()
            occupied = _is_occupied(
                target, overwrite, single_file is not None
            )  # and again, after what may have been hours
            was_folder = not occupied and target.is_dir()
            with blaming(target, "cannot be published"):
                ours = subject.lstat()
                _move(subject, target, exchange=occupied)
            with blaming(target.parent, "cannot be synced to the disk"):
                syscalls.sync_folder(target.parent)
        except BaseException:
            # What was published is asked of the disk: an interrupt may come between a call and a note that it was made.
            with suppress(OSError):
                if _is_same(target, ours):
                    _move(target, subject, exchange=occupied)
                    if was_folder:
                        syscalls.make_folder(target)
            with suppress(OSError):
                if _is_same(target, ours):  # and so what the destination held is in the partial folder
                    syscalls.remove(folder.job)
                elif not (resumable and os.path.lexists(folder.job)):
                    syscalls.remove(partial)
            raise
        _remove_rest(folder.job if resumable else None, partial if occupied or single_file is not None else None)


def refuse_occupied(destination: str | os.PathLike[str], *, overwrite: bool, single_file: bool) -> None:
    """Raise as :func:`publishing` does at its beginning, for writers who do much before."""
    target = _resolved(destination)
    try:
        _is_occupied(target, overwrite, single_file)
    except CheckpointExistsError:
        _tidy(Path(f"{target}{PARTIAL_SUFFIX}"))
        raise


def _resolved(destination: str | os.PathLike[str]) -> Path:
    try:
        target = Path(os.path.realpath(destination))
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise disk_error(Path(destination), f"cannot be the name of a folder: {error}") from error
    if target.name.endswith(PARTIAL_SUFFIX):
        raise disk_error(target, f"names that end in {PARTIAL_SUFFIX} are those of unfinished saves: choose another")
    return target


def _tidy(partial: Path) -> None:
    """Remove the note of a job that was killed after it had published everything."""
    folder = PartialFolder(partial)
    if not os.path.lexists(partial) and os.path.lexists(folder.job):
        with suppress(CheckpointError, OSError), locked(partial):
            if not os.path.lexists(partial):
                syscalls.remove(folder.job)


def _remove_rest(*paths: Path | None) -> None:
    """Remove what a publication leaves behind: it stands in any case."""
    for path in paths:
        try:
            if path is not None:
                syscalls.remove(path)
        except OSError as error:
            what = "what was replaced" if path is not None and path.suffix == PARTIAL_SUFFIX else "what is left"
            message = f"{path}: {what} cannot be removed wholly: {error.strerror or error}"
            # above: publishing, contextlib, the writer, its caller
            warnings.warn(message, CompressedFormatWarning, stacklevel=5)


def _move(source: Path, target: Path, *, exchange: bool) -> None:
    if exchange:
        syscalls.exchange(source, target)
    else:
        syscalls.rename(source, target)


def _is_same(path: Path, status: os.stat_result | None) -> bool:
    try:
        return status is not None and os.path.samestat(path.lstat(), status)
    except FileNotFoundError:
        return False


def _is_occupied(target: Path, overwrite: bool, single_file: bool) -> bool:
    """Whether the destination holds anything, which is an error unless it may be overwritten."""
    with blaming(target, "cannot be read"):
        try:
            if single_file and target.is_dir():
                raise disk_error(target, "is a folder, and one file is to be written: name a file in it")
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
        raise disk_error(target, "is a mount point and cannot be replaced: choose a folder in it")
    probes = partial / ".exchange-1", partial / ".exchange-2"
    for probe in probes:
        with blaming(probe, "cannot be made"):
            if os.path.lexists(probe):  # of an attempt that was killed right here
                syscalls.remove(probe)
            syscalls.make_folder(probe)
    with blaming(target, "cannot be overwritten, because this file system cannot exchange two folders in one step"):
        syscalls.exchange(*probes)
    for probe in probes:
        with blaming(probe, "cannot be removed"):
            syscalls.remove_folder(probe)


@contextmanager
def _parents(folder: Path) -> Iterator[None]:
    """Make ``folder`` and those above it as needed, and remove them again should the context fail."""
    with blaming(folder, "cannot be read"):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made: list[Path] = []
    try:
        for path in reversed(missing):
            with blaming(path, "cannot be made"):
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
