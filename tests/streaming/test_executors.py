"""Units on executors of other processes, some of which die."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from compressed_format.errors import CheckpointError
from compressed_format.streaming.engine import run_job
from tests.checkpoint.saves import content_of
from tests.streaming.conftest import JobCalls
from tests.streaming.units import SPAN, expected, once_in, pattern_job

ROOT = Path(__file__).parents[2]


class Here(Executor):
    """Runs each call where it is submitted, on copies of its arguments, and remembers its result."""

    def __init__(self) -> None:
        self.results: dict[bytes, Any] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        call = pickle.dumps((fn, args, kwargs))
        if call not in self.results:
            again, arguments, more = pickle.loads(call)
            self.results[call] = again(*arguments, **more)
        future.set_result(pickle.loads(pickle.dumps(self.results[call])))
        return future


@pytest.fixture
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        yield pool


def test_workers_sync_before_units_are_noted(tmp_path: Path, job_calls: JobCalls) -> None:
    job = pattern_job(2, 3)
    run_job(job, tmp_path / "out", executor=Here())
    journal = tmp_path / "out.partial.job"
    noted = next(at for at, call in enumerate(job_calls.record) if call[0] == "write_at" and b"done" in call[2][0])
    assert job_calls.record[noted][1] == journal
    for name in job.parts:
        part = tmp_path / "out.partial" / name
        assert job_calls.last("write_at", part, noted) < job_calls.last("sync", part, noted)
    assert content_of(tmp_path / "out") == expected(job)


def test_an_executor_that_remembers_calls(tmp_path: Path) -> None:
    """As dask does with calls whose arguments are equal: an attempt of its own is another call."""
    job, executor = pattern_job(), Here()

    def stop(done: int, _: int) -> None:
        if done >= 9 * SPAN:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job, tmp_path / "out", executor=executor, progress=stop)
    for part in (tmp_path / "out.partial").iterdir():
        part.unlink()
    run_job(job, tmp_path / "out", executor=executor)
    assert content_of(tmp_path / "out") == expected(job)


def test_workers_that_do_not_see_the_folder(tmp_path: Path) -> None:
    class Elsewhere(Here):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            unit, folder, *rest = args
            return super().submit(fn, unit, Path("/elsewhere") / folder.name, *rest)

    with pytest.raises(CheckpointError, match="it needs a file system that all workers share"):
        run_job(pattern_job(), tmp_path / "out", executor=Elsewhere())
    assert list(tmp_path.iterdir()) == []


def test_how_many_are_on_their_way(tmp_path: Path) -> None:
    class Slow(Here):
        waiting: list[Callable[[], None]]
        most = 0

        def __init__(self) -> None:
            super().__init__()
            self.waiting = []

        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            done: Future[Any] = super().submit(fn, *args, **kwargs)
            future: Future[Any] = Future()
            self.waiting.append(lambda: future.set_result(done.result()))
            self.most = max(self.most, len(self.waiting))
            if len(self.waiting) == 6 or args[0].id == pattern_job(4, 9).units[-1].id:
                while self.waiting:
                    self.waiting.pop()()
            return future

    slow = Slow()
    run_job(pattern_job(4, 9), tmp_path / "out", executor=slow, workers=3)
    assert slow.most == 6
    assert content_of(tmp_path / "out") == expected(pattern_job(4, 9))


def test_an_executor_that_says_nothing_of_what_was_cancelled(tmp_path: Path) -> None:
    """As Ray's futures do."""

    class Silent(Here):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            return super().submit(fn, *args, **kwargs) if args[0].index < 2 else Future()

    def stop(done: int, _: int) -> None:
        if done >= SPAN:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(pattern_job(), tmp_path / "out", executor=Silent(), progress=stop)
    run_job(pattern_job(), tmp_path / "out")
    assert content_of(tmp_path / "out") == expected(pattern_job())


def test_processes(tmp_path: Path, processes: ProcessPoolExecutor) -> None:
    job = pattern_job()
    run_job(job, tmp_path / "out", executor=processes)
    assert content_of(tmp_path / "out") == expected(job)
    assert processes.submit(os.getpid).result() != os.getpid()  # it is not ours to shut down


@pytest.mark.parametrize(("how", "message"), [("read", "missing: cannot be read: No such file"), ("disk", "mark: ")])
def test_errors_come_back(how: str, message: str, tmp_path: Path, processes: ProcessPoolExecutor) -> None:
    job = pattern_job(once=once_in(pattern_job(), 9, tmp_path / "mark", how))
    with pytest.raises(CheckpointError, match=message):
        run_job(job, tmp_path / "out", executor=processes)
    run_job(job, tmp_path / "out", executor=processes)
    assert content_of(tmp_path / "out") == expected(job)


def test_a_process_of_a_pool_is_killed(tmp_path: Path, processes: ProcessPoolExecutor) -> None:
    job = pattern_job(once=once_in(pattern_job(), 9, tmp_path / "mark", "kill"))
    message = r"out\.partial: the ProcessPoolExecutor could not do unit .*BrokenProcessPool.*call again to go on"
    with pytest.raises(CheckpointError, match=message):
        run_job(job, tmp_path / "out", executor=processes)
    with pytest.raises(CheckpointError, match="the ProcessPoolExecutor could not do work: BrokenProcessPool"):
        run_job(job, tmp_path / "out", executor=processes)
    calls: list[int] = []
    run_job(job, tmp_path / "out", progress=lambda done, _: calls.append(done))
    assert calls[0] >= 5 * SPAN
    assert content_of(tmp_path / "out") == expected(job)


def test_a_unit_that_cannot_be_pickled(tmp_path: Path, processes: ProcessPoolExecutor) -> None:
    job = pattern_job()
    object.__setattr__(job.units[3], "seconds", lambda: 0)
    with pytest.raises(CheckpointError, match=r"the ProcessPoolExecutor could not do unit .*pickle"):
        run_job(job, tmp_path / "out", executor=processes)


def test_a_worker_of_a_cluster_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the workers are new processes, which import these tests
    job = pattern_job(seconds=0.01, once=once_in(pattern_job(), 9, tmp_path / "mark", "kill"))
    with (
        distributed.LocalCluster(3, processes=True, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        run_job(job, tmp_path / "out", executor=client.get_executor())
        assert (tmp_path / "mark").exists()
        assert content_of(tmp_path / "out") == expected(job)
        again = pattern_job(once=once_in(pattern_job(), 9, tmp_path / "again", "read"))
        with pytest.raises(CheckpointError, match="missing: cannot be read: No such file"):
            run_job(again, tmp_path / "other", executor=client.get_executor())
        run_job(again, tmp_path / "other", executor=client.get_executor())
    assert content_of(tmp_path / "other") == expected(job)
