"""What benchmarks say of their measurements; the measuring itself is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import bars as module

    return module


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"),
    [
        (2.0, False, "met"),
        (1.5, False, "missed by 25.0%"),
        (2.0, True, "met"),
        (2.5, True, "missed by 25.0%"),
        (float("nan"), False, "missed by nan%"),
    ],
)
def test_a_bar_is_met_from_its_bound_on(bars: Any, value: float, at_most: bool, verdict: str) -> None:
    assert bars.Bar("work", "rival", value, 2.0, at_most=at_most).verdict == verdict


def test_costs_are_rates_and_shares_of_what_the_machine_can_do(bars: Any) -> None:
    cost = bars.Cost(0.002, nbytes=20e6, operations=1e9, reading=40e9, multiplying=1000e9)
    assert (cost.time, cost.bytes_rate, cost.operations_rate) == ("2.00 ms", "10.0 GB/s (25%)", "500 GFLOP/s (50%)")
    assert bars.Cost(0.002).bytes_rate == bars.Cost(0.002).operations_rate == "-"


def test_bars_of_several_programs_make_one_table(bars: Any, tmp_path: Path) -> None:
    made = [
        bars.Bar("first", "rival", 3.0, 2.0, cost=bars.Cost(0.5, 1e9, reading=4e9)),
        bars.Bar("second", "us", 3.0, 2.0, "us", at_most=True, note="disturbed"),
    ]
    file = tmp_path / "bars"
    file.write_text("".join(json.dumps(asdict(bar)) + "\n" for bar in made))
    assert bars.read_bars(file.read_text().splitlines()) == made
    again = bars.Bar("first", "rival", 4.0, 2.0)
    assert bars.read_bars([*file.read_text().splitlines(), json.dumps(asdict(again))]) == [again, made[1]]
    command = [sys.executable, FOLDER / "run_all.py", "--table", "--bars", file]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "1 of 2 bars met" in printed
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert rows[2] == ["first", "500.00 ms", "2.0 GB/s (50%)", "-", ">= 2 x rival", "3.00 x", "met"]
    assert rows[3] == ["second", "-", "-", "-", "<= 2 us us", "3.00 us (disturbed)", "missed by 50.0%"]


def test_a_report_leaves_its_bars_to_who_collects_them(
    bars: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bars"
    monkeypatch.setenv(bars.COLLECTED, str(file))
    for number in range(2):
        report = bars.Report("some work")
        report.add(bars.Bar(f"work {number}", "rival", 1.0, 2.0))
        report.finish()
    assert [bar.work for bar in bars.read_bars(file.read_text().splitlines())] == ["work 0", "work 1"]
    assert "bars met" not in capsys.readouterr().out


def test_an_unknown_benchmark_is_an_error() -> None:
    command = [sys.executable, FOLDER / "run_all.py", "cpu_lineal"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2
    assert "there is no benchmark cpu_lineal" in done.stderr


def test_bars_say_where_other_processes_took_time(bars: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processors = os.cpu_count() or 1
    # Work of all, work of this process, and time, in seconds: before, after a line with others, after one without.
    times = iter(
        [(0.0, 0.0, 0.0), (1.0 * processors, 0.8 * processors, 1.0), (1.5 * processors, 1.3 * processors, 2.0)]
    )
    monkeypatch.setattr(bars, "processor_seconds", lambda: next(times))
    report = bars.Report("some work")
    for _ in range(2):
        report.add(bars.Bar("work", "rival", 3.0, 2.0, note="best"))
    assert [bar.note for bar in report.bars] == ["best, disturbed: others took 20%", "best"]
