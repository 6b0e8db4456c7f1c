"""``inspect``: what is in a checkpoint, on the screen, as JSON or as a page."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from compressed_format.cli.messages import printable
from compressed_format.cli.options import debug_option, existing_path, json_option, print_json
from compressed_format.cli.progress import progress_on
from compressed_format.cli.tables import print_rendered

__all__ = ["inspect_command"]


@click.command(
    "inspect",
    epilog="""\b
Examples:
  compressed-format inspect my-model-w4a16
  compressed-format inspect my-model-w4a16 --reference my-model
  compressed-format inspect my-model-w4a16 --reference my-model --html report.html
  compressed-format inspect --json my-model-w4a16""",
)
@click.argument("path", type=existing_path)
@click.option(
    "--reference",
    metavar="DENSE",
    type=existing_path,
    help="The dense checkpoint that PATH was made of: says how far each layer is from it.",
)
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a page with plots to FILE, which needs no other file and no network.",
)
@json_option
@debug_option
def inspect_command(path: Path, reference: Path | None, html: Path | None, as_json: bool) -> None:
    """Say what is in the checkpoint PATH: schemes, sizes, bits per weight, kernels.

    Reads headers only, but for --reference, which reads all weights of both checkpoints once.
    """
    from compressed_format.inspection import inspect_checkpoint

    with nullcontext() if as_json else progress_on("comparing", patient=True, in_bytes=False) as progress:
        inspection = inspect_checkpoint(path, reference=reference, progress=progress)
    if html is not None:
        from compressed_format.inspection.report import write_report

        write_report(inspection, html)
    if as_json:
        print_json(inspection.to_dict())
        return
    from compressed_format.inspection.table import render_table

    print_rendered(render_table(inspection))
    if html is not None:
        click.echo(f"{printable(str(html))}: written")
