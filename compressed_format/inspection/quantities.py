"""How quantities are written for people: sizes with decimal prefixes, as disks have them, and ratios in dB."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["in_bits", "in_bytes", "in_decibels", "in_shape", "in_words"]

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
_NUMBERS = ("", " thousand", " million", " billion", " trillion", " quadrillion", " quintillion")


def in_bytes(count: int) -> str:
    """``113 MB``: three significant digits and a decimal prefix."""
    value, power = _scaled(count)
    return f"{value} {_PREFIXES[power]}B"


def in_words(count: int) -> str:
    """``135 million``."""
    value, power = _scaled(count)
    return f"{value}{_NUMBERS[power]}"


def _scaled(count: int) -> tuple[str, int]:
    if count < 1000:
        return str(count), 0
    power = min(int(math.log10(count) // 3), len(_PREFIXES) - 1)
    value = count / 1000**power
    if round(value, 2 - int(math.log10(value))) >= 1000 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.{max(2 - int(math.log10(value)), 0)}f}", power


def in_bits(value: float) -> str:
    """``4.25``; a dash where there is none."""
    return f"{value:.2f}" if math.isfinite(value) else "-"


def in_decibels(value: float) -> str:
    """``19.4 dB``, ``exact`` for weights that are equal, ``not finite`` where NaN or infinity came up."""
    if math.isnan(value):
        return "not finite"
    if math.isinf(value):
        return "exact" if value > 0 else "no signal"
    return f"{value:.1f} dB"


def in_shape(shape: Sequence[int]) -> str:
    """``576 x 1536``; a dash for a single value."""
    return " x ".join(map(str, shape)) or "-"
