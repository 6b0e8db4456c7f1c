"""The header of a safetensors file: eight bytes of length, then JSON, then the tensors without holes.

``build_header`` and ``parse_header`` are inverse to each other and need no torch.
"""

from __future__ import annotations

import io
import json
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

from compressed_format.checkpoint.collection import collection_paused
from compressed_format.checkpoint.json_stream import count_bytes, read_members
from compressed_format.dtypes import DTYPES, DTYPES_BY_SAFETENSORS_CODE
from compressed_format.errors import CheckpointError, Problem

__all__ = [
    "ALIGNMENT",
    "LENGTH_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_TENSORS",
    "MOST_PROBLEMS",
    "TensorSpec",
    "build_header",
    "byte_size",
    "parse_header",
    "read_header",
    "show_name",
]

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""What the safetensors library accepts, so what is written here must stay below it, too."""
MAX_TENSORS = 2**18
"""In one file. Knowing of a tensor takes some 300 bytes, whatever its size; the largest mixtures of experts that there
are have as many tensors in all of their files."""
MOST_PROBLEMS = 100
"""Listed of one file. A file in which everything is wrong must not fill the memory with words about it."""
ALIGNMENT = 64
"""Data starts at a multiple of this: a cache line, and the widest vector register of any CPU."""

_METADATA = "__metadata__"
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_LARGEST_SIZE = 2**63 - 1
_INTEGERS = frozenset({int})
_LONGEST_NAME = 300
_TOO_MANY = f"it has more than {MAX_TENSORS} tensors: split the file into shards"


class TensorSpec(NamedTuple):
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
    """:func:`read_header` of ``text``, the JSON without its length field."""
    return read_header(io.BytesIO(text), len(text), file=file, file_size=file_size)


def read_header(
    source: BinaryIO, length: int, *, file: str, file_size: int
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The tensors, in the order of their data, and the metadata of a header.

    ``source`` stands where its JSON begins, which takes ``length`` bytes and is never held whole; ``file_size`` is the
    size of the whole file, and ``file`` the name for specs and messages. Raises :class:`CheckpointError` with every
    problem of the header, or the first :data:`MOST_PROBLEMS` of them.
    """
    problems: list[Problem] = []
    metadata: dict[str, str] | None = None
    tensors: dict[str, TensorSpec] = {}
    kinds: _Kinds = {}
    beyond, first_beyond = 0, None
    data_start = LENGTH_BYTES + length
    try:
        with collection_paused():
            if count_bytes(source, length, b"{") > 2 + MAX_TENSORS:  # the header itself, its metadata
                raise ValueError(_TOO_MANY)
            for name, entry in read_members(source, length):
                if name == _METADATA:
                    if metadata is not None:
                        raise ValueError(f"the key {_METADATA!r} occurs twice in one object")
                    metadata = entry
                    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
                        metadata = {}
                        message = "must be an object whose values are all strings"
                        problems.append(Problem(f"{file}: {_METADATA}", message))
                    continue
                if name in tensors:
                    raise ValueError(f"the key {reprlib.repr(name)} occurs twice in one object")
                if len(tensors) == MAX_TENSORS:
                    raise ValueError(_TOO_MANY)
                spec = _parse_entry(entry, file, data_start, kinds)
                if isinstance(spec, str):
                    problems.append(Problem(f"{file}: {show_name(name)}", spec))
                    if len(problems) == MOST_PROBLEMS:
                        raise CheckpointError(problems=problems)
                    spec = _UNREADABLE
                elif spec.stop > file_size:
                    beyond, first_beyond = beyond + 1, first_beyond or (name, spec)
                    spec = _UNREADABLE
                tensors[name] = spec
    except ValueError as error:
        raise CheckpointError(problems=[Problem(file, f"its header cannot be read: {error}")]) from error
    if first_beyond is not None:
        name, spec = first_beyond
        offsets = [spec.start - data_start, spec.stop - data_start]
        message = f"data_offsets {offsets} reach past the end of the {file_size - data_start} bytes of data"
        others = f", and those of {beyond - 1} more tensors do, too" if beyond > 1 else ""
        message += f"{others}: the file is cut off, or its header wrong; download or save it again"
        problems.append(Problem(f"{file}: {show_name(name)}", message))
    if not problems:  # with an entry missing, everything behind it would look like a hole
        in_order = all(
            first.start <= second.start and first.stop <= second.stop
            for first, second in zip(tensors.values(), islice(tensors.values(), 1, None), strict=False)
        )
        if not in_order:
            tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
        problems.extend(islice(_layout_problems(tensors, file, data_start, file_size), MOST_PROBLEMS))
    if problems:
        raise CheckpointError(problems=problems)
    return tensors, metadata or {}


def show_name(name: str) -> str:
    """A tensor's name for messages: as it is, unless it is absurdly long or would do things to a terminal."""
    return name if len(name) <= _LONGEST_NAME and name.isprintable() else reprlib.repr(name)


_UNREADABLE = TensorSpec("", (), "", 0, 0)  # in the place of an entry that is wrong, so that its name is known


_Kinds = dict[tuple[object, ...], tuple[str, tuple[int, ...], int]]
"""The dtype, shape and bytes of tensors, by the code and shape in their entries: a model's tensors are of few kinds."""


def _parse_entry(entry: Any, file: str, data_start: int, kinds: _Kinds) -> TensorSpec | str:
    """The spec of one entry, or what is wrong with it; ``kinds`` are those seen before."""
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        return f"must be an object with exactly the keys {', '.join(sorted(_ENTRY_KEYS))}"
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    lists = type(code) is str and type(shape) is list and type(offsets) is list and len(offsets) == 2
    if lists and set(map(type, shape + offsets)) == _INTEGERS and (kind := (code, *shape)) in kinds:
        name, sizes, nbytes = kinds[kind]
        start, stop = offsets
        if 0 <= start <= stop <= _LARGEST_SIZE and stop - start == nbytes:
            return TensorSpec(name, sizes, file, data_start + start, data_start + stop)
    dtype = DTYPES_BY_SAFETENSORS_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        return f"unknown dtype {reprlib.repr(code)}; known are {', '.join(sorted(DTYPES_BY_SAFETENSORS_CODE))}"
    if not _is_list_of_sizes(shape):
        return f"shape {reprlib.repr(shape)} must be a list of integers from 0 to 2**63 - 1"
    if not _is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {reprlib.repr(offsets)} must be two integers, the first not above the second"
    size = _byte_size(dtype.bits // 8, shape)
    if size is None:
        return f"shape {reprlib.repr(shape)} is larger than any memory"
    if size != offsets[1] - offsets[0]:
        return f"shape {reprlib.repr(shape)} of {dtype.name} takes {size} bytes, data_offsets {offsets} span another"
    sizes = tuple(shape)
    kind = (code, *sizes)
    kinds[kind] = dtype.name, sizes, size
    return TensorSpec(dtype.name, sizes, file, data_start + offsets[0], data_start + offsets[1])


def _layout_problems(tensors: Mapping[str, TensorSpec], file: str, position: int, file_size: int) -> Iterator[Problem]:
    for name, spec in tensors.items():
        if spec.start != position:
            what = "overlaps the tensor before it" if spec.start < position else "leaves a hole before it"
            yield Problem(
                f"{file}: {show_name(name)}", f"starts at byte {spec.start} of the file, not at {position}: it {what}"
            )
        position = max(position, spec.stop)
    if position != file_size:
        yield Problem(file, f"its tensors end at byte {position}, the file at {file_size}")


def _byte_size(itemsize: int, shape: list[int]) -> int | None:
    """What a tensor takes; None where that is larger than 64 bits can say."""
    if len(shape) < 4 and 0 not in shape:
        size = itemsize * math.prod(shape)
        return size if size <= _LARGEST_SIZE else None
    # Python's integers do not overflow, but torch's do, also where another dimension is zero. Stopping early keeps
    # the product small however many dimensions there are.
    size = itemsize
    for length in shape:
        size *= max(length, 1)
        if size > _LARGEST_SIZE:
            return None
    return 0 if 0 in shape else size


def _is_list_of_sizes(value: Any) -> bool:
    # By type() and not isinstance(), because true and false are no sizes; and without a loop, which for each of a
    # million short lists would take most of the time.
    if type(value) is not list or not set(map(type, value)) <= _INTEGERS:
        return False
    return not value or (min(value) >= 0 and max(value) <= _LARGEST_SIZE)
