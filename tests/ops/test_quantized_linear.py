"""``quantized_linear`` as an op: what it means, its gradients, and what torch and its callers may do with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressed_format import ops
from compressed_format.errors import OpArgumentError
from tests.checks import assert_product
from tests.ops.test_reference_ops import COLUMNS, ROUNDINGS, ROWS, WEIGHTS, opcheck, raises_alike

OP = torch.ops.compressed_format.quantized_linear.default
REFERENCE = torch.ops.compressed_format.quantized_linear_reference.default
KINDS = [
    "int8 channel",
    "int8 tensor",
    "int8 group asymmetric",
    "packed 4 group",
    "float8 channel",
    "plain",
    "int8 2:4",
]


def arguments_of(kind: str, rounding: str, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
    """All that follows the input."""
    weight = WEIGHTS[kind]()
    return (*ROUNDINGS[rounding], *weight.tensors, bias, *weight.layout)


def two_steps(input: torch.Tensor, *rest: Any) -> torch.Tensor:
    """As both ops are defined, in plain torch."""
    defined = torch.ops.compressed_format
    return defined.linear_reference(defined.fake_quantize_reference(input, *rest[:6]), *rest[6:])


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_rounding_and_then_linear(kind: str, rounding: str) -> None:
    generator = torch.Generator().manual_seed(1)
    bias = torch.randn(ROWS, generator=generator)
    for shape in ((COLUMNS,), (5, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS)):
        input = torch.randn(shape, generator=generator)
        arguments = arguments_of(kind, rounding, bias)
        expected = two_steps(input, *arguments)
        # Kernels scale at the end; the definition rounds the dense weight to the dtype of its scale, which is bfloat16
        # at the least: half a step of that for each product.
        dense = WEIGHTS[kind]().dense.float()
        rounded = ops.fake_quantize(input, *ROUNDINGS[rounding])
        bound = torch.nn.functional.linear(rounded.abs(), dense.abs(), bias.abs()) * 2**-8
        for function in (ops.quantized_linear, OP):
            output = function(input, *arguments)
            assert output.shape == expected.shape
            assert ((output - expected).abs() <= bound).all()
        torch.testing.assert_close(REFERENCE(input, *arguments), expected)


@pytest.mark.parametrize("rounding", ["token", "tensor static asymmetric", "token float8", "group static"])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, rounding: str) -> None:
    input, bias = torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    opcheck(OP, (input, *arguments_of(kind, rounding, bias)))
    opcheck(REFERENCE, (input, *arguments_of(kind, rounding, bias)))


@pytest.mark.parametrize("kind", ["int8 channel", "packed 4 group"])
def test_gradients_pass_through_the_rounding(kind: str) -> None:
    weight = WEIGHTS[kind]()
    input, bias = torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    upstream = torch.randn(2, 3, ROWS)
    ops.quantized_linear(input, *arguments_of(kind, "token", bias)).backward(upstream)
    torch.testing.assert_close(input.grad, upstream @ weight.dense.float())
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))
    input = torch.randn(2, COLUMNS)
    assert not ops.quantized_linear(input, *arguments_of(kind, "token")).requires_grad


def test_tensors_of_the_weight_have_no_gradient() -> None:
    arguments = list(arguments_of("int8 channel", "token"))
    arguments[7] = arguments[7].clone().requires_grad_()
    output = ops.quantized_linear(torch.randn(2, COLUMNS, requires_grad=True), *arguments)
    with pytest.raises(OpArgumentError, match="quantized_linear: scale must not require a gradient"):
        output.sum().backward()


@pytest.mark.parametrize("kind", ["int8 channel", "float8 channel"])
def test_autocast_rounds_first_and_then_casts(kind: str) -> None:
    input = torch.randn(5, COLUMNS)
    arguments = arguments_of(kind, "token" if kind.startswith("int8") else "token float8")
    with torch.autocast("cpu", torch.bfloat16):
        output = ops.quantized_linear(input, *arguments)
        assert ops.quantized_linear(input.bfloat16(), *arguments).dtype == torch.bfloat16
        assert ops.quantized_linear(input.double(), *arguments).dtype == torch.float64
    assert output.dtype == torch.bfloat16
    rounded = ops.fake_quantize(input, *arguments[:6])
    assert not torch.equal(rounded, ops.fake_quantize(input.bfloat16().float(), *arguments[:6]))
    assert_product(output, rounded.bfloat16(), WEIGHTS[kind]().dense)


def test_it_compiles_without_a_graph_break() -> None:
    def program(input: torch.Tensor) -> torch.Tensor:
        return ops.quantized_linear(input * 2, *arguments).relu()

    arguments = arguments_of("int8 channel", "token")
    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5, 17):
        input = torch.randn(tokens, COLUMNS).requires_grad_()
        expected, actual = program(input), compiled(input)
        torch.testing.assert_close(actual, expected)
        (gradient,), (expected_gradient,) = (torch.autograd.grad(y.sum(), input) for y in (actual, expected))
        torch.testing.assert_close(gradient, expected_gradient)


BAD: list[tuple[dict[int, Any], str]] = [
    ({0: torch.zeros(2, COLUMNS, dtype=torch.int32)}, "input must have a float dtype"),
    ({0: torch.zeros(2, COLUMNS + 1)}, "input must have 24 columns"),
    ({1: torch.ones(2)}, r"input_scale must have shape"),
    ({3: 9}, "input_bits must lie in 1 to 8"),
    ({3: 4, 4: True}, r"input_bits must lie in 1 to 8 \(8 for floats\)"),
    ({1: torch.ones(2, 1), 5: False}, "input_zero_point must have shape"),
    ({6: 7}, "input_group_size must be 0, -1 or divide"),
    ({7: torch.zeros(ROWS, COLUMNS, dtype=torch.int64)}, "weight must be int32 words"),
    ({8: torch.ones(ROWS + 1, 1)}, "scale must have shape"),
    ({12: torch.ones(ROWS + 1)}, "bias must be"),
    ({12: torch.ones(ROWS, dtype=torch.int8)}, "bias must be"),
    ({13: 0}, "bits must lie in 1 to 8"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_arguments_that_it_does_not_take(changes: dict[int, Any], message: str) -> None:
    arguments = [torch.zeros(2, COLUMNS), *arguments_of("int8 channel", "token")]
    for index, value in changes.items():
        arguments[index] = value
    raises_alike(ops.quantized_linear, tuple(arguments), f"quantized_linear: {message}")
