"""Jobs that were interrupted go on where they were, and only they do."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from compressed_format.checkpoint import publish, read_checkpoint
from compressed_format.errors import CheckpointError, CheckpointExistsError
from compressed_format.streaming.engine import run_job
from compressed_format.streaming.job import Part
from tests.checkpoint.saves import OLD, content_of, save
from tests.streaming.conftest import JobCalls
from tests.streaming.units import SPAN, Pattern, expected, interrupted, once_in, pattern_job

Calls = list[tuple[int, int]]


def test_it_goes_on_where_it_was(tmp_path: Path) -> None:
    job, calls = pattern_job(), Calls()
    interrupted(job, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial", "out.partial.job"]
    with pytest.raises(CheckpointError, match="unfinished save"):
        read_checkpoint(tmp_path / "out.partial")
    ran = []

    class Counted(Pattern):
        def run(self, folder: Path) -> None:
            ran.append(self.id)
            super().run(folder)

    units = [Counted(unit.index, unit.files, unit.start) for unit in job.units if isinstance(unit, Pattern)]
    run_job(replace(job, units=units), tmp_path / "out", progress=lambda *call: calls.append(call))
    # In flight while the ninth was reported were at most two more.
    assert {unit.id for unit in units[11:]} <= set(ran) <= {unit.id for unit in units[9:]}
    assert calls[0][0] >= 9 * SPAN
    assert content_of(tmp_path / "out") == expected(job)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_real_interrupt(tmp_path: Path) -> None:
    job = pattern_job(seconds=0.01)
    job = pattern_job(seconds=0.01, once=once_in(job, 8, tmp_path / "mark", "interrupt"))
    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "out", workers=2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("unit", "sync"))]
    calls = Calls()
    run_job(job, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[0][0] >= 6 * SPAN
    assert content_of(tmp_path / "out") == expected(job)


def test_an_interrupt_while_units_are_noted(tmp_path: Path, job_calls: JobCalls, note_each: None) -> None:
    job, sent = pattern_job(seconds=0.001), []

    def interrupt(_: int, name: str, __: Path) -> None:
        if name == "sync" and threading.current_thread().name.startswith("sync") and not sent:
            sent.append(name)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    job_calls.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "out")
    assert sent
    calls = Calls()
    run_job(job, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[0][0] > 0
    assert content_of(tmp_path / "out") == expected(job)


def test_an_interrupt_while_a_lock_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it raised there, no one would give the lock back, and the job would never end."""
    job, entered = pattern_job(seconds=0.001), []
    enter = threading.Condition.__enter__

    def interrupted_enter(condition: threading.Condition) -> bool:
        result = enter(condition)
        if sys._getframe(1).f_code.co_name == "add_done_callback":  # of a unit that has just been submitted
            entered.append(condition)
            if len(entered) == 3:
                os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(threading.Condition, "__enter__", interrupted_enter)
        with pytest.raises(KeyboardInterrupt):
            run_job(job, tmp_path / "out", workers=2)
    assert len(entered) >= 3
    run_job(job, tmp_path / "out")
    assert content_of(tmp_path / "out") == expected(job)


def test_an_interrupt_outside_the_main_thread(tmp_path: Path) -> None:
    """A job there leaves signals to whom they are for."""
    job, done = pattern_job(seconds=0.02), []
    job = pattern_job(seconds=0.02, once=once_in(job, 8, tmp_path / "mark", "interrupt"))
    thread = threading.Thread(target=lambda: done.append(run_job(job, tmp_path / "out", workers=2)))
    thread.start()  # whose eighth unit begins long after this
    with pytest.raises(KeyboardInterrupt):
        time.sleep(30)
    thread.join()
    assert done == [None]
    assert content_of(tmp_path / "out") == expected(job)


def test_another_job_is_refused(tmp_path: Path) -> None:
    job, target = pattern_job(), tmp_path / "out"
    interrupted(job, target)
    content = content_of(tmp_path)
    other = {"source": {"path": "two", "size": 12}, "config": {"bits": 4, "group": 32}}
    part = replace(job, parts={**job.parts, "more.safetensors": Part(b"", 4)})
    cases = (
        (
            replace(job, fingerprint=other),
            (r"source\.path: was 'one' there, is 'two' here", r"config\.group: was None"),
        ),
        (part, (r"the files and pieces of work that it consists of: was '[0-9a-f.]+' there",)),
    )
    for wrong, messages in cases:
        way_out = r"belongs to another job.*remove out\.partial and out\.partial\.job"
        with pytest.raises(CheckpointError, match=way_out) as caught:
            run_job(wrong, target)
        assert all(re.search(message, str(caught.value)) for message in messages)
        assert len(caught.value.problems) == len(messages)
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"out\.partial: holds a job that was begun and can go on"):
            save(target, OLD, overwrite=overwrite)
    assert content_of(tmp_path) == content
    run_job(job, target)
    assert content_of(target) == expected(job)


def test_another_version_of_the_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(pattern_job(), tmp_path / "out")
    monkeypatch.setattr("compressed_format.__version__", "99", raising=False)
    with pytest.raises(CheckpointError, match=r"this library's version: was '[0-9.]+' there, is '99' here"):
        run_job(pattern_job(), tmp_path / "out")


@pytest.mark.parametrize("damage", ["gone", "short", "header", "folder", "link"])
def test_a_part_that_was_damaged_is_done_again(damage: str, tmp_path: Path) -> None:
    job, target = pattern_job(), tmp_path / "out"
    interrupted(job, target, units=17)
    part = tmp_path / "out.partial" / next(iter(job.parts))
    (tmp_path / "out.partial" / "left").mkdir()
    (tmp_path / "out.partial" / "left" / "over").touch()
    if damage == "short":
        os.truncate(part, 100)
    elif damage == "header":
        part.write_bytes(b"x" * part.stat().st_size)
    else:
        part.unlink()
        if damage == "folder":
            part.mkdir()
        if damage == "link":
            part.symlink_to(tmp_path / "elsewhere")
            (tmp_path / "elsewhere").write_bytes(expected(job)[part.name] or b"")
    # A second attempt that gets no further must not leave a journal that counts the old units.
    interrupted(job, target, units=0)
    calls = Calls()
    run_job(job, target, progress=lambda *call: calls.append(call))
    assert calls[0][0] <= 11 * SPAN
    assert content_of(target) == expected(job)


def test_torn_and_garbled_journals(tmp_path: Path) -> None:
    job, target, journal = pattern_job(), tmp_path / "out", tmp_path / "out.partial.job"
    interrupted(job, target, units=3)
    interrupted(job, target, units=9)
    whole = journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 3
    cases = {
        whole[:-1]: 3, whole[:-5]: 3, whole[:-4] + b"xx]\n": 3, lines[0] + lines[1]: 3, lines[0]: 0, lines[0][:-1]: 0,
        b"": 0, whole + b"\0" * 40: 9, whole + b"garbled\n": 9,
    }  # fmt: skip
    saved = content_of(tmp_path / "out.partial")
    for data, done in cases.items():
        target.with_name("out.partial").mkdir(exist_ok=True)
        for name, content in saved.items():
            (tmp_path / "out.partial" / name).write_bytes(content or b"")
        journal.write_bytes(data)
        calls = Calls()
        run_job(job, target, progress=lambda *call, calls=calls: calls.append(call), overwrite=True)
        assert done <= calls[0][0] // SPAN <= done + 2 * bool(done), data
        assert content_of(target) == expected(job)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "out.partial").mkdir()
    for data in (lines[0] + b"x" + lines[1] + lines[2], b"x" + whole, b"not a journal\n", lines[1] + lines[2]):
        journal.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"partial\.job: .*: remove it and out\.partial, and begin anew"):
            run_job(job, target, overwrite=True)
        assert journal.read_bytes() == data


def test_a_partial_without_a_journal_is_thrown_away(tmp_path: Path) -> None:
    job = pattern_job()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / next(iter(job.parts))).write_bytes(b"half")
    run_job(job, tmp_path / "out")
    assert content_of(tmp_path / "out") == expected(job)
    (tmp_path / "other.partial.job").write_bytes(b"an orphan")
    save(tmp_path / "other", OLD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_killed_between_publication_and_tidying_up(
    before: bool, single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was replaced then lies in the partial folder, with the sizes of the new: it must not pass for it."""
    target = tmp_path / ("out.safetensors" if single else "out")
    old = pattern_job(1 if single else 3, source="old")
    new = replace(old, fingerprint={"source": "new"})
    if before:
        run_job(old, target)
        content = target if single else target / next(iter(old.parts))
        content.write_bytes(content.read_bytes()[:-SPAN] + b"?" * SPAN)  # the old one, whose bytes are others
    with monkeypatch.context() as patch:
        patch.setattr(publish, "_remove_rest", lambda *_: None)
        run_job(new, target, overwrite=True)
    assert Path(f"{target}.partial.job").is_file()
    assert Path(f"{target}.partial").is_dir() == (before or single)
    if not single and not before:
        with pytest.raises(CheckpointExistsError):
            run_job(new, target)
        assert [path.name for path in tmp_path.iterdir()] == [target.name]
    run_job(new, target, overwrite=True)
    found = {next(iter(new.parts)): target.read_bytes()} if single else content_of(target)
    assert found == expected(new)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
