"""What a job takes of memory does not grow with its source; each runs in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.streaming.sparse_sources import write_sparse_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")

ROOT = Path(__file__).parents[2]
GB = 10**9
MOST_ANONYMOUS = 100 * 10**6
"""Bytes, of two workers: 34 to 42 MB are measured, at every size. The largest tensor of the sources has 1051 MB."""
MOST_MAPPED = 20 * 10**6
"""Bytes: libraries of which more is used than before, and never a page of the source."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not outlive the test, as pytest's do: gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def measured(task: str, source: Path, destination: Path) -> dict[str, int]:
    command = (sys.executable, "-m", "tests.streaming.memory_process", task, str(source), str(destination))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    print(f"{task}: {found}")
    return found


def assert_bounded(found: dict[str, int]) -> None:
    assert found["samples"] > 50
    assert 0 < found["anonymous"] < MOST_ANONYMOUS
    assert found["mapped"] < MOST_MAPPED


def stored_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_1_gb_and_back(folder: Path) -> None:
    write_sparse_checkpoint(folder / "dense", 1 * GB)
    assert_bounded(measured("compress", folder / "dense", folder / "packed"))
    assert 0.25 < stored_bytes(folder / "packed") / stored_bytes(folder / "dense") < 0.27
    assert_bounded(measured("decompress", folder / "packed", folder / "again"))
    assert stored_bytes(folder / "again") == pytest.approx(stored_bytes(folder / "dense"), rel=1e-4)


@pytest.mark.parametrize("gigabytes", [4, 16])
def test_more_than_that(gigabytes: int, folder: Path) -> None:
    """The same bound, with four shards read and 4 GB written."""
    write_sparse_checkpoint(folder / "dense", gigabytes * GB)
    assert_bounded(measured("compress", folder / "dense", folder / "packed"))
    assert 0.25 < stored_bytes(folder / "packed") / stored_bytes(folder / "dense") < 0.27
