"""Configs, headers and indexes that were right and then changed: a typed error, or a result that can be written again.

The seed is in the name of what fails: run it again with ``FUZZ_SEED``.
"""

from __future__ import annotations

import json
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from compressed_format.checkpoint.header import build_header, parse_header
from compressed_format.checkpoint.index import build_index, parse_index
from compressed_format.config import QuantizationConfig
from compressed_format.config.json_text import parse_json
from compressed_format.errors import CompressedFormatError
from tests.fuzz.mutation import Mutator

ROOT = Path(__file__).parents[2]
SEED = int(os.environ.get("FUZZ_SEED", str(time.time_ns() % 2**32)))
SECONDS_OF_ONE = 2.0
BYTES = 100_000_000

TENSORS = [("a.weight_packed", "int32", (4, 8)), ("a.weight_scale", "bfloat16", (4, 1)), ("ä", "float8_e4m3fn", (0, 3))]
HEADERS = [
    build_header(TENSORS, {"format": "pt"})[8:].rstrip(),
    build_header([("x", "uint8", ())], {})[8:],
    build_header([(f"layers.{i}.weight", "float16", (2, i)) for i in range(20)], {})[8:],
]
INDEXES = [build_index({"a": "1.safetensors", "b": "2.safetensors"}, 8), b'{"weight_map": {}}']
_END = re.compile(rb"data_offsets\":\s*\[\d{1,18},\s*(\d{1,18})\]")
SHORT = {"config_groups": {"FP8": ["re:.*proj$"], "b": {"targets": ["x"], "sparsity": "2:4"}}, "ignore": ["lm_head"]}


def configs() -> list[bytes]:
    authored = [path.read_bytes() for path in sorted((ROOT / "schema" / "examples").glob("*.json"))]
    written = [json.dumps(QuantizationConfig.from_dict(json.loads(text)).to_dict()).encode() for text in authored]
    return [*authored, *written, json.dumps(SHORT).encode()]


def header(data: bytes) -> None:
    # As long as the entries say, or nothing but its length would be wrong with any file.
    ends = [int(end) for end in _END.findall(data)]
    size = 8 + len(data) + max(ends, default=0)
    tensors, metadata = parse_header(data, file="f", file_size=size)
    again = build_header([(name, spec.dtype, spec.shape) for name, spec in tensors.items()], metadata)
    read, same = parse_header(again[8:], file="f", file_size=size - 8 - len(data) + len(again))
    assert same == metadata
    assert [(name, spec[:2], spec.nbytes) for name, spec in read.items()] == [
        (name, spec[:2], spec.nbytes) for name, spec in tensors.items()
    ]


def index(data: bytes) -> None:
    weight_map = parse_index(data, place="index")
    assert parse_index(build_index(weight_map, 0), place="index") == weight_map


def checkpoint_config(data: bytes) -> None:
    content = parse_json(data, "config.json")
    config, _ = QuantizationConfig.from_checkpoint(content)
    assert QuantizationConfig.from_checkpoint(config.to_dict())[0] == config.replace(unknown={})


def authors_config(data: bytes) -> None:
    config = QuantizationConfig.from_dict(parse_json(data, "w4a16.json"))
    assert QuantizationConfig.from_checkpoint(config.to_dict())[0] == config


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def fuzz(target: Callable[[bytes], None], seeds: list[bytes], seconds: float) -> None:
    mutator = Mutator(seeds, SEED)
    before, end, count = resident(), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data, words = mutator.draw(), b""
        count += 1
        start = time.thread_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target(data)
        except CompressedFormatError as error:
            words = str(error).encode()
        except BaseException as error:
            raise AssertionError(f"FUZZ_SEED={SEED}, input {count}: {data[:3000]!r}") from error
        assert len(words) < 1_000_000, f"FUZZ_SEED={SEED}, input {count}: {data[:3000]!r}"
        assert time.thread_time() - start < SECONDS_OF_ONE, f"FUZZ_SEED={SEED}, input {count} is slow: {data[:3000]!r}"
        if count % 200 == 0:
            assert resident() - before < BYTES, f"FUZZ_SEED={SEED}, {count} inputs"
    assert count > seconds  # a fuzzer that does nothing finds nothing


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "header": (header, lambda: HEADERS),
    "index": (index, lambda: INDEXES),
    "checkpoint": (checkpoint_config, configs),
    "author": (authors_config, configs),
}


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz(target: str) -> None:
    function, seeds = TARGETS[target]
    fuzz(function, seeds(), 5.0)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_for_long(target: str) -> None:
    function, seeds = TARGETS[target]
    fuzz(function, seeds(), 75.0)


def test_the_seeds_are_right() -> None:
    for text in configs():
        QuantizationConfig.from_dict(parse_json(text, "seed"))
    for text in HEADERS:
        header(text)
    for text in INDEXES:
        index(text)
