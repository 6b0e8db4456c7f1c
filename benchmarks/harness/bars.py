"""Bars: what was to be reached, what was measured, and how far apart they are. A missed one is no error."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Bar", "Report"]


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


BUSY = 0.05
"""Of the processors' time: if other processes take more than this, the figures are theirs, too."""


@dataclass
class Report:
    """Prints what is measured as it comes, and at the end all bars in one table, which Markdown can show."""

    title: str
    bars: list[Bar] = field(default_factory=list)
    begin: tuple[float, float, float] = field(default_factory=lambda: processor_seconds())

    def line(self, text: str) -> None:
        print(text, flush=True)

    def add(self, bar: Bar) -> None:
        self.bars.append(bar)
        note = f"  ({bar.note})" if bar.note else ""
        self.line(f"    {bar.wanted:<58} {bar.value:8.2f} {bar.unit:<4} {bar.verdict}{note}")

    def finish(self) -> None:
        if not self.bars:
            return
        busy = share_of_others(self.begin, processor_seconds())
        if busy > BUSY:
            self.line(f"\nOther processes took {busy:.0%} of the processors' time: these figures are disturbed.")
        met = sum(bar.met for bar in self.bars)
        rows = [("work", "bar", "measured", "")]
        rows += [(bar.work, bar.wanted, f"{bar.value:.2f} {bar.unit}".strip(), bar.verdict) for bar in self.bars]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        self.line(f"\n{self.title}: {met} of {len(self.bars)} bars met\n")
        for number, row in enumerate(rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.line(f"| {' | '.join(cells)} |")
            if number == 0:
                self.line(f"|{'|'.join('-' * (width + 2) for width in widths)}|")


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
