"""JSON objects out of files that may lie: duplicate keys, NaN, half characters and deep nesting are refused."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import Any, NoReturn

__all__ = ["parse_object", "refuse_constant", "unique_members"]


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of an object. Raises ``ValueError`` for a key that occurs twice."""
    members = dict(pairs)
    if len(members) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice in one object")
    return members


def refuse_constant(text: str) -> NoReturn:
    """Raises ``ValueError``: ``NaN`` and the infinities are no JSON, though Python writes them."""
    raise ValueError(f"{text} is not a JSON value")


def parse_object(data: bytes) -> dict[str, Any]:
    """The object that ``data`` holds as UTF-8 JSON.

    Raises ``ValueError``, with a reason that completes a sentence, for anything else.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_members, parse_constant=refuse_constant)
        if b"\\u" in data:  # an escape may stand for half a surrogate pair, a string that cannot even be printed
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from error
    except UnicodeEncodeError as error:
        raise ValueError("a string in it is not valid Unicode") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__} where an object is expected")
    return value
