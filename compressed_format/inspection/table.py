"""An inspection as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from compressed_format.inspection.inspection import Inspection
from compressed_format.inspection.layers import ModuleRow, module_rows, tensor_rows
from compressed_format.inspection.names import printable
from compressed_format.inspection.quantities import in_bits, in_bytes, in_decibels, in_shape, in_words

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType
    from rich.table import Table
    from rich.text import Text

__all__ = ["render_table"]


def render_table(inspection: Inspection, *, largest: int = 10) -> RenderableType:
    """What :func:`rich.print` shows of an inspection: a summary, schemes, the ``largest`` modules, and the rest.

    With a reference, also the modules with the lowest signal-to-noise ratio. Names are shown as they are, without the
    markup or the control characters that a file may have put into them.
    """
    from rich.console import Group

    shown: list[RenderableType] = [_summary(inspection), _schemes(inspection)]
    rows = module_rows(inspection)
    if rows:
        shown.append(_largest(rows, largest, inspection))
    if inspection.error is not None:
        shown.append(_lowest(rows, largest))
    if inspection.tensors:
        shown.append(_tensors(inspection, largest))
    shown += [_problem(problem.place, problem.message) for problem in inspection.unmatched[:largest]]
    if len(inspection.unmatched) > largest:
        shown.append(_text(f"and {len(inspection.unmatched) - largest} more that are not compared"))
    shown += [_problem(problem.place, problem.message) for problem in inspection.warnings]
    return Group(*shown)


def _summary(inspection: Inspection) -> RenderableType:
    share = f", {100 * inspection.nbytes / inspection.dense_nbytes:.0f} %" if inspection.dense_nbytes else ""
    lines = [
        ("size", f"{in_bytes(inspection.nbytes)} of {in_bytes(inspection.dense_nbytes)} in {inspection.dtype}{share}"),
        ("bits per weight", f"{in_bits(inspection.bits_per_weight)} of compressed ones, with scales"),
        ("parameters", f"{in_words(inspection.parameters)}, {_compressed_share(inspection)} % compressed"),
    ]
    error = inspection.error
    if error is not None:
        worst = in_decibels(error.worst_row_snr)
        lines.append(("signal to noise", f"{in_decibels(error.snr)}, worst channel {worst}"))
    table = _table(inspection.path, headings=False)
    for label, value in lines:
        table.add_row(_text(label, "dim"), _text(value))
    return table


def _compressed_share(inspection: Inspection) -> str:
    share = inspection.compressed_parameters / inspection.parameters if inspection.parameters else 0
    return f"{100 * share:.0f}"


def _schemes(inspection: Inspection) -> Table:
    table = _table("Schemes", "Scheme", "Format", "Modules>", "Size>", "Bits>", "Kernel here")
    for scheme in inspection.schemes:
        kernels = ", ".join(f"{kernel.op}: {kernel.name}" for kernel in scheme.kernels)
        size, bits = in_bytes(scheme.nbytes), in_bits(scheme.bits_per_weight)
        table.add_row(*map(_text, (scheme.title, scheme.format, f"{scheme.modules:,}", size, bits, kernels)))
    rest = inspection.nbytes - inspection.compressed_nbytes
    table.add_row(*map(_text, ("not compressed", "as they are", "", in_bytes(rest), "", "")))
    return table


def _largest(rows: Sequence[ModuleRow], count: int, inspection: Inspection) -> Table:
    table = _table(f"Largest of {_count(len(rows), 'module')}", "Module", "Scheme", "Shape>", "Size>", "Bits>")
    for row in sorted(rows, key=lambda row: -row.nbytes)[:count]:
        scheme = inspection.schemes[row.scheme].title
        cells = (_name(row), scheme, in_shape(row.shape), in_bytes(row.nbytes), in_bits(row.bits_per_weight))
        table.add_row(*map(_text, cells))
    return table


def _lowest(rows: Sequence[ModuleRow], count: int) -> Table:
    compared = [(row.error, row) for row in rows if row.error is not None]
    # NaN, which compares with nothing, comes first.
    compared.sort(key=lambda pair: -math.inf if math.isnan(pair[0].snr) else pair[0].snr)
    title = f"Lowest signal to noise of {_count(len(compared), 'module')}"
    table = _table(title, "Module", "Bits>", "SNR>", "Worst channel>", "Largest error>")
    for error, row in compared[:count]:
        worst = f"{in_decibels(error.worst_row_snr)} in {error.worst_row}"
        cells = (_name(row), in_bits(row.bits_per_weight), in_decibels(error.snr), worst, f"{error.max_abs_error:.3g}")
        table.add_row(*map(_text, cells))
    return table


def _name(row: ModuleRow) -> str:
    return row.name if row.count == 1 else f"{row.name} ({row.count})"


def _tensors(inspection: Inspection, count: int) -> Table:
    table = _table("Not compressed", "Tensor", "Dtype", "Shape>", "Count>", "Size>")
    rows = tensor_rows(inspection)
    for row in rows[:count]:
        shape = in_shape(row.shapes[0]) + (f" and {len(row.shapes) - 1} more" if len(row.shapes) > 1 else "")
        table.add_row(*map(_text, (row.name, ", ".join(row.dtypes), shape, f"{row.count:,}", in_bytes(row.nbytes))))
    if len(rows) > count:
        rest = sum(row.nbytes for row in rows[count:])
        table.add_row(*map(_text, (f"{len(rows) - count} more", "", "", "", in_bytes(rest))))
    return table


def _table(title: str, *columns: str, headings: bool = True) -> Table:
    """A table whose columns are flush right where their heading ends in ``>``."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(
        title=_text(title, "bold"), title_justify="left", box=SIMPLE_HEAD, show_header=headings, pad_edge=False
    )
    for column in columns:
        right = column.endswith(">")
        # Numbers stay whole; what does not fit is broken, and nothing is cut short.
        justify: JustifyMethod = "right" if right else "left"
        table.add_column(column.rstrip(">"), justify=justify, no_wrap=right, overflow="fold", header_style="dim")
    return table


def _problem(place: str, message: str) -> Text:
    return _text(f"{place}: {message}" if place else message, "yellow")


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(printable(value), style=style)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
