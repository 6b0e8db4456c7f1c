"""How far a stored weight is from the dense one, in slabs of rows: neither is ever in memory whole."""

from __future__ import annotations

import math

import torch

from compressed_format.inspection.inspection import LayerError, decibels
from compressed_format.reading import StoredModule

__all__ = ["SLAB_VALUES", "error_against"]

SLAB_VALUES = 2**17
"""How many values a slab has, as long as a row and what cannot be cut allow: 1 MB in float64, which the cache holds."""


def error_against(stored: StoredModule, dense: StoredModule) -> LayerError:
    """The error of a compressed module's weight ``[O, I]``, as the model computes with it, against the dense one.

    Differences and squares are in float64: they are exact, or as good as that, for values of all dtypes that weights
    have, and sums over billions of squares neither overflow nor lose what is small. A weight with values that are not
    finite has a NaN for its error.
    """
    layout = stored.layout
    rows, columns = layout.shape
    step = layout.row_step
    slab = max(SLAB_VALUES // max(columns, 1) // step, 1) * step
    signal = noise = largest = 0.0
    worst_row, worst_ratio = 0, math.inf
    for first in range(0, rows, slab):
        part = (first, min(first + slab, rows))
        original = dense.dense(rows=part).to(torch.float64)
        difference = stored.dense(rows=part).to(torch.float64) - original
        if difference.numel() == 0:
            continue
        peak = difference.abs().max().item()
        largest = peak if math.isnan(peak) else max(largest, peak)
        signals, noises = original.square().sum(dim=1), difference.square().sum(dim=1)
        signal, noise = signal + signals.sum().item(), noise + noises.sum().item()
        row, ratio = _worst_row(signals, noises)
        if _is_worse(ratio, worst_ratio):
            worst_row, worst_ratio = first + row, ratio
    return LayerError(signal, noise, worst_row, worst_ratio, largest)


def _worst_row(signals: torch.Tensor, noises: torch.Tensor) -> tuple[int, float]:
    """The row with the lowest ratio, and the ratio in dB. 0 / 0 is a row of zeros that stays one."""
    ratios = torch.where(noises == 0, math.inf, signals / noises)
    ratios = torch.where(ratios.isnan() | noises.isinf(), -1.0, ratios)  # worse than any: something is not finite
    row = int(ratios.argmin())
    return row, decibels(signals[row].item(), noises[row].item())


def _is_worse(ratio: float, than: float) -> bool:
    if math.isnan(than):
        return False
    return math.isnan(ratio) or ratio < than
