"""How far a job is: a bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO, TYPE_CHECKING

from compressed_format.cli.messages import printable
from compressed_format.cli.tables import is_terminal, terminal_console

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from typing_extensions import Self

__all__ = ["Bar", "Lines", "duration", "progress_on", "size"]

_PASSING_AFTER = 1.0  # seconds: what is over sooner needs no bar
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def progress_on(
    what: str, stream: IO[str] | None = None, *, patient: bool = False, in_bytes: bool = True
) -> Bar | Lines:
    """A context manager that is called with the bytes done and their total; ``what`` names the job.
    Unless they count ``in_bytes``, only their ratio is told.

    On a terminal it is a bar, and elsewhere lines; both go to stderr unless told otherwise. ``patient`` is for what is
    seldom long and has something to say at its end: the bar comes after a second and vanishes, and the first line comes
    after ten.
    """
    stream = stream or sys.stderr
    if is_terminal(stream):
        return Bar(what, stream, passing=patient, in_bytes=in_bytes)
    return Lines(what, stream, patient=patient, in_bytes=in_bytes)


class Bar:
    """A bar with bytes, rate and time left. The first call says what an earlier run has done; no rate counts that."""

    def __init__(self, what: str, stream: IO[str], *, passing: bool = False, in_bytes: bool = True) -> None:
        self._in_bytes = in_bytes
        self._what, self._stream, self._passing = printable(what), stream, passing
        self._began: float | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        from rich.markup import escape
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        if self._passing and self._began is None:
            self._began = time.monotonic()
        if self._began is not None and time.monotonic() < self._began + _PASSING_AFTER:
            return
        if self._progress is None or self._task is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %"),
                *([DownloadColumn(), TransferSpeedColumn()] if self._in_bytes else []),
                TimeRemainingColumn(compact=True),
                console=terminal_console(self._stream),
                expand=True,
                transient=self._passing,
            )
            self._task = self._progress.add_task(escape(self._what), total=total, completed=done)
            self._progress.start()
        else:
            self._progress.update(self._task, completed=done, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


class Lines:
    """A line at the start, one for every tenth of the work but at most one a second, one after ten seconds without,
    and one at the end."""

    def __init__(
        self,
        what: str,
        stream: IO[str],
        *,
        patient: bool = False,
        in_bytes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._in_bytes = in_bytes
        self._what, self._stream, self._patient, self._clock = printable(what), stream, patient, clock
        self._lock = threading.Lock()
        self._before = self._shown = 0  # bytes done when this run began, and in the latest line
        self._began = self._latest = clock()
        self._started = self._spoken = self._ended = False

    def __enter__(self) -> Self:
        return self

    def __call__(self, done: int, total: int) -> None:
        with self._lock:
            now = self._clock()
            waited = now - self._latest
            if not self._started:
                self._before, self._began, self._started = done, now, True
                already = f", {self._much(done, total)} of it done already" if done else ""
                if not self._patient:
                    self._say(f"{self._what}: {self._much(total, total)}{already}", done, now)
            elif done < total and (waited >= 10 or (self._spoken and self._is_tenth(done, total, waited))):
                self._say(f"{self._what}: {self._state(done, total, now)}", done, now)
            if done >= total and self._spoken and not self._ended:
                self._ended = True
                self._say(f"{self._what}: {self._much(total, total)} done in {duration(now - self._began)}", done, now)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def _is_tenth(self, done: int, total: int, waited: float) -> bool:
        return waited >= 1 and (done - self._shown) * 10 >= total

    def _state(self, done: int, total: int, now: float) -> str:
        text = f"{100 * done // total} %"
        rate = (done - self._before) / (now - self._began) if now > self._began else 0.0
        if self._in_bytes:
            text = f"{size(done)} of {size(total)}, {text}" + (f", {size(rate)}/s" if rate > 0 else "")
        return f"{text}, {duration((total - done) / rate)} left" if rate > 0 else text

    def _much(self, done: int, total: int) -> str:
        return size(done) if self._in_bytes else f"{100 * done // max(total, 1)} %"

    def _say(self, text: str, done: int, now: float) -> None:
        self._shown, self._latest, self._spoken = done, now, True
        print(text, file=self._stream, flush=True)


def size(count: float) -> str:
    """So many bytes in the unit that fits, which is one of 1000: ``113.2 MB``."""
    power = 0
    while count >= 999.95 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.0f} {_UNITS[0]}" if power == 0 else f"{count:.1f} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """So many seconds as ``4.2 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
