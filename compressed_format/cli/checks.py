"""``check``: what is wrong with a config or a checkpoint, a line each."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from compressed_format.cli.messages import printable
from compressed_format.cli.options import (
    consumer_names,
    debug_option,
    existing_path,
    for_option,
    json_option,
    print_json,
)
from compressed_format.cli.tables import is_terminal

if TYPE_CHECKING:
    from compressed_format.checking import Finding, Report

__all__ = ["check_command"]

_STYLES = {"error": "red", "warning": "yellow", "note": "cyan"}


@click.command(
    "check",
    epilog="""\b
Examples:
  compressed-format check w4a16.json
  compressed-format check my-model-w4a16
  compressed-format check --quick --for vllm --for sglang my-model-w4a16
  compressed-format check --json my-model-w4a16
\b
The exit code is 0 if nothing is worse than a note, 1 if there are warnings or errors, and 2 if PATH
cannot be read at all. docs/findings.md lists the codes of findings.""",
)
@click.argument("path", type=existing_path)
@click.option("--quick", is_flag=True, help="Read headers only, and no values.")
@for_option("Apply the rules of this consumer too: will it load there, and if not, why. May be given several times.")
@json_option
@debug_option
def check_command(path: Path, quick: bool, consumers: tuple[str, ...], as_json: bool) -> int:
    """Find everything that is wrong with PATH: a hand-written config or a checkpoint."""
    from compressed_format.checking import check

    report = check(path, quick=quick, consumers=consumer_names(consumers))
    if as_json:
        print_json(report.to_dict())
    else:
        for finding in report.findings:
            click.echo(_line(finding))
        click.echo(f"{printable(str(path))}: {_summary(report)}")
    return report.exit_code


def _line(finding: Finding) -> str:
    text = printable(str(finding))
    severity = finding.severity.value
    if not is_terminal(sys.stdout) or not text.startswith(severity) or os.environ.get("NO_COLOR"):
        return text
    return click.style(severity, fg=_STYLES[severity], bold=True) + text.removeprefix(severity)


def _summary(report: Report) -> str:
    counts = {"error": len(report.errors), "warning": len(report.warnings), "note": len(report.notes)}
    found = [f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items() if count]
    if report.ok:
        return ", ".join(["nothing wrong", *found])
    return ", ".join(found)
