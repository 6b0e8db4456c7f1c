"""A range of rows or groups is that part of the whole, in every format and strategy, and nothing else is touched."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from compressed_format import QuantizationConfig, compress, save_compressed
from compressed_format.errors import FormatError
from compressed_format.modules.base import compressed_modules
from compressed_format.reading import CheckpointReader, StoredModule, open_checkpoint

ROWS, COLUMNS = 70, 192

WEIGHTS: dict[str, dict[str, Any]] = {
    "int4 group": {"num_bits": 4, "group_size": 32},
    "int4 group asymmetric": {"num_bits": 4, "group_size": 32, "symmetric": False},
    "int3 group asymmetric": {"num_bits": 3, "group_size": 48, "symmetric": False},
    "int5 group of 24": {"num_bits": 5, "group_size": 24},
    "int4 channel asymmetric": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "int4 tensor": {"num_bits": 4, "strategy": "tensor"},
    "FP8 channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "FP8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "FP8 block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
    "FP8 ragged block": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 128]},
}
SPARSE: dict[str, dict[str, Any]] = {
    "2:4 FP8": {"weights": WEIGHTS["FP8 channel"], "sparsity": "2:4"},
    "2:4 dense": {"sparsity": "2:4"},
}
BITMASK = {"format": "sparse-bitmask", "targets": ["Linear"], "sparsity_structure": "unstructured"}


def _saved(folder: Path, group: dict[str, Any], **further: Any) -> tuple[StoredModule, torch.Tensor, CheckpointReader]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) > 0.4)
    groups = {"group_0": {"targets": ["Linear"], **group}} if group else {}
    compress(model, QuantizationConfig.from_dict({"config_groups": groups, **further}))
    save_compressed(model, folder)
    reader = open_checkpoint(folder)
    (compressed,) = compressed_modules(model).values()
    return reader.modules["0"], compressed.dequantized_weight(), reader


CASES = {name: {"weights": weights} for name, weights in WEIGHTS.items()} | SPARSE


@pytest.fixture(scope="module", params=[*CASES, "sparse-bitmask", "sparse-bitmask FP8 block"])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StoredModule, torch.Tensor]:
    folder = tmp_path_factory.mktemp("stored") / "model"
    with (
        pytest.warns(UserWarning, match="sparse")
        if "2:4" in request.param or "bitmask" in request.param
        else nullcontext()
    ):
        if "bitmask" in request.param:
            group = {"weights": WEIGHTS["FP8 block"]} if "FP8" in request.param else {}
            return _saved(folder, group, sparsity_config=BITMASK)[:2]
        return _saved(folder, CASES[request.param])[:2]


def _bounds(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=_bounds(ROWS))
def test_rows_are_those_of_the_whole(stored: tuple[StoredModule, torch.Tensor], rows: tuple[int, int]) -> None:
    module, dense = stored
    first, last = rows
    assert torch.equal(module.dense(rows=rows), dense[first:last])
    args = module.assignment.scheme.weights if module.assignment and module.assignment.scheme else None
    step = args.block_structure[0] if args is not None and args.block_structure else 1
    if any(row % step and row != ROWS for row in rows):
        with pytest.raises(FormatError, match=f"blocks of {step} rows"):
            module.quantized(rows=rows)
        return
    quantized = module.quantized(rows=rows)
    assert quantized.shape == (last - first, COLUMNS)
    assert torch.equal(module.layout.dequantize(quantized), dense[first:last])


def test_groups_are_those_of_the_whole(stored: tuple[StoredModule, torch.Tensor]) -> None:
    module, dense = stored
    args = module.assignment.scheme.weights if module.assignment and module.assignment.scheme else None
    size = 0 if args is None else args.group_size or (args.block_structure or (0, 0))[1]
    if not size:
        with pytest.raises(FormatError, match="has no groups"):
            module.quantized(groups=(0, 1))
        return
    count = -(-COLUMNS // size)
    for first in range(count + 1):
        for last in range(first, count + 1):
            part = dense[32:64, first * size : last * size]
            assert torch.equal(module.dense(rows=(32, 64), groups=(first, last)), part)
            assert torch.equal(module.layout.dequantize(module.quantized(rows=(32, 64), groups=(first, last))), part)
    with pytest.raises(FormatError, match=f"has {count} groups"):
        module.dense(groups=(0, count + 1))


def test_rows_outside_are_refused(stored: tuple[StoredModule, torch.Tensor]) -> None:
    for rows in ((0, ROWS + 1), (-1, 3), (5, 4)):
        with pytest.raises(FormatError, match=f"has {ROWS} rows"):
            stored[0].quantized(rows=rows)
