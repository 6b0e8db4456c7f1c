"""``expert_quantized_linear``: each expert's rows are those of ``quantized_linear``, bit for bit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from compressed_format import ops
from compressed_format.activations import WHOLE_TENSOR, WHOLE_TOKEN
from compressed_format.errors import OpArgumentError
from tests.checks import assert_same_bits
from tests.ops.processes import run_tests
from tests.ops.test_expert_kernels import FLOATS, LEVELS, STACKS, Stack, at_odd_address, inputs, routes, stack_of
from tests.ops.test_reference_ops import called, each_twin, op, opcheck, raises_alike

EXPERTS, ROWS, COLUMNS = 4, 33, 128
GROUP = 32

# Bits, whether they are floats, whether they are symmetric, what shares a scale; and whether scales are static.
ROUNDINGS: dict[str, tuple[int, bool, bool, int, bool]] = {
    "token": (8, False, True, WHOLE_TOKEN, False),
    "token asymmetric": (8, False, False, WHOLE_TOKEN, False),
    "token float8": (8, True, True, WHOLE_TOKEN, False),
    "tensor": (8, False, True, WHOLE_TENSOR, False),
    "tensor float8 static": (8, True, True, WHOLE_TENSOR, True),
    "tensor static": (8, False, True, WHOLE_TENSOR, True),
    "tensor static asymmetric": (8, False, False, WHOLE_TENSOR, True),
    "group": (8, False, True, GROUP, False),
    "group static": (8, False, True, GROUP, True),
}
KINDS = ("int8 channel", "float8 tensor", "packed 4", "packed 4 reordered", "int8 2:4", "plain")
every_rounding = pytest.mark.parametrize("rounding", list(ROUNDINGS))


def static_of(rounding: str, experts: int = EXPERTS) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    _, _, symmetric, size, static = ROUNDINGS[rounding]
    if not static:
        return None, None
    generator = torch.Generator().manual_seed(1)
    shape = (experts, COLUMNS // size if size > 0 else 1)
    scale = at_odd_address((torch.rand(shape, generator=generator) * 0.02 + 0.01).to(torch.bfloat16))
    zero_point = torch.randint(-20, 20, shape, generator=generator).to(torch.int8)
    return scale, None if symmetric else at_odd_address(zero_point)


def arguments(rounding: str, experts: torch.Tensor, stack: Stack, input: torch.Tensor) -> tuple[Any, ...]:
    return (input, *static_of(rounding), *ROUNDINGS[rounding][:4], experts, *stack.tensors, *stack.layout)


def one_by_one(rounding: str, experts: torch.Tensor, stack: Stack, input: torch.Tensor) -> torch.Tensor:
    scale, zero_point = static_of(rounding)
    output = input.new_zeros((*experts.shape, ROWS))
    for expert in range(EXPERTS):
        tokens, slots = (experts == expert).nonzero(as_tuple=True)
        if len(tokens):
            static = (None if tensor is None else tensor[expert] for tensor in (scale, zero_point))
            rest = (*ROUNDINGS[rounding][:4], *stack.of(expert))
            output[tokens, slots] = ops.quantized_linear(input[tokens], *static, *rest)
    return output


@every_rounding
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_computes_what_quantized_linear_does(kind: str, rounding: str) -> None:
    stack = stack_of(EXPERTS, ROWS, COLUMNS, **STACKS[kind])
    for (tokens, slots), dtype in zip([(1, 2), (7, 2), (40, 3), (3, 1)], [*FLOATS, torch.float64], strict=True):
        given = rounding, routes(tokens, slots, EXPERTS), stack, inputs(tokens, COLUMNS, dtype)
        assert_same_bits(ops.expert_quantized_linear(*arguments(*given)), one_by_one(*given))


@every_rounding
def test_it_is_close_to_its_reference(rounding: str) -> None:
    """Whose products of rounded values are summed in another order, and each of whose values is rounded before."""
    stack = stack_of(EXPERTS, ROWS, COLUMNS, **STACKS["float8 tensor" if "float8" in rounding else "int8 channel"])
    given = arguments(rounding, routes(9, 2, EXPERTS), stack, inputs(9, COLUMNS, torch.float32))
    expected = op("expert_quantized_linear", "_reference")(*given)
    difference = ops.expert_quantized_linear(*given) - expected
    assert difference.norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("rounding", ["token", "tensor static asymmetric", "tensor"])
def test_inputs_and_stacks_of_every_stride(rounding: str) -> None:
    stack = stack_of(2 * EXPERTS, ROWS, COLUMNS, **STACKS["int8 channel"])
    odd = Stack(tuple(None if tensor is None else tensor[1::2] for tensor in stack.tensors), stack.layout)
    input, experts = inputs(9, COLUMNS), routes(9, 2, EXPERTS)
    expected = one_by_one(rounding, experts, odd, input)
    wide = torch.full((9, COLUMNS + 8), torch.nan, dtype=input.dtype)
    wide[:, 5 : 5 + COLUMNS] = input
    for given in (at_odd_address(input), wide[:, 5 : 5 + COLUMNS], input.T.contiguous().T):
        for index in (experts, experts.T.contiguous().T):
            assert_same_bits(ops.expert_quantized_linear(*arguments(rounding, index, odd, given)), expected)


def test_nothing_to_compute() -> None:
    stack = stack_of(EXPERTS, ROWS, COLUMNS, **STACKS["int8 channel"])
    for tokens, slots in ((0, 2), (3, 0)):
        given = arguments("token", routes(tokens, slots, EXPERTS), stack, inputs(tokens, COLUMNS))
        assert ops.expert_quantized_linear(*given).shape == (tokens, slots, ROWS)
    for rounding in ("token", "tensor"):  # with and without kernels for many experts
        nobody = torch.full((2, 2), EXPERTS)
        output = ops.expert_quantized_linear(*arguments(rounding, nobody, stack, inputs(2, COLUMNS)))
        assert output.shape == (2, 2, ROWS)
        assert output.count_nonzero() == 0


def test_the_number_of_threads_changes_no_bit() -> None:
    threads = torch.get_num_threads()
    try:
        for kind, rounding in (("int8 channel", "token"), ("float8 tensor", "tensor float8 static")):
            stack = stack_of(EXPERTS, 515, COLUMNS, **STACKS[kind])
            for tokens in (1, 6, 70):
                given = arguments(rounding, routes(tokens, 2, EXPERTS), stack, inputs(tokens, COLUMNS))
                results = []
                for count in (1, 2):
                    torch.set_num_threads(count)
                    results.append(ops.expert_quantized_linear(*given))
                assert_same_bits(*results)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set(level: str) -> None:
    """The level is read once a process; a level that the machine lacks runs the highest that it has."""
    tests = "what_quantized_linear_does or every_stride or close_to"
    run_tests(level, __file__, tests)


# What torch expects of an op -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["token", "tensor static asymmetric", "tensor"])
@each_twin
def test_gradients_pass_through_the_rounding(rounding: str, twin: str) -> None:
    stack = stack_of(EXPERTS, ROWS, COLUMNS, **STACKS["int8 channel"])
    ours, plain = (inputs(5, COLUMNS, torch.float32).requires_grad_() for _ in range(2))
    experts, upstream = routes(5, 2, EXPERTS), torch.randn(5, 2, ROWS)
    op("expert_quantized_linear", twin)(*arguments(rounding, experts, stack, ours)).backward(upstream)
    ops.expert_linear(plain, experts, *stack.tensors, *stack.layout).backward(upstream)
    assert_same_bits(ours.grad, plain.grad)


@pytest.mark.parametrize("rounding", ["token", "tensor static asymmetric", "tensor"])
def test_opcheck(rounding: str) -> None:
    stack = stack_of(EXPERTS, ROWS, COLUMNS, **STACKS["int8 channel"])
    input = inputs(4, COLUMNS, torch.float32).requires_grad_()
    opcheck(op("expert_quantized_linear"), arguments(rounding, routes(4, 2, EXPERTS), stack, input))


def test_it_compiles_without_a_graph_break() -> None:
    stack = stack_of(EXPERTS, ROWS, COLUMNS, **STACKS["int8 channel"])

    def program(input: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        weights, experts = scores.topk(2)
        output = ops.expert_quantized_linear(*arguments("token", experts, stack, input * 2))
        return (output * weights.unsqueeze(-1)).sum(dim=1)

    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5, 17):
        input = inputs(tokens, COLUMNS, torch.float32).requires_grad_()
        scores = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
        expected, actual = program(input, scores), compiled(input, scores)
        torch.testing.assert_close(actual, expected)
        (gradient,), (expected_gradient,) = (torch.autograd.grad(y.sum(), input) for y in (actual, expected))
        torch.testing.assert_close(gradient, expected_gradient)


NAME = "expert_quantized_linear"
SMALL = torch.zeros(2, COLUMNS)
BAD: list[tuple[dict[int, Any], str]] = [
    ({0: SMALL.int()}, "input must have a float dtype, not torch.int32"),
    ({0: SMALL[:, 1:]}, "input must be [tokens, 128], not [2, 127]"),
    ({0: SMALL.unsqueeze(0)}, "experts must have a row for each of the 1 tokens, not 2"),
    ({1: torch.ones(EXPERTS)}, "input_scale must have a row for each of 4 experts, not [4]"),
    ({1: torch.ones(3, 1)}, "input_scale must have a row for each of 4 experts, not [3, 1]"),
    ({1: torch.ones(4, 2)}, "input_scale must have shape [1]"),
    ({2: torch.ones(4)}, "input_zero_point must have a row for each of 4 experts, not [4]"),
    ({5: False, 2: None}, "input_zero_point must have shape [1]"),
    ({3: 9}, "input_bits must lie in 1 to 8 (8 for floats), not 9"),
    ({6: 7}, "input_group_size must be 0, -1 or divide the 128 columns of input, not 7"),
    ({7: torch.zeros(2, 1)}, "experts must be int64 [tokens, experts of each]"),
    ({8: torch.zeros(4, ROWS, 3, dtype=torch.int8)}, "weight must have 128 elements a row"),
    ({9: torch.ones(2, ROWS, 1)}, "weight must be stacked for one and the same number of experts"),
    ({13: 0}, "bits must lie in 1 to 8, not 0"),
]


@each_twin
@pytest.mark.parametrize(("changes", "message"), BAD)
def test_arguments_that_it_does_not_take(changes: dict[int, Any], message: str, twin: str) -> None:
    stack = stack_of(EXPERTS, ROWS, COLUMNS, **STACKS["int8 channel"])
    given = list(arguments("tensor static", torch.zeros(2, 1, dtype=torch.int64), stack, SMALL))
    for index, value in changes.items():
        given[index] = value
    raises_alike(called(NAME, twin), tuple(given), f"{NAME}: {re.escape(message)}")


@pytest.mark.parametrize("wrong", [-1, EXPERTS + 1])
def test_there_are_no_other_experts(wrong: int) -> None:
    stack = stack_of(EXPERTS, ROWS, COLUMNS, **STACKS["int8 channel"])
    given = arguments("token", torch.tensor([[wrong]]), stack, inputs(1, COLUMNS))
    with pytest.raises(OpArgumentError, match=f"^{NAME}: experts must lie in 0 to 3, or be 4 for none"):
        ops.expert_quantized_linear(*given)
