"""Killed at any time, a job leaves nothing, or what it can go on from to the same bytes, or all of it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from compressed_format.checkpoint import read_checkpoint
from compressed_format.errors import CheckpointError
from compressed_format.streaming.engine import run_job
from compressed_format.streaming.job import Job
from tests.checkpoint.saves import OLD, content_of, save
from tests.streaming.conftest import WRITES, JobCalls
from tests.streaming.units import expected, pattern_job

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    # The child runs no code that could wait for a thread of this process.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

CHANGES = ("remove", "make_folder", "create_file", *WRITES, "exchange", "rename")


def in_a_child(call: Callable[[], None]) -> int:
    """The process id of a child that makes a call and ends."""
    child = os.fork()
    if child == 0:
        try:
            call()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def ended(child: int) -> bool:
    """Whether a child was killed, and did not end by itself; it must not have failed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def check_what_is_left(target: Path, job: Job, before: dict[str, bytes | None]) -> bool:
    """Whether the destination is complete; else it is as it was before, and the rest is refused."""
    partial = Path(f"{target}.partial")
    complete = target.exists() and content_of(target) == expected(job)
    if not complete:
        assert (content_of(target) if target.exists() else {}) == before
        if partial.exists():
            with pytest.raises(CheckpointError, match="unfinished save"):
                read_checkpoint(partial)
    return complete


def check_that_it_goes_on(target: Path, job: Job, place: str) -> None:
    run_job(job, target, overwrite=True)
    assert content_of(target) == expected(job), place
    assert [path.name for path in target.parent.iterdir()] == [target.name], place


@pytest.mark.parametrize("before", [False, True], ids=["new", "overwriting"])
def test_killed_before_each_call(before: bool, tmp_path: Path, job_calls: JobCalls) -> None:
    job = pattern_job(2, 2)

    def reset(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        if before:
            save(folder / "out", OLD)
        job_calls.record.clear()
        return folder / "out"

    run_job(job, reset("counted"), workers=1, overwrite=before)
    # Before any other call there is the same on the disk as before the next one of these.
    changing = [at for at, call in enumerate(job_calls.record) if call[0] in CHANGES]
    assert len(changing) > 20
    for number in changing:
        target = reset(str(number))
        content = content_of(target) if before else {}

        def kill(at: int, *_: object, number: int = number) -> None:
            if at == number:
                os.kill(os.getpid(), signal.SIGKILL)

        job_calls.before = kill
        assert ended(in_a_child(lambda target=target: run_job(job, target, workers=1, overwrite=before)))  # type: ignore[misc]
        job_calls.before = lambda *_: None
        check_what_is_left(target, job, content)
        check_that_it_goes_on(target, job, f"call {number}")


def kill_at_random(kills: int, tmp_path: Path, job_calls: JobCalls) -> None:
    """One warm process, from which each job is forked; it is killed up to three times before it may end.

    Half of the kills come after some time, the others at some call of one thread, wherever the others are.
    """
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    job = pattern_job(3, 8, seconds=0.002)
    start = time.monotonic()
    run_job(job, tmp_path / "warm" / "out", workers=2)
    duration, count = time.monotonic() - start, len(job_calls.record)
    killed = resumable = 0
    for number in range(kills):
        place = f"seed {seed}, kill {number}"
        target = tmp_path / str(number // 3) / "out"
        target.parent.mkdir(exist_ok=True)
        before: dict[str, bytes | None] = {}
        if number % 6 == 0:
            save(target, OLD)
        if target.exists() and "model.safetensors" in content_of(target):
            before = content_of(target)
        at_call, by_time = rng.randrange(count), rng.random() < 0.5

        def kill(at: int, *_: object, at_call: int = at_call) -> None:
            if at == at_call:
                os.kill(os.getpid(), signal.SIGKILL)

        job_calls.record.clear()
        job_calls.before = (lambda *_: None) if by_time else kill
        child = in_a_child(lambda target=target: run_job(job, target, workers=2, overwrite=True))  # type: ignore[misc]
        if by_time:
            time.sleep(rng.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
        killed += ended(child)
        job_calls.before = lambda *_: None
        try:
            complete = check_what_is_left(target, job, before)
        except AssertionError as error:
            raise AssertionError(place) from error
        resumable += Path(f"{target}.partial.job").exists() and not complete
        if complete or number % 3 == 2:
            check_that_it_goes_on(target, job, place)
    assert killed > kills // 5, f"seed {seed}: {killed} killed"
    assert resumable > kills // 10, f"seed {seed}: {resumable} to go on from"


def test_killed_at_random(tmp_path: Path, job_calls: JobCalls, note_each: None) -> None:
    kill_at_random(20, tmp_path, job_calls)


@pytest.mark.long
def test_killed_at_random_often(tmp_path: Path, job_calls: JobCalls, note_each: None) -> None:
    kill_at_random(200, tmp_path, job_calls)


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    """It may outlive a process that was killed."""
    job, target, ready = pattern_job(), tmp_path / "out", tmp_path / "ready"

    def parent() -> None:
        def progress(*_: int) -> None:
            child = in_a_child(lambda: time.sleep(600))
            ready.write_text(str(child))
            os.kill(os.getpid(), signal.SIGKILL)

        run_job(job, target, progress=progress)

    assert ended(in_a_child(parent))
    try:
        run_job(job, target)
    finally:
        os.kill(int(ready.read_text()), signal.SIGKILL)
    assert content_of(target) == expected(job)
