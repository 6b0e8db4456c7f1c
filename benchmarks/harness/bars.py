"""Bars: what was to be reached, what was measured, and how far apart they are. A missed one is no error."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class Report:
    """Prints what is measured as it comes, and at the end all bars in one table, which Markdown can show."""

    title: str
    bars: list[Bar] = field(default_factory=list)

    def line(self, text: str) -> None:
        print(text, flush=True)

    def add(self, bar: Bar) -> None:
        self.bars.append(bar)
        note = f"  ({bar.note})" if bar.note else ""
        self.line(f"    {bar.wanted:<58} {bar.value:8.2f} {bar.unit:<4} {bar.verdict}{note}")

    def finish(self) -> None:
        if not self.bars:
            return
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
