"""``expert_linear``: each token through the weights of its experts, of every kind that ``linear`` takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from compressed_format import ops
from compressed_format.config import CompressionFormat
from compressed_format.errors import OpArgumentError
from compressed_format.formats import SPARSITY_FORMATS
from compressed_format.modules.experts import stack_tensors
from tests.checks import assert_same_bits
from tests.ops.test_reference_ops import (
    COLUMNS,
    ROWS,
    WEIGHTS,
    Weight,
    called,
    dense_weight,
    each_twin,
    every_weight,
    op,
    opcheck,
    raises_alike,
)

EXPERTS = 3
NONE = EXPERTS  # the expert that stands for none
SOME = ["packed 4 group asymmetric", "packed 4 reordered", "float8 block", "int8 tensor", "int8 2:4", "plain bitmask"]


def stacked(build: Callable[..., Weight], experts: int = EXPERTS) -> Weight:
    """The weights of all experts, each with values (and zeros, and orders of columns) of its own."""
    each = [build(seed=expert) for expert in range(experts)]
    tensors = [
        None if parts[0] is None else stack_tensors("compressed" if parts[0].ndim == 1 else "", parts)
        for parts in zip(*(weight.tensors for weight in each), strict=True)
    ]
    return Weight(tuple(tensors), each[0].layout, torch.stack([weight.dense for weight in each]))


def ragged_weight(seed: int = 0) -> Weight:
    """Plain values of which every expert has another number that are not zero."""
    weight = dense_weight(seed=seed)
    weight[weight < 0.4 * seed] = 0
    tensors = SPARSITY_FORMATS[CompressionFormat.SPARSE_BITMASK].encode(weight)
    return Weight((tensors["compressed"], None, None, None, tensors["bitmask"]), (8, COLUMNS, 1, COLUMNS), weight)


def routes(tokens: int, slots: int, highest: int = NONE, seed: int = 0) -> torch.Tensor:
    """Which experts tokens go to: any of them, or none."""
    return torch.randint(0, highest + 1, (tokens, slots), generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int, dtype: torch.dtype = torch.float64, seed: int = 2) -> torch.Tensor:
    return torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def one_by_one(input: torch.Tensor, experts: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """What the op is to compute, a token and a slot at a time."""
    none = input.new_zeros(dense.shape[1])
    rows = [
        functional.linear(token, dense[expert].to(token.dtype)) if expert < len(dense) else none
        for token, row in zip(input, experts.tolist(), strict=True)
        for expert in row
    ]
    return torch.stack(rows).reshape(*experts.shape, -1) if rows else input.new_zeros((*experts.shape, dense.shape[1]))


# Values --------------------------------------------------------------------------------------------------------------


@every_weight
@each_twin
def test_each_token_goes_through_the_weights_of_its_experts(kind: str, twin: str) -> None:
    weight = stacked(WEIGHTS[kind])
    for tokens, slots in ((0, 2), (1, 1), (1, 3), (9, 2)):
        input, experts = inputs(tokens), routes(tokens, slots)
        output = op("expert_linear", twin)(input, experts, *weight.tensors, *weight.layout)
        assert (output.dtype, output.shape) == (torch.float64, (tokens, slots, ROWS))
        torch.testing.assert_close(output, one_by_one(input, experts, weight.dense), rtol=1e-12, atol=1e-12)


@each_twin
def test_experts_with_more_and_with_fewer_zeros(twin: str) -> None:
    """They are padded to the longest, and padding is never read."""
    weight = stacked(ragged_weight)
    values = [int(dense.count_nonzero()) for dense in weight.dense]
    assert len(set(values)) == EXPERTS
    weight.tensors[0][1, values[1] :] = torch.nan
    weight.tensors[0][2, values[2] :] = torch.nan
    input, experts = inputs(9), routes(9, 2)
    output = op("expert_linear", twin)(input, experts, *weight.tensors, *weight.layout)
    torch.testing.assert_close(output, one_by_one(input, experts, weight.dense), rtol=1e-12, atol=1e-12)


@each_twin
def test_the_expert_that_stands_for_none(twin: str) -> None:
    weight = stacked(WEIGHTS["packed 4"])
    experts = torch.tensor([[NONE, 1], [NONE, NONE]])
    output = op("expert_linear", twin)(inputs(2), experts, *weight.tensors, *weight.layout)
    assert output[0, 0].count_nonzero() == output[1].count_nonzero() == 0
    assert output[0, 1].count_nonzero() == ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["packed 4 group", "float8 block", "int8 channel"])
def test_the_dtype_is_that_of_the_input(kind: str, dtype: torch.dtype) -> None:
    weight = stacked(WEIGHTS[kind])
    input, experts = inputs(5, dtype), routes(5, 2, highest=EXPERTS - 1)
    output = ops.expert_linear(input, experts, *weight.tensors, *weight.layout)
    assert output.dtype == dtype
    exact = one_by_one(input.double(), experts, weight.dense.double())
    magnitude = one_by_one(input.double().abs(), experts, weight.dense.double().abs())
    # Weights may be rounded as the dense ones are, or not at all.
    eps = max(torch.finfo(dtype).eps, torch.finfo(weight.tensors[1].dtype).eps)
    assert ((output.double() - exact).abs() <= 4 * eps * magnitude).all()


def test_one_expert() -> None:
    weight = stacked(WEIGHTS["packed 4 group asymmetric"], experts=1)
    input = inputs(4)
    output = ops.expert_linear(input, torch.zeros(4, 1, dtype=torch.int64), *weight.tensors, *weight.layout)
    torch.testing.assert_close(output[:, 0], input @ weight.dense[0].double().T, rtol=1e-12, atol=1e-12)


def test_experts_that_no_token_goes_to_are_not_read() -> None:
    weight = stacked(WEIGHTS["packed 4"])
    words, scale, *rest = weight.tensors
    scale[1] = torch.nan
    experts = torch.tensor([[0, 2], [2, NONE]])
    output = ops.expert_linear(inputs(2), experts, words, scale, *rest, *weight.layout)
    assert output.isfinite().all()
    assert ops.expert_linear(inputs(2), experts.clamp(max=1), words, scale, *rest, *weight.layout).isnan().any()


@pytest.mark.parametrize("kind", SOME)
def test_slices_of_a_larger_stack(kind: str) -> None:
    """Tensors that are mapped or split begin anywhere, and are not contiguous."""
    weight = stacked(WEIGHTS[kind], experts=2 * EXPERTS)
    odd = tuple(None if tensor is None else tensor[1::2] for tensor in weight.tensors)
    wide = inputs(6, seed=4).repeat(1, 2)[:, :COLUMNS]
    experts = routes(6, 4)[:, ::2]
    assert not wide.is_contiguous()
    assert not experts.is_contiguous()
    output = ops.expert_linear(wide, experts, *odd, *weight.layout)
    torch.testing.assert_close(output, one_by_one(wide, experts, weight.dense[1::2]), rtol=1e-12, atol=1e-12)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*list(WEIGHTS)[::3], "packed 4 reordered asymmetric"])
@each_twin
def test_gradients_are_those_of_the_dense_weights(kind: str, twin: str) -> None:
    weight = stacked(WEIGHTS[kind])
    for tokens, slots in ((0, 2), (1, 3), (9, 2)):
        input, experts = inputs(tokens), routes(tokens, slots)
        upstream = torch.randn(tokens, slots, ROWS, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        ours, plain = input.clone().requires_grad_(), input.clone().requires_grad_()
        op("expert_linear", twin)(ours, experts, *weight.tensors, *weight.layout).backward(upstream)
        picked = torch.cat((weight.dense.double(), torch.zeros(1, ROWS, COLUMNS, dtype=torch.float64)))[experts]
        torch.einsum("ti,tkoi->tko", plain, picked).backward(upstream)
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-12, atol=1e-12)


@each_twin
def test_gradcheck(twin: str) -> None:
    weight = stacked(WEIGHTS["packed 4 group asymmetric"])
    input, experts = inputs(2).requires_grad_(), torch.tensor([[0, 1, 2], [2, NONE, 2]])
    function = op("expert_linear", twin)
    assert torch.autograd.gradcheck(lambda x: function(x, experts, *weight.tensors, *weight.layout), (input,))


def test_the_gradient_has_the_dtype_of_its_leaf() -> None:
    weight = stacked(WEIGHTS["int8 channel"])
    input = inputs(3, torch.bfloat16).requires_grad_()
    ops.expert_linear(input, routes(3, 2), *weight.tensors, *weight.layout).sum().backward()
    assert input.grad.dtype == torch.bfloat16
    assert not ops.expert_linear(inputs(3), routes(3, 2), *weight.tensors, *weight.layout).requires_grad


@each_twin
def test_tensors_of_the_weight_are_not_trained(twin: str) -> None:
    words, scale, *rest = stacked(WEIGHTS["packed 4"]).tensors
    output = op("expert_linear", twin)(
        inputs(2), routes(2, 1, 1), words, scale.clone().requires_grad_(), *rest, 4, COLUMNS, 1, COLUMNS
    )
    with pytest.raises(OpArgumentError, match="expert_linear: scale must not require a gradient"):
        output.sum().backward()


@pytest.mark.parametrize("kind", SOME)
@each_twin
def test_autocast_multiplies_in_its_dtype(kind: str, twin: str) -> None:
    weight = stacked(WEIGHTS[kind])
    experts, function = routes(5, 2), op("expert_linear", twin)
    input = inputs(5, torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = function(input, experts, *weight.tensors, *weight.layout)
        exact = function(input.double(), experts, *weight.tensors, *weight.layout)
    assert (output.dtype, exact.dtype) == (torch.bfloat16, torch.float64)
    rounded = input.detach().bfloat16().requires_grad_()
    expected = function(rounded, experts, *weight.tensors, *weight.layout)
    assert_same_bits(output, expected)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    assert input.grad.dtype == torch.float32
    assert_same_bits(input.grad, rounded.grad.float())


# What torch expects of an op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME)
def test_opcheck(kind: str) -> None:
    weight = stacked(WEIGHTS[kind])
    input = inputs(4, torch.float32).requires_grad_()
    opcheck(op("expert_linear"), (input, routes(4, 2), *weight.tensors, *weight.layout))


@each_twin
@pytest.mark.parametrize("kind", ["packed 4 group asymmetric", "plain bitmask"])
def test_opcheck_of_the_backward_and_of_empty_inputs(kind: str, twin: str) -> None:
    weight = stacked(WEIGHTS[kind])
    gradient = torch.randn(4, 2, ROWS)
    opcheck(op("expert_linear_backward", twin), (gradient, routes(4, 2), *weight.tensors, *weight.layout))
    opcheck(op("expert_linear", twin), (inputs(0, torch.float32), routes(0, 2), *weight.tensors, *weight.layout))


@pytest.mark.parametrize("kind", ["packed 4 group asymmetric", "float8 block", "int8 2:4"])
@each_twin
def test_it_compiles_without_a_graph_break(kind: str, twin: str) -> None:
    weight, function = stacked(WEIGHTS[kind]), op("expert_linear", twin)

    def program(input: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        weights, experts = scores.topk(2)
        output = function(input * 2, experts, *weight.tensors, *weight.layout)
        return (output.relu() * weights.unsqueeze(-1)).sum(dim=1)

    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5, 17):
        input = inputs(tokens, torch.float32, seed=tokens).requires_grad_()
        scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
        expected, actual = program(input, scores), compiled(input, scores)
        torch.testing.assert_close(actual, expected)
        (gradient,), (expected_gradient,) = (torch.autograd.grad(y.sum(), input) for y in (actual, expected))
        torch.testing.assert_close(gradient, expected_gradient)


@every_weight
def test_meta_tensors_have_shapes_and_dtypes(kind: str) -> None:
    weight = stacked(WEIGHTS[kind])
    meta = tuple(None if tensor is None else tensor.to("meta") for tensor in weight.tensors)
    input = torch.empty(5, COLUMNS, dtype=torch.float16, device="meta", requires_grad=True)
    output = ops.expert_linear(input, routes(5, 2).to("meta"), *meta, *weight.layout)
    assert (output.device.type, output.shape, output.dtype) == ("meta", (5, 2, ROWS), torch.float16)
    output.sum().backward()
    assert (input.grad.device.type, input.grad.shape, input.grad.dtype) == ("meta", (5, COLUMNS), torch.float16)


# Refusals ------------------------------------------------------------------------------------------------------------


@each_twin
@pytest.mark.parametrize(
    ("wrong", "message"),
    [([[0, -1]], "not in -1 to 0"), ([[NONE + 1, 1]], f"not in 1 to {NONE + 1}")],
)
def test_there_are_no_other_experts(wrong: list[list[int]], message: str, twin: str) -> None:
    weight = stacked(WEIGHTS["packed 4"])
    experts = torch.tensor(wrong)
    allowed = "experts must lie in 0 to 2, or be 3 for none, "
    with pytest.raises(OpArgumentError, match=f"^expert_linear: {allowed}{message}$"):
        called("expert_linear", twin)(inputs(1), experts, *weight.tensors, *weight.layout)
    with pytest.raises(OpArgumentError, match=f"^expert_linear_backward: {allowed}{message}$"):
        op("expert_linear_backward", twin)(torch.zeros(1, 2, ROWS), experts, *weight.tensors, *weight.layout)


FIRST = torch.zeros(2, 1, dtype=torch.int64)  # both tokens to the first expert


@each_twin
@pytest.mark.parametrize(
    ("input", "experts", "message"),
    [
        (
            torch.zeros(2, 24),
            FIRST.float(),
            "experts must be int64 [tokens, experts of each], not torch.float32 [2, 1]",
        ),
        (torch.zeros(2, 24), FIRST.int(), "experts must be int64 [tokens, experts of each], not torch.int32 [2, 1]"),
        (torch.zeros(2, 24), FIRST[:, 0], "experts must be int64 [tokens, experts of each], not torch.int64 [2]"),
        (torch.zeros(3, 24), FIRST, "experts must have a row for each of the 3 tokens, not 2"),
        (torch.zeros(2, 23), FIRST, "input must be [tokens, 24], not [2, 23]"),
        (torch.zeros(2, 1, 24), FIRST, "input must be [tokens, 24], not [2, 1, 24]"),
        (torch.zeros(()), FIRST, "input must be [tokens, 24], not []"),
        (torch.zeros(2, 24, dtype=torch.int8), FIRST, "input must have a float dtype, not torch.int8"),
    ],
)
def test_inputs_that_it_does_not_take(input: torch.Tensor, experts: torch.Tensor, message: str, twin: str) -> None:
    weight = stacked(WEIGHTS["packed 4 group asymmetric"])
    arguments = (input, experts, *weight.tensors, *weight.layout)
    raises_alike(called("expert_linear", twin), arguments, f"expert_linear: {re.escape(message)}")


STACKED = "weight must be stacked for one and the same number of experts, not for "
HIGH = {0: torch.zeros(3, 2, ROWS, 3, dtype=torch.int32), 1: torch.ones(3, 2, ROWS, 3), 2: None}


@each_twin
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({1: torch.ones(2, ROWS, 3)}, f"{STACKED}[3, 2, 3]"),
        ({1: torch.ones(())}, f"{STACKED}[3, 0, 3]"),
        ({0: torch.zeros(0, ROWS, 3, dtype=torch.int32)}, f"{STACKED}[0, 3, 3]"),
        ({0: torch.zeros((), dtype=torch.int32)}, f"{STACKED}[0, 3, 3]"),
        (HIGH, "weight must be a matrix for each expert, not 3-dimensional"),
        ({0: torch.zeros(3, ROWS, 4, dtype=torch.int32)}, "weight must have 3 elements a row for 24 columns"),
        ({0: torch.zeros(3, 3, dtype=torch.int32)}, "weight must have 3 elements a row for 24 columns"),
        ({1: None}, "scale is missing"),
        ({1: torch.ones(3, ROWS, 4)}, "scale must have shape [7, 3], or [1] for the whole weight, not [7, 4]"),
        ({1: torch.ones(3)}, "scale must have shape [7, 3], or [1] for the whole weight, not []"),
        ({2: torch.zeros(3, 2, 3, dtype=torch.int32)}, "zero_point must have shape [1, 3], not [2, 3]"),
        ({3: torch.zeros(3, 8, dtype=torch.int32)}, "g_idx must be int32 [24], not torch.int32 [8]"),
        ({5: 9}, "bits must lie in 1 to 8, not 9"),
    ],
)
def test_weights_that_it_does_not_take(changes: dict[int, Any], message: str, twin: str) -> None:
    weight = stacked(WEIGHTS["packed 4 group asymmetric"])
    arguments = [*weight.tensors, *weight.layout]
    for index, value in changes.items():
        arguments[index] = value
    given = (torch.zeros(2, COLUMNS), FIRST, *arguments)
    raises_alike(called("expert_linear", twin), given, f"expert_linear: {re.escape(message)}")
    given = (torch.zeros(2, 1, ROWS), FIRST, *arguments)
    raises_alike(op("expert_linear_backward", twin), given, f"expert_linear_backward: {re.escape(message)}")


def test_gradients_that_the_backward_does_not_take() -> None:
    weight = stacked(WEIGHTS["packed 4 group asymmetric"])
    arguments = (torch.zeros(2, 1, ROWS + 1), FIRST, *weight.tensors, *weight.layout)
    message = r"expert_linear_backward: gradient must be \[2, 1, 7\], not \[2, 1, 8\]"
    raises_alike(op("expert_linear_backward"), arguments, message)
