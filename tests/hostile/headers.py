"""Headers of safetensors files that lie: each must be refused, with words that say what is wrong."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["HOSTILE", "entry", "file_with"]


def file_with(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header: an object, or text that stands for itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def deep(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


# name: (header, data, further arguments of raw_file, part of the message)
HOSTILE: dict[str, tuple[Any, bytes, dict[str, int], str]] = {
    "length past the end": ({}, b"", {"length": 3}, "whole file has 10"),
    "length far past the end": ({}, b"", {"length": 99_999_999}, "whole file has"),
    "length above the cap": ({}, b"", {"length": 100_000_001}, "not read"),
    "length of 2**64 - 1": ({}, b"", {"length": 2**64 - 1}, "not read"),
    "length zero": ({}, b"", {"length": 0}, "empty one"),
    "length cuts the JSON": ({"a": entry()}, bytes(4), {"length": 10}, "cannot be read"),
    "not JSON": (b"{hello}", b"", {}, "cannot be read"),
    "a list": (b"[]", b"", {}, "opening brace"),
    "a number": (b"12", b"", {}, "opening brace"),
    "space before the object": (b" {}", b"", {}, "opening brace"),
    "more after the object": (b"{}{}", b"", {}, "Extra data"),
    "not UTF-8": (b'{"\xff":1}', b"", {}, "not UTF-8 at byte 2"),
    "half a surrogate pair": (rb'{"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", {}, "Unicode"),
    "NaN": (b'{"a":NaN}', b"", {}, "NaN"),
    "nested deeply": (deep(100_000), b"", {}, "nested too deeply"),
    "a number of 10000 digits": (b'{"a":' + b"9" * 10_000 + b"}", b"", {}, "digits"),
    "tensor twice": (b'{"a":{},"b":{},"a":{}}', b"", {}, "'a' occurs twice"),
    "key of an entry twice": (b'{"a":{"dtype":"U8","dtype":"I8"}}', b"", {}, "'dtype' occurs twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b"", {}, "occurs twice"),
    "metadata a list": ({"__metadata__": []}, b"", {}, "__metadata__: must be"),
    "metadata with a number": ({"__metadata__": {"a": 1}}, b"", {}, "__metadata__: must be"),
    "entry null": ({"a": None}, b"", {}, "a: must be an object"),
    "entry without offsets": ({"a": {"dtype": "U8", "shape": []}}, b"", {}, "exactly the keys"),
    "entry with more": ({"a": entry(strides=[1])}, bytes(4), {}, "exactly the keys"),
    "unknown dtype": ({"a": entry("F7")}, bytes(4), {}, "unknown dtype 'F7'"),
    "dtype in lower case": ({"a": entry("u8")}, bytes(4), {}, "unknown dtype"),
    "dtype a list": ({"a": entry(["U8"])}, bytes(4), {}, "unknown dtype"),
    "dtype very long": ({"a": entry("U" * 10_000)}, bytes(4), {}, r"UUU\.\.\.UUU"),
    "shape a number": ({"a": entry(shape=4)}, bytes(4), {}, "shape 4 must"),
    "shape negative": ({"a": entry(shape=[-2, -2])}, bytes(4), {}, "shape"),
    "shape of floats": ({"a": entry(shape=[4.0])}, bytes(4), {}, "shape"),
    "shape of booleans": ({"a": entry(shape=[True, 4])}, bytes(4), {}, "shape"),
    "shape of strings": ({"a": entry(shape=["4"])}, bytes(4), {}, "shape"),
    "dimension above 64 bits": ({"a": entry(shape=[2**64 + 4])}, bytes(4), {}, "2\\*\\*63"),
    "product wraps around to 4": ({"a": entry(shape=[2**62 + 1, 4])}, bytes(4), {}, "larger than any memory"),
    "product overflows before a zero": ({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, b"", {}, "memory"),
    "a million dimensions": ({"a": entry(shape=[2] * 1_000_000)}, bytes(4), {}, "memory"),
    "shape disagrees": ({"a": entry(shape=[3])}, bytes(4), {}, "takes 3 bytes"),
    "zero dimension with bytes": ({"a": entry(shape=[0])}, bytes(4), {}, "takes 0 bytes"),
    "offsets a string": ({"a": entry(offsets="04")}, bytes(4), {}, "data_offsets"),
    "one offset": ({"a": entry(offsets=[4])}, bytes(4), {}, "data_offsets"),
    "three offsets": ({"a": entry(offsets=[0, 4, 4])}, bytes(4), {}, "data_offsets"),
    "offsets reversed": ({"a": entry(offsets=[4, 0])}, bytes(4), {}, "not above"),
    "offsets negative": ({"a": entry(offsets=[-4, 0])}, bytes(4), {}, "data_offsets"),
    "offsets past the end": ({"a": entry(offsets=[1, 5])}, bytes(4), {}, "past the end"),
    "offsets far past the end": ({"a": entry(offsets=[2**62, 2**62 + 4])}, bytes(4), {}, "past the end"),
    "hole before the first": ({"a": entry(offsets=[1, 5])}, bytes(5), {}, "hole"),
    "hole between two": ({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9), {}, "b: .*hole"),
    "overlap": ({"a": entry(), "b": entry(offsets=[3, 7])}, bytes(7), {}, "b: .*overlaps"),
    "the same bytes twice": ({"a": entry(), "b": entry()}, bytes(4), {}, "b: .*overlaps"),
    "an empty tensor inside another": (
        {"a": entry(), "b": entry(shape=[0], offsets=[2, 2])},
        bytes(4),
        {},
        "b: .*overlaps",
    ),
    "bytes after the last": ({"a": entry()}, bytes(5), {}, "the file at"),
    "bytes and no tensor": ({}, bytes(1), {}, "the file at"),
}
