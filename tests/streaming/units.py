"""Units of work for tests: a pattern that depends on unit, part and place, and ways to go wrong."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from compressed_format.checkpoint.header import build_header
from compressed_format.checkpoint.spans import read_span, write_span
from compressed_format.streaming.engine import run_job
from compressed_format.streaming.job import Job, Part

SPAN = 96
FILES = {"config.json": b'{"a": 1}\n', "code/x.py": b"pass\n"}


def pattern(part: str, index: int) -> bytes:
    return (f"<{part} {index}>" * SPAN).encode()[:SPAN]


@dataclass(frozen=True)
class Pattern:
    """Span ``index`` of each of ``files``, in two writes."""

    index: int
    files: tuple[str, ...]
    start: int
    seconds: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.files[0]}#{self.index}"

    @property
    def nbytes(self) -> int:
        return SPAN * len(self.files)

    def run(self, folder: Path) -> None:
        time.sleep(self.seconds)
        for file in self.files:
            data = pattern(file, self.index)
            for at in range(0, SPAN, SPAN // 2):
                write_span(folder / file, self.start + self.index * SPAN + at, data[at : at + SPAN // 2])


@dataclass(frozen=True)
class Once(Pattern):
    """Goes wrong, unless the file ``mark`` is there, which it makes first: as ``how`` says."""

    mark: Path = Path()
    how: str = "kill"

    def run(self, folder: Path) -> None:
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            super().run(folder)
            return
        write_span(folder / self.files[0], self.start + self.index * SPAN, b"half of it")
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            super().run(folder)
        if self.how == "read":
            read_span(self.mark.with_name("missing"), 0, bytearray(4))
        if self.how == "disk":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.mark))
        if self.how == "bug":
            raise ZeroDivisionError("a bug")


def pattern_job(
    parts: int = 3, spans: int = 6, *, seconds: float = 0.0, source: str = "one", once: Once | None = None
) -> Job:
    """A job whose parts are readable safetensors files; its last unit writes to two of them."""
    names = [f"model-{number:05d}-of-{parts:05d}.safetensors" for number in range(1, parts + 1)]
    if parts == 1:
        names = ["model.safetensors"]
    headers = {name: build_header([(f"t{at}", "uint8", (spans * SPAN,))], {}) for at, name in enumerate(names)}
    units: list[Pattern] = [
        Pattern(index, (name,), len(headers[name]), seconds)
        for name in names
        for index in range(spans - (name in names[:2]))
    ]
    units.append(Pattern(spans - 1, tuple(names[:2]), len(headers[names[0]]), seconds))
    if once is not None:
        units = [once if unit.id == once.id else unit for unit in units]
    files: dict[str, bytes | Path] = {} if parts == 1 else dict(FILES)
    sized = {name: Part(header, len(header) + spans * SPAN) for name, header in headers.items()}
    return Job({"source": {"path": source, "size": 12}, "config": {"bits": 4}}, sized, units, files)


def once_in(job: Job, number: int, mark: Path, how: str) -> Once:
    """The unit of that number, which goes wrong at its first attempt."""
    unit = job.units[number]
    assert isinstance(unit, Pattern)
    return Once(unit.index, unit.files, unit.start, unit.seconds, mark, how)


def expected(job: Job) -> dict[str, bytes | None]:
    """What the job's folder holds in the end, as ``content_of`` tells it."""
    content: dict[str, bytes | None] = {}
    for name, part in job.parts.items():
        spans = (part.size - len(part.header)) // SPAN
        content[name] = part.header + b"".join(pattern(name, index) for index in range(spans))
    for name, data in job.files.items():
        assert isinstance(data, bytes)
        content[name] = data
        content.update({str(parent): None for parent in Path(name).parents[:-1]})
    return content


def interrupted(job: Job, target: Path, units: int = 9, **more: object) -> None:
    """Run a job on one worker until so many units are done."""

    def progress(done: int, _: int) -> None:
        if done >= units * SPAN:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, target, workers=1, progress=progress, **more)  # type: ignore[arg-type]
