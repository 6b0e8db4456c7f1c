"""The kinds of values a config holds: each reads one value, and says in JSON Schema which values it takes.

A kind stands in the annotation of a model's field. ``read`` returns the value as the model holds it, or reports what
is wrong and returns ``INVALID``. For authors it takes exactly what its ``schema`` describes; a lenient report also
lets pass what the writers of checkpoints have accepted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from frozendict import frozendict

from compressed_format.config.report import INVALID, Report, child, nearest, options, show
from compressed_format.config.words import Word
from compressed_format.dtypes import DTYPES

__all__ = [
    "Anything",
    "Boolean",
    "Choice",
    "DTypeName",
    "Integer",
    "Kind",
    "ListOf",
    "Nullable",
    "Number",
    "Text",
    "freeze",
    "thaw",
]

_DEEPEST = 64
_INTEGER = re.compile(r"\s*[+-]?\d{1,19}\s*")
_BOOLEAN_WORDS = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}


class Kind(Protocol):
    """One kind of value."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        """The value as a model holds it, or ``INVALID`` after reporting why not."""

    def schema(self) -> dict[str, Any]:
        """The values an author may write, as JSON Schema."""


@dataclass(frozen=True)
class Integer:
    """A whole number; ``4.0`` is one, as in JSON Schema."""

    least: int | None = None

    def read(self, value: Any, place: str, report: Report) -> Any:
        number = value
        if report.lenient and isinstance(value, str) and _INTEGER.fullmatch(value):
            number = int(value)
        elif isinstance(value, bool):
            number = int(value) if report.lenient else None
        elif isinstance(value, float):
            number = int(value) if value.is_integer() and abs(value) < 2**53 else None
        if not isinstance(number, int):
            report.error(place, f"must be an integer, not {show(value)}")
            return INVALID
        if number.bit_length() > 63:
            report.error(place, f"must be an integer of reasonable size, not {show(value)}")
            return INVALID
        if self.least is not None and number < self.least:
            report.error(place, f"must be at least {self.least}, not {show(value)}")
            return INVALID
        return int(number)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer"} | ({} if self.least is None else {"minimum": self.least})


@dataclass(frozen=True)
class Number:
    """A finite number. Checkpoints hold others too, where nothing depends on it; they become ``None``."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
            if report.lenient:
                report.warn(place, f"must be a finite number, not {show(value)}; it is ignored")
                return None
        report.error(place, f"must be a finite number, not {show(value)}")
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"type": "number"}


@dataclass(frozen=True)
class Boolean:
    """``true`` or ``false``."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, bool):
            return value
        if report.lenient:
            if isinstance(value, str) and value.lower() in _BOOLEAN_WORDS:
                return _BOOLEAN_WORDS[value.lower()]
            if isinstance(value, (int, float)) and value in (0, 1):
                return bool(value)
        report.error(place, f"must be true or false, not {show(value)}")
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    """Any string."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, str):
            return str.__str__(value)
        report.error(place, f"must be a string, not {show(value)}")
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"type": "string"}


@dataclass(frozen=True)
class Choice:
    """One word out of a closed list.

    ``refused`` are words that authors may not use, with the reason; checkpoints may hold them.
    """

    words: type[Word]
    refused: frozendict[str, str] = field(default_factory=frozendict)

    def allowed(self) -> list[str]:
        """The spellings that an author may use."""
        return [word.value for word in self.words if word.value not in self.refused]

    def read(self, value: Any, place: str, report: Report) -> Any:
        word = value.lower() if isinstance(value, str) and report.lenient else value
        if isinstance(word, str):
            if word in self.refused and not report.lenient:
                report.error(place, self.refused[word])
                return INVALID
            for member in self.words:
                if member.value == word:
                    return member
        report.error(place, options(value, self.allowed()))
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"enum": self.allowed()}


@dataclass(frozen=True)
class DTypeName:
    """The name of a torch dtype, with or without ``torch.``; held as in a file, with it."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        if isinstance(value, str) and value.removeprefix("torch.") in DTYPES:
            return "torch." + value.removeprefix("torch.")
        guess = nearest(value.removeprefix("torch."), DTYPES) if isinstance(value, str) else None
        hint = f"; did you mean torch.{guess}?" if guess else f"; the dtypes are {', '.join(DTYPES)}"
        report.error(place, f"must be the name of a torch dtype, not {show(value)}{hint}")
        return INVALID

    def schema(self) -> dict[str, Any]:
        return {"enum": [prefix + name for prefix in ("torch.", "") for name in DTYPES]}


@dataclass(frozen=True)
class Nullable:
    """``null``, or what ``kind`` takes. ``null`` (and ``{}`` where ``or_empty``) is held as ``instead``."""

    kind: Kind
    instead: Any = None
    or_empty: bool = False

    def read(self, value: Any, place: str, report: Report) -> Any:
        if value is None or (self.or_empty and isinstance(value, Mapping) and not value):
            return self.instead
        return self.kind.read(value, place, report)

    def schema(self) -> dict[str, Any]:
        schema = self.kind.schema()
        if "enum" in schema:
            return schema | {"enum": [*schema["enum"], None]}
        if isinstance(schema.get("type"), str):
            return schema | {"type": [schema["type"], "null"]}
        empty = [{"type": "object", "maxProperties": 0}] if self.or_empty else []
        return {"anyOf": [schema, {"type": "null"}, *empty]}


@dataclass(frozen=True)
class ListOf:
    """A list, held as a tuple. ``single`` also takes one bare item, as the list of it."""

    kind: Kind
    single: bool = False

    def read(self, value: Any, place: str, report: Report) -> Any:
        if self.single and isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)):
            hint = f"; did you mean [{show(value)}]?" if isinstance(value, str) else ""
            report.error(place, f"must be a list, not {show(value)}{hint}")
            return INVALID
        items = [self.kind.read(item, child(place, index), report) for index, item in enumerate(value)]
        return INVALID if any(item is INVALID for item in items) else tuple(items)

    def schema(self) -> dict[str, Any]:
        items = {"type": "array", "items": self.kind.schema()}
        return {"anyOf": [items, self.kind.schema()]} if self.single else items


@dataclass(frozen=True)
class Anything:
    """Any JSON object, held frozen; its members mean nothing to this library."""

    def read(self, value: Any, place: str, report: Report) -> Any:
        if value is None and report.lenient:
            return frozendict()
        if not isinstance(value, Mapping):
            report.error(place, f"must be an object, not {show(value)}")
            return INVALID
        return freeze(value, place, report)

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}


def freeze(value: Any, place: str, report: Report, depth: int = 0) -> Any:
    """A JSON value made of immutable parts, so that what holds it can be hashed.

    Checkpoints hold numbers that JSON does not have (``NaN``, ``Infinity``); they become ``null`` with a warning.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if value.bit_length() <= 1024:
            return int(value)
        report.error(place, f"must be a number of reasonable size, not {show(value)}")
        return INVALID
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        report.doubt(place, f"is {show(value)}, which JSON does not have")
        return None
    if depth >= _DEEPEST:
        report.error(place, f"is nested more than {_DEEPEST} levels deep")
        return INVALID
    if isinstance(value, Mapping):
        frozen = {}
        for key, member in value.items():
            if isinstance(key, str):
                frozen[key] = freeze(member, child(place, key), report, depth + 1)
            else:
                report.error(place, f"the keys of an object are strings, not {show(key)}")
        return frozendict(frozen)
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item, child(place, index), report, depth + 1) for index, item in enumerate(value))
    report.error(place, f"must be a JSON value, not {show(value)}")
    return INVALID


def thaw(value: Any) -> Any:
    """The plain dicts, lists and strings that :func:`freeze` was given."""
    if isinstance(value, Word):
        return value.value
    if isinstance(value, Mapping):
        return {key: thaw(member) for key, member in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value
