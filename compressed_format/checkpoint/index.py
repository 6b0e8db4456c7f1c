"""The index of a sharded checkpoint, and which names a checkpoint may hold files under."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Literal, get_args

from compressed_format.checkpoint.strict_json import parse_object
from compressed_format.errors import CheckpointError, Problem

__all__ = [
    "INDEX_SUFFIX",
    "STEMS",
    "Stem",
    "build_index",
    "file_name_problem",
    "index_file",
    "parse_index",
    "single_file",
]

Stem = Literal["model", "diffusion_pytorch_model"]
STEMS: tuple[Stem, ...] = get_args(Stem)
"""How the names of files of tensors begin: everywhere, and in the folders of a pipeline of diffusers."""
INDEX_SUFFIX = ".safetensors.index.json"


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
    """Tensor name to shard name, each shard's name being safe to join with the folder's.

    Raises :class:`CheckpointError` with every problem; ``place`` is the index's name in messages.
    """
    try:
        weight_map = parse_object(data).get("weight_map")
    except ValueError as error:
        raise CheckpointError(problems=[Problem(place, f"the index cannot be read: {error}")]) from error
    if not isinstance(weight_map, dict):
        raise CheckpointError(problems=[Problem(f"{place}: weight_map", "must be an object: tensor name to file name")])
    problems: list[Problem] = []
    first_with: dict[str, str] = {}  # one problem for each file, not for each tensor in it
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            problems.append(Problem(f"{place}: weight_map.{tensor}", "must be the name of a file"))
        else:
            first_with.setdefault(file, tensor)
    for file, tensor in first_with.items():
        reason = file_name_problem(file)
        if reason is None and not file.endswith(".safetensors"):
            reason = "is no .safetensors file, and no other kind is ever read"
        if reason is not None:
            problems.append(Problem(f"{place}: weight_map.{tensor}", f"the file name {file!r} {reason}"))
    if problems:
        raise CheckpointError(problems=problems)
    return weight_map


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
