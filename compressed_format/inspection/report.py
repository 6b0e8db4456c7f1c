"""An inspection as one HTML page that needs nothing else: no network, no server, no other file."""

from __future__ import annotations

import base64
import hashlib
import os
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from compressed_format.checkpoint import syscalls
from compressed_format.errors import CheckpointError, CompressedFormatError, Problem
from compressed_format.inspection.figures import (
    MAX_SERIES,
    bits_figure,
    error_figure,
    error_range,
    series_of,
    size_figure,
)
from compressed_format.inspection.inspection import Inspection
from compressed_format.inspection.layers import Part, layers_of, module_rows, parts_of, tensor_rows
from compressed_format.inspection.names import printable
from compressed_format.inspection.quantities import in_bits, in_bytes, in_decibels, in_shape, in_words

__all__ = ["MAX_PARTS", "render_report", "write_report"]

MAX_PARTS = 16
"""How many plots of errors there are at most; the parts with the most bytes have one."""
_WORST = 10


def write_report(inspection: Inspection, path: str | os.PathLike[str]) -> None:
    """Write the page to ``path``: whole, or not at all. A report that is there already is replaced.

    Needs the packages jinja2 and plotly. Raises :class:`CompressedFormatError` where they are missing, and
    :class:`CheckpointError` if the file cannot be written.
    """
    page = render_report(inspection).encode("utf-8")
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        if target.is_dir():
            raise CheckpointError(problems=[Problem(str(target), "is a folder; name a file, such as report.html")])
        descriptor = syscalls.create_file(partial)
        try:
            try:
                rest = memoryview(page)
                while rest:
                    rest = rest[syscalls.write(descriptor, rest) :]
                syscalls.sync(descriptor)
            finally:
                syscalls.close(descriptor)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        message = f"the report cannot be written: {error.strerror or error}"
        raise CheckpointError(problems=[Problem(str(target), message)]) from error


def render_report(inspection: Inspection) -> str:
    """The page as a string; see :func:`write_report`."""
    try:
        import jinja2
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        package = (error.name or "one of its packages").partition(".")[0]
        message = f"a report needs {package}, which is not installed: pip install 'compressed-format[report]'"
        raise CompressedFormatError(message) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        bytes=in_bytes, bits=in_bits, decibels=in_decibels, shape=in_shape, words=in_words, name=printable
    )
    plotly = get_plotlyjs()
    script = _asset("report.js")
    template = environment.from_string(_asset("report.html"))
    return template.render(
        **_content(inspection),
        style=_asset("report.css"),
        script=script,
        # Deflated, it is two fifths as long, base64 included. Its hash lets the page run it, and nothing else.
        plotly=base64.b64encode(zlib.compress(plotly.encode("utf-8"), 9)).decode("ascii"),
        script_hashes=[_hash(script), _hash(plotly)],
    )


def _asset(name: str) -> str:
    return (resources.files("compressed_format.inspection") / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _content(inspection: Inspection) -> dict[str, Any]:
    """What the template asks for."""
    rows, layers = module_rows(inspection), layers_of(inspection)
    parts, unplotted = _plotted(parts_of(rows))
    figures: dict[str, Any] = {}
    if layers:
        figures["size"] = size_figure(inspection, layers)
    if rows:
        figures["bits"] = bits_figure(inspection, layers)
    span = error_range(parts)
    plots = []
    if span is not None:
        for index, part in enumerate(parts):
            figures[f"error-{index}"] = error_figure(part, span)
            plots.append((f"error-{index}", part))
    compared = sorted(
        (row for row in rows if row.error is not None), key=lambda row: row.error.snr if row.error is not None else 0.0
    )
    return {
        "inspection": inspection,
        "title": Path(inspection.path).absolute().name or inspection.path,
        "figures": figures,
        "error_plots": plots,
        "unplotted": unplotted,
        "rows": rows,
        "any_experts": any(row.count > 1 for row in rows),
        "worst": compared[:_WORST],
        "tensors": tensor_rows(inspection),
        "layer_count": len(layers),
        "series_of": series_of,
        "schemes_share_colours": len(inspection.schemes) > MAX_SERIES,
    }


def _plotted(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """The parts with errors that have a plot, and those that are too many for one."""
    compared = [part for part in parts if any(row.error is not None for _, row in part.rows)]

    def nbytes(part: Part) -> int:
        return sum(row.nbytes for _, row in part.rows)

    largest = sorted(compared, key=nbytes, reverse=True)[:MAX_PARTS]
    return [part for part in compared if part in largest], [part for part in compared if part not in largest]
