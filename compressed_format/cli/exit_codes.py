"""With which code a command ends. ``compressed-format --help`` has this table."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["EXIT_CODES", "ExitCode"]


class ExitCode(IntEnum):
    """The codes; :data:`EXIT_CODES` says what each means."""

    DONE = 0
    FOUND = 1
    WRONG = 2
    INTERRUPTED = 130
    """128 + SIGINT, as shells have it."""
    PIPE_CLOSED = 141
    """128 + SIGPIPE, likewise."""


EXIT_CODES = (
    (ExitCode.DONE, "done; check found nothing wrong; diff found no difference"),
    (ExitCode.FOUND, "check found something; diff found a difference; a job had begun and could not be finished"),
    (ExitCode.WRONG, "wrong usage, input that cannot be read, or a failure of any other kind"),
    (ExitCode.INTERRUPTED, "interrupted by Ctrl-C"),
    (ExitCode.PIPE_CLOSED, "whoever read the output has closed it"),
)
