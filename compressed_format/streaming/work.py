"""Units on an executor: how many at a time, what of them is on the disk, and how it ends when one fails."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Protocol, TypeVar

from compressed_format.checkpoint.disk_errors import disk_error
from compressed_format.checkpoint.partial_folder import PartialFolder
from compressed_format.errors import CheckpointError, CompressedFormatError, Problem
from compressed_format.streaming.interrupts import held_interrupts
from compressed_format.streaming.job import Unit
from compressed_format.streaming.journal import Journal
from compressed_format.streaming.options import checked_workers
from compressed_format.threads import MOST_WORKERS, cores, use_one_thread

__all__ = ["results", "work_off"]

_UNKNOWN_WORKERS = 64
"""An executor has as many, as far as keeping it busy is concerned, when neither it nor the caller says how many."""
_SYNC_SECONDS = 2.0
_SYNC_BYTES = 2**30
"""What is not in the journal yet is done again after a kill: this much time, or this much of the source, at most."""

_T_co = TypeVar("_T_co", covariant=True)


def work_off(
    units: Iterable[Unit],
    folder: PartialFolder,
    journal: Journal,
    report: Callable[[int], None],
    *,
    workers: int | None,
    executor: Executor | None,
) -> None:
    """Run ``units`` and note them in ``journal`` as their bytes reach the disk; ``report`` gets each one's bytes.

    Returns when all are done and noted. After an exception nothing runs any more, as far as the executor lets itself
    be stopped, and what had been done until then is noted.
    """
    workers = checked_workers(workers)
    if executor is not None:
        parallel = workers or getattr(executor, "_max_workers", None) or _UNKNOWN_WORKERS
        _Work(folder, journal, executor, 2 * parallel, shared=True).run(units, report)
        return
    parallel = workers or min(cores(), MOST_WORKERS)
    with ThreadPoolExecutor(parallel, "unit", use_one_thread) as pool:
        _Work(folder, journal, pool, 2 * parallel, shared=False).run(units, report)


class _Call(Protocol[_T_co]):
    """A piece of work that can be pickled, and writes nothing."""

    def run(self) -> _T_co: ...


def results(calls: Iterable[_Call[_T_co]], *, workers: int | None, executor: Executor | None) -> list[_T_co]:
    """What each of ``calls`` yields, of which as many run at the same time as :func:`work_off` runs units.

    Raises the error of the first one that fails, and :class:`CheckpointError` for workers of ``executor`` that died.
    """
    if executor is None:
        with ThreadPoolExecutor(workers or min(cores(), MOST_WORKERS), "count", use_one_thread) as pool:
            return list(pool.map(_run, calls))
    try:
        return list(executor.map(_run, calls))
    except CompressedFormatError:
        raise
    except Exception as error:  # of the executor, each of which has its own
        message = f"could not look through the source: {type(error).__name__}: {error}; call again"
        raise CheckpointError(problems=[Problem(type(executor).__name__, message)]) from error


def _run(call: _Call[_T_co]) -> _T_co:
    return call.run()


class _Work:
    """Units that wait, run, and are finished; only the last kind may be noted, and only when synced.

    With ``shared``, the executor is not of this process: its workers sync what they wrote themselves.
    """

    def __init__(
        self, folder: PartialFolder, journal: Journal, executor: Executor, in_flight: int, *, shared: bool
    ) -> None:
        self._folder = folder
        self._journal = journal
        self._executor = executor
        self._in_flight = in_flight
        self._shared = shared
        self._attempt = uuid.uuid4().hex
        self._running: dict[Future[Exception | None], Unit] = {}
        self._finished: SimpleQueue[Future[Exception | None] | None] = SimpleQueue()
        self._not_noted: list[Unit] = []
        self._noting: Future[None] | None = None
        self._noted_at = time.monotonic()
        self._may_note = True

    def run(self, units: Iterable[Unit], report: Callable[[int], None]) -> None:
        waiting = iter(units)
        # Syncing takes seconds on a slow disk, in which units go on.
        with (
            held_interrupts(lambda: self._finished.put(None)) as hand_over_interrupts,
            ThreadPoolExecutor(1, thread_name_prefix="sync") as syncer,
        ):
            try:
                self._submit(islice(waiting, self._in_flight))
                while self._running:
                    hand_over_interrupts()
                    with suppress(Empty):
                        future = self._finished.get(timeout=_SYNC_SECONDS if self._not_noted else None)
                        if future is None:
                            continue
                        unit = self._running.pop(future)
                        self._refuse_failure(unit, future)
                        self._not_noted.append(unit)
                        self._submit(islice(waiting, 1))
                        report(unit.nbytes)
                    self._note_if_due(syncer)
                self._note_now()
            except BaseException:
                self._stop()
                raise

    def _submit(self, units: Iterator[Unit]) -> None:
        for unit in units:
            try:
                if self._shared:
                    call = (unit, self._folder.path, self._folder.job, self._attempt)
                    future = self._executor.submit(_attempt_elsewhere, *call)
                else:
                    future = self._executor.submit(_attempt_here, unit, self._folder.path)
            except RuntimeError as error:  # broken, or shut down
                raise self._executor_error(error) from error
            self._running[future] = unit
            future.add_done_callback(self._finished.put)

    def _refuse_failure(self, unit: Unit, future: Future[Exception | None]) -> None:
        if future.cancelled():
            raise self._executor_error("it was cancelled there", unit)
        error = future.exception()
        if error is not None:  # of the executor: a unit's own is its result
            raise self._executor_error(error, unit) from error
        failure = future.result()
        if isinstance(failure, OSError):
            path = self._folder.path if failure.filename is None else Path(os.fsdecode(failure.filename))
            raise disk_error(path, f"cannot be read or written: {failure.strerror or failure}") from failure
        if failure is not None:
            raise failure

    def _executor_error(self, reason: BaseException | str, unit: Unit | None = None) -> CheckpointError:
        kind = type(self._executor).__name__
        if isinstance(reason, BaseException):
            reason = f"{type(reason).__name__}: {reason}"
        which = "work" if unit is None else f"unit {unit.id}"
        return disk_error(
            self._folder.path, f"the {kind} could not do {which}: {reason}; what is done stays: call again to go on"
        )

    def _note_if_due(self, syncer: ThreadPoolExecutor) -> None:
        if self._noting is not None:
            if not self._noting.done():
                return
            self._finish_noting()
        due = time.monotonic() - self._noted_at >= _SYNC_SECONDS
        if self._not_noted and (due or sum(unit.nbytes for unit in self._not_noted) >= _SYNC_BYTES):
            units, self._not_noted = self._not_noted, []
            self._noting = syncer.submit(self._note, units)

    def _finish_noting(self) -> None:
        if self._noting is not None:
            wait([self._noting])  # an interrupt here must not let a second note begin beside it
            noting, self._noting = self._noting, None
            self._noted_at = time.monotonic()
            noting.result()

    def _note_now(self) -> None:
        """What is being noted, and then all that is left."""
        self._finish_noting()
        units, self._not_noted = self._not_noted, []
        self._note(units)

    def _note(self, units: list[Unit]) -> None:
        if not units or not self._may_note:
            return
        # The system forgets what it could not write once it has told: a later sync could succeed without these bytes.
        self._may_note = False
        if not self._shared:
            self._folder.sync_files(sorted({file for unit in units for file in unit.files}))
        self._journal.add_done(unit.id for unit in units)
        self._may_note = True

    def _stop(self) -> None:
        """Let what runs come to its end and the rest not begin; then note what was done."""
        # A unit that was still writing when the lock is given back could write into the files of another job. What
        # could be cancelled is not waited for: not every executor tells when it has taken note of that.
        running = [future for future in self._running if not future.cancel()]
        wait(running)
        for future in running:
            if future.exception() is None and future.result() is None:
                self._not_noted.append(self._running[future])
        with suppress(CheckpointError):  # the error that led here is the one to tell
            self._note_now()


def _attempt_here(unit: Unit, folder: Path) -> Exception | None:
    """Run a unit on a thread of this process; its error is the result."""
    try:
        unit.run(folder)
    except Exception as error:
        return error
    return None


def _attempt_elsewhere(unit: Unit, folder: Path, job: Path, attempt: str) -> Exception | None:
    """Run a unit in another process, maybe on another machine, and sync what it wrote.

    An executor may outlive the job, or run on a machine with another disk: the job's journal says whether this is the
    place. ``attempt`` makes each attempt a call of its own for executors that remember the results of equal calls.
    """
    try:
        if not (folder.is_dir() and job.is_file()):
            message = "is not seen by a worker of the executor: it needs a file system that all workers share"
            return disk_error(folder, message)
        with PartialFolder(folder).synced(unit.files):
            unit.run(folder)
    except Exception as error:
        return error
    return None
