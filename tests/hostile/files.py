"""Files of tensors, indexes and folders that lie, lead astray or cost too much."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.hostile.case import EVERYWHERE, FILES, Case
from tests.hostile.headers import HOSTILE, entry, file_with

__all__ = ["FILE_CASES", "Marks"]

MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
Spoil = Callable[[Path], None]


class Marks:
    """Its pickle writes a file when it is read, as any pickle may do whatever it likes."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def content(data: bytes | Callable[[], bytes]) -> Spoil:
    """The file of tensors is these bytes."""

    def spoil(folder: Path) -> None:
        (folder / MODEL).write_bytes(data() if callable(data) else data)

    return spoil


def cut(place: Callable[[bytes], int]) -> Spoil:
    """The file ends at a place in it."""

    def spoil(folder: Path) -> None:
        os.truncate(folder / MODEL, place((folder / MODEL).read_bytes()))

    return spoil


def header_end(file: bytes) -> int:
    return 8 + int.from_bytes(file[:8], "little")


def instead(make: Callable[[Path], object]) -> Spoil:
    """Something else stands where the file of tensors was."""

    def spoil(folder: Path) -> None:
        (folder / MODEL).unlink()
        make(folder / MODEL)

    return spoil


def index(weight_map: Any, more: str = "") -> Spoil:
    """An index instead of one file, which becomes its shard ``a.safetensors``."""

    def spoil(folder: Path) -> None:
        (folder / MODEL).rename(folder / "a.safetensors")
        text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
        (folder / INDEX).write_text(text + more)

    return spoil


def sharded(change: Callable[[Path, dict[str, str]], None]) -> Spoil:
    """A right index, then changed."""

    def spoil(folder: Path) -> None:
        data = (folder / MODEL).read_bytes()
        names = json.loads(data[8 : header_end(data)])
        weight_map = {name: "a.safetensors" for name in names if name != "__metadata__"}
        (folder / MODEL).rename(folder / "a.safetensors")
        change(folder, weight_map)
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))

    return spoil


def _duplicate(folder: Path, weight_map: dict[str, str]) -> None:
    """A second shard that holds a tensor of the first one again, though the index says nothing of it there."""
    name = "model.norm.weight"
    header = {"other": entry(), name: {"dtype": "BF16", "shape": [2], "data_offsets": [4, 8]}}
    (folder / "b.safetensors").write_bytes(file_with(header, bytes(8)))
    weight_map["other"] = "b.safetensors"


def _link(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "blob").write_bytes((folder / "a.safetensors").read_bytes())
    (folder / "a.safetensors").unlink()
    (folder / "a.safetensors").symlink_to("blob")


def many_tensors(count: int, *, last: str = "") -> bytes:
    members = (f'"layers.{i}.weight":{{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}' for i in range(count))
    return file_with(b"{" + ",".join(members).encode() + last.encode() + b"}")


def _sparse(size: int) -> Callable[[Path], None]:
    """A file of zeros after the length and brace of a long header, which takes no room on the disk."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            file.write((size - 8).to_bytes(8, "little") + b'{"')
            file.truncate(size)

    return make


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Marks(path.parent / "marker")))


def _only_pickle(folder: Path) -> None:
    (folder / MODEL).unlink()
    _pickle(folder / "pytorch_model.bin")


def _shrinks(folder: Path) -> None:
    """What a file looks like that shrank after its header was written."""
    os.truncate(folder / MODEL, (folder / MODEL).stat().st_size - 1000)


HEADERS = [
    Case(f"header: {name}", content(file_with(text, data, **more)), words, ("reader", "load", "check"))
    for name, (text, data, more, words) in HOSTILE.items()
]

CUTS = [
    Case(f"cut {where}", cut(place), "ends before|claims|past the end|cannot be read")
    for where, place in {
        "to nothing": lambda _: 0,
        "within the length": lambda _: 5,
        "after the length": lambda _: 8,
        "after the brace": lambda _: 9,
        "within the header": lambda file: header_end(file) // 2,
        "after the header": header_end,
        "within the data": lambda file: header_end(file) + 5000,
        "before the last byte": lambda file: len(file) - 1,
    }.items()
]

READERS = ("reader", "check", "load")
LARGE = [
    Case("100 MB of zeros for a header", instead(_sparse(99_000_000)), "cannot be read"),
    Case("a header longer than any", instead(_sparse(200_000_000)), "more than 100000000 are not read"),
    Case("100 MB of spaces in a header", content(lambda: file_with(b"{" + b" " * 99_999_000)), "cannot be read"),
    Case(
        "a name of 50 MB",
        content(lambda: file_with(b'{"' + b"a" * 50_000_000 + b'":{}}')),
        "longer than|more than 4194304",
    ),
    Case(
        "metadata of 50 MB",
        content(lambda: file_with({"__metadata__": {"a": "x" * 50_000_000}})),
        "longer than|more than 4194304",
    ),
    Case("a million lists in an entry", content(lambda: file_with(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}")), "parts"),
    Case("a million empty tensors", content(lambda: many_tensors(1_000_000)), "more than 262144 tensors"),
    Case(
        "200000 entries, all wrong",
        content(lambda: many_tensors(200_000).replace(b"F16", b"F17")),
        "unknown dtype 'F17'",
    ),
    Case(
        "200000 empty tensors, then a hole",
        content(lambda: many_tensors(200_000, last=',"z":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}') + b"\0\0"),
        "leaves a hole",
    ),
    Case(
        "an index of a million tensors",
        index('{"weight_map":{' + ",".join(f'"t{i}":"a.safetensors"' for i in range(1_000_000)) + "}}"),
        "more than 524288 tensors",
    ),
    Case(
        "an index of 400000 tensors that are not there",
        index({f"t{i}": "a.safetensors" for i in range(400_000)}),
        "is here, and not in|is not in",
    ),
    Case(
        "an index of a million keys",
        index("{" + ",".join(f'"k{i}":0' for i in range(1_000_000)) + "}"),
        "1000 keys|other keys",
    ),
    Case(
        "an index of 100000 shards",
        index({f"t{i}": f"{i}.safetensors" for i in range(100_000)}),
        "no such file",
    ),
]

LARGE = [replace(case, refused_by=READERS) for case in LARGE]

ESCAPES = [
    Case(f"an index that names {name!r}", index({"model.norm.weight": name}), "the file name")
    for name in (
        "../x.safetensors",
        "/etc/x.safetensors",
        "C:x.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "a/../../x.safetensors",
        "/dev/zero",
        "a.bin",
        "x" * 5000 + "/../y.safetensors",
    )
]

INDEXES = [
    Case("an index that is a list", index([1]), "must be an object"),
    Case("an index that is no JSON", index("{"), "cannot be read"),
    Case("an index with more behind it", index({}, "x"), "Extra data"),
    Case("an index nested deeply", index('{"a":' * 400_000), "nested too deeply|longer than|parts"),
    Case("an index with a tensor twice", index('{"weight_map":{"a":"a.safetensors","a":"b.safetensors"}}'), "twice"),
    Case("a missing shard", sharded(lambda _, names: names.update(x="b.safetensors")), "no such file"),
    Case("a tensor the shard does not have", sharded(lambda _, names: names.update(x="a.safetensors")), "is not in"),
    Case("a tensor in two shards", sharded(_duplicate), "is here, and"),
    Case("a name in two shards", sharded(lambda _, names: names.pop("model.norm.weight")), "not in"),
    Case("an index as it should be", sharded(lambda *_: None), refused_by=(), loads_with=("reader", "load", "fill")),
    Case("a shard that is a link", sharded(_link), refused_by=(), loads_with=("reader", "open", "load", "fill")),
]

FOLDERS = [
    Case("a folder instead of the file", instead(os.mkdir), "is a folder"),
    Case("a pipe instead of the file", instead(os.mkfifo), "a pipe"),
    Case("a device instead of the file", instead(lambda path: path.symlink_to("/dev/zero")), "a device"),
    Case("a link to itself", instead(lambda path: path.symlink_to(path)), "cannot be read|no such file|none of"),
    Case("a link to nothing", instead(lambda path: path.symlink_to("nothing")), "no such file|none of"),
    Case("a pickle under a false name", instead(_pickle), "cannot|opening brace|not read"),
    Case("a pickle instead of the file", _only_pickle, "a pickle, which is never read"),
    Case("a file that has shrunk", _shrinks, "past the end"),
    Case(
        "no folder", lambda folder: folder.rename(folder.with_name("elsewhere")), "no such|cannot be read", EVERYWHERE
    ),
]

FILE_CASES = [*HEADERS, *CUTS, *LARGE, *ESCAPES, *INDEXES, *FOLDERS]
assert all(set(case.refused_by) <= set(EVERYWHERE) for case in FILE_CASES)
assert FILES
