"""Collects everything that is wrong with one config, and says it: places, values, suggestions."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Final

from compressed_format.errors import ConfigError, Problem

__all__ = ["INVALID", "Invalid", "Report", "child", "nearest", "options", "show"]

_PLAIN_KEY = re.compile(r"[A-Za-z_$][\w$-]*", re.ASCII)
_VERSION = re.compile(r"[\w.+-]{1,40}", re.ASCII)
_LONGEST_SHOWN = 60
_MOST_PROBLEMS = 1000
"""Listed of one config: a file in which everything is wrong must not fill the memory with words about it."""


class Invalid(Enum):
    """What a reader returns in place of a value that it has reported."""

    INVALID = "invalid"


INVALID: Final = Invalid.INVALID


class Report:
    """The problems found while one config is read.

    ``lenient`` is the mode for checkpoints: values are coerced as their writers did, and what is merely meaningless
    (:meth:`doubt`) becomes a warning. Authors get an error for both.
    """

    def __init__(self, *, lenient: bool = False, allow_unknown: bool = False, version: str | None = None) -> None:
        self.lenient = lenient
        self.allow_unknown = allow_unknown
        self.version = version
        self.errors: list[Problem] = []
        self.warnings: list[Problem] = []
        self.unknown: dict[str, Any] = {}
        self.pattern_size = 0

    def error(self, place: str, message: str) -> None:
        """Something that cannot be read or cannot mean anything."""
        self.errors.append(Problem(place, message))
        if len(self.errors) == _MOST_PROBLEMS:
            raise ConfigError(f"the config has {_MOST_PROBLEMS} problems or more:", self.errors)

    def warn(self, place: str, message: str) -> None:
        """Something that a careful reader of a checkpoint would want to know."""
        if len(self.warnings) < _MOST_PROBLEMS:
            self.warnings.append(Problem(place, message))
        elif len(self.warnings) == _MOST_PROBLEMS:
            self.warnings.append(Problem(place, f"and there is more to warn of than {_MOST_PROBLEMS} times"))

    def doubt(self, place: str, message: str) -> None:
        """Something that means nothing but does not keep a checkpoint from being decoded."""
        (self.warn if self.lenient else self.error)(place, message)

    def unknown_key(self, place: str, key: str, value: Any, known: Iterable[str]) -> None:
        """A key that the format does not have: an error, except where a checkpoint may carry it."""
        if not self.lenient:
            guess = nearest(key, known)
            hint = f"did you mean {guess}?" if guess else f"the keys are {', '.join(known)}"
            self.error(place, f"unknown key, {hint}")
            return
        writer = f"written by version {_plain(self.version)}" if self.version else "in a file that names no version"
        if value is None or (isinstance(value, (Mapping, list, tuple, str)) and len(value) == 0):
            self.unknown[place] = value
            self.warn(place, f"unknown key, {writer}; it is empty and changes nothing")
        elif self.allow_unknown:
            self.warn(place, f"unknown key with the value {show(value)}, {writer}; it is ignored")
        else:
            self.error(
                place,
                f"unknown key with the value {show(value)}, {writer}; a newer release of this library may know it, "
                "and allow_unknown=True reads the file without it",
            )

    def finish(self, source: str = "") -> None:
        """Raise what has been collected, if anything; ``source`` names the file in the headline."""
        if not self.errors:
            return
        count = len(self.errors)
        headline = f"{source}: " if source else ""
        if count > 1:
            headline += f"{count} problems in the config:"
        elif source:
            headline += "1 problem in the config:"
        raise ConfigError(headline, self.errors)


def _plain(version: str) -> str:
    """A version as it is, unless it is none: whatever else stands there, quoted and shortened."""
    return version if _VERSION.fullmatch(version) else show(version)


def child(place: str, key: object) -> str:
    """The JSON path of a member: ``a.b``, ``a[3]``, or ``a["odd key"]``."""
    if isinstance(key, int):
        return f"{place}[{key}]"
    if isinstance(key, str) and _PLAIN_KEY.fullmatch(key):
        return f"{place}.{key}" if place else key
    return f"{place}[{show(key)}]"


def nearest(word: object, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known word that ``word`` is probably a misspelling of, if there is one."""
    if not isinstance(word, str) or not word or len(word) > 200:
        return None
    spellings = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(word.lower(), spellings, n=1, cutoff=cutoff)
    return spellings[found[0]] if found else None


def options(value: object, allowed: Iterable[str]) -> str:
    """``must be one of …, not "x"``, with the nearest one where there is one."""
    words = list(allowed)
    guess = nearest(value, words)
    hint = f"; did you mean {guess}?" if guess else ""
    return f"must be one of {', '.join(words)}, not {show(value)}{hint}"


def show(value: object) -> str:
    """A value as it would stand in JSON, in a few words if it is long; never fails, whatever the object."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        text = str.__str__(value)
        return json.dumps(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…", ensure_ascii=True)
    if isinstance(value, int):
        # Python refuses to print integers of many thousand digits.
        return int.__repr__(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return json.dumps(float(value))
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        if len(value) <= 4 and all(item is None or isinstance(item, (bool, int, float, str)) for item in value):
            return f"[{', '.join(map(show, value))}]"
        return "a list"
    return f"a Python object of type {type(value).__name__}"
