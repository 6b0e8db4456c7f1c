"""The files of a checkpoint: what is beside the weights, and an index against what the shards hold."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressed_format.checking import codes
from compressed_format.checking.findings import Code
from compressed_format.checking.notebook import Notebook
from compressed_format.checkpoint import Checkpoint
from compressed_format.checkpoint.index import INDEX_SUFFIX, STEMS, index_file
from compressed_format.checkpoint.json_stream import OBJECT, JsonStream
from compressed_format.checkpoint.shard_file import read_shard_names
from compressed_format.config.report import show
from compressed_format.errors import CheckpointError, Problem

__all__ = ["check_companions", "check_index", "note_problems"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MOST_NAMED = 8
_CANNOT_BE_OPENED = ("there is no such file in", "cannot be read", "is a folder, a device")


def note_problems(error: CheckpointError, path: Path, notebook: Notebook) -> bool:
    """Make findings of the problems of :func:`~compressed_format.checkpoint.read_checkpoint`.

    Returns whether there was nothing to read at all.
    """
    problems = error.problems or (Problem(str(path), error.message),)
    kinds = [_kind(problem, path) for problem in problems]
    for kind, problem in zip(kinds, problems, strict=True):
        notebook.add_all([kind.of(problem)])
    return all(kind is codes.UNREADABLE for kind in kinds)


def _kind(problem: Problem, path: Path) -> Code:
    place, message = problem.place, problem.message
    if message.startswith(_CANNOT_BE_OPENED):
        return codes.INDEX if _index_name(path) is not None else codes.UNREADABLE
    if place in (str(path), os.path.realpath(path)) or Path(place) == path.parent:
        return codes.UNREADABLE
    if INDEX_SUFFIX in place:
        return codes.INDEX_CONTENT if message.startswith("is not in") else codes.INDEX
    return codes.INDEX_CONTENT if message.startswith("is here, and") else codes.HEADER


def _index_name(path: Path) -> str | None:
    """The index that ``path`` is, or that a folder has."""
    if path.name.endswith(INDEX_SUFFIX):
        return path.name
    stems = (stem for stem in STEMS if path.is_dir() and (path / index_file(stem)).exists())
    return next((index_file(stem) for stem in stems), None)


def check_index(checkpoint: Checkpoint, notebook: Notebook) -> None:
    """The index, where there is one: its ``total_size``, and its names if the checkpoint was read without it."""
    name = _index_name(checkpoint.path)
    if name is None:
        return
    try:
        weight_map = read_shard_names(checkpoint.folder, name)
        total = _total_size(checkpoint.folder / name)
    except CheckpointError as error:
        notebook.add_error(codes.INDEX, error)
        return
    for tensor in weight_map:
        if tensor not in checkpoint:
            notebook.alike(codes.INDEX_CONTENT, f"{name}: weight_map.{tensor}", "is in no file of the checkpoint")
    for tensor in checkpoint:
        if weight_map.get(tensor) != checkpoint.spec(tensor).file:
            file = checkpoint.spec(tensor).file
            notebook.alike(codes.INDEX_CONTENT, f"{name}: weight_map.{tensor}", f"must say {file}, where the tensor is")
    held = sum(checkpoint.spec(tensor).nbytes for tensor in checkpoint)
    if total is not None and total != held:
        message = f"is {show(total)}, and the tensors take {held} bytes: write {held}"
        notebook.add(codes.TOTAL_SIZE, f"{name}: metadata.total_size", message)


def _total_size(file: Path) -> object:
    """What an index, which could be read, says of its tensors' size; None if nothing."""
    try:
        with file.open("rb") as source:
            stream = JsonStream(source, os.fstat(source.fileno()).st_size)
            for key, value in stream.members(nested=("weight_map",)):
                if value is OBJECT:
                    for _ in stream.members():
                        pass
                elif key == "metadata":
                    return value.get("total_size") if isinstance(value, dict) else None
    except (OSError, ValueError) as error:
        raise CheckpointError(problems=[Problem(file.name, f"cannot be read: {error}")]) from error
    return None


def check_companions(folder: Path, files: tuple[str, ...], content: Mapping[str, Any], notebook: Notebook) -> None:
    """Files beside the weights: other weights, pickles, code. None of them is opened."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if _is_file(entry))
    except OSError:
        return  # the files with the weights could be opened all the same
    stray = [name for name in names if name.endswith(".safetensors") and name not in files]
    if stray:
        notebook.add(codes.STRAY_FILE, stray[0], f"{_listed(stray)}: {codes.STRAY_FILE.way_out}")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        message = f"{_listed(pickles)} may hold a pickle, which was not opened; {codes.PICKLES.way_out}"
        notebook.add(codes.PICKLES, pickles[0], message)
    if content.get("auto_map") is not None:
        message = f"asks for code out of the folder, which was not run; {codes.CODE_IN_FOLDER.way_out}"
        notebook.add(codes.CODE_IN_FOLDER, "config.json: auto_map", message)
    code = [name for name in names if name.endswith(".py")]
    if code:
        message = f"{_listed(code)}: code, which was not run; {codes.CODE_IN_FOLDER.way_out}"
        notebook.add(codes.CODE_IN_FOLDER, code[0], message)


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMED])
    return f"{shown} and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else shown
