"""``diff``: in what two checkpoints differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressed_format.cli.exit_codes import ExitCode
from compressed_format.cli.messages import printable
from compressed_format.cli.options import debug_option, existing_path, json_option, print_json
from compressed_format.cli.progress import progress_on
from compressed_format.cli.tables import print_table

if TYPE_CHECKING:
    from compressed_format.comparison import Difference, ValueDifference

__all__ = ["diff_command"]

_LONGEST_VALUE = 60


@click.command(
    "diff",
    epilog="""\b
Examples:
  compressed-format diff my-model my-copy
  compressed-format diff --dequantize my-model my-model-w4a16
  compressed-format diff --json my-model-w4a16 my-model-fp8
\b
The exit code is 0 if A and B are the same, 1 if they differ, and 2 if one cannot be read.""",
)
@click.argument("first", metavar="A", type=existing_path)
@click.argument("second", metavar="B", type=existing_path)
@click.option(
    "--dequantize",
    is_flag=True,
    help="Compare dense weights: those of compressed modules are dequantized, and how they are stored does not count.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    help="How many tensors of a kind to list; 0 lists all. --json always does.",
)
@json_option
@debug_option
def diff_command(first: Path, second: Path, dequantize: bool, limit: int, as_json: bool) -> ExitCode:
    """Compare the checkpoints A and B: tensors, values, metadata and configs.

    Values differ by the largest |a-b|, and by the root mean square of a-b over that of a (rel. RMS), which
    is also told as a signal-to-noise ratio (SNR). Pairs with a NaN or infinity are counted apart.
    """
    from compressed_format.comparison import diff_checkpoints

    with nullcontext() if as_json else progress_on("comparing", patient=True) as progress:
        found = diff_checkpoints(first, second, dequantize=dequantize, progress=progress)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found, limit or None)
    return ExitCode.DONE if found.same else ExitCode.FOUND


def _print(found: Difference, limit: int | None) -> None:
    for side, alone in ((found.first, found.only_in_first), (found.second, found.only_in_second)):
        stored = [(name, str(how)) for name, how in alone.items()]
        _print_block(f"only in {side}: {len(alone)}", ("tensor", "stored as"), stored, limit)
    # Of weights that were dequantized, formats differ because that is what is compared.
    reshaped = [
        (tensor.name, str(tensor.first), str(tensor.second))
        for tensor in found.tensors
        if (tensor.first.dtype, tensor.first.shape) != (tensor.second.dtype, tensor.second.shape)
    ]
    _print_block(f"other dtype or shape: {len(reshaped)}", ("tensor", "in A", "in B"), reshaped, limit)
    valued = [_value_row(name, values) for name, values in _worst_first(found)]
    columns: tuple[str, ...] = ("tensor", "differing", "not finite", "max |a-b|", "rel. RMS", "SNR in dB")
    if not any(row[2] for row in valued):
        columns, valued = _without(columns, 2), [_without(row, 2) for row in valued]
    _print_block(f"other values: {len(valued)}", columns, valued, limit, right=columns[1:])
    for title, keys in (("metadata", found.metadata), ("config", found.config)):
        sides = [(key.place, _shown(key.first), _shown(key.second)) for key in keys]
        _print_block(f"{title}: {len(keys)}", ("place", "in A", "in B"), sides, limit)
    shared = f", {found.shared_tensors} of them the same bytes of the same file" if found.shared_tensors else ""
    click.echo(f"the same: {found.same_tensors} {'weights and other ' * found.dequantized}tensors{shared}")


def _worst_first(found: Difference) -> list[tuple[str, ValueDifference]]:
    """What has other values: first where nothing can be measured, then by falling relative error."""
    differing = [
        (each.name, each.values) for each in found.tensors if each.values is not None and each.values.differing
    ]
    return sorted(differing, key=lambda pair: -math.inf if pair[1].relative_rms is None else -pair[1].relative_rms)


def _print_block(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    limit: int | None,
    right: Sequence[str] = (),
) -> None:
    if not rows:
        return
    click.echo(printable(title))
    print_table(columns, rows[:limit], right=right)
    if limit is not None and len(rows) > limit:
        click.echo(f"… and {len(rows) - limit} more (--limit 0 lists all)")
    click.echo()


def _value_row(name: str, values: ValueDifference) -> tuple[str, ...]:
    return (
        name,
        f"{values.differing} of {values.count}{' words' if values.unit == 'word' else ''}",
        f"{values.unpaired}" if values.unpaired else "",
        "" if values.max_abs is None else f"{values.max_abs:.4g}",
        "" if values.relative_rms is None else f"{values.relative_rms:.3g}",
        "" if values.snr_db is None else f"{values.snr_db:.1f}",
    )


def _without(cells: tuple[str, ...], index: int) -> tuple[str, ...]:
    return cells[:index] + cells[index + 1 :]


def _shown(value: Any) -> str:
    import json

    from compressed_format.comparison import ABSENT

    if value is ABSENT:
        return "(none)"
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + "…"
