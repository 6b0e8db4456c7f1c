"""Where packed weights may be split: parts are whole tensors of the same format, and decode to parts of the weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressed_format import CompressedLinear, compress
from compressed_format.config import CompressionFormat, QuantizationConfig
from compressed_format.errors import UnsupportedFormatError
from compressed_format.formats import prune_2_of_4
from compressed_format.parallel.sharding import ShardPlan, plan_sharding
from tests.checks import assert_same_bits
from tests.models import seeded, weights, word_aligned

_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def _plan(layer: CompressedLinear, dim: int, parts: int, **fields: Any) -> ShardPlan:
    tensors = {name: value for name, value in layer._parameters.items() if value is not None}
    shape, scheme, sparsity = layer._weight_shape, layer.scheme, layer.sparsity
    return plan_sharding(tensors, shape, scheme, sparsity, dim, parts, place="some.layer", **fields)


def _layer(rows: int, columns: int, config: Any, *, sparse: bool = False) -> CompressedLinear:
    dense = seeded(nn.Linear, columns, rows)
    if sparse:
        dense.weight.data = prune_2_of_4(dense.weight.data)
    layer = compress(nn.Sequential(dense), config)[0]
    assert isinstance(layer, CompressedLinear)
    return layer


def _part(layer: CompressedLinear, plan: ShardPlan, rank: int) -> CompressedLinear:
    """The part of ``rank``, as a module of its own."""
    tensors = {}
    for name, dim in plan.splits.items():
        whole = layer._parameters[name].detach()
        tensors[name] = whole if dim is None else whole.chunk(plan.parts, dim=dim)[rank].contiguous()
    bias = tensors.pop("bias", None)
    first, last = plan.bounds(rank)
    shape = (last - first, layer.in_features) if plan.dim == 0 else (layer.out_features, last - first)
    part = CompressedLinear(
        tensors, shape, layer.scheme, layer.format, sparsity=layer.sparsity, bias=bias, dtype=torch.float32
    )
    bits, _, block_rows, _ = layer._layout
    part._layout = (bits, plan.columns(rank), block_rows, plan.block_columns)
    return part


def _check_parts(layer: CompressedLinear, plan: ShardPlan) -> None:
    """The parts put together are the tensors, and each decodes to its slice of the dense weight."""
    for name, dim in plan.splits.items():
        whole = layer._parameters[name].detach()
        if dim is not None:
            chunks = whole.chunk(plan.parts, dim=dim)
            assert len(chunks) == plan.parts
            assert_same_bits(torch.cat(chunks, dim=dim), whole, name)
    dense = layer.dequantized_weight()
    for rank in range(plan.parts):
        first, last = plan.bounds(rank)
        assert first < last
        expected = dense.narrow(plan.dim, first, last - first)
        assert_same_bits(_part(layer, plan, rank).dequantized_weight(), expected.contiguous(), f"part {rank}")
    assert plan.bounds(0)[0] == 0
    assert plan.bounds(plan.parts - 1)[1] == layer._weight_shape[plan.dim]


@st.composite
def _layers(draw: st.DrawFn) -> CompressedLinear:
    kind = draw(st.sampled_from(["packed", "int", "float", "2:4"]))
    sizes = st.integers(1, 40)
    rows, columns = draw(sizes), draw(sizes) * draw(st.sampled_from([1, 4, 8]))
    bits = draw(st.integers(1, 8)) if kind == "packed" else 8
    fields: dict[str, Any] = {"symmetric": draw(st.booleans())}
    strategies = ["tensor", "channel", "group"] if kind == "packed" else ["tensor", "channel", "group", "block"]
    fields["strategy"] = draw(st.sampled_from(strategies))
    if fields["strategy"] == "group":
        fields["group_size"] = draw(st.sampled_from([size for size in (1, 2, 4, 8, 16, 32) if columns % size == 0]))
    if fields["strategy"] == "block":
        fields["block_structure"] = [draw(st.integers(1, 16)), draw(st.integers(1, 16))]
    if kind in ("float", "2:4"):
        fields |= {"type": "float", "symmetric": True}
    config = weights(bits, **fields)
    if kind == "int":
        config["config_groups"]["group_0"]["input_activations"] = _TOKEN
    if kind == "2:4":
        columns = 4 * math.ceil(columns / 4)
        config = weights(8, type="float")
        config["config_groups"]["group_0"]["sparsity"] = "2:4"
    return _layer(rows, columns, config, sparse=kind == "2:4")


@given(_layers(), st.integers(0, 1), st.integers(1, 9))
def test_parts_decode_to_parts_of_the_weight(layer: CompressedLinear, dim: int, parts: int) -> None:
    try:
        plan = _plan(layer, dim, parts)
    except UnsupportedFormatError as error:
        message = str(error)
        size = layer._weight_shape[dim]
        assert message.startswith(f"some.layer: {size} {('rows', 'columns')[dim]} cannot be split over {parts}")
        # Every size that is said to work does.
        if "parallel sizes that work: " in message:
            for working in message.rpartition("parallel sizes that work: ")[2].split(", "):
                _check_parts(layer, _plan(layer, dim, int(working)))
        else:
            assert message.endswith("no parallel size works")
            for other in range(2, min(size, 12) + 1):
                with pytest.raises(UnsupportedFormatError):
                    _plan(layer, dim, other)
    else:
        _check_parts(layer, plan)


@pytest.mark.parametrize(
    ("rows", "columns", "fields", "dim", "parts", "message"),
    [
        (48, 64, {"strategy": "group", "group_size": 32}, 1, 4, "16, inside a group of weight_scale; .*: 2$"),
        (64, 40, {"strategy": "channel"}, 1, 2, "20, inside a word of weight_packed; .*: 5$"),
        (24, 64, {"strategy": "channel", "symmetric": False}, 0, 2, "12, inside a word of weight_zero_point; .*: 3$"),
        (6, 64, {"strategy": "channel"}, 0, 4, "a process would be left without any; .*: 2, 3, 6$"),
        (8, 7, {"strategy": "tensor"}, 1, 2, "4, inside a word of weight_packed; no parallel size works$"),
    ],
)
def test_a_cut_is_refused_and_names_the_sizes_that_work(
    rows: int, columns: int, fields: dict[str, Any], dim: int, parts: int, message: str
) -> None:
    with pytest.raises(UnsupportedFormatError, match=message):
        _plan(_layer(rows, columns, weights(4, **fields)), dim, parts)


def test_blocks_are_not_cut() -> None:
    config = weights(8, type="float", strategy="block", block_structure=[16, 16])
    layer = _layer(48, 64, config)
    with pytest.raises(UnsupportedFormatError, match=r"24, inside a block of weight_scale; .*: 3$"):
        _plan(layer, 0, 2)
    assert _plan(layer, 1, 4).splits["weight_scale"] == 1
    # One block is as high as the weight: whoever has some of its rows needs its scales.
    assert _plan(_layer(16, 64, config), 0, 2).splits["weight_scale"] is None


def test_what_is_one_for_all_is_replicated() -> None:
    layer = _layer(64, 64, weights(4, strategy="tensor", symmetric=False))
    for dim in (0, 1):
        splits = _plan(layer, dim, 2).splits
        assert [splits[name] for name in ("weight_scale", "weight_zero_point", "weight_shape")] == [None] * 3
        assert splits["weight_packed"] == dim
        assert splits["bias"] == (0 if dim == 0 else None)


def test_groups_of_activations_are_not_cut() -> None:
    config = weights(8)
    config["config_groups"]["group_0"]["input_activations"] = {
        "num_bits": 8, "type": "int", "strategy": "group", "group_size": 32, "dynamic": True,
    }  # fmt: skip
    layer = _layer(64, 96, config)
    with pytest.raises(UnsupportedFormatError, match=r"48, inside a group of input activations; .*: 3$"):
        _plan(layer, 1, 2)
    assert _plan(layer, 0, 2).parts == 2
    # Outputs of a Linear are its rows, those of an Embedding its columns.
    config["config_groups"]["group_0"]["output_activations"] = config["config_groups"]["group_0"].pop(
        "input_activations"
    )
    layer = _layer(96, 96, config)
    with pytest.raises(UnsupportedFormatError, match="group of output activations"):
        _plan(layer, 0, 2)
    assert _plan(layer, 1, 2).parts == 2
    with pytest.raises(UnsupportedFormatError, match="group of output activations"):
        _plan(layer, 1, 2, outputs=1)


def test_reordered_columns_take_all_scales_along() -> None:
    layer = _layer(64, 64, weights(4, strategy="group", group_size=16, symmetric=False))
    in_order = layer.dequantized_weight()
    groups = torch.arange(64, dtype=torch.int32) * 5 % 4
    layer._parameters["weight_g_idx"] = nn.Parameter(groups, requires_grad=False)
    assert not torch.equal(layer.dequantized_weight(), in_order)
    for dim in (0, 1):
        plan = _plan(layer, dim, 2)
        assert plan.splits["weight_g_idx"] == (0 if dim == 1 else None)
        assert plan.splits["weight_scale"] == (0 if dim == 0 else None)
        _check_parts(layer, plan)


def test_sparse_rows_of_different_lengths_are_refused() -> None:
    config = QuantizationConfig.from_dict(weights(8, type="float"))
    layer = _layer(8, 8, config)
    with pytest.raises(UnsupportedFormatError, match="as many values in a row as are not zero"):
        plan_sharding({}, (8, 8), layer.scheme, CompressionFormat.SPARSE_BITMASK, 0, 2, place="some.layer")


def test_older_layouts_are_refused() -> None:
    layer = _layer(64, 64, weights(3, strategy="channel", symmetric=False))
    tensors = {name: value.detach() for name, value in layer._parameters.items() if value is not None}
    codes = layer.quantized_weight().codes
    older = (
        {"weight_packed": word_aligned(codes, 3)},
        {"weight_zero_point": torch.zeros(64, 1, dtype=torch.int8)},
    )
    for change in older:
        with pytest.raises(UnsupportedFormatError, match=r"some\.layer: is stored in an older layout"):
            plan_sharding(tensors | change, (64, 64), layer.scheme, None, 0, 2, place="some.layer")
