"""What a job brings to the disk and when, and each of its system calls failing."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from compressed_format.checkpoint.spans import read_span
from compressed_format.errors import CheckpointError, CompressedFormatWarning
from compressed_format.streaming.engine import run_job
from tests.checkpoint.saves import OLD, content_of, save
from tests.streaming.conftest import WRITES, JobCalls
from tests.streaming.units import SPAN, Pattern, expected, pattern_job


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_renamed_or_noted_before_it_is_on_the_disk(
    overwrite: bool, tmp_path: Path, job_calls: JobCalls, note_each: None
) -> None:
    job, target, partial = pattern_job(seconds=0.001), tmp_path / "out", tmp_path / "out.partial"
    if overwrite:
        save(target, OLD)
    job_calls.record.clear()
    run_job(job, target, workers=3, overwrite=overwrite)
    record = job_calls.record
    publication = ("exchange" if overwrite else "rename", partial, (target,))
    published = record.index(publication)
    for name in content_of(target):
        if (target / name).is_file():
            assert job_calls.last(WRITES, partial / name) < job_calls.last("sync", partial / name) < published
    for folder in (partial, partial / "code"):
        made = [at for at, call in enumerate(record) if call[0] == "create_file" and call[1].parent == folder]
        assert max(made) < job_calls.last("sync_folder", folder, published)
    assert record[published + 1][:2] == ("sync_folder", tmp_path)
    assert [call[0] for call in record[published + 2 :]] == ["sync", "remove", *(["remove"] if overwrite else [])]

    journal = tmp_path / "out.partial.job"
    (made,) = (at for at, call in enumerate(record) if call[:2] == ("create_file", journal))
    for name in job.parts:
        assert job_calls.last(WRITES, partial / name, made) < job_calls.last("sync", partial / name, made)
    assert ("sync_folder", partial, ()) in record[:made]
    notes = [at for at, call in enumerate(record) if call[:2] == ("write_at", journal) and b'{"done"' in call[2][0]]
    assert len(notes) > 2
    units = {unit.id: unit for unit in job.units if isinstance(unit, Pattern)}
    for note in notes:
        assert record[note + 1 :].index(("sync", journal, ())) >= 0
        for unit in map(units.pop, json.loads(record[note][2][0][9:])["done"]):
            for file in unit.files:
                start = unit.start + unit.index * SPAN
                writes = [
                    at
                    for at, call in enumerate(record)
                    if call[:2] == ("write_at", partial / file) and start <= call[2][1] < start + SPAN
                ]
                assert len(writes) == 2
                assert any(call[:2] == ("sync", partial / file) for call in record[max(writes) : note])
    assert not units


def test_the_power_may_fail_at_any_time(tmp_path: Path, job_calls: JobCalls, note_each: None) -> None:
    """What was not synced is there in part, or not; the job goes on from it to the same bytes."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    job, place = pattern_job(2, 4, seconds=0.005), tmp_path / "place"
    place.mkdir()
    durable: dict[Path, bytes] = {}
    cuts: list[dict[Path, bytes]] = []

    def before(_: int, name: str, path: Path) -> None:
        if name == "sync" and path.is_file():
            durable[path] = path.read_bytes()
        if name in ("rename", "exchange"):
            job_calls.after = lambda *_: None

    def torn(path: Path) -> bytes | None:
        now, synced = path.read_bytes(), durable.get(path)
        if synced is None:
            return rng.choice((None, b"", bytes(len(now)), now))
        pieces = [rng.choice((synced, now))[at : at + 16] for at in range(0, max(len(now), len(synced)), 16)]
        return b"".join(pieces) if len(now) == len(synced) else synced + now[len(synced) :][: rng.randrange(200)]

    def after(*_: object) -> None:
        if rng.random() < 0.3:
            files = [path for path in place.rglob("*") if path.is_file()]
            cuts.append({path: data for path in files if (data := torn(path)) is not None})

    job_calls.before, job_calls.after = before, after
    run_job(job, place / "out", workers=3)
    job_calls.before = job_calls.after = lambda *_: None
    resumed = 0
    assert len(cuts) > 20
    for number, files in enumerate(cuts):
        again = tmp_path / str(number)
        for path, data in files.items():
            copy = again / path.relative_to(place)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(data)
        calls: list[int] = []
        run_job(job, again / "out", progress=lambda done, _, calls=calls: calls.append(done))
        resumed += calls[0] > 0
        assert content_of(again / "out") == expected(job), f"seed {seed}, cut {number}"
        assert [path.name for path in again.iterdir()] == ["out"]
    assert resumed > 5, f"seed {seed}"


@pytest.mark.parametrize(
    ("before", "code"),
    [
        ("nothing", errno.EIO),
        ("nothing", errno.ENOSPC),
        ("checkpoint", errno.EIO),
        ("file", errno.EIO),
        ("killed", errno.ENOSPC),
    ],
)
def test_each_call_fails_once(before: str, code: int, tmp_path: Path, job_calls: JobCalls) -> None:
    place = tmp_path / "place"
    single = before == "file"
    target = place / {"file": "out.safetensors", "nothing": "deep/out"}.get(before, "out")
    job = pattern_job(1, 3) if single else pattern_job(2, 2)

    def die(done: int, _: int) -> None:
        if done >= 2 * SPAN:
            raise KeyboardInterrupt

    def reset() -> dict[str, bytes | None]:
        job_calls.before = lambda *_: None
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if before == "checkpoint":
            save(target, OLD)
        elif single:
            target.write_bytes(b"old")
        content = content_of(place)
        if before == "killed":
            with pytest.raises(KeyboardInterrupt):
                run_job(job, target, workers=1, progress=die)
            next(path for path in (place / "out.partial").iterdir() if "00002" in path.name).unlink()
        job_calls.record.clear()
        return content

    def holds() -> bool:
        return {next(iter(job.parts)): target.read_bytes()} == expected(job) if single else (
            content_of(target) == expected(job)
        )  # fmt: skip

    reset()
    run_job(job, target, workers=1, overwrite=True)
    calls = list(job_calls.record)
    publication = "exchange" if before in ("checkpoint", "file") else "rename"
    published = max(at for at, call in enumerate(calls) if call[0] == publication)
    assert len(calls) > 40
    for number, (name, path, _) in enumerate(calls):
        content = reset()

        def fail(at: int, called: str, _: Path, number: int = number, name: str = name) -> None:
            if at == number:
                assert called == name
                raise OSError(code, os.strerror(code))

        job_calls.before = fail
        if name == "remove" and number > published:
            with pytest.warns(CompressedFormatWarning, match="cannot be removed wholly"):
                run_job(job, target, workers=1, overwrite=True)
            assert holds()
        else:
            with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
                run_job(job, target, workers=1, overwrite=True)
            assert str(place) in str(caught.value), (number, name, path)
            left = content_of(place)
            if (target.parent / f"{target.name}.partial.job").exists() or name == "remove":
                left = {key: value for key, value in left.items() if ".partial" not in key and key != "deep"}
            assert left == content, (number, name, path)
        job_calls.before = lambda *_: None
        run_job(job, target, workers=1, overwrite=True)
        assert holds()
        assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_what_a_failed_sync_may_have_lost_is_not_noted(tmp_path: Path, job_calls: JobCalls, note_each: None) -> None:
    """The system reports a lost write once; the next sync of the file succeeds without it."""
    job, lost = pattern_job(1, 8, seconds=0.005), []

    def fail(_: int, name: str, path: Path) -> None:
        if name == "sync" and path.suffix == ".safetensors" and b"<" in path.read_bytes() and not lost:
            lost.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    job_calls.before = fail
    with pytest.raises(CheckpointError, match="cannot be synced to the disk: Input/output error"):
        run_job(job, tmp_path / "out", workers=1)
    assert lost
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_fills_up(small_disk: Path, note_each: None) -> None:
    job, target, ballast = pattern_job(1, 1200), small_disk / "out.safetensors", small_disk / "ballast"
    ballast.write_bytes(bytes(960_000))
    with pytest.raises(CheckpointError, match=r"needs 115\d\d\d more bytes of disk space, and \d+ are free"):
        run_job(job, target)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
    ballast.unlink()

    def fill(done: int, _: int) -> None:
        if done >= 300 * SPAN and not ballast.exists():
            with ballast.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        return

    with pytest.raises(CheckpointError, match="cannot be written: No space left on device"):
        run_job(job, target, progress=fill)
    assert sorted(path.name for path in small_disk.iterdir()) == [
        "ballast", "out.safetensors.partial", "out.safetensors.partial.job",
    ]  # fmt: skip
    ballast.unlink()
    calls: list[int] = []
    run_job(job, target, progress=lambda done, _: calls.append(done))
    assert calls[0] > 0
    assert target.read_bytes() == next(iter(expected(job).values()))
    assert [path.name for path in small_disk.iterdir()] == ["out.safetensors"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    job = pattern_job()
    (tmp_path / "file").touch()
    cases = {"file/out": "Not a directory", "x.partial": "choose another", "/proc/out": r"/proc/out"}
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            run_job(job, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"12345")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    buffer = bytearray(4)
    read_span(tmp_path / "short", 1, buffer)
    assert buffer == b"2345"
    cases = {
        "short": "ends at byte 5, and bytes up to 6 are needed", "folder": "not a file", "pipe": "not a file",
        "missing": "cannot be read: No such file",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(CheckpointError, match=f"{name}: .*{message}"):
            read_span(tmp_path / name, 2, buffer)


def test_modes_of_what_is_published(tmp_path: Path) -> None:
    run_job(pattern_job(), tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    for path in (tmp_path / "out").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask
