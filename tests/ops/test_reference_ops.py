"""The ops on weights and activations: what they compute, what they refuse, and what torch expects of an op."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compressed_format import ops
from compressed_format.blocks import block_shape
from compressed_format.config import CompressionFormat, QuantizationArgs
from compressed_format.errors import OpArgumentError
from compressed_format.formats import FORMATS, SPARSITY_FORMATS, prune_2_of_4
from compressed_format.quantization import dequantize, quantize
from tests.checks import assert_product, assert_same_bits

ROWS, COLUMNS = 7, 24
TWINS = ["", "_reference"]


class Weight(NamedTuple):
    """The arguments that describe a weight to an op, and the dense weight they stand for."""

    tensors: tuple[torch.Tensor | None, ...]  # weight, scale, zero_point, g_idx, bitmask
    layout: tuple[int, int, int, int]
    dense: torch.Tensor


def op(name: str, twin: str = "") -> Callable[..., torch.Tensor]:
    return getattr(torch.ops.compressed_format, name + twin).default


def called(name: str, twin: str = "") -> Callable[..., torch.Tensor]:
    """As users call it: native code has errors of one type only, and no others leave it."""
    return op(name, twin) if twin else getattr(ops, name)


def dense_weight(
    dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (ROWS, COLUMNS), seed: int = 0
) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized_weight(
    format: str,
    *,
    sparsity: str = "",
    dtype: torch.dtype = torch.float32,
    g_idx: bool = False,
    seed: int = 0,
    **fields: Any,
) -> Weight:
    """A weight in the tensors of a format, as a module holds them."""
    args = QuantizationArgs(**fields)
    weight = dense_weight(dtype, seed=seed)
    if sparsity:
        weight = prune_2_of_4(weight)
    order = None
    if g_idx:
        columns = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(seed + 1))
        order = (columns // args.group_size).to(torch.int32)
    quantized = quantize(weight, args, g_idx=order)
    tensors = FORMATS[CompressionFormat(format)].encode(quantized, args)
    if sparsity:
        tensors |= SPARSITY_FORMATS[CompressionFormat(sparsity)].encode(tensors.pop("weight"))
    names = next(name for name in ("weight_packed", "compressed", "weight") if name in tensors)
    names = (names, "weight_scale", "weight_zero_point", "weight_g_idx", "bitmask")
    layout = (args.num_bits, COLUMNS, *block_shape(args, weight.shape))
    return Weight(tuple(tensors.get(name) for name in names), layout, dequantize(quantized, args))


def plain_weight(*, sparsity: str = "", dtype: torch.dtype = torch.float32, seed: int = 0) -> Weight:
    weight, bitmask = dense_weight(dtype, seed=seed), None
    stored = weight
    if sparsity:
        weight = prune_2_of_4(weight)
        tensors = SPARSITY_FORMATS[CompressionFormat(sparsity)].encode(weight)
        stored, bitmask = tensors["compressed"], tensors["bitmask"]
    return Weight((stored, None, None, None, bitmask), (8, COLUMNS, 1, COLUMNS), weight)


PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
GROUP, BLOCK = {"strategy": "group", "group_size": 8}, {"strategy": "block", "block_structure": (4, 10)}
ASYMMETRIC = {"symmetric": False}

WEIGHTS: dict[str, Callable[..., Weight]] = {
    **{f"packed {bits}": partial(quantized_weight, PACK, num_bits=bits, strategy="channel") for bits in range(1, 9)},
    "packed 3 group asymmetric": partial(quantized_weight, PACK, num_bits=3, **GROUP, **ASYMMETRIC),
    "packed 4 group": partial(quantized_weight, PACK, num_bits=4, **GROUP, dtype=torch.bfloat16),
    "packed 4 group asymmetric": partial(quantized_weight, PACK, num_bits=4, **GROUP, **ASYMMETRIC),
    "packed 4 channel asymmetric": partial(quantized_weight, PACK, num_bits=4, strategy="channel", **ASYMMETRIC),
    "packed 4 tensor asymmetric": partial(quantized_weight, PACK, num_bits=4, strategy="tensor", **ASYMMETRIC),
    "packed 4 block asymmetric": partial(quantized_weight, PACK, num_bits=4, **BLOCK, **ASYMMETRIC),
    "packed 4 reordered": partial(quantized_weight, PACK, num_bits=4, **GROUP, g_idx=True),
    "packed 4 reordered asymmetric": partial(quantized_weight, PACK, num_bits=4, **GROUP, **ASYMMETRIC, g_idx=True),
    "int8 channel": partial(quantized_weight, INT, num_bits=8, strategy="channel", dtype=torch.float16),
    "int8 tensor": partial(quantized_weight, INT, num_bits=8, strategy="tensor"),
    "int8 group asymmetric": partial(quantized_weight, INT, num_bits=8, **GROUP, **ASYMMETRIC),
    "int8 block": partial(quantized_weight, INT, num_bits=8, **BLOCK),
    "int4 reordered": partial(quantized_weight, INT, num_bits=4, **GROUP, g_idx=True),
    "float8 tensor": partial(quantized_weight, FLOAT, num_bits=8, type="float", strategy="tensor"),
    "float8 channel": partial(quantized_weight, FLOAT, num_bits=8, type="float", strategy="channel"),
    "float8 block": partial(quantized_weight, FLOAT, num_bits=8, type="float", **BLOCK, dtype=torch.bfloat16),
    "float8 channel asymmetric": partial(
        quantized_weight, FLOAT, num_bits=8, type="float", strategy="channel", **ASYMMETRIC
    ),
    "plain": plain_weight,
    "plain bfloat16": partial(plain_weight, dtype=torch.bfloat16),
    "plain 2:4": partial(plain_weight, sparsity="sparse-24-bitmask"),
    "plain bitmask": partial(plain_weight, sparsity="sparse-bitmask"),
    "int8 2:4": partial(quantized_weight, INT, num_bits=8, strategy="channel", sparsity="sparse-24-bitmask"),
    "int8 bitmask group": partial(quantized_weight, INT, num_bits=8, **GROUP, sparsity="sparse-bitmask"),
    "float8 2:4": partial(
        quantized_weight, FLOAT, num_bits=8, type="float", strategy="channel", sparsity="sparse-24-bitmask"
    ),
}
every_weight = pytest.mark.parametrize("kind", list(WEIGHTS))
each_twin = pytest.mark.parametrize("twin", TWINS)

# Values --------------------------------------------------------------------------------------------------------------


@every_weight
@each_twin
def test_dequantize_is_what_the_format_decodes(kind: str, twin: str) -> None:
    weight = WEIGHTS[kind]()
    dense = op("dequantize", twin)(*weight.tensors, *weight.layout)
    assert_same_bits(dense, weight.dense)
    assert dense.is_contiguous()
    assert dense is not weight.tensors[0]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("strategy", ["channel", "group", "tensor", "block"])
def test_dequantize_stacks_of_matrices(bits: int, strategy: str) -> None:
    fields = {"group": GROUP, "block": BLOCK}.get(strategy, {"strategy": strategy})
    args = QuantizationArgs(num_bits=bits, **fields, **ASYMMETRIC)
    weight = dense_weight(shape=(3, ROWS, COLUMNS))
    quantized = quantize(weight, args)
    tensors = FORMATS[CompressionFormat.PACK_QUANTIZED].encode(quantized, args)
    arguments = tensors["weight_packed"], tensors["weight_scale"], tensors["weight_zero_point"], None, None
    layout = (bits, COLUMNS, *block_shape(args, weight.shape))
    assert_same_bits(ops.dequantize(*arguments, *layout), dequantize(quantized, args))


@every_weight
@each_twin
@pytest.mark.parametrize("shape", [(COLUMNS,), (5, COLUMNS), (2, 3, COLUMNS), (0, COLUMNS)])
def test_linear_is_that_of_the_dense_weight(kind: str, twin: str, shape: tuple[int, ...]) -> None:
    weight = WEIGHTS[kind]()
    input = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    bias = torch.randn(ROWS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for given in (None, bias):
        output = op("linear", twin)(input, *weight.tensors, given, *weight.layout)
        expected = torch.nn.functional.linear(input, weight.dense.to(torch.float64), given)
        assert output.dtype == torch.float64
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["packed 4 group", "int8 channel", "float8 block", "plain"])
def test_linear_computes_in_the_dtype_of_the_input(kind: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[kind]()
    input, bias = torch.randn(3, COLUMNS).to(dtype), torch.randn(ROWS)
    output = ops.linear(input, *weight.tensors, bias, *weight.layout)
    assert output.dtype == dtype
    assert_product(output, input, weight.dense, bias)


@every_weight
@each_twin
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 0), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding_is_rows_of_the_dense_weight(
    kind: str, twin: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    weight = WEIGHTS[kind]()
    indices = torch.randint(0, ROWS, shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    rows = op("embedding", twin)(indices, *weight.tensors, *weight.layout)
    assert_same_bits(rows, weight.dense[indices.to(torch.int64)])


@pytest.mark.parametrize("kind", ["packed 4 channel asymmetric", "float8 block", "plain", "plain bitmask"])
@pytest.mark.parametrize("index", [-1, ROWS])
def test_embedding_has_no_other_rows(kind: str, index: int) -> None:
    """As in torch's own; a negative index is none from the end."""
    weight = WEIGHTS[kind]()
    with pytest.raises(IndexError, match="out of range"):
        ops.embedding(torch.tensor([0, index]), *weight.tensors, *weight.layout)


@pytest.mark.parametrize("kind", ["packed 3", "int8 channel", "plain"])
def test_embedding_of_an_empty_table(kind: str) -> None:
    tensors, layout, _ = WEIGHTS[kind]()
    empty = tuple(None if tensor is None else tensor[:0] for tensor in tensors)
    assert ops.embedding(torch.zeros(0, dtype=torch.int64), *empty, *layout).shape == (0, COLUMNS)


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*list(WEIGHTS)[::3], "packed 4 reordered asymmetric"])
@each_twin
def test_gradients_of_linear_are_those_of_the_dense_weight(kind: str, twin: str) -> None:
    weight = WEIGHTS[kind]()
    generator = torch.Generator().manual_seed(5)
    input, bias, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, COLUMNS), (ROWS,), (2, 3, ROWS))
    )
    gradients = []
    for function in (
        lambda x, b: op("linear", twin)(x, *weight.tensors, b, *weight.layout),
        lambda x, b: torch.nn.functional.linear(x, weight.dense.to(torch.float64), b),
    ):
        leaves = input.clone().requires_grad_(), bias.clone().requires_grad_()
        function(*leaves).backward(upstream)
        gradients.append([leaf.grad for leaf in leaves])
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@each_twin
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradcheck_of_linear(twin: str, with_bias: bool) -> None:
    weight = WEIGHTS["packed 4 group asymmetric"]()
    input = torch.randn(2, COLUMNS, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(ROWS, dtype=torch.float64, requires_grad=True) if with_bias else None

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        return op("linear", twin)(leaves[0], *weight.tensors, leaves[1] if with_bias else None, *weight.layout)

    leaves = (input, bias) if with_bias else (input,)
    assert torch.autograd.gradcheck(function, leaves)


def test_gradients_have_the_dtypes_of_their_leaves() -> None:
    weight = WEIGHTS["int8 channel"]()
    input = torch.randn(3, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(ROWS, dtype=torch.float32, requires_grad=True)
    ops.linear(input, *weight.tensors, bias, *weight.layout).sum().backward()
    assert input.grad.dtype == torch.bfloat16
    assert bias.grad.dtype == torch.float32
    assert bias.grad.tolist() == [3.0] * ROWS


def test_only_what_is_asked_for_has_a_gradient() -> None:
    weight = WEIGHTS["packed 4"]()
    input = torch.randn(3, COLUMNS)
    bias = torch.randn(ROWS, requires_grad=True)
    ops.linear(input, *weight.tensors, bias, *weight.layout).sum().backward()
    assert input.grad is None
    assert bias.grad is not None
    assert not ops.linear(input, *weight.tensors, None, *weight.layout).requires_grad


@each_twin
@pytest.mark.parametrize("group", [0, -1, 8])
def test_the_gradient_of_rounding_passes_straight_through(twin: str, group: int) -> None:
    input = torch.randn(3, COLUMNS, requires_grad=True)
    upstream = torch.randn(3, COLUMNS)
    op("fake_quantize", twin)(input, None, None, 4, False, True, group).backward(upstream)
    assert torch.equal(input.grad, upstream)


# What torch expects of an op -----------------------------------------------------------------------------------------


def opcheck(function: Callable[..., torch.Tensor], arguments: tuple[Any, ...]) -> None:
    """:func:`torch.library.opcheck`, but for its test of the schema, which cannot compare float8 tensors: that
    arguments stay as they are, and that the result is none of them, is checked here then."""
    tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
    if all(tensor.dtype != torch.float8_e4m3fn for tensor in tensors):
        torch.library.opcheck(function, arguments)
        return
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(function, arguments, test_utils=tests)
    before = [tensor.detach().clone() for tensor in tensors]
    output = function(*arguments)
    for tensor, copy in zip(tensors, before, strict=True):
        assert_same_bits(tensor, copy)
        assert output.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@every_weight
def test_opcheck_of_dequantize(kind: str) -> None:
    weight = WEIGHTS[kind]()
    opcheck(op("dequantize"), (*weight.tensors, *weight.layout))


@every_weight
def test_opcheck_of_linear(kind: str) -> None:
    weight = WEIGHTS[kind]()
    input, bias = torch.randn(2, 3, COLUMNS, requires_grad=True), torch.randn(ROWS, requires_grad=True)
    opcheck(op("linear"), (input, *weight.tensors, bias, *weight.layout))


@every_weight
def test_opcheck_of_embedding(kind: str) -> None:
    weight = WEIGHTS[kind]()
    opcheck(op("embedding"), (torch.tensor([[1, 0], [3, 6]]), *weight.tensors, *weight.layout))


@pytest.mark.parametrize("kind", ["packed 4 group asymmetric", "float8 block", "int8 2:4"])
def test_opcheck_of_the_references(kind: str) -> None:
    weight = WEIGHTS[kind]()
    input = torch.randn(3, COLUMNS, requires_grad=True)
    opcheck(op("dequantize", "_reference"), (*weight.tensors, *weight.layout))
    opcheck(op("linear", "_reference"), (input, *weight.tensors, None, *weight.layout))
    opcheck(op("embedding", "_reference"), (torch.tensor(2), *weight.tensors, *weight.layout))


STATIC, GROUPS = torch.tensor([0.1]), torch.tensor([0.1, 0.2, 0.3])
ZERO, ZEROS = torch.tensor([3], dtype=torch.int8), torch.tensor([3, 0, -5], dtype=torch.int8)
ROUNDINGS = {
    "tensor": (None, None, 8, False, True, 0),
    "tensor asymmetric": (None, None, 8, False, False, 0),
    "tensor static": (STATIC, None, 8, False, True, 0),
    "tensor static asymmetric": (STATIC, ZERO, 8, False, False, 0),
    "token": (None, None, 8, False, True, -1),
    "token asymmetric int4": (None, None, 4, False, False, -1),
    "token float8": (None, None, 8, True, True, -1),
    "group": (None, None, 8, False, True, 8),
    "group static": (GROUPS, None, 8, True, True, 8),
    "group static asymmetric": (GROUPS, ZEROS, 8, False, False, 8),
}


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_fake_quantize(rounding: str, transposed: bool) -> None:
    input = torch.randn(COLUMNS, 3).T if transposed else torch.randn(2, 3, COLUMNS)
    opcheck(op("fake_quantize"), (input.detach().requires_grad_(), *ROUNDINGS[rounding]))


@pytest.mark.parametrize("twin", TWINS)
def test_opcheck_of_empty_inputs(twin: str) -> None:
    weight = WEIGHTS["packed 4"]()
    opcheck(op("fake_quantize", twin), (torch.zeros(COLUMNS, 0).T, None, None, 8, False, True, -1))
    opcheck(op("linear", twin), (torch.zeros(0, COLUMNS), *weight.tensors, None, *weight.layout))
    indices = torch.zeros(0, dtype=torch.int64)
    opcheck(op("embedding", twin), (indices, *weight.tensors, *weight.layout))


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
@each_twin
def test_fake_quantize_is_the_definition(rounding: str, twin: str) -> None:
    input = torch.randn(2, 3, COLUMNS, generator=torch.Generator().manual_seed(6))
    scale, zero_point, bits, is_float, _, group = ROUNDINGS[rounding]
    output = op("fake_quantize", twin)(input, *ROUNDINGS[rounding])
    values = input.reshape(6, -1, group) if group > 0 else input
    if scale is not None:
        scale, offset = scale.unsqueeze(-1), 0 if zero_point is None else zero_point.unsqueeze(-1)
        largest = 448 if is_float else 2 ** (bits - 1) - 1
        codes = (values / scale + offset).clamp(-448 if is_float else -largest - 1, largest)
        codes = codes.to(torch.float8_e4m3fn).float() if is_float else codes.round()
        assert torch.equal(output, ((codes - offset) * scale).reshape(input.shape))
    else:
        # A range found from the values: the error is at most a step of the widest range.
        dims = tuple(range(values.ndim)) if group == 0 else (-1,)
        span = (values.amax(dims, keepdim=True).clamp(min=0) - values.amin(dims, keepdim=True).clamp(max=0)) * 2
        error = (output.reshape(values.shape) - values).abs()
        assert (error <= (values.abs() / 8 if is_float else span / (2**bits - 1))).all()
        assert not torch.equal(output, input)


# Compiled, and without values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["packed 4 group asymmetric", "packed 3", "float8 block", "int8 2:4"])
def test_linear_compiles_without_a_graph_break(kind: str) -> None:
    weight = WEIGHTS[kind]()

    def program(input: torch.Tensor) -> torch.Tensor:
        rounded = ops.fake_quantize(input * 2, None, None, 8, False, True, -1)
        return ops.linear(rounded, *weight.tensors, None, *weight.layout).relu()

    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 5, 17):
        input = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(tokens)).requires_grad_()
        expected, actual = program(input), compiled(input)
        torch.testing.assert_close(actual, expected)
        (gradient,), (expected_gradient,) = (torch.autograd.grad(y.sum(), input) for y in (actual, expected))
        torch.testing.assert_close(gradient, expected_gradient)


def test_embedding_compiles_without_a_graph_break() -> None:
    weight = WEIGHTS["packed 4 group asymmetric"]()

    def program(indices: torch.Tensor) -> torch.Tensor:
        return ops.embedding(indices + 1, *weight.tensors, *weight.layout) * 2

    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 5):
        indices = torch.arange(count)
        assert torch.equal(compiled(indices), program(indices))


@every_weight
def test_meta_tensors_have_shapes_and_dtypes(kind: str) -> None:
    tensors, layout, dense = WEIGHTS[kind]()
    meta = tuple(None if tensor is None else tensor.to("meta") for tensor in tensors)
    found = ops.dequantize(*meta, *layout)
    assert (found.device.type, found.shape, found.dtype) == ("meta", dense.shape, dense.dtype)
    found = ops.linear(torch.empty(2, 3, COLUMNS, dtype=torch.float16, device="meta"), *meta, None, *layout)
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 3, ROWS), torch.float16)
    found = ops.embedding(torch.empty(2, 3, dtype=torch.int64, device="meta"), *meta, *layout)
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 3, COLUMNS), dense.dtype)
    found = ops.fake_quantize(torch.empty(4, COLUMNS, device="meta"), None, None, 8, False, True, -1)
    assert (found.device.type, found.shape) == ("meta", (4, COLUMNS))


# Refusals ------------------------------------------------------------------------------------------------------------


def raises_alike(function: Callable[..., Any], arguments: tuple[Any, ...], message: str) -> None:
    """The same typed error for real tensors, in inference mode, without values, and while a graph is traced."""
    fake = FakeTensorMode()
    places: list[tuple[Any, Callable[[torch.Tensor], torch.Tensor]]] = [
        (torch.no_grad(), torch.clone),
        (torch.inference_mode(), torch.clone),
        (torch.no_grad(), lambda tensor: tensor.to("meta")),
        (fake, fake.from_tensor),
    ]
    for mode, convert in places:
        with mode:
            converted = [convert(value) if isinstance(value, torch.Tensor) else value for value in arguments]
            with pytest.raises(OpArgumentError, match=f"^{message}"):
                function(*converted)


PACKED = WEIGHTS["packed 4 group asymmetric"]
BAD_WEIGHTS: list[tuple[str, dict[int, Any], str]] = [
    # what to put in place of which argument of the weight, and what the error says
    ("packed", {0: torch.zeros(ROWS, 3, dtype=torch.int64)}, "weight must be int32 words, int8 or"),
    ("packed", {0: torch.zeros(ROWS, 4, dtype=torch.int32)}, r"weight must have 3 elements a row for 24 columns"),
    ("packed", {0: torch.zeros(3, dtype=torch.int32)}, r"weight must have 3 elements a row for 24 columns"),
    ("packed", {0: torch.zeros(ROWS, 3, dtype=torch.int8)}, r"weight must have 24 elements a row for 24 columns"),
    ("packed", {5: 0}, "bits must lie in 1 to 8, not 0"),
    ("packed", {5: 9}, "bits must lie in 1 to 8, not 9"),
    ("packed", {6: -1}, "columns must not be negative, not -1"),
    ("packed", {6: 32}, "weight must have 4 elements a row for 32 columns"),
    ("packed", {7: 0}, "block_rows and block_columns must be positive, not 0 and 8"),
    ("packed", {8: -8}, "block_rows and block_columns must be positive, not 1 and -8"),
    ("packed", {1: None}, "scale is missing; only a weight of plain values goes without"),
    ("packed", {1: torch.ones(ROWS, 3, dtype=torch.int32)}, "scale must have a float dtype"),
    ("packed", {1: torch.ones(ROWS, 4)}, r"scale must have shape \[7, 3\], or \[1\]"),
    ("packed", {1: torch.ones(())}, r"scale must have shape \[7, 3\], or \[1\]"),
    ("packed", {2: torch.zeros(2, 3, dtype=torch.int32)}, r"zero_point must have shape \[1, 3\], not \[2, 3\]"),
    ("packed", {2: torch.zeros(1, 3, dtype=torch.int8)}, r"zero_point must have shape \[7, 3\], not \[1, 3\]"),
    ("packed", {1: torch.ones(1), 2: torch.zeros(1, dtype=torch.int32)}, "zero_point must not be packed where"),
    ("packed", {1: torch.ones(1), 2: torch.zeros(2, dtype=torch.int8)}, r"zero_point must have shape \[1\], not \[2\]"),
    ("packed", {3: torch.zeros(COLUMNS, dtype=torch.int64)}, r"g_idx must be int32 \[24\], not torch.int64 \[24\]"),
    ("packed", {3: torch.zeros(8, dtype=torch.int32)}, r"g_idx must be int32 \[24\], not torch.int32 \[8\]"),
    ("packed", {4: torch.zeros(ROWS, 3, dtype=torch.uint8)}, "bitmask goes with int8 or float8_e4m3fn codes or plain"),
    ("sparse", {4: torch.zeros(ROWS, 4, dtype=torch.uint8)}, r"bitmask must be uint8 \[rows, 3\], not torch.uint8"),
    ("sparse", {4: torch.zeros(ROWS, 3, dtype=torch.int8)}, r"bitmask must be uint8 \[rows, 3\], not torch.int8"),
    ("sparse", {4: torch.zeros(ROWS * 3, dtype=torch.uint8)}, r"bitmask must be uint8 \[rows, 3\]"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "message"), BAD_WEIGHTS)
@pytest.mark.parametrize("name", ["dequantize", "linear", "embedding"])
@each_twin
def test_weights_that_no_op_takes(kind: str, changes: dict[int, Any], message: str, name: str, twin: str) -> None:
    tensors, layout, _ = (PACKED if kind == "packed" else WEIGHTS["plain 2:4"])()
    arguments = [*tensors, *layout]
    for index, value in changes.items():
        arguments[index] = value
    if name == "linear":
        arguments = [torch.zeros(2, COLUMNS), *arguments[:5], None, *arguments[5:]]
    elif name == "embedding":
        arguments = [torch.tensor([0]), *arguments]
    raises_alike(called(name, twin), tuple(arguments), f"{name}: {message}")


@pytest.mark.parametrize(
    ("input", "bias", "message"),
    [
        (torch.zeros(2, COLUMNS, dtype=torch.int32), None, "input must have a float dtype, not torch.int32"),
        (torch.zeros(2, 23), None, r"input must have 24 columns, not shape \[2, 23\]"),
        (torch.zeros(()), None, r"input must have 24 columns, not shape \[\]"),
        (torch.zeros(2, COLUMNS), torch.zeros(8), r"bias must be \[7\] floats, not torch.float32 \[8\]"),
        (torch.zeros(2, COLUMNS), torch.zeros(7, 1), r"bias must be \[7\] floats"),
        (torch.zeros(2, COLUMNS), torch.zeros(7, dtype=torch.int8), r"bias must be \[7\] floats, not torch.int8"),
    ],
)
@each_twin
def test_inputs_that_linear_does_not_take(
    input: torch.Tensor, bias: torch.Tensor | None, message: str, twin: str
) -> None:
    weight = PACKED()
    raises_alike(called("linear", twin), (input, *weight.tensors, bias, *weight.layout), f"linear: {message}")


@each_twin
def test_stacks_of_matrices_are_dequantized_only(twin: str) -> None:
    weight, scale = torch.zeros(2, ROWS, 3, dtype=torch.int32), torch.ones(2, ROWS, 1)
    arguments = (weight, scale, None, None, None)
    layout = (4, COLUMNS, 1, COLUMNS)
    input, indices = torch.zeros(2, COLUMNS), torch.tensor([0])
    raises_alike(
        called("linear", twin), (input, *arguments, None, *layout), "linear: weight must be a matrix, not 3-dim"
    )
    raises_alike(
        called("embedding", twin), (indices, *arguments, *layout), "embedding: weight must be a matrix, not shape"
    )
    assert op("dequantize", twin)(*arguments, *layout).shape == (2, ROWS, COLUMNS)


@each_twin
def test_indices_that_embedding_does_not_take(twin: str) -> None:
    weight = PACKED()
    arguments = (torch.tensor([0.0]), *weight.tensors, *weight.layout)
    raises_alike(called("embedding", twin), arguments, "embedding: indices must be int64 or int32, not torch.float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 8, dtype=torch.int8), None, None, 8, False, True, 0), "input must have a float dtype"),
        ((torch.zeros(()), None, None, 8, False, True, 0), "input must have at least one dimension"),
        ((torch.zeros(8), None, None, 0, False, True, 0), r"bits must lie in 1 to 8 \(8 for floats\), not 0"),
        ((torch.zeros(8), None, None, 9, False, True, 0), r"bits must lie in 1 to 8 \(8 for floats\), not 9"),
        ((torch.zeros(8), None, None, 4, True, True, 0), r"bits must lie in 1 to 8 \(8 for floats\), not 4"),
        ((torch.zeros(8), None, None, 8, False, True, 3), "group_size must be 0, -1 or divide the 8 columns"),
        ((torch.zeros(8), None, None, 8, False, True, -2), "group_size must be 0, -1 or divide the 8 columns"),
        ((torch.zeros(2, 8), torch.ones(1), None, 8, False, True, -1), r"scale must have shape \[2, 1\], not \[1\]"),
        ((torch.zeros(8), torch.ones(2), None, 8, False, True, 0), r"scale must have shape \[1\], not \[2\]"),
        ((torch.zeros(8), torch.ones(1), None, 8, False, True, 4), r"scale must have shape \[2\], not \[1\]"),
        ((torch.zeros(8), torch.ones(1), None, 8, False, False, 0), r"zero_point must have shape \[1\] where codes"),
        ((torch.zeros(8), torch.ones(2), ZERO, 8, False, False, 4), r"zero_point must have shape \[2\] where codes"),
    ],
)
@each_twin
def test_arguments_that_fake_quantize_does_not_take(arguments: tuple[Any, ...], message: str, twin: str) -> None:
    raises_alike(called("fake_quantize", twin), arguments, f"fake_quantize: {message}")
