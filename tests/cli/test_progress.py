"""Progress in lines, whose times a made-up clock tells, and as a bar on a terminal."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from compressed_format.cli.progress import Bar, Lines, duration, progress_on, size

GB = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def told(calls: list[tuple[float, float]], *, patient: bool = False) -> list[str]:
    """The lines of a job of 10 GB, given (time in seconds, GB done) of each call."""
    stream, clock = io.StringIO(), Clock()
    with Lines("out", stream, clock=clock, patient=patient) as progress:
        for at, done in calls:
            clock.now = 100 + at
            progress(int(done * GB), 10 * GB)
    return stream.getvalue().splitlines()


def test_a_line_for_every_tenth() -> None:
    assert told([(second, second / 4) for second in range(41)]) == [
        "out: 10.0 GB",
        *(
            f"out: {quarters / 4:.1f} GB of 10.0 GB, {quarters * 10 // 4} %, 250.0 MB/s, {40 - quarters}.0 s left"
            for quarters in (4, 8, 12, 16, 20, 24, 28, 32, 36)
        ),
        "out: 10.0 GB done in 40.0 s",
    ]


def test_at_most_one_a_second_and_one_after_ten() -> None:
    assert told([(0, 0), *((tenth / 100, tenth) for tenth in range(1, 11))]) == [
        "out: 10.0 GB",
        "out: 10.0 GB done in 0.1 s",
    ]
    slow = told([(second, second / 1000) for second in range(25)])
    assert slow[1:] == [
        "out: 10.0 MB of 10.0 GB, 0 %, 1.0 MB/s, 2 h 46 min left",
        "out: 20.0 MB of 10.0 GB, 0 %, 1.0 MB/s, 2 h 46 min left",
    ]


def test_what_an_earlier_run_has_done_counts_for_no_rate() -> None:
    assert told([(0, 8), (10, 9), (20, 10)]) == [
        "out: 10.0 GB, 8.0 GB of it done already",
        "out: 9.0 GB of 10.0 GB, 90 %, 100.0 MB/s, 10.0 s left",
        "out: 10.0 GB done in 20.0 s",
    ]


def test_patience() -> None:
    assert told([(0, 0), (9, 9), (9.5, 10)], patient=True) == []
    assert told([(0, 0), (9, 4), (11, 5), (12, 6), (20, 10)], patient=True) == [
        "out: 5.0 GB of 10.0 GB, 50 %, 454.5 MB/s, 11.0 s left",
        "out: 6.0 GB of 10.0 GB, 60 %, 500.0 MB/s, 8.0 s left",
        "out: 10.0 GB done in 20.0 s",
    ]


def test_nothing_to_do_and_names_of_anyone() -> None:
    stream = io.StringIO()
    with progress_on("a\x1b[0m", stream) as progress:
        progress(0, 0)
        progress(0, 0)
    assert stream.getvalue() == "a\\x1b[0m: 0 bytes\na\\x1b[0m: 0 bytes done in 0.0 s\n"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (5e18, "5000.0 PB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.99, "60.0 s"), (119.6, "2 min 0 s"), (7260, "2 h 1 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


PROGRAM = """
import sys, time
from compressed_format.cli.progress import progress_on
with progress_on("my [bold]model", sys.stdout) as progress:
    for done in (2, 4, 10):
        progress(done * 10**9, 10**10)
        time.sleep(0.12)
"""


def test_a_bar_on_a_terminal(tmp_path: Any, show: Callable[[str], str]) -> None:
    shown = show(PROGRAM)
    assert "my [bold]model" in shown
    assert "━" in shown
    assert "100 %" in shown
    assert "10.0/10.0 GB" in shown
    assert "GB/s" in shown
    assert shown.endswith("\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("env", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=["dumb", "no colour"])
def test_other_terminals(env: dict[str, str], show: Callable[..., str]) -> None:
    shown = show(PROGRAM, env)
    if "TERM" in env:
        assert shown.splitlines()[0] == "my [bold]model: 10.0 GB, 2.0 GB of it done already"
        assert "\x1b" not in shown
    else:
        assert "━" in shown
        assert "\x1b[3" not in shown  # no colour, though the cursor moves


def test_no_terminal_gets_no_codes() -> None:
    environment = {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    assert ended.stdout.splitlines()[0] == "my [bold]model: 10.0 GB, 2.0 GB of it done already"
    assert "\x1b" not in ended.stdout


def test_what_is_over_soon_needs_no_bar() -> None:
    with Bar("x", sys.stdout, passing=True) as bar:
        bar(0, 10)
        bar(10, 10)
    assert bar._progress is None
