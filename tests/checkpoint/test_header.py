"""Headers: literal bytes, what is built is what is parsed, and everything that lies is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from compressed_format.checkpoint import TensorSpec, header, read_checkpoint, write_checkpoint
from compressed_format.checkpoint.header import build_header, parse_header
from compressed_format.errors import CheckpointError

RawFile = Callable[..., bytes]


def test_literal_bytes(tmp_path: Path) -> None:
    tensors = {
        "scale": torch.tensor([1.5], dtype=torch.bfloat16),
        "shape": torch.tensor([2, 3]),
        "packed": torch.arange(16, dtype=torch.int32),
    }
    write_checkpoint(tmp_path / "out", tensors)
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"packed":{"dtype":"I32","shape":[16],"data_offsets":[0,64]},'
        b'"shape":{"dtype":"I64","shape":[2],"data_offsets":[64,80]},'
        b'"scale":{"dtype":"BF16","shape":[1],"data_offsets":[80,82]}}'
    )
    data = b"".join(number.to_bytes(4, "little") for number in range(16))
    data += b"\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0" + b"\xc0\x3f"
    expected = b"\xf8\0\0\0\0\0\0\0" + text.ljust(248) + data
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_built_and_parsed() -> None:
    entries = [("a", "float32", (2, 3)), ("ä", "uint8", ()), ("empty", "bfloat16", (0, 7)), ("c", "complex64", (1,))]
    built = build_header(entries, {"format": "pt", "by": "hand"})
    size = len(built) + 24 + 1 + 8
    tensors, metadata = parse_header(built[8:], file="f", file_size=size)
    assert len(built) % 64 == 0
    assert int.from_bytes(built[:8], "little") == len(built) - 8
    assert metadata == {"format": "pt", "by": "hand"}
    start = len(built)
    assert tensors == {
        "a": TensorSpec("float32", (2, 3), "f", start, start + 24),
        "ä": TensorSpec("uint8", (), "f", start + 24, start + 25),
        "empty": TensorSpec("bfloat16", (0, 7), "f", start + 25, start + 25),
        "c": TensorSpec("complex64", (1,), "f", start + 25, start + 33),
    }
    assert tensors["a"].nbytes == 24


def test_order_of_metadata_does_not_change_the_bytes() -> None:
    assert build_header([], {"a": "1", "b": "2"}) == build_header([], {"b": "2", "a": "1"})


def test_a_header_that_no_reader_takes_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(CheckpointError, match="smaller max_shard_size"):
        build_header([("x" * 1000, "uint8", (1,))], {})


def _entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def _deep(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


# name: (header, data, further arguments of raw_file, part of the message)
HOSTILE: dict[str, tuple[Any, bytes, dict[str, int], str]] = {
    "length past the end": ({}, b"", {"length": 3}, "whole file has 10"),
    "length far past the end": ({}, b"", {"length": 99_999_999}, "whole file has"),
    "length above the cap": ({}, b"", {"length": 100_000_001}, "not read"),
    "length of 2**64 - 1": ({}, b"", {"length": 2**64 - 1}, "not read"),
    "length zero": ({}, b"", {"length": 0}, "empty one"),
    "length cuts the JSON": ({"a": _entry()}, bytes(4), {"length": 10}, "cannot be read"),
    "not JSON": (b"{hello}", b"", {}, "cannot be read"),
    "a list": (b"[]", b"", {}, "opening brace"),
    "a number": (b"12", b"", {}, "opening brace"),
    "space before the object": (b" {}", b"", {}, "opening brace"),
    "more after the object": (b"{}{}", b"", {}, "Extra data"),
    "not UTF-8": (b'{"\xff":1}', b"", {}, "not UTF-8 at byte 2"),
    "half a surrogate pair": (rb'{"\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", {}, "Unicode"),
    "NaN": (b'{"a":NaN}', b"", {}, "NaN"),
    "nested deeply": (_deep(100_000), b"", {}, "nested too deeply"),
    "a number of 10000 digits": (b'{"a":' + b"9" * 10_000 + b"}", b"", {}, "digits"),
    "tensor twice": (b'{"a":{},"b":{},"a":{}}', b"", {}, "'a' occurs twice"),
    "key of an entry twice": (b'{"a":{"dtype":"U8","dtype":"I8"}}', b"", {}, "'dtype' occurs twice"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b"", {}, "occurs twice"),
    "metadata a list": ({"__metadata__": []}, b"", {}, "__metadata__: must be"),
    "metadata with a number": ({"__metadata__": {"a": 1}}, b"", {}, "__metadata__: must be"),
    "entry null": ({"a": None}, b"", {}, "a: must be an object"),
    "entry without offsets": ({"a": {"dtype": "U8", "shape": []}}, b"", {}, "exactly the keys"),
    "entry with more": ({"a": _entry(strides=[1])}, bytes(4), {}, "exactly the keys"),
    "unknown dtype": ({"a": _entry("F7")}, bytes(4), {}, "unknown dtype 'F7'"),
    "dtype in lower case": ({"a": _entry("u8")}, bytes(4), {}, "unknown dtype"),
    "dtype a list": ({"a": _entry(["U8"])}, bytes(4), {}, "unknown dtype"),
    "dtype very long": ({"a": _entry("U" * 10_000)}, bytes(4), {}, r"UUU\.\.\.UUU"),
    "shape a number": ({"a": _entry(shape=4)}, bytes(4), {}, "shape 4 must"),
    "shape negative": ({"a": _entry(shape=[-2, -2])}, bytes(4), {}, "shape"),
    "shape of floats": ({"a": _entry(shape=[4.0])}, bytes(4), {}, "shape"),
    "shape of booleans": ({"a": _entry(shape=[True, 4])}, bytes(4), {}, "shape"),
    "shape of strings": ({"a": _entry(shape=["4"])}, bytes(4), {}, "shape"),
    "dimension above 64 bits": ({"a": _entry(shape=[2**64 + 4])}, bytes(4), {}, "2\\*\\*63"),
    "product wraps around to 4": ({"a": _entry(shape=[2**62 + 1, 4])}, bytes(4), {}, "larger than any memory"),
    "product overflows before a zero": ({"a": _entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}, b"", {}, "memory"),
    "a million dimensions": ({"a": _entry(shape=[2] * 1_000_000)}, bytes(4), {}, "memory"),
    "shape disagrees": ({"a": _entry(shape=[3])}, bytes(4), {}, "takes 3 bytes"),
    "zero dimension with bytes": ({"a": _entry(shape=[0])}, bytes(4), {}, "takes 0 bytes"),
    "offsets a string": ({"a": _entry(offsets="04")}, bytes(4), {}, "data_offsets"),
    "one offset": ({"a": _entry(offsets=[4])}, bytes(4), {}, "data_offsets"),
    "three offsets": ({"a": _entry(offsets=[0, 4, 4])}, bytes(4), {}, "data_offsets"),
    "offsets reversed": ({"a": _entry(offsets=[4, 0])}, bytes(4), {}, "not above"),
    "offsets negative": ({"a": _entry(offsets=[-4, 0])}, bytes(4), {}, "data_offsets"),
    "offsets past the end": ({"a": _entry(offsets=[1, 5])}, bytes(4), {}, "past the end"),
    "offsets far past the end": ({"a": _entry(offsets=[2**62, 2**62 + 4])}, bytes(4), {}, "past the end"),
    "hole before the first": ({"a": _entry(offsets=[1, 5])}, bytes(5), {}, "hole"),
    "hole between two": ({"a": _entry(), "b": _entry(offsets=[5, 9])}, bytes(9), {}, "b: .*hole"),
    "overlap": ({"a": _entry(), "b": _entry(offsets=[3, 7])}, bytes(7), {}, "b: .*overlaps"),
    "the same bytes twice": ({"a": _entry(), "b": _entry()}, bytes(4), {}, "b: .*overlaps"),
    "an empty tensor inside another": (
        {"a": _entry(), "b": _entry(shape=[0], offsets=[2, 2])},
        bytes(4),
        {},
        "b: .*overlaps",
    ),
    "bytes after the last": ({"a": _entry()}, bytes(5), {}, "the file at"),
    "bytes and no tensor": ({}, bytes(1), {}, "the file at"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path, raw_file: RawFile) -> None:
    text, data, more, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(text, data, **more))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert all(problem.place.startswith("model.safetensors") for problem in caught.value.problems)
    assert len(str(caught.value)) < 1000
    str(caught.value).encode()


@pytest.mark.parametrize("size", range(9))
def test_a_file_too_short_for_a_header(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\x02\0\0\0\0\0\0\0{}"[:size])
    with pytest.raises(CheckpointError, match="ends before its header"):
        read_checkpoint(path)


def test_cut_anywhere(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_checkpoint(tmp_path / "out", tensors)
    whole = (tmp_path / "out" / "model.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            read_checkpoint(path)


def test_all_problems_in_one_error(tmp_path: Path, raw_file: RawFile) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(
        raw_file({"__metadata__": 3, "a": _entry("F7"), "b": _entry(shape=[-1]), "c": 4, "fine": _entry()})
    )
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert [problem.place for problem in caught.value.problems] == [
        f"model.safetensors: {name}" for name in ("__metadata__", "a", "b", "c", "fine")
    ]


VALID: dict[str, tuple[Any, bytes]] = {
    "nothing": ({}, b""),
    "metadata alone": ({"__metadata__": {"a": ""}}, b""),
    "trailing spaces": (b"{}   \n", b""),
    "entries in another order than their data": ({"b": _entry(offsets=[4, 8]), "a": _entry()}, b"abcdefgh"),
    "empty tensors between others": (
        {
            "z": _entry(shape=[2, 0], offsets=[4, 4]),
            "b": _entry(offsets=[4, 8]),
            "a": _entry(),
            "y": _entry("I64", [0], [8, 8]),
        },
        b"abcdefgh",
    ),
    "escapes": (rb'{"\u00e4\n":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
    "empty name": ({"": _entry()}, b"abcd"),
}


@pytest.mark.parametrize("case", VALID)
def test_unusual_and_valid_headers(case: str, tmp_path: Path, raw_file: RawFile) -> None:
    content = raw_file(*VALID[case])
    (tmp_path / "x.safetensors").write_bytes(content)
    found, expected = read_checkpoint(tmp_path), load(content)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_the_reference_refuses_is_refused_here(tmp_path: Path, raw_file: RawFile) -> None:
    """The reverse need not hold: it lets duplicate keys and unknown members of an entry pass."""
    path = tmp_path / "model.safetensors"
    refused = 0
    for text, data, more, _ in HOSTILE.values():
        path.write_bytes(raw_file(text, data, **more))
        try:
            load(path.read_bytes())
        except (SafetensorError, ValueError, KeyError, RuntimeError):
            refused += 1
            with pytest.raises(CheckpointError):
                read_checkpoint(path)
    assert refused > 30
