"""JSON text from files that may hold anything: what cannot be parsed says where, in this library's own exception."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressed_format.config.report import Report, child
from compressed_format.errors import CheckpointError, ConfigError, Problem

__all__ = ["parse_json", "read_bytes", "repeated_keys"]

_LARGEST_FILE = 64 * 1024 * 1024
_LONGEST_NUMBER = 400
_MOST_MEMORY = 80_000_000
"""Bytes that the values of a config may take, at most ten times of what the largest do that there are."""


class _Object(dict[str, Any]):
    """A JSON object that had a key twice; the later value counts, as in every parser."""

    repeated: tuple[str, ...] = ()


def read_bytes(path: Path) -> bytes:
    """The bytes of a config file; a missing, unreadable or absurdly large one is a ``CheckpointError``."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(problems=[Problem(str(path), f"cannot be read: {reason}")]) from error
    if len(content) > _LARGEST_FILE:
        raise CheckpointError(problems=[Problem(str(path), f"is larger than {_LARGEST_FILE} bytes: it is no config")])
    return content


def parse_json(content: bytes, source: str) -> Any:
    """The value of JSON text; what is wrong with it is a ``ConfigError`` that names file, line and column."""
    if len(content) * (2 if content.isascii() else 8) > _MOST_MEMORY:
        message = f"to read its {len(content)} bytes would take too much memory, more than {_MOST_MEMORY} bytes"
        raise _no_json(source, message)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, column = _position(content[: error.start])
        raise _no_json(f"{source}:{line}:{column}", f"byte 0x{content[error.start]:02x} is no UTF-8") from None
    if _memory(content) > _MOST_MEMORY:
        message = f"to read it would take too much memory, more than {_MOST_MEMORY} bytes"
        raise _no_json(source, f"{message}: it is too large or nested too deeply")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise _no_json(f"{source}:{error.lineno}:{error.colno}", error.msg) from None
    except _NumberTooLongError as error:
        raise _no_json(source, f"it holds a number of {error.args[0]} digits") from None
    except RecursionError:
        raise _no_json(source, "it is nested too deeply") from None


def repeated_keys(value: Any, place: str, report: Report) -> None:
    """Report every key that stands twice in one object anywhere in a parsed ``value``."""
    if not _holds_repeated(value):
        return
    waiting = [(place, value)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Mapping):
            for key in getattr(value, "repeated", ()):
                report.doubt(child(place, key), "stands here more than once; only the last one counts")
            waiting.extend((child(place, key), member) for key, member in value.items())
        elif isinstance(value, list):
            waiting.extend((child(place, index), member) for index, member in enumerate(value))


def _memory(content: bytes) -> int:
    """About how many bytes the values in JSON text take; seldom less. One wide character widens its whole text."""
    members, items = content.count(b":"), content.count(b",")
    return 160 * members + 48 * items + 64 * (content.count(b"[") + content.count(b"{"))


def _holds_repeated(value: Any) -> bool:
    """Whether any object in ``value`` had a key twice; without the places, which take most of the time."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if type(value) is _Object:
                return True
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
    return False


class _NumberTooLongError(ValueError):
    pass


def _integer(digits: str) -> int:
    # Converting takes time quadratic in the digits, and Python refuses from some thousand on.
    if len(digits) > _LONGEST_NUMBER:
        raise _NumberTooLongError(len(digits))
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    marked = _Object(members)
    marked.repeated = tuple(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
    return marked


def _position(before: bytes) -> tuple[int, int]:
    """Line and column, from 1, of what follows ``before``."""
    last_line = before.rpartition(b"\n")[2]
    return before.count(b"\n") + 1, len(last_line.decode("utf-8-sig", "replace")) + 1


def _no_json(place: str, message: str) -> ConfigError:
    return ConfigError(problems=[Problem(place, f"is no valid JSON: {message}")])
