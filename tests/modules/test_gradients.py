"""Gradients through packed weights: those of the decompressed module, in every format, and none for what is packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compressed_format import CompressedEmbedding, CompressedLinear, OpArgumentError, UnsupportedFormatError, compress
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.decoders import DECODERS
from tests.models import weights
from tests.modules.test_linear import (
    ACTIVATIONS,
    CASES,
    COLUMNS,
    FEW,
    ROWS,
    embedding_of,
    fake_quantized,
    inputs,
    int_args,
    linear_of,
    rounding_linear,
    snapshot,
    without_bias,
)

BLOCKS = {
    "int8 block": {"weights": int_args(8, "block", block_structure=[5, 12]), "format": "int-quantized"},
    "int8 block naive": {"weights": int_args(8, "block", block_structure=[5, 12]), "format": "naive-quantized"},
}


def module_of(case: str, *, bias: bool = True) -> CompressedLinear:
    if case not in BLOCKS:
        return linear_of(case, bias=bias)
    layer = nn.Linear(COLUMNS, ROWS, bias=bias)
    return compress(nn.Sequential(layer), {"config_groups": {"g": {"targets": ["Linear"], **BLOCKS[case]}}})[0]


def straight_through(x: torch.Tensor, args: Any, **static: torch.Tensor) -> torch.Tensor:
    """Activations rounded, with the gradient of the identity."""
    return x + (fake_quantized(x.detach(), args, **static) - x.detach())


def dense_forward(module: CompressedLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What ``module`` computes, by torch's own linear on the dense weight."""
    scheme, static = module.scheme, {}
    for end in ("input", "output"):
        found = {suffix: module._parameters.get(f"{end}_{suffix}") for suffix in ("scale", "zero_point")}
        static[end] = {suffix: value.data for suffix, value in found.items() if value is not None}
    if scheme is not None:
        x = straight_through(x, scheme.input_activations, **static["input"])
    y = functional.linear(x, module.weight.clone().to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y if scheme is None else straight_through(y, scheme.output_activations, **static["output"])


def assert_same_gradients(module: CompressedLinear, *, shape: tuple[int, ...] = (2, 3)) -> None:
    """The input and the bias have the gradients that the dense module gives them, where both use the module twice."""
    x, plain = inputs(*shape).requires_grad_(), inputs(*shape).requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    before = snapshot(module)
    towards = torch.linspace(-1, 1, plain.numel() // plain.shape[-1] * module.out_features)
    towards = towards.reshape(*shape, module.out_features)
    (module(x) + torch.tanh(module(x * 2))).backward(towards)
    (dense_forward(module, plain, bias) + torch.tanh(dense_forward(module, plain * 2, bias))).backward(towards)
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(module.bias.grad, bias.grad)
    assert bool(x.grad.any()) == bool(module.weight.any())  # one bit rounds a symmetric tensor to nothing
    assert [name for name, parameter in module.named_parameters() if parameter.grad is not None] == ["bias"]
    assert_same_tensors(module.state_dict(), before)


@pytest.mark.parametrize("case", [*CASES, *BLOCKS])
def test_gradients_are_those_of_the_dense_weight(case: str) -> None:
    assert_same_gradients(module_of(case))


@pytest.mark.parametrize("end", ["input", "output"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_pass_straight_through_rounded_activations(name: str, end: str) -> None:
    module = rounding_linear(COLUMNS, 16, **{f"{end}_activations": ACTIVATIONS[name]})
    assert (module._input if end == "input" else module._output) is not None
    assert_same_gradients(module)


@pytest.mark.parametrize("shape", [(), (4,), (2, 1, 3), (0,)])
def test_gradients_of_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    module = linear_of("int4 group symmetric")
    x = inputs(*shape).requires_grad_()
    module(x).sum().backward()
    expected = module.weight.sum(dim=0).expand_as(x)
    torch.testing.assert_close(x.grad, expected)
    torch.testing.assert_close(module.bias.grad, torch.full((ROWS,), float(x.numel() // COLUMNS)))


@pytest.mark.parametrize("case", [*CASES, *BLOCKS])
def test_gradcheck(case: str) -> None:
    """Differences of the forward pass in float64 say the same, and, for a few, those of the gradients."""
    module = module_of(case)
    module._input = None  # rounding is flat almost everywhere
    x = inputs(2, dtype=torch.float64).requires_grad_()
    bias = torch.linspace(-1, 1, ROWS, dtype=torch.float64, requires_grad=True)

    def run(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, {"bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, bias))
    if case in FEW:
        assert torch.autograd.gradgradcheck(lambda x, bias: run(x, bias).square(), (x, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", FEW)
def test_gradients_have_the_dtype_of_what_they_belong_to(case: str, dtype: torch.dtype) -> None:
    module = linear_of(case)  # its bias is float32
    x = inputs(2, 3, dtype=dtype).requires_grad_()
    module(x).sum().backward()
    dense = module.weight.to(dtype).float().sum(dim=0).to(dtype)
    torch.testing.assert_close(x.grad, dense.expand_as(x))
    assert_same_bits(module.bias.grad, torch.full((ROWS,), 6.0))


# Checkpointed segments and autocast ----------------------------------------------------------------------------------


class Twice(nn.Module):
    """One compressed layer used twice, and trainable ones before and between."""

    def __init__(self, case: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.between = nn.Linear(COLUMNS, COLUMNS), nn.Linear(ROWS, COLUMNS)
        self.packed = linear_of(case)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(torch.tanh(self.between(self.packed(self.before(x)))))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("case", FEW)
def test_checkpointed_segments(case: str, use_reentrant: bool, autocast: bool) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = Twice(case)
        x = inputs(2, 3).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            for _ in range(2):  # gradients of two passes add up
                y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
                assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
                y.float().square().mean().backward()
        gradients.append({"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}})
    names = {"x", "packed.bias", *(f"{name}.{end}" for name in ("before", "between") for end in ("weight", "bias"))}
    assert gradients[0].keys() == names
    assert_same_tensors(gradients[1], gradients[0])


@pytest.mark.parametrize("case", FEW)
def test_gradients_under_autocast_are_those_of_the_dense_module(case: str) -> None:
    module = linear_of(case)
    module._input = None
    plain = nn.Linear(COLUMNS, ROWS)
    plain.weight, plain.bias = nn.Parameter(module.weight.clone()), nn.Parameter(module.bias.detach().clone())
    results = []
    for layer in (module, plain):
        x = inputs(3).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(torch.tanh(x)).float().square().sum()
        loss.backward()
        results.append((x.grad, layer.bias.grad))
    # The output, of which the gradients are made, and the sums are rounded to bfloat16, in any order.
    for packed, dense in zip(*results, strict=True):
        torch.testing.assert_close(packed, dense, rtol=0.02, atol=0.02 * dense.abs().max().item())


# What has no gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["int4 group symmetric", "fp8 block", "fp8 2:4", "dense 2:4"])
def test_an_embedding_gives_no_gradient(case: str) -> None:
    table = embedding_of(case)
    assert isinstance(table, CompressedEmbedding)
    rows = table(torch.arange(ROWS))
    assert not rows.requires_grad
    # As transformers' enable_input_require_grads does, so that checkpointed segments have something to reach.
    rows.requires_grad_().square().sum().backward()
    torch.testing.assert_close(rows.grad, 2 * table.weight.clone())
    assert all(parameter.grad is None for parameter in table.parameters())


@pytest.mark.parametrize("case", FEW)
def test_requires_grad_is_for_the_bias(case: str) -> None:
    module = linear_of(case)

    def trainable() -> list[str]:
        return [name for name, parameter in module.named_parameters() if parameter.requires_grad]

    assert module.requires_grad_(False) is module
    assert trainable() == []
    assert module.requires_grad_() is module
    assert trainable() == ["bias"]
    module.adapter = nn.Linear(2, 2).requires_grad_(False)
    module.requires_grad_()
    assert trainable() == ["bias", "adapter.weight", "adapter.bias"]


def test_requires_grad_says_where_there_is_nothing_to_train() -> None:
    for module in (linear_of("int4 group symmetric", bias=False), linear_of("fp8 block", bias=False)):
        with pytest.raises(UnsupportedFormatError, match=r"^CompressedLinear\(.*nothing to train.*decompress\(\)"):
            module.requires_grad_()
        assert not any(parameter.requires_grad for parameter in module.parameters())
        module.requires_grad_(False)
    with pytest.raises(UnsupportedFormatError, match=r"^CompressedEmbedding\(13, 32|^CompressedEmbedding\(int4"):
        embedding_of("int4 group symmetric").requires_grad_()


@pytest.mark.parametrize(
    ("case", "name", "argument"),
    [
        ("fp8 block", "weight", "weight"),
        ("int4 group symmetric", "weight_scale", "scale"),
        ("dense 2:4", "compressed", "weight"),
    ],
)
def test_packed_tensors_that_are_made_trainable_are_named(case: str, name: str, argument: str) -> None:
    """As torch does to every parameter of a float dtype when a whole model is asked to train."""
    module = linear_of(case)
    module._parameters[name].requires_grad_()
    with pytest.raises(
        OpArgumentError, match=rf"^linear: {argument} must not require a gradient.*requires_grad_\(False"
    ):
        module(inputs(2)).sum().backward()
    with torch.no_grad():
        module(inputs(2))


def test_packed_experts_that_are_made_trainable_are_named() -> None:
    experts = compress(DECODERS["Mixtral"](), weights(8, "Linear", type="float")).model.layers[0].mlp.experts
    x = torch.randn(3, experts.up_proj.in_features, requires_grad=True)
    index = torch.tensor([[0, 1], [2, 3], [1, 0]])
    experts.up_proj(x, index).sum().backward()
    expected = experts.up_proj.weight.sum(dim=1)[index].sum(dim=1)
    torch.testing.assert_close(x.grad, expected)
    for parameter in experts.parameters():
        parameter.requires_grad_()
    with pytest.raises(OpArgumentError, match=r"^expert_linear: weight, scale must not require a gradient"):
        experts.up_proj(x, index).sum().backward()


def test_an_optimizer_of_everything_changes_no_packed_tensor() -> None:
    for case in FEW:
        module = linear_of(case)
        before = snapshot(module)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            module(inputs(2)).square().sum().backward()
            optimizer.step()
        assert not torch.equal(module.bias, before["bias"])
        assert_same_tensors(without_bias(module.state_dict()), without_bias(before))
