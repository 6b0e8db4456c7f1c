"""Which tensor goes into which file, and in which order."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

from frozendict import frozendict

from compressed_format.checkpoint.header import ALIGNMENT, byte_size
from compressed_format.checkpoint.index import Stem, single_file
from compressed_format.dtypes import DTYPES
from compressed_format.errors import CheckpointError, Problem

__all__ = ["order_for_alignment", "parse_shard_size", "plan_shards", "shard_names"]

_UNITS: frozendict[str, int] = frozendict(
    {"B": 1}
    | {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
    | {f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)}
)
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?) ?([A-Za-z]*)")


def parse_shard_size(size: int | str) -> int:
    """The number of bytes that ``5_000_000_000``, ``"5GB"`` or ``"1.5GiB"`` stands for.

    Raises :class:`CheckpointError` for anything else, and for less than one byte.
    """
    count = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        # Exact units only: "Gb" means gigabits to some.
        count = int(Decimal(match[1]) * _UNITS.get(match[2] or "B", 0))
    if count < 1:
        units = ", ".join(_UNITS)
        message = f"{size!r} is no size: give a positive number of bytes, alone or in a string with one of {units}"
        raise CheckpointError(problems=[Problem("max_shard_size", message)])
    return count


def plan_shards(sizes: Iterable[tuple[str, int]], max_shard_size: int) -> list[list[str]]:
    """Names in the given order, cut where the next tensor's bytes would exceed ``max_shard_size``.

    A tensor larger than that stands alone. There is always at least one shard, if an empty one.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes:
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_names(count: int, stem: Stem = "model") -> list[str]:
    """The file names of ``count`` shards, as the Hugging Face libraries number them."""
    if count == 1:
        return [single_file(stem)]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def order_for_alignment(names: Sequence[str], specs: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """The order of one shard's tensors in its data; ``specs`` gives dtype name and shape of each.

    The format allows no holes, so order is the only means: what is a multiple of 64 bytes long comes first, in the
    given order, and keeps all of its kind aligned; the rest follows by falling item size, which aligns each to its
    items.
    """

    def rank(name: str) -> int:
        dtype, shape = specs[name]
        return 0 if byte_size(dtype, shape) % ALIGNMENT == 0 else 1_000 - DTYPES[dtype].bits

    return sorted(names, key=rank)
