"""Working off a job: prepared or taken up again, run unit by unit, noted, published.

What reaches the disk, in this order::

    parts         made at their full sizes with their headers, and synced
    journal       made beside the partial folder, and synced; from here on, there is something to go on from
    units         in any order and at the same time; every now and then
                  sync the parts that finished units wrote to, then add these units to the journal and sync that
    files         the rest of the folder
    publication   as checkpoint.publish has it, when all parts are synced

So the journal never claims what a power cut could take away, and nothing gets its name before it is complete.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path
from typing import Any

from compressed_format.checkpoint import syscalls
from compressed_format.checkpoint.disk_errors import blaming, disk_error
from compressed_format.checkpoint.partial_folder import PartialFolder
from compressed_format.checkpoint.publish import publishing
from compressed_format.checkpoint.spans import read_span
from compressed_format.errors import CheckpointError, Problem
from compressed_format.streaming.job import Job, Part, Unit
from compressed_format.streaming.journal import Journal
from compressed_format.streaming.work import work_off

__all__ = ["run_job"]


def run_job(
    job: Job,
    destination: str | os.PathLike[str],
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> None:
    """Do what is not done yet of ``job``, and publish it as ``destination``: complete or not at all.

    A destination whose name ends in ``.safetensors`` is one file, that of the job's only part; else it is a folder.
    Units run on ``workers`` threads (default: one for each core this process may use, at most 16) with one thread of
    torch each; or on ``executor``, any of :mod:`concurrent.futures`, whose workers must see source and destination
    under the same paths. It is not shut down; ``workers`` is then how many it has, if it does not say so.
    ``progress`` is called with the bytes of finished units, those of earlier attempts included, and of all of them;
    what it raises ends the job.

    When a unit fails, at an interrupt, and when the process is killed, ``<destination>.partial`` and its journal
    ``<destination>.partial.job`` stay if anything in them is worth it, and the same call goes on from there.

    Raises the error of the first unit that fails; :class:`CheckpointError` for what the disk refuses, for workers of
    ``executor`` that died, and when the partial folder is that of another job; :class:`CheckpointExistsError`;
    :class:`CheckpointLockedError`.
    """
    single = _single_file(job, Path(destination))
    total = sum(unit.nbytes for unit in job.units)
    with publishing(destination, overwrite=overwrite, resumable=True, single_file=single) as folder:
        journal = _prepared(job, folder, single)
        try:
            done = sum(unit.nbytes for unit in job.units if unit.id in journal.done)

            def report(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                if progress is not None:
                    progress(done, total)

            report(0)
            left = [unit for unit in job.units if unit.id not in journal.done]
            work_off(left, folder, journal, report, workers=workers, executor=executor)
            folder.sync_files(job.parts)
            for name, content in job.files.items():
                folder.copy(name, content)
            inode = _inode(folder, single)
            assert inode is not None
            journal.add_publishing(inode)
        except BaseException:
            if not journal.done:  # nothing that another attempt would be spared
                with suppress(OSError):
                    syscalls.remove(journal.path)
            raise
        finally:
            journal.close()


def _single_file(job: Job, destination: Path) -> str | None:
    """The name of the part that becomes the destination, or ``None`` if the whole folder does."""
    if not destination.name.endswith(".safetensors"):
        return None
    if len(job.parts) != 1 or job.files:
        names = ", ".join(sorted({*job.parts, *job.files})) or "nothing"
        raise disk_error(destination, f"is the name of one file, and {names} is to be written: name a folder")
    return next(iter(job.parts))


def _prepared(job: Job, folder: PartialFolder, single: str | None) -> Journal:
    """The journal of this job, in whose folder all parts are at their sizes and the parts of done units are intact."""
    identity = job.identity()
    journal = _earlier(identity, folder, single) if folder.kept else None
    try:
        lost = {name for name, part in job.parts.items() if not _is_intact(folder.path / name, part)}
        folder.keep(job.parts.keys() - lost)
        _refuse_without_space(job, folder, lost)
        if journal is not None and (redo := _done_in(job.units, journal, lost)):
            journal.add_redo(redo)
        for name in job.parts:
            if name in lost:
                folder.allocate(name, job.parts[name].header, job.parts[name].size)
        folder.sync_folders()
    except BaseException:
        if journal is not None:
            journal.close()
        raise
    return Journal.create(folder.job, identity) if journal is None else journal


def _earlier(identity: Mapping[str, Any], folder: PartialFolder, single: str | None) -> Journal | None:
    """The journal of an earlier attempt at the same job; ``None``, and an empty folder, if that left nothing of use."""
    journal = Journal.open(folder.job)
    if journal is not None:
        if differences := list(_differences(journal.identity, identity)):
            journal.close()
            way_out = (
                f"to finish that job, make the same call that began it; to give it up, remove {folder.path.name} and "
                f"{folder.job.name}"
            )
            raise CheckpointError(
                f"{folder.path}: belongs to another job, which was not finished ({way_out}); what differs:", differences
            )
        if journal.publishing is None or _inode(folder, single) == journal.publishing:
            return journal
        journal.close()  # killed after it had published: what is here now is what was replaced
    folder.clear()
    return None


def _inode(folder: PartialFolder, single: str | None) -> int | None:
    """The inode of what is to get the destination's name; ``None`` if it is not there."""
    path = folder.path if single is None else folder.path / single
    with blaming(path, "cannot be read"):
        try:
            return path.lstat().st_ino
        except FileNotFoundError:
            return None


def _is_intact(path: Path, part: Part) -> bool:
    """Whether this is a file of the part's size, with its header."""
    with blaming(path, "cannot be read"):
        if path.is_symlink() or not path.is_file() or path.stat().st_size != part.size:
            return False
    found = bytearray(len(part.header))
    read_span(path, 0, found)
    return found == part.header


def _done_in(units: Iterable[Unit], journal: Journal, files: set[str]) -> list[str]:
    return [unit.id for unit in units if unit.id in journal.done and not files.isdisjoint(unit.files)]


def _refuse_without_space(job: Job, folder: PartialFolder, lost: set[str]) -> None:
    """Know at once, and not after hours, that the disk is too small."""
    with blaming(folder.path, "cannot be read"):
        needed = 0
        for name, part in job.parts.items():
            here = 0 if name in lost else getattr((folder.path / name).stat(), "st_blocks", 0) * 512
            needed += max(part.size - here, 0)
        free = syscalls.free_bytes(folder.path)
    for content in job.files.values():
        with blaming(content if isinstance(content, Path) else folder.path, "cannot be read"):
            needed += content.stat().st_size if isinstance(content, Path) else len(content)
    if needed > free:
        raise disk_error(
            folder.path, f"needs {needed} more bytes of disk space, and {free} are free: make room, then call again"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Problem]:
    """What another job was planned from, by its JSON path; the plan itself only if nothing else tells."""
    found = list(_compared("", {**old.get("fingerprint", {})}, {**new["fingerprint"]}))
    for key in ("version", "plan"):
        if not found and old.get(key) != new[key]:
            what = {"version": "this library's version", "plan": "the files and pieces of work that it consists of"}
            found = list(_compared(what[key], old.get(key), new[key]))
    return iter(found)


def _compared(path: str, old: Any, new: Any) -> Iterator[Problem]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _compared(f"{path}.{key}" if path else key, old.get(key), new.get(key))
    elif old != new:
        yield Problem(path, f"was {reprlib.repr(old)} there, is {reprlib.repr(new)} here")
