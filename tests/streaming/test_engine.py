"""Jobs: what they write, what they leave when they fail, and which ones are refused."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from compressed_format import threads
from compressed_format.checkpoint import read_checkpoint, syscalls, write_checkpoint
from compressed_format.errors import CheckpointError, CheckpointExistsError, CheckpointLockedError
from compressed_format.streaming.engine import run_job
from compressed_format.streaming.job import Job, Part
from tests.checkpoint.saves import OLD, content_of, save
from tests.streaming.units import SPAN, Pattern, expected, interrupted, once_in, pattern_job

Calls = list[tuple[int, int]]


@pytest.mark.parametrize("workers", [None, 1, 5])
def test_a_job_is_done(workers: int | None, tmp_path: Path) -> None:
    job, calls = pattern_job(), Calls()
    run_job(job, tmp_path / "out", workers=workers, progress=lambda *call: calls.append(call))
    assert content_of(tmp_path / "out") == expected(job)
    assert list(content_of(tmp_path)) == ["out", *(f"out/{name}" for name in content_of(tmp_path / "out"))]
    total = sum(unit.nbytes for unit in job.units)
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(set(calls))
    assert len(calls) == len(job.units) + 1


def test_nothing_is_left_of_a_job_that_did_nothing(tmp_path: Path) -> None:
    job = pattern_job(1, 1)
    job = pattern_job(1, 1, once=once_in(job, 0, tmp_path / "mark", "read"))
    with pytest.raises(CheckpointError, match="missing: cannot be read: No such file"):
        run_job(job, tmp_path / "a" / "out")
    (tmp_path / "mark").unlink()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("read", CheckpointError, "missing: cannot be read: No such file"),
        ("disk", CheckpointError, "mark: cannot be read or written: Input/output error"),
        ("bug", ZeroDivisionError, "a bug"),
    ],
)
def test_a_unit_that_fails(how: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    job = pattern_job()
    job = pattern_job(once=once_in(job, 9, tmp_path / "mark", how))
    with pytest.raises(error, match=message):
        run_job(job, tmp_path / "out", workers=2)
    assert (tmp_path / "out.partial.job").is_file()
    calls = Calls()
    run_job(job, tmp_path / "out", progress=lambda *call: calls.append(call))
    assert calls[0][0] >= 8 * SPAN
    assert content_of(tmp_path / "out") == expected(job)


def test_overwriting(tmp_path: Path) -> None:
    job, target = pattern_job(), tmp_path / "out"
    save(target, OLD)
    before = content_of(target)
    with pytest.raises(CheckpointExistsError, match="overwrite=True"):
        run_job(job, target)
    interrupted(job, target, overwrite=True)
    assert content_of(target) == before
    with pytest.raises(CheckpointExistsError):
        run_job(job, target)
    for name in (".exchange-1", ".exchange-2"):  # as if killed while it tried whether that works
        (tmp_path / "out.partial" / name).mkdir()
    run_job(job, target, overwrite=True)
    assert content_of(target) == expected(job)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_single_file(tmp_path: Path) -> None:
    job, target = pattern_job(1), tmp_path / "deep" / "out.safetensors"
    (content,) = expected(job).values()
    interrupted(job, target, units=3)
    with pytest.raises(CheckpointError, match="unfinished save"):
        read_checkpoint(tmp_path / "deep" / "out.safetensors.partial" / "model.safetensors")
    run_job(job, target)
    assert target.read_bytes() == content
    assert set(read_checkpoint(target)) == {"t0"}
    target.write_bytes(b"old")
    with pytest.raises(CheckpointExistsError):
        run_job(job, target)
    interrupted(job, target, units=3, overwrite=True)
    assert target.read_bytes() == b"old"
    run_job(job, target, overwrite=True)
    assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["out.safetensors"]
    for several in (pattern_job(2), replace(job, files={"config.json": b"{}"})):
        with pytest.raises(CheckpointError, match=r"is the name of one file, and .* is to be written"):
            run_job(several, target, overwrite=True)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="is a folder, and one file is to be written"):
        run_job(job, tmp_path / "folder.safetensors", overwrite=True)


def test_two_writers_at_once(tmp_path: Path) -> None:
    job, target = pattern_job(), tmp_path / "out"
    held, go = threading.Event(), threading.Event()

    def hold(done: int, _: int) -> None:
        if done >= 4 * SPAN:
            held.set()
            assert go.wait(60)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(run_job, job, target, workers=2, progress=hold)
        try:
            assert held.wait(60)
            for overwrite in (False, True):
                with pytest.raises(CheckpointLockedError, match="another process is writing"):
                    run_job(job, target, overwrite=overwrite)
                with pytest.raises(CheckpointLockedError):
                    write_checkpoint(target, OLD, overwrite=overwrite)
        finally:
            go.set()
        first.result()
    assert content_of(target) == expected(job)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, target = pattern_job(), tmp_path / "out"
    monkeypatch.setattr(syscalls, "free_bytes", lambda _: 100)
    with pytest.raises(CheckpointError, match=r"out\.partial: needs \d+ more bytes of disk space, and 100 are free"):
        run_job(job, target)
    assert list(tmp_path.iterdir()) == []


def test_jobs_that_contradict_themselves(tmp_path: Path) -> None:
    header = b"12345678"
    unit = Pattern(0, ("a",), 8)
    cases = {
        "the name is not a plain relative name": ({"../a": Part(b"", 1)}, [], {}),
        "cannot be both a file of tensors and another one": ({"a": Part(b"", 1)}, [], {"a": b""}),
        "'a' cannot be both a file and the folder": ({"a": Part(b"", 1)}, [], {"a/b": b""}),
        "its header has 8 bytes, and the whole file 7": ({"a": Part(header, 7)}, [], {}),
        "unit a#0: is there 2 times": ({"a": Part(b"", 1)}, [unit, unit], {}),
        "unit a#0: writes to 'a', which is not among": ({"b": Part(b"", 1)}, [unit], {}),
    }
    for message, (parts, units, files) in cases.items():
        with pytest.raises(CheckpointError, match=re.escape(message)):
            Job({}, parts, units, files)
    with pytest.raises(CheckpointError, match="workers: must be at least 1, not 0"):
        run_job(pattern_job(), tmp_path / "out", workers=0)
    assert list(tmp_path.iterdir()) == []


def test_a_job_without_units(tmp_path: Path) -> None:
    (tmp_path / "copied").write_bytes(b"b")
    job = Job({}, {"deep/a.safetensors": Part(b"head", 4)}, [], {"b": tmp_path / "copied"})
    run_job(job, tmp_path / "out")
    assert content_of(tmp_path / "out") == {"deep": None, "deep/a.safetensors": b"head", "b": b"b"}


class Threads(Pattern):
    """Notes how many threads torch would use."""

    seen: list[int] = []  # noqa: RUF012

    def run(self, folder: Path) -> None:
        self.seen.append(torch.get_num_threads())
        super().run(folder)


def test_units_compute_on_their_own_thread_only(tmp_path: Path) -> None:
    job = pattern_job()
    units = [Threads(unit.index, unit.files, unit.start) for unit in job.units if isinstance(unit, Pattern)]
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run_job(replace(job, units=units), tmp_path / "out", workers=2)
        after: list[int] = [torch.get_num_threads()]
        threads._on_a_new_thread(lambda: after.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(before)
    assert set(Threads.seen) == {1}
    assert after == [3, 3]
