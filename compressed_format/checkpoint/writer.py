"""Writing a checkpoint: safetensors files, an index where there are several, and whatever else belongs beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frozendict import frozendict

from compressed_format.checkpoint.header import build_header, byte_size
from compressed_format.checkpoint.index import STEMS, Stem, build_index, file_name_problem, index_file, single_file
from compressed_format.checkpoint.publish import publishing
from compressed_format.checkpoint.shards import order_for_alignment, parse_shard_size, plan_shards, shard_names
from compressed_format.dtypes import DTYPES
from compressed_format.errors import CheckpointError, Problem

if TYPE_CHECKING:
    import torch

__all__ = ["write_checkpoint"]

_CHUNK_BYTES = 64 * 1024 * 1024
"""Written between two reports of progress."""

_RESERVED = re.compile(rf"({'|'.join(STEMS)})(\.safetensors(\.index\.json)?|-\d{{5,}}-of-\d{{5,}}\.safetensors)")


def write_checkpoint(
    destination: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    files: Mapping[str, bytes | Path] = frozendict(),
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    metadata: Mapping[str, str] = frozendict({"format": "pt"}),
    stem: Stem = "model",
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write tensors of any shape, device and stride, and further files, as the folder ``destination``: whole or not.

    The tensors go into ``model.safetensors``, or into shards of at most ``max_shard_size`` bytes of tensors each
    (an integer, or such as ``"5GB"`` or ``"1GiB"``; a larger tensor gets a shard of its own) with an index. They are
    read one at a time, so a mapping may make each on demand; it is asked twice, once for dtypes and shapes.
    ``files`` gives the content, or a file to copy, for each further name, such as ``config.json`` or ``code/x.py``.
    ``metadata`` is written into each shard; ``stem`` takes the place of ``model`` in the names of files. The same
    arguments give the same bytes.

    A destination that holds anything is refused unless ``overwrite`` is true, and then replaced as a whole, with
    all that is in it; tensors that are mapped from it stay valid. ``progress`` is called with the bytes of tensors
    written so far and in total. Whatever it raises ends the save, as does an interrupt: the destination is then as
    it was before.

    Raises :class:`CheckpointError` for arguments that cannot be written, with all of them in ``problems`` and before
    anything is, and for what the disk refuses; :class:`CheckpointExistsError`; and :class:`CheckpointLockedError`
    while another process writes the same destination.
    """
    limit = parse_shard_size(max_shard_size)
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    problems = [*_file_problems(files), *_metadata_problems(metadata)]
    for name, tensor in tensors.items():
        problem = _tensor_problem(name, tensor)
        if problem is not None:
            problems.append(Problem(str(name), problem))
        else:
            specs[name] = _spec(tensor)
    if problems:
        raise CheckpointError("cannot be written as a checkpoint:", _printable(problems))
    sizes = {name: byte_size(*spec) for name, spec in specs.items()}
    shards = [order_for_alignment(names, specs) for names in plan_shards(sizes.items(), limit)]
    headers = [build_header(((name, *specs[name]) for name in names), metadata) for names in shards]
    shard_files = shard_names(len(shards), stem)
    total = sum(sizes.values())
    written = 0
    with publishing(destination, overwrite=overwrite) as folder:
        for file, header, names in zip(shard_files, headers, shards, strict=True):
            with folder.create(file) as append:
                append(header)
                for name in names:
                    for chunk in _chunks(name, tensors[name], specs[name]):
                        append(chunk)
                        written += len(chunk)
                        if progress is not None:
                            progress(written, total)
        if len(shards) > 1:
            weight_map = {name: file for file, names in zip(shard_files, shards, strict=True) for name in names}
            with folder.create(index_file(stem)) as append:
                append(build_index(weight_map, total))
        for file, content in files.items():
            folder.copy(file, content)


def _spec(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _chunks(name: str, tensor: torch.Tensor, spec: tuple[str, tuple[int, ...]]) -> Iterator[memoryview]:
    """The tensor's bytes, row-major, without a copy where it lies so in the CPU's memory."""
    import torch

    if _spec(tensor) != spec:
        raise CheckpointError(problems=[Problem(name, f"was {spec} when it was first asked for, now {_spec(tensor)}")])
    # Conjugated and negated views are a flag on bytes that do not have it applied.
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel() == 0:
        return
    if flat.stride(0) != 1:
        # A single element counts as contiguous whatever its stride, but a view as bytes wants a stride of 1.
        flat = flat.clone(memory_format=torch.contiguous_format)
    data = flat.view(torch.uint8).numpy().data
    for start in range(0, len(data), _CHUNK_BYTES):
        yield data[start : start + _CHUNK_BYTES]


def _tensor_problem(name: Any, tensor: Any) -> str | None:
    """Why this cannot be written, or ``None``."""
    import torch

    if not isinstance(name, str) or name == "__metadata__" or not _is_unicode(name):
        return "is no name for a tensor: give a string of valid Unicode, other than __metadata__"
    if not isinstance(tensor, torch.Tensor):
        return f"is of the type {type(tensor).__name__}, not a tensor"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"is a {type(tensor).__name__}, which holds no plain memory: convert it to a torch.Tensor"
    if torch.nn.parameter.is_lazy(tensor):
        return "is not initialised yet: call forward once"
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"is {kind}, and the format holds dense tensors only"
    if tensor.device.type == "meta":
        return "is on the meta device and has no values: load it first"
    if tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
        return "has no memory any more: its storage was freed, as sharding libraries do"
    if _spec(tensor)[0] not in DTYPES:
        return f"has the dtype {tensor.dtype}, and the format holds {', '.join(sorted(DTYPES))}"
    return None


def _metadata_problems(metadata: Mapping[Any, Any]) -> Iterable[Problem]:
    for key, value in metadata.items():
        if not all(isinstance(text, str) and _is_unicode(text) for text in (key, value)):
            yield Problem(f"metadata[{key!r}]", "must be a string of valid Unicode, as must its key")


def _file_problems(files: Mapping[Any, Any]) -> Iterable[Problem]:
    names = {name for name in files if isinstance(name, str)}
    for name, content in files.items():
        place = f"files[{name!r}]"
        if not isinstance(name, str):
            yield Problem(place, "the name must be a string")
        elif reason := file_name_problem(name):
            yield Problem(place, f"the name {reason}")
        elif _RESERVED.fullmatch(name.partition("/")[0]):
            yield Problem(
                place, f"the name is that of a file of tensors: {single_file('model')}, its shards and their index"
            )
        elif inside := names.intersection(str(parent) for parent in Path(name).parents):
            yield Problem(place, f"{min(inside)!r} cannot be both a file and the folder of this one")
        if isinstance(content, Path):
            if not content.is_file():
                yield Problem(place, f"{content} is no file that can be copied")
        elif not isinstance(content, bytes):
            yield Problem(place, f"give bytes, or a pathlib.Path to copy, not the type {type(content).__name__}")


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: not with half a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _printable(problems: Iterable[Problem]) -> Iterator[Problem]:
    """With places that any terminal can show, though what is wrong may be just that."""
    for problem in problems:
        yield Problem(problem.place.encode("utf-8", "backslashreplace").decode("utf-8"), problem.message)
