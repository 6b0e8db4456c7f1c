"""Tables: by rich on a terminal, aligned with spaces everywhere else."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from compressed_format.cli.messages import printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

__all__ = ["is_terminal", "print_rendered", "print_table", "terminal_console"]

_ANY_WIDTH = 1000  # columns: more than any table has


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    return stream is not None and bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def terminal_console(stream: Any = None) -> Console:
    """Rich's view of a stream, stdout if none is given; ``NO_COLOR`` is honoured, and what is no terminal is plain."""
    from rich.console import Console

    stream = stream or sys.stdout
    # Told and not asked: variables such as FORCE_COLOR would put colours into a pipe.
    return Console(file=stream, force_terminal=is_terminal(stream), highlight=False, soft_wrap=False)


def print_rendered(renderable: RenderableType) -> None:
    """Print what rich has laid out: to the width of a terminal, or as wide as it is, and plain, anywhere else."""
    if is_terminal(sys.stdout):
        terminal_console().print(renderable)
        return
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, force_terminal=False, color_system=None, highlight=False, width=_ANY_WIDTH).print(renderable)
    click.echo("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows of text under the names of their columns; those named in ``right`` are aligned to the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if is_terminal(sys.stdout):
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            # Names come out of files, and must not be read as markup.
            table.add_row(*(Text(cell) for cell in row))
        terminal_console().print(table)
        return
    widths = [max(len(row[index]) for row in (columns, *rows)) for index in range(len(columns))]
    for row in (columns, *rows):
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, row, widths, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
