"""Compressed modules: the tensors of the file as parameters, weights on demand, and all that torch does to modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressed_format import CompressedEmbedding, CompressedLinear, compress, ops
from compressed_format.activations import activation_group_size
from compressed_format.config import (
    CompressionFormat,
    QuantizationArgs,
    QuantizationConfig,
)
from compressed_format.errors import OpArgumentError, UnsupportedFormatError
from compressed_format.formats import FORMATS, prune_2_of_4
from compressed_format.formats.module import module_tensor_specs
from compressed_format.modules.base import CompressedModule, compressed_modules
from compressed_format.quantization import dequantize, quantize
from tests.checks import FLOATS, assert_product, assert_same_bits, assert_same_tensors

ROWS, COLUMNS = 13, 32


def int_args(bits: int, strategy: str, **fields: Any) -> dict[str, Any]:
    return {"num_bits": bits, "strategy": strategy, **({"group_size": 8} if strategy == "group" else {}), **fields}


def float_args(strategy: str, **fields: Any) -> dict[str, Any]:
    return {"num_bits": 8, "type": "float", "strategy": strategy, **fields}


TOKEN_INT8 = {"num_bits": 8, "strategy": "token", "dynamic": True}
TOKEN_FP8 = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}

# Each is a group of a hand-written config, without its targets.
PACKED = {
    f"int{bits} {strategy} {'symmetric' if symmetric else 'asymmetric'}": {
        "weights": int_args(bits, strategy, symmetric=symmetric),
        "format": "pack-quantized",
    }
    for bits in range(1, 9)
    for strategy in ("tensor", "channel", "group")
    for symmetric in (True, False)
}
OTHERS = {
    "int8 channel": {"weights": int_args(8, "channel"), "input_activations": TOKEN_INT8},
    "int8 tensor asymmetric": {"weights": int_args(8, "tensor", symmetric=False), "input_activations": TOKEN_INT8},
    "int4 as int8": {"weights": int_args(4, "group"), "format": "int-quantized"},
    "fp8 channel": {"weights": float_args("channel"), "input_activations": TOKEN_FP8},
    "fp8 tensor": {"weights": float_args("tensor"), "input_activations": TOKEN_FP8},
    # Neither 13 rows nor 32 columns are a multiple.
    "fp8 block": {"weights": float_args("block", block_structure=[5, 12]), "format": "float-quantized"},
    "fp8 group": {"weights": float_args("group", group_size=8), "format": "float-quantized"},
    "fp8 weights only": {"weights": float_args("channel"), "format": "naive-quantized"},
    "dense 2:4": {"weights": None, "sparsity": "2:4"},
    "fp8 2:4": {"weights": float_args("channel"), "input_activations": TOKEN_FP8, "sparsity": "2:4"},
    "int8 2:4": {"weights": int_args(8, "channel"), "format": "int-quantized", "sparsity": "2:4"},
    "bitmask": {"weights": None, "sparse-bitmask": True},
    "fp8 bitmask": {"weights": float_args("channel"), "input_activations": TOKEN_FP8, "sparse-bitmask": True},
}
CASES: dict[str, dict[str, Any]] = {**PACKED, **OTHERS, "int4 g_idx": {}, "fp8 g_idx": {}}
# One for each set of tensors and each kernel's branch: what does not depend on the width is tried on these alone.
FEW = [
    "int4 group symmetric",
    "int3 channel asymmetric",
    "int8 channel",
    "fp8 block",
    "fp8 tensor",
    "dense 2:4",
    "fp8 2:4",
    "bitmask",
    "int4 g_idx",
]


def config_of(case: str, target: str = "Linear") -> QuantizationConfig:
    group = {"targets": [target], **CASES[case]}
    if target == "Embedding":
        group.pop("input_activations", None)
    top: dict[str, Any] = {"config_groups": {"group_0": group}}
    if group.pop("sparse-bitmask", False):
        top["sparsity_config"] = {"format": "sparse-bitmask", "targets": [target]}
    if group["weights"] is None and "sparsity_config" in top:
        top["config_groups"] = {}
    return QuantizationConfig.from_dict(top)


def dense_weight(rows: int = ROWS, columns: int = COLUMNS, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns), dtype=torch.float32)
    weight[:, 3::7] = 0
    return weight.to(dtype)


def linear_of(case: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> CompressedLinear:
    """A Linear of :func:`dense_weight`, compressed."""
    layer = nn.Linear(COLUMNS, ROWS, bias=bias, dtype=dtype)
    layer.weight = nn.Parameter(dense_weight(dtype=dtype))
    if bias:
        layer.bias = nn.Parameter(torch.linspace(-1, 1, ROWS, dtype=dtype))
    if "g_idx" in case:
        return reordered(layer, float8="fp8" in case)
    compressed = compress(nn.Sequential(layer), config_of(case))[0]
    assert isinstance(compressed, CompressedLinear)
    return compressed


def reordered(layer: nn.Linear, *, float8: bool) -> CompressedLinear:
    """Compressed with columns that belong to groups out of order, as GPTQ leaves them."""
    fields = float_args("group") if float8 else int_args(4, "group", symmetric=False)
    args = {**fields, "group_size": 8, "actorder": "group"}
    content = {"config_groups": {"g": {"targets": ["Linear"], "weights": args}}, "quant_method": "compressed-tensors"}
    config, _ = QuantizationConfig.from_checkpoint(content)  # only old files have such an order
    scheme = config.config_groups["g"]
    assert scheme.weights is not None
    format = CompressionFormat.FLOAT_QUANTIZED if float8 else CompressionFormat.PACK_QUANTIZED
    g_idx = (torch.arange(COLUMNS, dtype=torch.int32) * 5 % COLUMNS) // 8
    tensors = FORMATS[format].encode(quantize(layer.weight.detach(), scheme.weights, g_idx=g_idx), scheme.weights)
    return CompressedLinear(tensors, (ROWS, COLUMNS), scheme, format, bias=layer.bias, dtype=layer.weight.dtype)


def embedding_of(case: str, dtype: torch.dtype = torch.float32) -> CompressedEmbedding:
    table = nn.Embedding(ROWS, COLUMNS, padding_idx=2, dtype=dtype)
    table.weight = nn.Parameter(dense_weight(dtype=dtype))
    compressed = compress(nn.Sequential(table), config_of(case, "Embedding"))[0]
    assert isinstance(compressed, CompressedEmbedding)
    return compressed


def rounded_weight(module: CompressedModule, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the numerics, without any format, make of :func:`dense_weight` by the scheme of ``module``."""
    weight = dense_weight(dtype=dtype)
    if module.sparsity is CompressionFormat.SPARSE_24_BITMASK:
        weight = prune_2_of_4(weight)
    args = None if module.scheme is None else module.scheme.weights
    if args is None:
        return weight
    g_idx = module._parameters.get("weight_g_idx")
    return dequantize(quantize(weight, args, g_idx=None if g_idx is None else g_idx.data), args, dtype=dtype)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def without_bias(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "bias"}


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, COLUMNS, generator=torch.Generator().manual_seed(7)).to(dtype)


# Parameters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_the_tensors_of_the_file(case: str) -> None:
    module = linear_of(case)
    specs = module_tensor_specs(module.scheme, module.format, module.sparsity, (ROWS, COLUMNS), ROWS)
    state = module.state_dict()
    assert sorted(state) == sorted([*specs, "bias"])
    assert dict(module.named_parameters()).keys() == state.keys()
    assert list(module.buffers()) == []
    for name, spec in specs.items():
        assert spec.problem(state[name].dtype, tuple(state[name].shape)) is None
        assert not getattr(module._parameters[name], "requires_grad", True)
    assert module.bias.requires_grad
    assert (module.in_features, module.out_features) == (COLUMNS, ROWS)
    assert isinstance(module, nn.Linear)


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("int4 group symmetric", {"weight_packed", "weight_scale", "weight_shape"}),
        ("int4 group asymmetric", {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point"}),
        ("int4 g_idx", {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}),
        ("int8 channel", {"weight", "weight_scale"}),
        ("int8 tensor asymmetric", {"weight", "weight_scale", "weight_zero_point"}),
        ("fp8 block", {"weight", "weight_scale"}),
        ("dense 2:4", {"shape", "compressed", "bitmask"}),
        ("fp8 2:4", {"shape", "compressed", "bitmask", "weight_scale"}),
        ("bitmask", {"shape", "compressed", "bitmask", "row_offsets"}),
    ],
)
def test_names_of_the_file(case: str, names: set[str]) -> None:
    assert linear_of(case, bias=False).state_dict().keys() == names


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", CASES)
def test_weight_is_the_dequantized_weight(case: str, dtype: torch.dtype) -> None:
    module = linear_of(case, dtype=dtype)
    assert module.dtype == dtype
    # -0.0 and 0.0 are the same weight: bitmasks hold no zeros of either sign.
    assert_same_bits(module.weight + 0.0, rounded_weight(module, dtype) + 0.0)
    assert not module.weight.requires_grad
    assert module.weight is not module.weight
    decoded = module.quantized_weight()
    args = None if module.scheme is None else module.scheme.weights
    assert_same_bits(module.weight, dequantize(decoded, args, dtype=dtype))


def test_weight_can_be_asked_for_and_not_set() -> None:
    for case in FEW:
        module = linear_of(case)
        assert hasattr(module, "weight")
        assert not hasattr(module, "wait")
        before = snapshot(module)
        for value in (nn.Parameter(dense_weight()), dense_weight(), None, nn.Parameter(torch.zeros(2))):
            with pytest.raises(AttributeError, match=r"^CompressedLinear.weight is computed .* decompress\(\)"):
                module.weight = value
        assert_same_tensors(module.state_dict(), before)
        module.weight.clone().zero_()
        assert_same_tensors(module.state_dict(), before)


def test_unquantized_weights_are_copied_too() -> None:
    config = {"config_groups": {"g": {"targets": ["Linear"], "weights": None, "input_activations": TOKEN_INT8}}}
    module = compress(nn.Sequential(nn.Linear(4, 4)), config)[0]
    assert module.format is CompressionFormat.DENSE
    before = snapshot(module)
    for dense in (module.dequantized_weight(), module.weight.clone(), module.weight.cpu(), module.weight[:]):
        dense.zero_()
    assert_same_tensors(module.state_dict(), before)


def test_bias_can_be_set_and_removed() -> None:
    module = linear_of("int4 group symmetric")
    x = inputs(2)
    module.bias = nn.Parameter(torch.zeros(ROWS))
    assert_product(module(x), x, module.dequantized_weight())
    module.bias = None
    assert_product(module(x), x, module.dequantized_weight())
    assert "bias" not in module.state_dict()
    with pytest.raises(TypeError):
        module.bias = torch.zeros(ROWS)


def test_a_bias_given_as_a_tensor_becomes_trainable() -> None:
    module = linear_of("int8 channel")
    tensors = {name: tensor for name, tensor in module.state_dict().items() if name != "bias"}
    made = CompressedLinear(
        tensors, (ROWS, COLUMNS), module.scheme, module.format, bias=torch.ones(ROWS), dtype=torch.float32
    )
    assert isinstance(made.bias, nn.Parameter)
    assert made.bias.requires_grad
    torch.testing.assert_close(made(inputs(2)), module(inputs(2)) - module.bias + 1)


def test_scales_can_be_set_and_stay_untrainable() -> None:
    module = linear_of("int4 group symmetric")
    weight = module.weight
    module.weight_scale = nn.Parameter(module.weight_scale * 2)
    assert not module.weight_scale.requires_grad
    assert torch.equal(module.weight, weight * 2)
    module.note = "any other attribute"
    assert module.note == "any other attribute"


# Casting -------------------------------------------------------------------------------------------------------------


CASTS = {
    "to": (lambda module: module.to(torch.float16), torch.float16),
    "half": (lambda module: module.half(), torch.float16),
    "bfloat16": (lambda module: module.bfloat16(), torch.bfloat16),
    "double": (lambda module: module.double(), torch.float64),
    "device and dtype": (lambda module: module.to("cpu", torch.bfloat16), torch.bfloat16),
    "there and back": (lambda module: module.half().float(), torch.float32),
    "type": (lambda module: module.type(torch.bfloat16), torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("case", FEW)
def test_casting_changes_the_bias_and_dtype_alone(case: str, cast: str) -> None:
    module = linear_of(case)
    before, expected = snapshot(module), rounded_weight(module)
    function, dtype = CASTS[cast]
    model = nn.Sequential(module)
    function(model)
    assert_same_tensors(without_bias(module.state_dict()), without_bias(before))
    assert module.dtype == module.weight.dtype == module.bias.dtype == dtype
    if cast != "there and back":
        assert_same_bits(module.bias.data, before["bias"].to(dtype))
        assert_same_bits(module.weight, expected.to(dtype))
        assert module(inputs(3, dtype=dtype)).dtype == dtype


def test_casting_an_embedding_changes_what_is_looked_up() -> None:
    for case in ("int4 group symmetric", "fp8 2:4", "bitmask", "fp8 block"):
        table = embedding_of(case)
        before, weight = snapshot(table), table.weight
        table.to(torch.bfloat16)
        assert_same_tensors(table.state_dict(), before)
        assert_same_bits(table(torch.arange(ROWS)), weight.to(torch.bfloat16))


def test_casting_takes_gradients_along() -> None:
    module = linear_of("int4 group symmetric")
    module(inputs(2)).sum().backward()
    assert module.bias.grad is not None
    module.double()
    assert module.bias.grad.dtype == torch.float64
    module(inputs(2, dtype=torch.float64)).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((ROWS,), 4.0, dtype=torch.float64))


def test_casting_reaches_children() -> None:
    module = linear_of("int8 channel")
    module.adapter = nn.Linear(2, 2)
    module.half()
    assert module.adapter.weight.dtype == torch.float16
    assert module.weight_scale.dtype == torch.float32


@pytest.mark.cuda
@pytest.mark.parametrize("case", FEW)
def test_moving_and_casting_at_once(case: str) -> None:
    module = linear_of(case)
    before = snapshot(module)
    module.to("cuda", torch.float16)
    assert all(parameter.is_cuda for parameter in module.parameters())
    assert module.weight.dtype == module.bias.dtype == torch.float16
    moved = {name: tensor.cpu() for name, tensor in module.state_dict().items()}
    assert_same_tensors(without_bias(moved), without_bias(before))


# Forward -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,)])
@pytest.mark.parametrize("case", FEW)
def test_forward_takes_any_rank(case: str, shape: tuple[int, ...]) -> None:
    module = linear_of(case)
    x = inputs(*shape)
    scheme = module.scheme
    rounded = x if scheme is None else fake_quantized(x, scheme.input_activations)
    output = module(x)
    assert output.shape == (*shape, ROWS)
    torch.testing.assert_close(output, functional.linear(rounded, rounded_weight(module), module.bias))


@pytest.mark.parametrize("case", CASES)
def test_forward_of_every_format(case: str) -> None:
    for bias in (True, False):
        module = linear_of(case, bias=bias)
        assert (module.bias is not None) == bias
        x = inputs(2, 3)
        rounded = x if module.scheme is None else fake_quantized(x, module.scheme.input_activations)
        torch.testing.assert_close(module(x), functional.linear(rounded, rounded_weight(module), module.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", FEW)
def test_forward_keeps_the_dtype_of_its_input(case: str, dtype: torch.dtype) -> None:
    module = linear_of(case)
    x = inputs(4, dtype=dtype)
    rounded = x if module.scheme is None else fake_quantized(x, module.scheme.input_activations)
    output = module(x)
    assert output.dtype == dtype
    weight, bias = module.weight.to(dtype).double(), module.bias.to(dtype).double()
    exact = functional.linear(rounded.double(), weight, bias)
    # Kernels may round less on the way than torch does: not what activations stand for, nor the weight.
    magnitude = functional.linear(rounded.double().abs(), weight.abs(), bias.abs())
    assert ((output.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * magnitude).all()


def fake_quantized(x: torch.Tensor, args: QuantizationArgs | None, **static: torch.Tensor) -> torch.Tensor:
    """Activations rounded by the numerics of weights: dynamic ones as if they were a weight of one token a row."""
    if args is None or x.numel() == 0:
        return x
    size = activation_group_size(args)
    fields = {"num_bits": args.num_bits, "type": args.type, "symmetric": args.symmetric}
    rows = x.reshape(-1, size if size > 0 else x.shape[-1])
    by_row = QuantizationArgs(strategy="tensor" if size == 0 else "channel", **fields)
    if static:
        count = x.shape[-1] // size if size > 0 else 1
        scales = {name: value.repeat(len(rows) // count if size > 0 else 1) for name, value in static.items()}
        shaped = {name: value if size == 0 else value.unsqueeze(-1) for name, value in scales.items()}
        return dequantize(quantize(rows, by_row, **shaped), by_row).reshape(x.shape)
    return dequantize(quantize(rows, by_row), by_row).reshape(x.shape)


ACTIVATIONS = {
    f"{kind} {strategy} {'symmetric' if symmetric else 'asymmetric'} {'dynamic' if dynamic else 'static'}": {
        "num_bits": 8,
        "type": kind,
        "strategy": strategy,
        "symmetric": symmetric,
        "dynamic": dynamic,
        **({"group_size": 4} if strategy == "group" else {}),
    }
    for kind in ("int", "float")
    for strategy in ("tensor", "token", "group")
    for symmetric in (True, False)
    for dynamic in (True, False)
    # A token's scale can only be found from the token; asymmetric floats are not to be had with other formats.
    if (strategy != "token" or dynamic) and (kind == "int" or symmetric)
}


def rounding_linear(columns: int, rows: int, **ends: Any) -> CompressedLinear:
    """Weights and both ends quantized; static scales from one batch."""
    layer = nn.Linear(columns, rows)
    layer.weight = nn.Parameter(dense_weight(rows, columns))
    layer.bias = nn.Parameter(torch.linspace(-1, 1, rows))
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}, **ends}
    config = QuantizationConfig.from_dict({"config_groups": {"group_0": group}})
    compressed = compress(nn.Sequential(layer), config, calibration=[inputs(5)])[0]
    assert isinstance(compressed, CompressedLinear)
    return compressed


@pytest.mark.parametrize("end", ["input", "output"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_rounded(name: str, end: str) -> None:
    module = rounding_linear(COLUMNS, 16, **{f"{end}_activations": ACTIVATIONS[name]})
    args = getattr(module.scheme, f"{end}_activations")
    static = {
        suffix: module._parameters[f"{end}_{suffix}"].data
        for suffix in ("scale", "zero_point")
        if f"{end}_{suffix}" in module._parameters
    }
    assert bool(static) is not bool(args.dynamic)
    for shape in [(), (3,), (2, 3), (2, 1, 3)]:
        x = inputs(*shape)
        if end == "input":
            expected = functional.linear(fake_quantized(x, args, **static), module.weight, module.bias)
        else:
            expected = fake_quantized(functional.linear(x, module.weight, module.bias), args, **static)
        torch.testing.assert_close(module(x), expected)
        assert not torch.equal(module(x), functional.linear(x, module.weight, module.bias))


def test_each_token_has_a_scale_of_its_own() -> None:
    """A token's output does not depend on who shares the batch with it."""
    module = linear_of("int8 channel")
    x = inputs(2, 3)
    x[0, 0] *= 1000
    together = module(x)
    for batch in range(2):
        for token in range(3):
            torch.testing.assert_close(together[batch, token], module(x[batch, token]))


def test_output_activations_of_an_embedding() -> None:
    group = {
        "targets": ["Embedding"],
        "weights": {"num_bits": 8, "strategy": "channel"},
        "output_activations": ACTIVATIONS["int token symmetric dynamic"],
    }
    table = nn.Embedding(ROWS, COLUMNS)
    compressed = compress(nn.Sequential(table), {"config_groups": {"group_0": group}})[0]
    ids = torch.tensor([[0, 5], [12, 5]])
    expected = fake_quantized(compressed.weight[ids], compressed.scheme.output_activations)
    torch.testing.assert_close(compressed(ids), expected)


@pytest.mark.parametrize("case", ["int4 group symmetric", "int3 channel asymmetric", "int4 g_idx"])
def test_forward_never_reads_weight_shape(case: str) -> None:
    module = linear_of(case)
    x = inputs(2)
    expected, weight = module(x), module.weight
    module._parameters["weight_shape"].fill_(-(2**40))
    assert torch.equal(module(x), expected)
    assert torch.equal(module.weight, weight)
    del module._parameters["weight_shape"]
    assert torch.equal(module(x), expected)


def test_forward_names_what_it_cannot_take() -> None:
    module = linear_of("int4 group symmetric")
    with pytest.raises(OpArgumentError, match=r"input must have 32 columns, not shape \[2, 31\]"):
        module(torch.zeros(2, 31))
    with pytest.raises(OpArgumentError, match="input must have a float dtype"):
        module(torch.zeros(2, COLUMNS, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*OTHERS, "int4 group symmetric", "int3 channel asymmetric", "int5 tensor symmetric"])
def test_embedding_looks_rows_up(case: str, dtype: torch.dtype) -> None:
    table = embedding_of(case, dtype)
    assert isinstance(table, nn.Embedding)
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (ROWS, COLUMNS, 2)
    assert "bias" not in table.state_dict()
    assert_same_bits(table.weight + 0.0, rounded_weight(table, dtype) + 0.0)
    for ids in (torch.tensor(4), torch.tensor([[0, 12, 12], [7, 2, 1]]), torch.zeros(0, 3, dtype=torch.int32)):
        assert_same_bits(table(ids) + 0.0, rounded_weight(table, dtype)[ids.long()] + 0.0)
    for wrong in (-1, ROWS):
        with pytest.raises(IndexError):
            table(torch.tensor([wrong]))


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", FEW)
def test_gradients_reach_input_and_bias_only(case: str) -> None:
    module = linear_of(case)
    dense = nn.Linear(COLUMNS, ROWS)
    dense.weight, dense.bias = nn.Parameter(rounded_weight(module)), nn.Parameter(module.bias.detach().clone())
    x, plain = inputs(2, 3).requires_grad_(), inputs(2, 3).requires_grad_()
    gradient = torch.linspace(-1, 1, 6 * ROWS).reshape(2, 3, ROWS)
    module(x).backward(gradient)
    dense(plain).backward(gradient)
    # Rounding of inputs passes gradients straight through.
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(module.bias.grad, dense.bias.grad)
    assert all(parameter.grad is None for name, parameter in module.named_parameters() if name != "bias")


def test_the_bias_learns() -> None:
    module = linear_of("int4 group symmetric")
    before = snapshot(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    module(inputs(2)).sum().backward()
    optimizer.step()
    assert torch.equal(module.bias, before["bias"] - 1)
    assert_same_tensors(without_bias(module.state_dict()), without_bias(before))


# What torch does to modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["int4 group symmetric", "int8 channel", "fp8 2:4", "int4 g_idx"])
def test_compile(case: str) -> None:
    torch._dynamo.reset()
    module = linear_of(case)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 5):
        x, plain = inputs(batch, 3).requires_grad_(), inputs(batch, 3).requires_grad_()
        output = compiled(x)
        torch.testing.assert_close(output, module(plain))
        output.sum().backward()
        module(plain).sum().backward()
        torch.testing.assert_close(x.grad, plain.grad)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(linear_of("int4 group symmetric"), nn.ReLU()).eval()
    compiled = torch.compile(model, fullgraph=True)
    for batch in (2, 3, 7):  # the second size makes the batch dynamic, the third uses what that compiled
        x = inputs(batch)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("case", FEW)
def test_autocast_is_that_of_a_plain_linear(case: str, compiled: bool) -> None:
    torch._dynamo.reset()
    module = linear_of(case)
    module._input = None  # a plain linear rounds nothing
    plain = nn.Linear(COLUMNS, ROWS)
    plain.weight, plain.bias = nn.Parameter(module.dequantized_weight()), module.bias
    results = []
    for layer in (module, plain):

        def run(x: torch.Tensor, layer: nn.Module = layer) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return layer(x)

        x = inputs(2).requires_grad_()
        output = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(x)
        assert output.dtype == torch.bfloat16
        output.float().sum().backward()
        results.append((output, x.grad))
    rounded = inputs(2).to(torch.bfloat16)
    for output, _ in results:
        assert_product(output, rounded, plain.weight, plain.bias)
    assert_same_bits(results[0][1], results[1][1])


def test_compile_embedding() -> None:
    torch._dynamo.reset()
    table = embedding_of("int4 group symmetric")
    compiled = torch.compile(table, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, 5):
        assert torch.equal(compiled(torch.arange(count)), table.weight[:count])


def test_compile_weight() -> None:
    """Model code may read the weight inside a compiled region."""
    torch._dynamo.reset()
    module = linear_of("int4 group symmetric")
    compiled = torch.compile(lambda: module.weight * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), module.weight * 2)


@pytest.mark.parametrize("case", [*FEW, "fp8 g_idx"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(case: str, how: str) -> None:
    module = linear_of(case).eval()
    twin = copies(module, how)
    assert type(twin) is CompressedLinear
    assert_same_tensors(twin.state_dict(), module.state_dict())
    assert (twin.scheme, twin.format, twin.sparsity, twin.dtype) == (
        module.scheme,
        module.format,
        module.sparsity,
        module.dtype,
    )
    assert not twin.training
    x = inputs(2)
    assert torch.equal(twin(x), module(x))
    assert {name: p.requires_grad for name, p in twin.named_parameters()} == {
        name: p.requires_grad for name, p in module.named_parameters()
    }
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_same_bits(module.weight + 0.0, rounded_weight(module) + 0.0)


def copies(module: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "copy":
        return copy.copy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_shallow_copies_share_parameters() -> None:
    for case in FEW:
        module = linear_of(case)
        twin = copies(module, "copy")
        assert twin is not module
        assert all(twin._parameters[name] is value for name, value in module._parameters.items())
        assert torch.equal(twin(inputs(2)), module(inputs(2)))


def test_copies_of_float8_weights_stay_tied() -> None:
    """torch's pickle cannot read float8 back; the way around it must not part what modules share."""
    model = nn.Sequential(linear_of("fp8 tensor"), linear_of("fp8 tensor"))
    model[1]._parameters["weight"] = model[0]._parameters["weight"]
    for how in ("deepcopy", "pickle", "torch.save"):
        twin = copies(model, how)
        assert twin[0]._parameters["weight"] is twin[1]._parameters["weight"]
        assert twin[0]._parameters["weight"] is not model[0]._parameters["weight"]


def test_copies_of_embeddings() -> None:
    table = embedding_of("int4 group symmetric")
    for how in ("deepcopy", "pickle", "torch.save"):
        twin = copies(table, how)
        assert_same_tensors(twin.state_dict(), table.state_dict())
        assert torch.equal(twin(torch.arange(ROWS)), table.weight)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", [case for case in FEW if "bitmask" not in case])
def test_state_dict_round_trip(case: str, assign: bool) -> None:
    module, other = linear_of(case), linear_of(case)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert_same_tensors(state, module.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    result = other.load_state_dict(state, assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_tensors(other.state_dict(), module.state_dict())
    assert torch.equal(other(inputs(2)), module(inputs(2)))
    assert [name for name, parameter in other.named_parameters() if parameter.requires_grad] == ["bias"]


def test_state_dict_is_strict() -> None:
    module = linear_of("int4 group symmetric")
    state = module.state_dict()
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight_scale"'):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight"'):
        module.load_state_dict({**module.state_dict(), "weight": dense_weight()})


@pytest.mark.parametrize("case", FEW)
def test_meta_and_back(case: str) -> None:
    module = linear_of(case)
    state, x = snapshot(module), inputs(2)
    expected = module(x)
    specs = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    module.to("meta")
    assert all(parameter.is_meta for parameter in module.parameters())
    assert module(x.to("meta")).shape == (2, ROWS)
    assert module.weight.shape == (ROWS, COLUMNS)
    assert module.dtype == torch.float32
    module.to_empty(device="cpu")
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()} == specs
    module.load_state_dict(state)
    assert torch.equal(module(x), expected)


def test_meta_takes_a_dtype_along() -> None:
    module = linear_of("int4 group symmetric").to("meta", torch.bfloat16)
    assert module.dtype == module.bias.dtype == torch.bfloat16
    assert module.weight_scale.dtype == torch.float32


def test_share_memory() -> None:
    module = linear_of("fp8 block")
    before = snapshot(module)
    module.share_memory()
    assert all(parameter.is_shared() for parameter in module.parameters())
    assert_same_tensors(module.state_dict(), before)
    assert module.dtype == torch.float32


def test_apply_visits_it_once_and_cannot_initialize_it() -> None:
    module = linear_of("int4 group symmetric")
    before, seen = snapshot(module), []

    def initialize(visited: nn.Module) -> None:
        seen.append(visited)
        if isinstance(visited, nn.Linear):
            nn.init.normal_(visited.weight)

    with pytest.raises(UnsupportedFormatError, match="cannot be written to: it is computed from packed tensors"):
        nn.Sequential(module).apply(initialize)
    assert seen == [module]
    assert_same_tensors(module.state_dict(), before)


def test_within_sequential_and_functional_call() -> None:
    module = linear_of("int8 channel")
    model = nn.Sequential(nn.Linear(COLUMNS, COLUMNS), module, nn.Tanh())
    assert list(compressed_modules(model)) == ["1"]
    x = inputs(2)
    expected = model(x)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert torch.equal(torch.func.functional_call(model, parameters, (x,)), expected)
    doubled = {**parameters, "1.weight_scale": parameters["1.weight_scale"] * 2, "1.bias": parameters["1.bias"] * 2}
    twice = torch.func.functional_call(model, doubled, (x,))
    torch.testing.assert_close(twice, torch.tanh(torch.atanh(expected) * 2), rtol=1e-3, atol=1e-4)
    assert torch.equal(model(x), expected)


def test_gradient_of_the_bias_by_functional_call() -> None:
    module = linear_of("int4 group symmetric")
    frozen = {name: parameter.detach() for name, parameter in module.named_parameters() if name != "bias"}

    def loss(bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {**frozen, "bias": bias}, (inputs(3),)).sum()

    bias = module.bias.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(bias), bias)
    assert torch.equal(gradient, torch.full((ROWS,), 3.0))


def test_modules_that_read_the_weight_of_another() -> None:
    """torch's attention reads the weight of its output layer instead of calling it."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(COLUMNS, 4, batch_first=True).eval()
    compress(attention, {"config_groups": {"g": {"targets": ["Linear"], "weights": int_args(8, "channel")}}})
    assert isinstance(attention.out_proj, CompressedLinear)
    x = inputs(2, 3)
    output, _ = attention(x, x, x)
    plain = nn.MultiheadAttention(COLUMNS, 4, batch_first=True).eval()
    plain.load_state_dict(
        {
            "in_proj_weight": attention.in_proj_weight,
            "in_proj_bias": attention.in_proj_bias,
            "out_proj.weight": attention.out_proj.weight,
            "out_proj.bias": attention.out_proj.bias,
        }
    )
    torch.testing.assert_close(output, plain(x, x, x)[0])


# What it says of itself ----------------------------------------------------------------------------------------------


def test_extra_repr_shows_scheme_and_bytes() -> None:
    # 13 rows of four int32 words, 13 x 4 scales, the shape, and the bias.
    size = ROWS * 4 * 4 + ROWS * 4 * 4 + 2 * 8 + ROWS * 4
    assert repr(linear_of("int4 group symmetric")) == (
        "CompressedLinear(in_features=32, out_features=13, bias=True, int4 group 8 symmetric, pack-quantized, "
        f"{size} bytes)"
    )
    assert "int8 channel symmetric, input int8 token dynamic, int-quantized" in repr(linear_of("int8 channel"))
    assert "float8 block 5x12 symmetric, float-quantized" in repr(linear_of("fp8 block"))
    assert "bias=False, dense, sparse-24-bitmask, " in repr(linear_of("dense 2:4", bias=False))
    assert repr(embedding_of("int3 channel asymmetric")) == (
        "CompressedEmbedding(13, 32, padding_idx=2, int3 channel asymmetric, pack-quantized, "
        f"{ROWS * 3 * 4 + ROWS * 4 + 2 * 4 + 2 * 8} bytes)"
    )


def test_memory_is_that_of_the_packed_weight() -> None:
    module = linear_of("int4 group symmetric", bias=False)
    module(inputs(2))
    held = sum(tensor.untyped_storage().nbytes() for tensor in module.parameters())
    assert held == ROWS * COLUMNS // 2 + ROWS * COLUMNS // 8 * 4 + 16
    assert not [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]


def test_forward_calls_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(ops, "linear", lambda *args: called.append("linear") or torch.zeros(2, ROWS))
    monkeypatch.setattr(ops, "dequantize", lambda *args: called.append("dequantize"))
    linear_of("int4 group symmetric")(inputs(2))
    assert called == ["linear"]


def test_a_weight_can_be_replaced_by_its_like_of_another_format() -> None:
    module = linear_of("int4 as int8")
    before, x = module.weight, inputs(2)
    expected = module(x)
    assert module.scheme is not None
    packed = FORMATS[CompressionFormat.PACK_QUANTIZED].encode(module.quantized_weight(), module.scheme.weights)
    module.replace_weight(packed, CompressionFormat.PACK_QUANTIZED)
    assert module.state_dict().keys() == {"weight_packed", "weight_scale", "weight_shape", "bias"}
    assert torch.equal(module.weight, before)
    assert torch.equal(module(x), expected)
