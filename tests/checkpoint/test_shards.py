"""How tensors are spread over files and ordered in them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressed_format.checkpoint.header import byte_size
from compressed_format.checkpoint.shards import order_for_alignment, parse_shard_size, plan_shards, shard_names
from compressed_format.dtypes import DTYPES
from compressed_format.errors import CheckpointError


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1),
        (5_000_000_000, 5_000_000_000),
        ("17", 17),
        ("17B", 17),
        (" 5GB ", 5_000_000_000),
        ("5 GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("1GiB", 2**30),
        ("2TiB", 2**41),
        ("1.5GB", 1_500_000_000),
        ("0.001KB", 1),
    ],
)
def test_sizes(size: int | str, expected: int) -> None:
    assert parse_shard_size(size) == expected


@pytest.mark.parametrize(
    "size", [0, -1, True, 1.5, None, "", "GB", "0GB", "-1GB", "5Gb", "5gb", "5 G B", "1e9", "1,5GB", "5PB", "9" * 99]
)
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(CheckpointError, match=r"max_shard_size: .* is no size"):
        parse_shard_size(size)


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_plan(sizes: list[int], limit: int) -> None:
    named = [(str(number), size) for number, size in enumerate(sizes)]
    shards = plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == [name for name, _ in named]
    size_of = dict(named)
    for shard in shards:
        filled = sum(size_of[name] for name in shard)
        assert filled <= limit or len(shard) == 1
    assert all(shard for shard in shards) or len(shards) == 1
    # Nothing that would have fitted was cut off.
    for shard, following in itertools.pairwise(shards):
        assert sum(size_of[name] for name in shard) + size_of[following[0]] > limit


def test_names() -> None:
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(7)[0] == "model-00001-of-00007.safetensors"
    assert shard_names(100_000)[-1] == "model-100000-of-100000.safetensors"


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 40), max_size=2).map(tuple))))
def test_order_aligns_what_can_be_aligned(entries: list[tuple[str, tuple[int, ...]]]) -> None:
    specs = {str(number): entry for number, entry in enumerate(entries)}
    order = order_for_alignment(list(specs), specs)
    assert sorted(order) == sorted(specs)
    position = 0
    for name in order:
        size = byte_size(*specs[name])
        assert position % (64 if size % 64 == 0 else DTYPES[specs[name][0]].bits // 8) == 0
        position += size
    whole = [name for name in specs if byte_size(*specs[name]) % 64 == 0]
    assert order[: len(whole)] == whole
    rest = order[len(whole) :]
    for bits in {DTYPES[specs[name][0]].bits for name in rest}:
        same = [int(name) for name in rest if DTYPES[specs[name][0]].bits == bits]
        assert same == sorted(same)


def test_byte_size() -> None:
    assert byte_size("bfloat16", ()) == 2
    assert byte_size("int64", (3, 5)) == 8 * math.prod((3, 5))
    assert byte_size("bool", (7, 0)) == 0
