"""``compressed-format``: the table of commands, and how every one of them ends."""

from __future__ import annotations

import difflib
import importlib
import io
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
from frozendict import frozendict

import compressed_format
from compressed_format.cli.exit_codes import EXIT_CODES
from compressed_format.cli.messages import end_by, show_warnings
from compressed_format.cli.options import debug_is_on, debug_option, forget_debug

__all__ = ["COMMANDS", "PROGRAM", "command_line", "main"]

PROGRAM = "compressed-format"

# Name -> module that defines it, and what it does. A closed table, so that --help imports none of them.
COMMANDS = frozendict(
    {
        "compress": ("jobs", "Compress a checkpoint of any size into another one."),
        "decompress": ("jobs", "Write a compressed checkpoint as a dense one."),
        "check": ("checks", "Find everything that is wrong with a config or a checkpoint."),
        "inspect": ("inspections", "Say what is in a checkpoint, how large it is and how it would run."),
        "diff": ("differences", "Compare two checkpoints, as they are stored or dequantized."),
        "schema": ("configs", "Print the JSON Schema of configs."),
        "presets": ("configs", "List the schemes that have a name."),
        "completion": ("completion", "Print the script that completes this command line in a shell."),
    }
)


class _Commands(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"compressed_format.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            guess = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {guess[0]}?" if guess else f"the commands are {', '.join(COMMANDS)}"
            ctx.fail(f"no such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), meaning) for code, meaning in EXIT_CODES])
        super().format_epilog(ctx, formatter)


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(f"{PROGRAM} {compressed_format.__version__}")
        ctx.exit()


@click.group(
    cls=_Commands,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  compressed-format presets
  compressed-format check w4a16.json
  compressed-format compress my-model my-model-w4a16 --config w4a16.json
  compressed-format inspect my-model-w4a16
\b
compressed-format completion --help says how a shell completes all this.""",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Print the version and exit.",
)
@debug_option
def command_line() -> None:
    """Compressed model checkpoints: write, check, look into and compare them.

    Checkpoints may be of any size: they are read and written in pieces, and no code of a model is run.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command, with the arguments of the process unless told otherwise, and end the process with its code."""
    show_warnings()
    forget_debug()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal's encoding lacks is written out
            stream.reconfigure(errors="backslashreplace")
    options: dict[str, Any] = {"args": arguments, "prog_name": PROGRAM, "standalone_mode": False}
    stdout = sys.stdout
    try:
        result = command_line.main(**options)
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where it can still be told that it failed
    except SystemExit:
        if sys.stdout is not stdout:  # which click replaces where whoever read it is gone, before an exit of its own
            end_by(BrokenPipeError(), debug=False)
        raise
    except BaseException as error:
        end_by(error, debug=debug_is_on())
    sys.exit(result if isinstance(result, int) else 0)
