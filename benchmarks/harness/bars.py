"""Bars: what was to be reached, what was measured, and how far apart they are. A missed one is no error."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

# Nothing of third parties is imported here: checkpoint.py needs it, which runs in the environments of its peers, too.

__all__ = ["COLLECTED", "Bar", "Cost", "Report", "bars_table", "read_bars"]

COLLECTED = "BENCHMARK_BARS"
"""The environment variable with the file to which programs add their bars, one JSON object a line."""
BUSY = 0.05
"""Of the processors' time: if other processes take more than this, the figures are theirs, too."""
SAME_LINE = 0.1
"""Bars that are added within so many seconds are of the same measurement."""
NOTHING = "-"


@dataclass(frozen=True)
class Cost:
    """What some work took, beside what the machine can do at most, as measured in the same run. Zero: not known."""

    seconds: float
    nbytes: float = 0
    """Read and written."""
    operations: float = 0
    reading: float = 0
    """Bytes a second."""
    multiplying: float = 0
    """Operations a second, of bfloat16 instructions."""

    @property
    def time(self) -> str:
        for unit, factor in (("s", 1.0), ("ms", 1e3)):
            if self.seconds * factor >= 1:
                return f"{self.seconds * factor:.2f} {unit}"
        return f"{self.seconds * 1e6:.{0 if self.seconds >= 1e-4 else 2}f} us"

    @property
    def bytes_rate(self) -> str:
        return self.rate(self.nbytes, self.reading, "GB/s", 1)

    @property
    def operations_rate(self) -> str:
        return self.rate(self.operations, self.multiplying, "GFLOP/s", 0)

    def rate(self, amount: float, ceiling: float, unit: str, digits: int) -> str:
        if not amount:
            return NOTHING
        rate = amount / self.seconds
        share = f" ({rate / ceiling:.0%})" if ceiling else ""
        return f"{rate / 1e9:.{digits}f} {unit}{share}"


@dataclass(frozen=True)
class Bar:
    """``value`` in ``unit``, which is to be at least ``bound``, or at most that."""

    work: str
    what: str
    value: float
    bound: float
    unit: str = "x"
    at_most: bool = False
    note: str = ""
    cost: Cost | None = None

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    @property
    def verdict(self) -> str:
        """``met``, or by how much of the bound it is not."""
        return "met" if self.met else f"missed by {abs(self.value / self.bound - 1):.1%}"

    @property
    def wanted(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g} {self.unit} {self.what}"

    @property
    def measured(self) -> str:
        return f"{self.value:.2f} {self.unit}" + (f" ({self.note})" if self.note else "")

    @property
    def cells(self) -> tuple[str, ...]:
        costs = (self.cost.time, self.cost.bytes_rate, self.cost.operations_rate) if self.cost else (NOTHING,) * 3
        return self.work, *costs, self.wanted, self.measured, self.verdict


HEADINGS = ("work", "takes", "bytes (of reading)", "operations (of the bf16 peak)", "bar", "measured", "")


@dataclass
class Report:
    """Prints what is measured as it comes, and at the end all bars in one table, which Markdown can show."""

    title: str
    bars: list[Bar] = field(default_factory=list)
    last: tuple[float, float, float] = field(default_factory=lambda: processor_seconds())
    others: float = 0.0
    """What other processes took of the processors' time while the last line was measured."""

    def line(self, text: str) -> None:
        print(text, flush=True)

    def add(self, bar: Bar) -> None:
        now = processor_seconds()
        if now[-1] - self.last[-1] > SAME_LINE:
            self.others, self.last = share_of_others(self.last, now), now
        if self.others > BUSY:
            bar = replace(bar, note=", ".join(filter(None, (bar.note, f"disturbed: others took {self.others:.0%}"))))
        self.bars.append(bar)
        self.line(f"    {bar.wanted:<58} {bar.measured:<28} {bar.verdict}")

    def finish(self) -> None:
        """Prints the table, or leaves it to who collects the bars of several programs."""
        if collected := os.environ.get(COLLECTED):
            with Path(collected).open("a") as file:
                file.writelines(json.dumps(asdict(bar)) + "\n" for bar in self.bars)
        elif self.bars:
            self.line(f"\n{self.title}: {bars_table(self.bars)}")


def bars_table(bars: Sequence[Bar]) -> str:
    """How many are met, and a line for each."""
    rows = [HEADINGS, *(bar.cells for bar in bars)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))} |" for row in rows]
    lines.insert(1, f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return f"{sum(bar.met for bar in bars)} of {len(bars)} bars met\n\n" + "\n".join(lines)


def read_bars(lines: Iterable[str]) -> list[Bar]:
    """Those that programs have added to the file of :data:`COLLECTED`; what is measured again replaces what was."""
    found: dict[tuple[str, str], Bar] = {}
    for values in map(json.loads, lines):
        cost = values.pop("cost")
        bar = Bar(**values, cost=Cost(**cost) if cost else None)
        found[bar.work, bar.what] = bar
    return list(found.values())


def processor_seconds() -> tuple[float, float, float]:
    """Since some time: of all processors together, in work; of this process and those it has waited for; and passed."""
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    stat = Path("/proc/stat")
    if not stat.is_file():
        return own, own, time.perf_counter()
    user, nice, system, _idle, _waiting, interrupts, soft_interrupts, stolen = map(
        int, stat.read_text().split(maxsplit=9)[1:9]
    )
    work = user + nice + system + interrupts + soft_interrupts + stolen
    return work / os.sysconf("SC_CLK_TCK"), own, time.perf_counter()


def share_of_others(begin: tuple[float, float, float], end: tuple[float, float, float]) -> float:
    """What other processes took of all processors' time between the two."""
    work, own, passed = (after - before for before, after in zip(begin, end, strict=True))
    return (work - own) / (passed * (os.cpu_count() or 1))
