"""The index of a sharded checkpoint, and which names a checkpoint may hold files under."""

from __future__ import annotations

import io
import json
import reprlib
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import BinaryIO, Literal, get_args

from compressed_format.checkpoint.header import MOST_PROBLEMS, show_name
from compressed_format.checkpoint.json_stream import OBJECT, JsonStream, count_bytes
from compressed_format.errors import CheckpointError, Problem

__all__ = [
    "INDEX_SUFFIX",
    "MAX_TENSORS",
    "STEMS",
    "Stem",
    "build_index",
    "file_name_problem",
    "index_file",
    "parse_index",
    "read_index",
    "single_file",
]

Stem = Literal["model", "diffusion_pytorch_model"]
STEMS: tuple[Stem, ...] = get_args(Stem)
"""How the names of files of tensors begin: everywhere, and in the folders of a pipeline of diffusers."""
INDEX_SUFFIX = ".safetensors.index.json"
MAX_TENSORS = 2**19
"""In one checkpoint; the largest mixtures of experts have three hundred thousand."""

_WEIGHT_MAP = "weight_map"
_MOST_KEYS = 1000


def single_file(stem: Stem) -> str:
    """The name of the one file of tensors of a checkpoint that is not sharded."""
    return f"{stem}.safetensors"


def index_file(stem: Stem) -> str:
    """The name of the index of a sharded checkpoint."""
    return stem + INDEX_SUFFIX


def build_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The index file for tensors in shards; ``total_size`` is the number of bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode("utf-8")


def parse_index(data: bytes, *, place: str) -> dict[str, str]:
    """:func:`read_index` of the bytes of an index."""
    return read_index(io.BytesIO(data), len(data), place=place)


def read_index(source: BinaryIO, length: int, *, place: str) -> dict[str, str]:
    """Tensor name to shard name, each shard's name being safe to join with the folder's.

    ``source`` yields the ``length`` bytes of the index, which are never held whole. Raises :class:`CheckpointError`
    with every problem, or the first :data:`MOST_PROBLEMS` of them; ``place`` is the index's name in messages.
    """
    try:
        if count_bytes(source, length, b'":') > MAX_TENSORS + _MOST_KEYS:
            raise ValueError(f"it has more than {MAX_TENSORS} tensors, or other keys")
        return _weight_map(JsonStream(source, length), place)
    except ValueError as error:
        raise CheckpointError(problems=[Problem(place, f"the index cannot be read: {error}")]) from error


def _weight_map(stream: JsonStream, place: str) -> dict[str, str]:
    weight_map: dict[str, str] = {}
    files: dict[str, str] = {}  # one string for each file, and one problem, not for each tensor in it
    problems: list[Problem] = []
    keys: set[str] = set()
    found = False
    for key, value in stream.members(nested=(_WEIGHT_MAP,)):
        if key in keys:
            raise ValueError(f"the key {reprlib.repr(key)} occurs twice in one object")
        keys.add(key)
        if len(keys) > _MOST_KEYS:
            raise ValueError(f"it has more than {_MOST_KEYS} keys beside {_WEIGHT_MAP}")
        if value is not OBJECT:
            continue
        found = True
        for tensor, file in stream.members():
            if tensor in weight_map:
                raise ValueError(f"the key {reprlib.repr(tensor)} occurs twice in one object")
            if len(weight_map) == MAX_TENSORS:
                raise ValueError(f"it has more than {MAX_TENSORS} tensors")
            reason = None
            if not isinstance(file, str):
                reason = "must be the name of a file"
            elif file not in files:
                files[file] = file
                reason = _shard_name_problem(file)
            if reason is not None:
                problems.append(Problem(f"{place}: {_WEIGHT_MAP}.{show_name(tensor)}", reason))
                if len(problems) == MOST_PROBLEMS:
                    raise CheckpointError(problems=problems)
            weight_map[tensor] = files[file] if isinstance(file, str) else ""
    if not found:
        problems.append(Problem(f"{place}: {_WEIGHT_MAP}", "must be an object: tensor name to file name"))
    if problems:
        raise CheckpointError(problems=problems)
    return weight_map


def _shard_name_problem(file: str) -> str | None:
    reason = file_name_problem(file)
    if reason is None and not file.endswith(".safetensors"):
        reason = "is no .safetensors file, and no other kind is ever read"
    return None if reason is None else f"the file name {reprlib.repr(file)} {reason}"


def file_name_problem(name: str) -> str | None:
    """Why ``name`` must not be joined with a folder's path, or ``None``.

    Fine are relative names with forward slashes that stay inside the folder, on every operating system.
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if "\0" in name or "\\" in name or PureWindowsPath(name).drive:
        return "holds a NUL, a backslash or a drive"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "is not a plain relative name inside the folder"
    return None
