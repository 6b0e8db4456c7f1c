"""A JSON object read member by member, so that what is kept decides the memory it takes, not what the file holds.

Parsed whole, JSON takes ten to fifty times its size. As strict as :mod:`~compressed_format.checkpoint.strict_json`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Container, Iterable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]  # the parser of the string that is each key
from typing import Any, BinaryIO, Final

from compressed_format.checkpoint.strict_json import refuse_constant, unique_members

__all__ = ["LONGEST_MEMBER", "OBJECT", "JsonStream", "count_bytes", "read_members"]

LONGEST_MEMBER = 4 * 1024 * 1024
"""Characters of one member, name and value: a tensor's have some hundreds, all metadata of a file some thousands."""
_MOST_PARTS = 200_000
"""Lists and objects in one member that is longer than a piece: an empty list takes twenty times its brackets."""

_PIECE = 1 << 18
_SHORT = 1 << 20  # bytes that take some 30 MB at worst once they are parsed
_DECODER = json.JSONDecoder(object_pairs_hook=unique_members, parse_constant=refuse_constant)
_SCAN: Callable[[str, int], tuple[Any, int]] = _DECODER.scan_once  # type: ignore[attr-defined]
_SPACE = re.compile(r"[ \t\n\r]*")

OBJECT: Final = object()
"""Stands for the value of a member that is about to be read member by member."""


def count_bytes(source: BinaryIO, length: int, wanted: bytes) -> int:
    """About how often ``wanted`` stands in the next ``length`` bytes, where ``source`` then stands again.

    A hundredth of the time of parsing: what has far too many members is refused before.
    """
    start, count = source.tell(), 0
    while length > 0 and (piece := source.read(min(length, 4 * _PIECE))):
        count += piece.count(wanted)
        length -= len(piece)
    source.seek(start)
    return count


def read_members(source: BinaryIO, length: int) -> Iterable[tuple[str, Any]]:
    """The members of the JSON object in the next ``length`` bytes of ``source``, as :class:`JsonStream` has them.

    A short object is parsed whole, in less than half the time, as long as there is nothing to be said of it.
    """
    if length <= _SHORT:
        start = source.tell()
        try:
            piece = source.read(length)
            text = piece.decode("utf-8")
            if len(piece) == length and text.startswith("{") and "\\u" not in text:
                found, end = _SCAN(text, 0)
                if _SPACE.match(text, end).end() == len(text):  # type: ignore[union-attr]  # it matches anything
                    members: dict[str, Any] = found
                    return members.items()
        except (RecursionError, StopIteration, ValueError):
            pass
        source.seek(start)
    return JsonStream(source, length).members()


class JsonStream:
    """The JSON object in the next ``length`` bytes of ``source``.

    Everything raises ``ValueError``, with a reason that completes a sentence, for text that is not such an object.
    Keys that occur twice are for the caller to find, who keeps what he needs of them; inside values they are refused.
    """

    def __init__(self, source: BinaryIO, length: int) -> None:
        self._source = source
        self._unread = length
        self._decode = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0  # given to the decoder
        self._text = ""
        self._at = 0
        self._dropped = 0  # characters before _text
        self._escapes = False  # whether _text has any, which alone can spell half a surrogate pair
        self._opened = False

    def members(self, nested: Container[str] = ()) -> Iterator[tuple[str, Any]]:
        """The members, in order. Where the value of a key in ``nested`` is an object it comes as :data:`OBJECT`, and
        :meth:`members` has to be called and exhausted for it before the next one is asked for."""
        outermost, self._opened = not self._opened, True
        if outermost and (symbol := self._next()) != "{":
            found = "a JSON list" if symbol == "[" else "no JSON object"
            raise ValueError(f"it is {found} where an object is expected")
        self._at += 1
        if self._next() == "}":
            self._at += 1
        else:
            while True:
                key, value = self._member(nested)
                yield key, value
                symbol = self._next()
                self._at += 1
                if symbol == "}":
                    break
                if symbol != ",":
                    raise self._unexpected("Expecting ',' delimiter", self._at - 1)
        if outermost and self._next():
            raise self._unexpected("Extra data", self._at)

    def _member(self, nested: Container[str]) -> tuple[str, Any]:
        """The next member. Read to where what follows it stands, so that no number is taken for a shorter one."""
        while True:
            text = self._text
            try:
                at = _SPACE.match(text, self._at).end()  # type: ignore[union-attr]  # it matches anything
                if text[at] != '"':
                    raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, at)
                key, at = scanstring(text, at + 1, True)
                at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
                if text[at] != ":":
                    raise json.JSONDecodeError("Expecting ':' delimiter", text, at)
                at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
                if text[at] == "{" and key in nested:
                    value = OBJECT
                else:
                    value, at = _SCAN(text, at)
                    at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
                    text[at]
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            except (IndexError, StopIteration, ValueError) as error:
                # Cut short, as far as can be told; what is wrong in the middle is read again, and wrong again.
                if self._read():
                    continue
                if isinstance(error, json.JSONDecodeError):
                    raise self._unexpected(error.msg, error.pos) from None
                if isinstance(error, ValueError):
                    raise
                raise self._unexpected("Expecting more", len(text)) from None
            if self._escapes:
                self._refuse_half_characters(key, value)
            self._at = at
            return key, value

    def _next(self) -> str:
        """The next character that is no space; an empty string at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read():
                return ""

    def _read(self) -> bool:
        """Read on, twice as much each time, and forget what has been consumed. False at the end."""
        kept = self._text[self._at :]
        if len(kept) > LONGEST_MEMBER:
            raise ValueError(
                f"one member of it has more than {LONGEST_MEMBER} characters, near {self._place(self._at)}"
            )
        if len(kept) > _PIECE and kept.count("[") + kept.count("{") > _MOST_PARTS:
            raise ValueError(f"one member of it has more than {_MOST_PARTS} parts, near {self._place(self._at)}")
        if not self._unread:
            return False
        piece = self._source.read(min(self._unread, max(_PIECE, len(kept))))
        if not piece:
            raise ValueError("it became shorter while it was read")
        self._unread -= len(piece)
        pending = len(self._decode.getstate()[0])
        try:
            decoded = self._decode.decode(piece, final=not self._unread)
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8 at byte {self._bytes - pending + error.start}") from None
        self._bytes += len(piece)
        self._dropped += self._at
        self._text, self._at = kept + decoded, 0
        self._escapes = "\\u" in self._text
        return True

    @staticmethod
    def _refuse_half_characters(key: str, value: Any) -> None:
        try:
            key.encode("utf-8")
            if value is not OBJECT:
                json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a string in it is not valid Unicode") from None

    def _unexpected(self, message: str, at: int) -> ValueError:
        return ValueError(f"{message} ({self._place(at)})")

    def _place(self, at: int) -> str:
        return f"character {self._dropped + at}"
