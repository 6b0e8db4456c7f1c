"""Headers: literal bytes, what is built is what is parsed, and everything that lies is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from compressed_format.checkpoint import TensorSpec, header, json_stream, read_checkpoint, write_checkpoint
from compressed_format.checkpoint.header import build_header, parse_header
from compressed_format.errors import CheckpointError
from tests.hostile.headers import HOSTILE, entry

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


@pytest.fixture(params=["whole", "member by member"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which a header is parsed, whatever its size."""
    if request.param != "whole":
        monkeypatch.setattr(json_stream, "_SHORT", -1)


@pytest.mark.usefixtures("way")
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


@pytest.mark.usefixtures("way")
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
    path.write_bytes(raw_file({"__metadata__": 3, "a": entry("F7"), "b": entry(shape=[-1]), "c": 4, "fine": entry()}))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert [problem.place for problem in caught.value.problems] == [
        f"model.safetensors: {name}" for name in ("__metadata__", "a", "b", "c", "fine")
    ]


VALID: dict[str, tuple[Any, bytes]] = {
    "nothing": ({}, b""),
    "metadata alone": ({"__metadata__": {"a": ""}}, b""),
    "trailing spaces": (b"{}   \n", b""),
    "entries in another order than their data": ({"b": entry(offsets=[4, 8]), "a": entry()}, b"abcdefgh"),
    "empty tensors between others": (
        {
            "z": entry(shape=[2, 0], offsets=[4, 4]),
            "b": entry(offsets=[4, 8]),
            "a": entry(),
            "y": entry("I64", [0], [8, 8]),
        },
        b"abcdefgh",
    ),
    "escapes": (rb'{"\u00e4\n":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', b"x"),
    "empty name": ({"": entry()}, b"abcd"),
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


def test_a_file_that_is_cut_off_is_one_problem(tmp_path: Path) -> None:
    entries = {f"{number}": entry(shape=[8], offsets=[8 * number, 8 * number + 8]) for number in range(300)}
    with pytest.raises(CheckpointError) as caught:
        parse_header(json.dumps(entries).encode(), file="f", file_size=len(json.dumps(entries)) + 8 + 44)
    (problem,) = caught.value.problems
    assert problem.place == "f: 5"
    assert "data_offsets [40, 48] reach past the end of the 44 bytes of data" in problem.message
    assert "294 more tensors" in problem.message
