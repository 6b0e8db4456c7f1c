"""Every exception this library raises on purpose.

::

    CompressedFormatError
    ├── ConfigError             (ValueError)       a config that cannot mean anything
    ├── TargetError             (ValueError)       targets that cannot be matched with a model
    ├── UnsupportedFormatError                     well formed, but nothing here can decode or run it
    ├── QuantizationError       (ValueError)       a weight that cannot be quantized as asked
    │   └── CalibrationError                       activation scales that cannot be found
    ├── FormatError             (ValueError)       tensors that contradict their format
    ├── CheckpointError                            files that cannot be read or written
    │   ├── CheckpointExistsError (FileExistsError)  the destination already holds something
    │   └── CheckpointLockedError                  another process is writing the destination
    └── OpArgumentError         (ValueError)       an op called with arguments it cannot take

    CompressedFormatWarning     (UserWarning)      the result is usable, but not what one might expect

An error lists everything that is wrong in ``problems``, so that one run is enough to find it all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "CheckpointExistsError",
    "CheckpointLockedError",
    "CompressedFormatError",
    "CompressedFormatWarning",
    "ConfigError",
    "FormatError",
    "OpArgumentError",
    "Problem",
    "QuantizationError",
    "TargetError",
    "UnsupportedFormatError",
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it is, and what to do about it.

    ``place`` is a JSON path, a module's or a tensor's name, or a file; ``message`` says what was found, what is
    allowed and the way out.
    """

    place: str
    message: str

    def __str__(self) -> str:
        return _printable(f"{self.place}: {self.message}" if self.place else self.message)


def _printable(text: str) -> str:
    """``text`` with halves of surrogate pairs spelled out, which files may hold and no stream can write."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")


class CompressedFormatError(Exception):
    """The root of all errors of this library.

    ``message`` is the headline; ``problems``, when given, are listed below it, one a line. A single problem without
    a headline reads as itself.
    """

    def __init__(self, message: str = "", problems: Iterable[Problem] = ()) -> None:
        self.message = message
        self.problems = tuple(problems)
        super().__init__(message, self.problems)

    def __str__(self) -> str:
        if not self.problems:
            return _printable(self.message)
        if len(self.problems) == 1 and not self.message:
            return str(self.problems[0])
        lines = [_printable(self.message)] if self.message else []
        return "\n  ".join(lines + [str(problem) for problem in self.problems])


class ConfigError(CompressedFormatError, ValueError):
    """A config that cannot mean anything; ``problems`` holds one entry for each mistake, with its JSON path."""


class TargetError(CompressedFormatError, ValueError):
    """Targets or ignore entries that cannot be matched with the modules of a model."""


class UnsupportedFormatError(CompressedFormatError):
    """A well-formed request for something that this library cannot decode or run; names feature and module."""


class QuantizationError(CompressedFormatError, ValueError):
    """A weight that cannot be quantized as asked: NaN, infinity, a group size that does not divide, not 2:4."""


class CalibrationError(QuantizationError):
    """Static activation scales were asked for and cannot be found from what was given."""


class FormatError(CompressedFormatError, ValueError):
    """Tensors that contradict their format: missing, misshapen, mistyped, or holding values out of range."""


class CheckpointError(CompressedFormatError):
    """Files that cannot be read or written as a checkpoint."""


class CheckpointExistsError(CheckpointError, FileExistsError):
    """The destination already holds something, and overwriting was not asked for."""

    # FileExistsError's own __str__ and __init__ read errno and file names out of the arguments.
    __str__ = CompressedFormatError.__str__


class CheckpointLockedError(CheckpointError):
    """Another process holds the lock on the destination's partial folder."""


class OpArgumentError(CompressedFormatError, ValueError):
    """An op was called with a dtype, shape, device or value that it does not take; names the argument."""


class CompressedFormatWarning(UserWarning):
    """The result is usable, but a careful user would want to know this."""
