"""The plots of a report, as figures in plotly's JSON.

Colours are names behind ``@``, which the page puts the colours of light or dark in place of. All that comes out of
the checkpoint is escaped, because plotly reads some HTML in its texts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from compressed_format.dtypes import DTYPES
from compressed_format.inspection.inspection import Inspection
from compressed_format.inspection.layers import Layer, ModuleRow, Part
from compressed_format.inspection.names import printable
from compressed_format.inspection.quantities import in_bits, in_bytes, in_decibels

__all__ = ["MAX_SERIES", "bits_figure", "error_figure", "error_range", "series_of", "size_figure"]

Figure = dict[str, Any]

MAX_SERIES = 7
"""How many schemes have a colour of their own; more than that cannot be told apart."""
_TICKS = 14
_MOST_ALONE = 6
"""So many layers outside of stacks have room around them."""
_MANY = 100
"""So many layers are drawn with finer marks."""
_LABEL_LENGTH = 16


def text(name: str) -> str:
    """A name as plotly shows it literally. Of the entities of HTML it knows few, and none of quotation marks."""
    return html.escape(printable(name), quote=False)


def series_of(scheme: int) -> int:
    """Which colour a scheme has; the smallest share the last one where there are too many."""
    return min(scheme, MAX_SERIES)


def size_figure(inspection: Inspection, layers: Sequence[Layer]) -> Figure:
    """A bar for each layer: bytes by scheme, what is not compressed, and what is saved against the dense model."""
    positions, axis, notes = _positions(layers)
    widths = _widths(layers)
    series: dict[int, list[int]] = {}
    for place, layer in enumerate(layers):
        for scheme, nbytes in layer.nbytes.items():
            series.setdefault(series_of(scheme), [0] * len(layers))[place] += nbytes
    traces = [
        _bars(_series_name(inspection, number), positions, widths, series[number], f"@series-{number}")
        for number in sorted(series)
    ]
    traces.append(_bars("not compressed", positions, widths, [layer.other_nbytes for layer in layers], "@other"))
    dense = [_dense_nbytes(inspection, layer) for layer in layers]
    saved = [max(whole - layer.total_nbytes, 0) for whole, layer in zip(dense, layers, strict=True)]
    traces.append(_bars(f"saved against {inspection.dtype}", positions, widths, saved, "@saved"))
    tops = [max(whole, layer.total_nbytes) for whole, layer in zip(dense, layers, strict=True)]
    hovers = [_size_hover(inspection, layer, whole) for layer, whole in zip(layers, dense, strict=True)]
    traces.append(_hover_targets(positions, tops, hovers))
    y = {**_AXIS, "rangemode": "tozero", "tickformat": "~s", "ticksuffix": "B", "fixedrange": True}
    layout = {**_layout_below(notes), "barmode": "stack", "xaxis": axis, "yaxis": y, "annotations": notes}
    return {"data": [trace for trace in traces if trace is not None], "layout": layout}


def bits_figure(inspection: Inspection, layers: Sequence[Layer]) -> Figure:
    """A dot for each scheme in each layer at its bits per weight, and the layer's own as a line where they differ."""
    layers = [layer for layer in layers if layer.nbytes]
    positions, axis, notes = _positions(layers)
    dots: dict[int, tuple[list[float], list[float]]] = {}
    for position, layer in zip(positions, layers, strict=True):
        for scheme, nbytes in layer.nbytes.items():
            if layer.parameters[scheme]:
                xs, ys = dots.setdefault(series_of(scheme), ([], []))
                xs.append(position)
                ys.append(round(8 * nbytes / layer.parameters[scheme], 4))
    traces: list[Figure] = []
    averages = [_number(layer.bits_per_weight) for layer in layers]
    if any(len(layer.nbytes) > 1 for layer in layers):
        line = {"color": "@text-2", "width": 1.5, "shape": "hvh"}
        trace = {"type": "scatter", "mode": "lines", "name": "whole layer", "x": positions, "y": averages}
        traces.append({**trace, "line": line, "hoverinfo": "skip"})
    for number in sorted(dots):
        xs, ys = dots[number]
        marker = {"color": f"@series-{number}", "size": 7 if len(layers) <= _MANY else 4}
        trace = {"type": "scatter", "mode": "markers", "name": _series_name(inspection, number), "x": xs, "y": ys}
        traces.append({**trace, "marker": marker, "hoverinfo": "skip"})
    hovers = [_bits_hover(inspection, layer) for layer in layers]
    traces.append(_hover_targets(positions, averages, hovers))
    bits = DTYPES[inspection.dtype].bits
    highest = max([bits, *(value for _, ys in dots.values() for value in ys)])
    y = {**_AXIS, "range": [0, highest * 1.08], "fixedrange": True, "dtick": 4 if highest > 8 else 1}
    dense = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": bits, "y1": bits, "layer": "below"}
    note = {"text": f"dense, {inspection.dtype}", "xref": "paper", "x": 1, "xanchor": "right", "y": bits}
    layout = {
        **_layout_below(notes),
        "xaxis": axis,
        "yaxis": y,
        "shapes": [{**dense, "line": {"color": "@text-2", "width": 1, "dash": "dot"}}],
        "annotations": [
            *notes,
            {**note, "yanchor": "top", "showarrow": False, "font": {"color": "@text-2", "size": 12}},
        ],
    }
    return {"data": traces, "layout": layout}


def error_range(parts: Sequence[Part]) -> tuple[float, float] | None:
    """The dB that the plots of all parts span, so that they compare; None where no ratio is finite."""
    errors = [row.error for part in parts for _, row in part.rows if row.error is not None]
    ratios = [ratio for error in errors for ratio in (error.snr, error.worst_row_snr) if math.isfinite(ratio)]
    if not ratios:
        return None
    margin = max((max(ratios) - min(ratios)) * 0.08, 0.5)
    return min(ratios) - margin, max(ratios) + margin


def error_figure(part: Part, span: tuple[float, float]) -> Figure:
    """The signal-to-noise ratio of one part in each layer, and that of its worst output channel."""
    members = [(index, row) for index, row in part.rows if row.error is not None]
    positions = [index for index, _ in members]
    errors = [row.error for _, row in members if row.error is not None]
    lines = "lines+markers" if part.stack is not None and len(members) <= _MANY else "markers"
    traces: list[Figure] = []
    for name, values, colour, symbol in (
        ("whole weight", [error.snr for error in errors], "@series-0", "circle"),
        ("worst channel", [error.worst_row_snr for error in errors], "@series-1", "diamond"),
    ):
        trace = {"type": "scatter", "mode": lines, "name": name, "x": positions, "y": [_number(v) for v in values]}
        marker = {"color": colour, "size": 6 if len(members) <= _MANY else 3, "symbol": symbol}
        traces.append({**trace, "line": {"color": colour, "width": 1}, "marker": marker, "hoverinfo": "skip"})
    middles = [error.snr if math.isfinite(error.snr) else span[1] for error in errors]
    traces.append(_hover_targets(positions, middles, [_error_hover(row) for _, row in members]))
    x: Figure = {**_AXIS, "showgrid": False, "fixedrange": True, "nticks": 6, "tickformat": "d"}
    if part.stack is None:
        x |= {"tickvals": positions, "ticktext": [_short(row.name) for _, row in members]}
        if len(members) > _TICKS // 2:
            x |= {"showticklabels": False}
    if positions:
        margin = max((positions[-1] - positions[0]) * 0.04, 0.5)
        x["range"] = [positions[0] - margin, positions[-1] + margin]
    y = {**_AXIS, "range": list(span), "fixedrange": True, "nticks": 5}
    return {"data": traces, "layout": {**_LAYOUT, "showlegend": False, "xaxis": x, "yaxis": y}}


_AXIS: Figure = {
    "gridcolor": "@grid",
    "linecolor": "@axis",
    "tickcolor": "@axis",
    "zeroline": False,
    "automargin": True,
    "ticklabeloverflow": "allow",
    "tickfont": {"color": "@text-2", "size": 12},
}
_LAYOUT: Figure = {
    "autosize": True,
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "paper_bgcolor": "@clear",
    "plot_bgcolor": "@clear",
    "font": {"color": "@text", "size": 13},
    "hovermode": "x",
    "dragmode": False,
    "hoverlabel": {
        "bgcolor": "@surface",
        "bordercolor": "@axis",
        "font": {"color": "@text", "size": 13},
        "namelength": 0,
    },
    "showlegend": False,
}


def _layout_below(notes: Sequence[Figure]) -> Figure:
    """The layout with room for ``notes`` below the axis."""
    return {**_LAYOUT, "margin": {**_LAYOUT["margin"], "b": 48}} if notes else _LAYOUT


def _widths(layers: Sequence[Layer]) -> list[float]:
    """How wide the bars are, in layers: what has room around it can still be seen beside hundreds of layers."""
    # Gaps between hundreds of bars would be thinner than a pixel, here and not there.
    usual = 0.85 if len(layers) <= _MANY else 1.0
    alone = max(usual, len(layers) * 0.015) if sum(_stack(layer) is None for layer in layers) <= _MOST_ALONE else usual
    return [usual if _stack(layer) is not None else alone for layer in layers]


def _bars(
    name: str, positions: Sequence[float], widths: Sequence[float], values: Sequence[int], colour: str
) -> Figure | None:
    """One colour of the bars; None where there is nothing of it."""
    if not any(values):
        return None
    heights = [value or None for value in values]
    trace: Figure = {"type": "bar", "name": name, "x": list(positions), "y": heights, "width": list(widths)}
    return {**trace, "marker": {"color": colour, "line": {"width": 0}}, "hoverinfo": "skip"}


def _hover_targets(positions: Sequence[float], heights: Sequence[float | None], hovers: Sequence[str]) -> Figure:
    """What shows the text of the nearest layer, wherever in the plot one points."""
    trace: Figure = {"type": "scatter", "mode": "markers", "x": list(positions), "y": list(heights), "text": hovers}
    # Its own text alone: positions on the x axis mean nothing to anyone.
    return {**trace, "marker": {"color": "@clear", "size": 1}, "hoverinfo": "text"}


def _positions(layers: Sequence[Layer]) -> tuple[list[float], Figure, list[Figure]]:
    """Where on the x axis each layer is, the axis, and the names of the stacks below it, where there are several.

    Stacks are apart, and have ticks at round numbers. So is what is in no stack, so that its name has room.
    """
    alone = sum(_stack(layer) is None for layer in layers)
    room = 0.0 if alone > _MOST_ALONE else max(len(layers) * 0.06, 0.4)
    positions: list[float] = []
    ticks: dict[float, str] = {}
    spans: dict[str, list[float]] = {}
    step = _tick_step(len(layers))
    for index, layer in enumerate(layers):
        stack = _stack(layer)
        if not positions:
            position = 0.0
        else:
            before = _stack(layers[index - 1])
            position = positions[-1] + 1 + (room if stack is None or stack != before else 0)
        positions.append(position)
        if stack is not None and layer.name is not None:
            spans.setdefault(stack, []).append(position)
            if (layer.name.index or 0) % step == 0:
                ticks[position] = str(layer.name.index)
        elif alone <= _MOST_ALONE or index % step == 0:
            ticks[position] = "rest" if layer.name is None else _short(layer.name.stack)
    axis = {**_AXIS, "showgrid": False, "fixedrange": True, "tickvals": list(ticks), "ticktext": list(ticks.values())}
    if positions:
        margin = max(0.7, len(layers) * 0.02)
        axis["range"] = [-margin, positions[-1] + margin]
    notes: list[Figure] = []
    if len(spans) > 1:
        axis |= {"tickangle": 0, "automargin": False}
        style = {"yref": "paper", "y": 0, "yanchor": "top", "yshift": -20, "showarrow": False}
        for stack, places in spans.items():
            middle = (places[0] + places[-1]) / 2
            notes.append({"text": _short(stack), "x": middle, "font": {"color": "@text-2", "size": 12}, **style})
    return positions, axis, notes


def _stack(layer: Layer) -> str | None:
    return layer.name.stack if layer.name is not None and layer.name.index is not None else None


def _tick_step(count: int) -> int:
    steps = (scale * factor for scale in (1, 10, 100, 1000, 10000) for factor in (1, 2, 5))
    return next((step for step in steps if count / step <= _TICKS), count)


def _short(name: str) -> str:
    last = printable(name).rpartition(".")[2]
    return text(last if len(last) <= _LABEL_LENGTH else f"{last[: _LABEL_LENGTH - 1]}…")


def _series_name(inspection: Inspection, number: int) -> str:
    return "other schemes" if number == MAX_SERIES else text(inspection.schemes[number].title)


def _dense_nbytes(inspection: Inspection, layer: Layer) -> int:
    return sum(layer.parameters.values()) * DTYPES[inspection.dtype].bits // 8 + layer.other_nbytes


def _heading(layer: Layer) -> str:
    if layer.name is not None:
        return f"<b>{text(layer.name.layer)}</b>"
    shown = [text(name) for name in layer.members[:6]]
    more = [f"and {len(layer.members) - 6} more"] if len(layer.members) > 6 else []
    return "<br>".join(["<b>rest</b>", *shown, *more])


def _size_hover(inspection: Inspection, layer: Layer, dense: int) -> str:
    lines = [f"{in_bytes(n)} {text(inspection.schemes[scheme].title)}" for scheme, n in sorted(layer.nbytes.items())]
    if layer.other_nbytes:
        lines.append(f"{in_bytes(layer.other_nbytes)} not compressed")
    return "<br>".join([_heading(layer), *lines, f"{in_bytes(layer.total_nbytes)} of {in_bytes(dense)} dense"])


def _bits_hover(inspection: Inspection, layer: Layer) -> str:
    lines = [
        f"{in_bits(8 * layer.nbytes[scheme] / layer.parameters[scheme])} {text(inspection.schemes[scheme].title)}"
        for scheme in sorted(layer.nbytes)
        if layer.parameters[scheme]
    ]
    whole = [f"{in_bits(layer.bits_per_weight)} together"] if len(lines) > 1 else []
    return "<br>".join([_heading(layer), *lines, *whole])


def _error_hover(row: ModuleRow) -> str:
    assert row.error is not None
    worst = f"{in_decibels(row.error.worst_row_snr)} in channel {row.error.worst_row}"
    if row.count > 1 and row.worst is not None:
        worst += f" of {text(row.worst)}"
    return f"<b>{text(row.name)}</b><br>{in_decibels(row.error.snr)}<br>{worst}"


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity; plotly leaves None out."""
    return round(value, 4) if math.isfinite(value) else None
