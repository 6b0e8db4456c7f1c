"""The files of a destination, laid out before any is written: which tensor goes where, down to the byte."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compressed_format.checkpoint.header import build_header, byte_size
from compressed_format.checkpoint.index import Stem, build_index, index_file
from compressed_format.checkpoint.shards import order_for_alignment, plan_shards, shard_names
from compressed_format.streaming.job import Part
from compressed_format.streaming.units import Placement

__all__ = ["OutputTensor", "Outputs", "layer_order", "place_tensors"]

_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True)
class OutputTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return byte_size(self.dtype, self.shape)


@dataclass(frozen=True)
class Outputs:
    """The files of tensors with their headers, where each tensor begins, and the index: None for a single file."""

    parts: dict[str, Part]
    places: dict[str, Placement]
    index: tuple[str, bytes] | None


def layer_order(name: str) -> list[tuple[int, str]]:
    """A key that sorts names as their layers follow each other: the tenth after the ninth."""
    parts = _DIGITS.split(name)  # words and numbers in turn; numbers of any length, and so by their lengths first
    numbers = [part.lstrip("0") for part in parts[1::2]]
    parts[1::2] = numbers
    lengths = [len(part) if at % 2 else 0 for at, part in enumerate(parts)]
    return list(zip(lengths, parts, strict=True))


def place_tensors(
    modules: Sequence[Sequence[OutputTensor]],
    *,
    max_shard_size: int,
    metadata: Mapping[str, str],
    stem: Stem = "model",
    single: str | None = None,
) -> Outputs:
    """Lay out the tensors of ``modules`` in this order; those of one module are in one file.

    ``single`` is the name of the only file; without it there are as many as ``max_shard_size`` bytes each need. Raises
    :class:`CheckpointError` for a header longer than readers take.
    """
    tensors = [tensor for module in modules for tensor in module]
    specs = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}
    if single is not None:
        shards, files = [[tensor.name for tensor in tensors]], [single]
    else:
        sizes = ((str(number), sum(tensor.nbytes for tensor in module)) for number, module in enumerate(modules))
        shards = [
            [tensor.name for number in numbers for tensor in modules[int(number)]]
            for numbers in plan_shards(sizes, max_shard_size)
        ]
        files = shard_names(len(shards), stem)
    parts, places, weight_map = {}, {}, {}
    for file, names in zip(files, shards, strict=True):
        ordered = order_for_alignment(names, specs)
        header = build_header(((name, *specs[name]) for name in ordered), metadata)
        position = len(header)
        for name in ordered:
            places[name] = Placement(file, position)
            weight_map[name] = file
            position += byte_size(*specs[name])
        parts[file] = Part(header, position)
    total = sum(tensor.nbytes for tensor in tensors)
    index = (index_file(stem), build_index(weight_map, total)) if len(files) > 1 else None
    return Outputs(parts, places, index)
