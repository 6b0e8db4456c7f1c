"""The header of a safetensors file: eight bytes of length, then JSON, then the tensors without holes.

``build_header`` and ``parse_header`` are inverse to each other and need no torch.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compressed_format.checkpoint.strict_json import parse_object
from compressed_format.dtypes import DTYPES, DTYPES_BY_SAFETENSORS_CODE
from compressed_format.errors import CheckpointError, Problem

__all__ = ["ALIGNMENT", "LENGTH_BYTES", "MAX_HEADER_BYTES", "TensorSpec", "build_header", "byte_size", "parse_header"]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts, so what is written here must stay below it, too."""
ALIGNMENT = 64
"""Data starts at a multiple of this: a cache line, and the widest vector register of any CPU."""

_METADATA = "__metadata__"
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_LARGEST_SIZE = 2**63 - 1


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint, as its header tells it.

    ``dtype`` is torch's name without ``torch.``; ``file`` is the shard's name relative to the checkpoint's folder;
    the bytes of the tensor are ``start`` to ``stop`` of that file, little-endian and row-major.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor takes in the file."""
        return self.stop - self.start


def byte_size(dtype: str, shape: Iterable[int]) -> int:
    """How many bytes a tensor of this dtype name and shape takes."""
    size = DTYPES[dtype].bits // 8
    for length in shape:
        size *= length
    return size


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The header, with its length field and padding, of tensors ``(name, dtype name, shape)`` in the order of the data.

    Raises :class:`CheckpointError` when it would be longer than the safetensors library reads.
    """
    members: dict[str, Any] = {}
    if metadata:
        members[_METADATA] = dict(sorted(metadata.items()))
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + byte_size(dtype, shape)
        code = DTYPES[dtype].safetensors_code
        members[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header of one file would take {len(text)} bytes, and readers stop at {MAX_HEADER_BYTES}: "
            "choose a smaller max_shard_size"
        )
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def parse_header(text: bytes, *, file: str, file_size: int) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors, in the order of their data, and the metadata of a header.

    ``text`` is the JSON without its length field, ``file_size`` the size of the whole file, and ``file`` the name
    for specs and messages. Raises :class:`CheckpointError` with every problem of the header.
    """
    try:
        members = parse_object(text)
    except ValueError as error:
        raise CheckpointError(problems=[Problem(file, f"its header cannot be read: {error}")]) from error
    problems: list[Problem] = []
    metadata = members.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        problems.append(Problem(f"{file}: {_METADATA}", "must be an object whose values are all strings"))
    data_start = LENGTH_BYTES + len(text)
    tensors: dict[str, TensorSpec] = {}
    for name, entry in members.items():
        spec = _parse_entry(entry, file, data_start, file_size)
        if isinstance(spec, str):
            problems.append(Problem(f"{file}: {name}", spec))
        else:
            tensors[name] = spec
    if not problems:  # with an entry missing, everything behind it would look like a hole
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
        problems.extend(_layout_problems(tensors, file, data_start, file_size))
    if problems:
        raise CheckpointError(problems=problems)
    return tensors, metadata


def _parse_entry(entry: Any, file: str, data_start: int, file_size: int) -> TensorSpec | str:
    """The spec of one entry, or what is wrong with it."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        return f"must be an object with exactly the keys {', '.join(sorted(_ENTRY_KEYS))}"
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES_BY_SAFETENSORS_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        return f"unknown dtype {reprlib.repr(code)}; known are {', '.join(sorted(DTYPES_BY_SAFETENSORS_CODE))}"
    if not _is_list_of_sizes(shape):
        return f"shape {reprlib.repr(shape)} must be a list of integers from 0 to 2**63 - 1"
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {reprlib.repr(offsets)} must be two integers, the first not above the second"
    # Python's integers do not overflow, but torch's do, also where another dimension is zero. Stopping early keeps
    # the product small however many dimensions there are.
    size = dtype.bits // 8
    for length in shape:
        size *= max(length, 1)
        if size > _LARGEST_SIZE:
            return f"shape {reprlib.repr(shape)} is larger than any memory"
    size = 0 if 0 in shape else size
    if size != offsets[1] - offsets[0]:
        return f"shape {reprlib.repr(shape)} of {dtype.name} takes {size} bytes, data_offsets {offsets} span another"
    if data_start + offsets[1] > file_size:
        return f"data_offsets {offsets} reach past the end of the {file_size - data_start} bytes of data"
    return TensorSpec(dtype.name, tuple(shape), file, data_start + offsets[0], data_start + offsets[1])


def _layout_problems(tensors: Mapping[str, TensorSpec], file: str, position: int, file_size: int) -> Iterable[Problem]:
    for name, spec in tensors.items():
        if spec.start != position:
            what = "overlaps the tensor before it" if spec.start < position else "leaves a hole before it"
            yield Problem(f"{file}: {name}", f"starts at byte {spec.start} of the file, not at {position}: it {what}")
        position = max(position, spec.stop)
    if position != file_size:
        yield Problem(file, f"its tensors end at byte {position}, the file at {file_size}")


def _is_list_of_sizes(value: Any) -> bool:
    # type() and not isinstance(): true and false are no sizes.
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _LARGEST_SIZE for item in value)
