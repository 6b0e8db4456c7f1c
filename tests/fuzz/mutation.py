"""Changes valid input a little, again and again, as the files of an enemy would be."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

__all__ = ["Mutator"]

_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
_WORDS = [
    *(b"0", b"-1", b"1", b"3", b"64", b"255", b"65536", b"4294967296", b"9223372036854775807", b"18446744073709551616"),
    *(b"1e999", b"-0.0", b"1.5", b"NaN", b"Infinity", b"true", b"null", b"9" * 5000),
    *(
        b"{}",
        b"[]",
        b'""',
        b"[[",
        b"}}",
        b'{"":',
        b",",
        b":",
        b'"',
        b"\\",
        rb"\ud800",
        rb"\u0000",
        b"\xff",
        b"\xef\xbb\xbf",
    ),
    *(b'"Linear"', b'"re:(a+)+$"', b'"re:("', b'"re:.*"', b'"group"', b'"channel"', b'"block"', b'"float"', b'"dense"'),
    *(
        b'"sparse-24-bitmask"',
        b'"pack-quantized"',
        b'"2:4"',
        b'"W4A16"',
        b'"U8"',
        b'"F4"',
        b'"__metadata__"',
        b" " * 300,
    ),
]


class Mutator:
    """Draws from ``seeds`` and what became of them; the same ``seed`` draws the same."""

    def __init__(self, seeds: Sequence[bytes], seed: int) -> None:
        self.seeds = seeds
        self.random = random.Random(seed)

    def draw(self) -> bytes:
        data = self.random.choice(self.seeds)
        for _ in range(self.random.choice((1, 1, 2, 3, 8))):
            data = self._changed(data)
        return data

    def _changed(self, data: bytes) -> bytes:
        draw = self.random
        start = draw.randrange(len(data) + 1)
        stop = min(len(data), start + draw.choice((1, 1, 2, 8, 40, 1000)))
        match draw.randrange(8):
            case 0:
                return data[:start] + bytes([draw.randrange(256)]) + data[start + 1 :]
            case 1:
                return data[:start] + data[stop:]
            case 2:
                return data[:stop] + data[start:stop] * draw.choice((1, 2, 100)) + data[stop:]
            case 3:
                return data[:start] + draw.choice(_WORDS) + data[start:]
            case 4:
                return data[:start]
            case 5:
                other = draw.choice(self.seeds)
                return data[:start] + other[draw.randrange(len(other) + 1) :]
            case 6:
                return self._with_another(_NUMBER, data)
            case _:
                return self._with_another(_VALUE, data)

    def _with_another(self, pattern: re.Pattern[bytes], data: bytes) -> bytes:
        found = list(pattern.finditer(data))
        if not found:
            return data
        chosen = self.random.choice(found)
        return data[: chosen.start()] + self.random.choice(_WORDS) + data[chosen.end() :]


_VALUE = re.compile(rb'"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\}')
