"""What goes to stderr: errors as their text, warnings in one line each."""

from __future__ import annotations

import sys
import traceback
import warnings
from typing import IO, NoReturn

import click

from compressed_format.cli.exit_codes import ExitCode
from compressed_format.errors import CompressedFormatError

__all__ = ["Failure", "end_by", "one_line", "printable", "show_warnings"]


class Failure(Exception):  # noqa: N818
    """Ends a command with a code and a message; ``__cause__`` is the error that ``--debug`` shows."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


def end_by(error: BaseException, *, debug: bool) -> NoReturn:
    """Print what went wrong, and end the process with the code that says so."""
    if isinstance(error, BrokenPipeError):
        # Python would flush stdout once more at its end, and complain.
        sys.stdout = None
        sys.exit(ExitCode.PIPE_CLOSED)
    if debug and not isinstance(error, click.ClickException):
        traceback.print_exception(error)
    message, code = _told(error)
    print("\n".join(printable(line) for line in message.split("\n")), file=sys.stderr)
    sys.exit(code)


def _told(error: BaseException) -> tuple[str, ExitCode]:
    if isinstance(error, Failure):
        return str(error), error.code
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx is not None else "compressed-format"
        return f"error: {one_line(error.format_message())} ({command} --help says more)", ExitCode.WRONG
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted", ExitCode.INTERRUPTED
    if isinstance(error, CompressedFormatError):
        return f"error: {error}", ExitCode.WRONG
    return f"error: {type(error).__name__}: {one_line(str(error))} (--debug shows where)", ExitCode.WRONG


def one_line(text: str) -> str:
    """The text with every run of white space, line ends too, as one space."""
    return " ".join(text.split())


def printable(text: str) -> str:
    """The text with what a terminal would obey instead of showing written out: names come from files of anyone."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def show_warnings() -> None:
    """From here on, a warning is one line on stderr."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: IO[str] | None = None,
        line: str | None = None,
    ) -> None:
        print(f"warning: {printable(one_line(str(message)))}", file=file or sys.stderr)

    warnings.showwarning = show
