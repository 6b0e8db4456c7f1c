"""Stacks of experts: what they compute, expert by expert, and all that torch does to modules."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from compressed_format import (
    CompressedLinear,
    QuantizationConfig,
    compress,
    decompress,
    load_compressed,
    quantize,
    resolve_targets,
    save_compressed,
)
from compressed_format.config import expand_ignore
from compressed_format.config.experts import expert_stack
from compressed_format.errors import (
    CalibrationError,
    CompressedFormatWarning,
    FormatError,
    QuantizationError,
    TargetError,
    UnsupportedFormatError,
)
from compressed_format.formats import prune_2_of_4
from compressed_format.modules.base import compressed_modules
from compressed_format.modules.experts import CompressedExpertLinear, CompressedExperts, compressed_experts_class
from compressed_format.quantization import dequantize
from tests.checks import assert_same_bits, assert_same_tensors
from tests.mixtures import EXPERTS, HIDDEN, INNER, LAYOUTS, SLOTS, Experts, Layers, Mixture, expert_weights, routed
from tests.models import read_config, read_tensors, recorded_warnings, seeded
from tests.modules.test_linear import fake_quantized

INT8, FP8 = {"num_bits": 8}, {"num_bits": 8, "type": "float"}
TENSOR, TOKEN, GROUP = {"strategy": "tensor"}, {"strategy": "token"}, {"strategy": "group", "group_size": 8}
CHANNEL, BLOCK = {"strategy": "channel"}, {"strategy": "block", "block_structure": [5, 12]}
DYNAMIC, STATIC, ASYMMETRIC = {"dynamic": True}, {"dynamic": False}, {"symmetric": False}

# What becomes of a group of a config, but for its targets.
SCHEMES: dict[str, dict[str, Any]] = {
    **{f"int{bits} channel": {"weights": {"num_bits": bits, **CHANNEL}, "format": "pack-quantized"} for bits in (2, 8)},
    "int3 tensor asymmetric": {"weights": {"num_bits": 3, **TENSOR, **ASYMMETRIC}},
    "int4 group": {"weights": {"num_bits": 4, **GROUP}},
    "int4 group asymmetric": {"weights": {"num_bits": 4, **GROUP, **ASYMMETRIC}},
    "int8 block": {"weights": {**INT8, **BLOCK}, "format": "int-quantized"},
    "fp8 block": {"weights": {**FP8, **BLOCK}, "input_activations": {**FP8, **GROUP, **DYNAMIC}},
    "fp8 tensor": {"weights": {**FP8, **TENSOR}, "input_activations": {**FP8, **TENSOR, **STATIC}},
    "fp8 token": {"weights": {**FP8, **CHANNEL}, "input_activations": {**FP8, **TOKEN, **DYNAMIC}},
    "int8 token": {"weights": {**INT8, **CHANNEL}, "input_activations": {**INT8, **TOKEN, **DYNAMIC}},
    "int8 token asymmetric": {
        "weights": {**INT8, **CHANNEL},
        "input_activations": {**INT8, **TOKEN, **DYNAMIC, **ASYMMETRIC},
    },
    "int8 dynamic tensor": {"weights": {**INT8, **CHANNEL}, "input_activations": {**INT8, **TENSOR, **DYNAMIC}},
    "int8 dynamic tensor asymmetric": {
        "weights": {**INT8, **CHANNEL},
        "input_activations": {**INT8, **TENSOR, **DYNAMIC, **ASYMMETRIC},
    },
    "int8 static": {"weights": {**INT8, **CHANNEL}, "input_activations": {**INT8, **TENSOR, **STATIC}},
    "int8 static asymmetric": {
        "weights": {**INT8, **CHANNEL},
        "input_activations": {**INT8, **TENSOR, **STATIC, **ASYMMETRIC},
    },
    "int8 static group": {
        "weights": {**INT8, **CHANNEL},
        "input_activations": {**INT8, **GROUP, **STATIC, **ASYMMETRIC},
    },
    "both ends": {
        "weights": {**INT8, **CHANNEL},
        "input_activations": {**INT8, **TENSOR, **STATIC},
        "output_activations": {**INT8, **TENSOR, **STATIC, **ASYMMETRIC},
    },
    "output tensor": {"weights": {**INT8, **CHANNEL}, "output_activations": {**INT8, **TENSOR, **DYNAMIC}},
    "output token": {"weights": {**INT8, **CHANNEL}, "output_activations": {**INT8, **TOKEN, **DYNAMIC}},
    "output group": {"weights": {**INT8, **CHANNEL}, "output_activations": {**INT8, **GROUP, **DYNAMIC}},
    "dense 2:4": {"weights": None, "sparsity": "2:4"},
    "fp8 2:4": {"weights": {**FP8, **CHANNEL}, "input_activations": {**FP8, **TOKEN, **DYNAMIC}, "sparsity": "2:4"},
}
FEW = ["int4 group asymmetric", "int8 static asymmetric", "fp8 block", "fp8 2:4"]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def config(scheme: str, *targets: str, ignore: tuple[str, ...] = ()) -> QuantizationConfig:
    group = {"targets": list(targets or ["Linear"]), **SCHEMES[scheme]}
    return QuantizationConfig.from_dict({"config_groups": {"group_0": group}, "ignore": ignore})


def dense_experts(layout: str = "gate over up", **fields: Any) -> Any:
    return seeded(Experts, **LAYOUTS[layout], **fields)


def calibration() -> list[torch.Tensor]:
    return [routed(6)[0].reshape(2, 3, HIDDEN), routed(5)[0] * 2]


def packed_experts(scheme: str, layout: str = "gate over up", **fields: Any) -> Any:
    """Compressed alone, calibrated with every token through every expert."""
    holder = nn.ModuleDict({"experts": dense_experts(layout, **fields)})
    holder.forward = lambda *args: holder["experts"](*args)
    return compress(holder, config(scheme), calibration=[routed(7)])["experts"]


def rounded(weight: torch.Tensor, scheme: str) -> torch.Tensor:
    """A weight as the scheme rounds it, by the definition for one matrix."""
    made = config(scheme).config_groups["group_0"]
    pruned = prune_2_of_4(weight) if "sparsity" in SCHEMES[scheme] else weight
    return pruned if made.weights is None else dequantize(quantize(pruned, made.weights), made.weights)


def static_scales(values: torch.Tensor, args: Any) -> dict[str, torch.Tensor]:
    """Static scales of what goes into or comes out of one expert, by the numerics of weights."""
    if args is None or args.dynamic:
        return {}
    size = args.group_size or values.shape[-1]
    rows = values.unflatten(-1, (-1, size)).movedim(-2, 0).flatten(1)
    by_row = {"num_bits": args.num_bits, "type": args.type, "symmetric": args.symmetric, "strategy": "channel"}
    quantized = quantize(rows.contiguous(), type(args)(**by_row))
    found = {"scale": quantized.scale.flatten()}
    return found if args.symmetric else {**found, "zero_point": quantized.zero_point.flatten()}


class Oracle:
    """Experts one by one, each of plain matrices, activations rounded by the numerics of weights."""

    def __init__(self, experts: Any, scheme: str, data: torch.Tensor | None = None) -> None:
        self.experts = experts
        self.ends = config(scheme).config_groups["group_0"]
        self.weights = [
            {name: rounded(weight, scheme) for name, weight in expert_weights(experts, expert).items()}
            for expert in range(EXPERTS)
        ]
        self.static: dict[tuple[int, str], tuple[dict[str, torch.Tensor], ...]] = {}
        if data is not None:
            for expert in range(EXPERTS):
                self._one(data, expert, self._observe)

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        for expert in range(EXPERTS):
            tokens, slots = (index == expert).nonzero(as_tuple=True)
            if len(tokens):
                output[tokens] += self._one(hidden[tokens], expert, self._round) * weights[tokens, slots, None]
        return output

    def _one(self, x: torch.Tensor, expert: int, project: Callable[..., torch.Tensor]) -> torch.Tensor:
        experts = self.experts

        def bias(name: str) -> Any:
            return getattr(experts, f"{name}_bias").detach()[expert] if experts.has_bias else 0

        up = project(x, expert, "up_proj")
        if experts.has_gate:
            gate_bias, up_bias = bias("gate_up_proj"), bias("gate_up_proj")
            if experts.has_bias:
                halves = gate_bias.unflatten(0, (2, -1) if experts.is_concatenated else (-1, 2))
                gate_bias, up_bias = halves if experts.is_concatenated else halves.T
            inner = functional.silu(project(x, expert, "gate_proj") + gate_bias) * (up + up_bias)
        else:
            inner = functional.silu(up + bias("up_proj"))
        output = project(inner, expert, "down_proj") + bias("down_proj")
        return experts.post_expert_norm(output).detach() if experts.has_post_expert_norm else output

    def _round(self, x: torch.Tensor, expert: int, name: str) -> torch.Tensor:
        before, after = self.static.get((expert, name), ({}, {}))
        output = functional.linear(fake_quantized(x, self.ends.input_activations, **before), self.weights[expert][name])
        return fake_quantized(output, self.ends.output_activations, **after)

    def _observe(self, x: torch.Tensor, expert: int, name: str) -> torch.Tensor:
        output = functional.linear(x, expert_weights(self.experts, expert)[name])
        ends = (x, self.ends.input_activations), (output, self.ends.output_activations)
        self.static[expert, name] = tuple(static_scales(values, args) for values, args in ends)  # type: ignore[assignment]
        return output


def save(model: nn.Module, folder: Path) -> None:
    with recorded_warnings():  # that few others read sparse files
        save_compressed(model, folder)


# What they compute ---------------------------------------------------------------------------------------------------


@each_scheme
def test_every_expert_computes_as_a_linear_that_rounds(scheme: str, request: pytest.FixtureRequest) -> None:
    if scheme == "output tensor":  # where a sum that differs in its last bit may be rounded to another step
        request.getfixturevalue("exact_products")
    packed, oracle = packed_experts(scheme), Oracle(dense_experts(), scheme, routed(7)[0])
    for tokens in (1, 10):
        torch.testing.assert_close(packed(*routed(tokens)), oracle(*routed(tokens)), rtol=1e-4, atol=1e-4)
    difference = packed(*routed()) - dense_experts()(*routed())
    assert difference.abs().max() > 1e-3  # it does round


@pytest.mark.parametrize("scheme", ["int4 group asymmetric", "int8 static asymmetric"])
@each_layout
def test_every_layout(layout: str, scheme: str) -> None:
    packed, oracle = packed_experts(scheme, layout), Oracle(dense_experts(layout), scheme, routed(7)[0])
    torch.testing.assert_close(packed(*routed()), oracle(*routed()), rtol=1e-4, atol=1e-4)
    names = {"gate_proj", "up_proj", "down_proj"} if packed.has_gate else {"up_proj", "down_proj"}
    assert {name for name, _ in packed.named_children()} - {"act_fn", "post_expert_norm"} == names
    assert not {"gate_up_proj", "gate_up_proj.weight"} & packed.state_dict().keys()


@pytest.mark.parametrize("scheme", [*FEW, "int8 dynamic tensor asymmetric", "output tensor"])
def test_no_tokens_and_experts_that_stand_for_none(scheme: str) -> None:
    packed = packed_experts(scheme)
    hidden, index, weights = routed()
    assert packed(*routed(0)).shape == (0, HIDDEN)
    some = index.clone()
    some[3, 0], some[4] = EXPERTS, EXPERTS
    weights[some == EXPERTS] = 0
    oracle = Oracle(dense_experts(), scheme, routed(7)[0])
    torch.testing.assert_close(packed(hidden, some, weights), oracle(hidden, some, weights), rtol=1e-4, atol=1e-4)


def test_who_else_is_in_the_batch_does_not_matter() -> None:
    packed = packed_experts("int8 token")
    hidden, index, weights = routed()
    hidden[1:] *= 100
    together, alone = packed(hidden, index, weights), packed(hidden[:1], index[:1], weights[:1])
    torch.testing.assert_close(together[:1], alone)


@each_layout
def test_gradients_reach_what_comes_in(layout: str) -> None:
    packed = packed_experts("int4 group asymmetric", layout)
    dense = decompress(nn.Sequential(copy.deepcopy(packed)))[0]
    results = []
    for experts in (packed, dense):
        hidden, index, weights = routed()
        experts(hidden.requires_grad_(), index, weights.requires_grad_()).square().sum().backward()
        results.append((hidden.grad, weights.grad))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    frozen = {name for name, parameter in packed.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in packed.named_parameters() if "_proj." in name}
    assert all(parameter.grad is not None for parameter in packed.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_whichever_implementation_transformers_would_choose(implementation: str) -> None:
    from transformers.integrations.moe import use_experts_implementation

    class Configured:
        _experts_implementation = implementation

    class Decorated(Experts):
        def __init__(self, config: Any) -> None:
            super().__init__()

    kind = use_experts_implementation(Decorated)
    dense = seeded(kind, Configured())
    packed = compress(nn.Sequential(copy.deepcopy(dense)), config("int4 group"))[0]
    assert isinstance(packed, kind)
    plain = decompress(nn.Sequential(copy.deepcopy(packed)))[0]
    torch.testing.assert_close(packed(*routed()), plain(*routed()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(packed(*routed()), dense(*routed()), rtol=1e-3, atol=1e-3)


# Static scales -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8 static asymmetric", "int8 static group", "both ends", "fp8 tensor"])
@pytest.mark.parametrize("layout", ["gate over up", "interleaved, transposed, biased", "without gate"])
def test_static_scales_come_from_all_tokens_through_every_expert(scheme: str, layout: str) -> None:
    packed, oracle = packed_experts(scheme, layout), Oracle(dense_experts(layout), scheme, routed(7)[0])
    for (expert, name), ends in oracle.static.items():
        for end, expected in zip(("input", "output"), ends, strict=True):
            for what, values in expected.items():
                found = packed.get_submodule(name)._parameters[f"{end}_{what}"]
                assert found.shape == (EXPERTS, values.numel())
                torch.testing.assert_close(
                    found[expert], values, rtol=1e-5, atol=0, msg=f"{expert} {name} {end} {what}"
                )
    assert not torch.equal(*packed.down_proj.input_scale[:2])


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = seeded(Layers)
    model.layers[0]["mlp"].experts.train()
    with pytest.raises(CalibrationError, match="NaN"):
        compress(model, config("int8 static"), calibration=[torch.full((1, HIDDEN), torch.nan)])
    with pytest.raises(CalibrationError, match=r"\(layers.0.mlp.experts.0.gate_proj, …\)|modules \("):
        compress(model, config("int8 static"))
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.layers[0]["mlp"].experts.training
    assert not compressed_modules(model)
    assert_same_tensors(model.state_dict(), seeded(Layers).state_dict())


# There and back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4 group asymmetric", "fp8 block", "fp8 2:4", "int3 tensor asymmetric"])
@each_layout
def test_decompressed_they_are_the_class_they_were(scheme: str, layout: str) -> None:
    dense = dense_experts(layout)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    packed = packed_experts(scheme, layout)
    assert isinstance(packed, CompressedExperts)
    assert isinstance(packed, Experts)
    back = decompress(nn.Sequential(packed))[0]
    assert type(back) is Experts
    assert expert_stack(back) == expert_stack(dense)
    assert {name: tensor.shape for name, tensor in back.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    for expert in range(EXPERTS):
        for name, weight in expert_weights(dense, expert).items():
            assert_same_bits(expert_weights(back, expert)[name] + 0.0, rounded(weight, scheme) + 0.0, name)
    for name in before:
        if name.endswith("_bias") or "norm" in name:
            assert_same_bits(back.state_dict()[name], before[name])
    assert back.down_proj.requires_grad
    assert all(parameter.is_contiguous() for parameter in back.parameters())
    assert not {"expert_stack"} & vars(back).keys()


def test_compressing_takes_nothing_from_whoever_else_has_the_stack() -> None:
    dense = dense_experts("biased")
    packed = compress(nn.Sequential(dense), config("int4 group"))[0]
    assert dense.gate_up_proj.shape == (EXPERTS, 2 * INNER, HIDDEN)
    assert packed.down_proj_bias is dense.down_proj_bias
    assert not isinstance(dense, CompressedExperts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", FEW)
def test_every_float(scheme: str, dtype: torch.dtype) -> None:
    holder = nn.Sequential(seeded(Layers, dtype=dtype))
    compress(holder, config(scheme), calibration=[values.to(dtype) for values in calibration()])
    experts = holder[0].layers[0]["mlp"].experts
    assert experts.down_proj.dtype is experts.down_proj.weight.dtype is dtype
    found = holder(calibration()[0].to(dtype))
    assert found.dtype is dtype
    assert found.isfinite().all()
    for expert in range(EXPERTS):
        weight = expert_weights(seeded(Layers, dtype=dtype).layers[0]["mlp"].experts, expert)["up_proj"]
        assert_same_bits(experts.up_proj.weight[expert] + 0.0, rounded(weight, scheme).to(dtype) + 0.0)


def test_one_stack_in_two_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Mixture()
            self.second = Mixture()
            self.second.experts = self.first.experts

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model = compress(seeded(Twice), config("int4 group"))
    assert model.first.experts is model.second.experts
    assert isinstance(model.first.experts, CompressedExperts)
    decompress(model)
    assert model.first.experts is model.second.experts
    assert type(model.first.experts) is Experts


# What torch does to modules ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", FEW)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save", "copy"])
def test_copies(scheme: str, way: str) -> None:
    packed = packed_experts(scheme, "biased")
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(packed))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(packed, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = copy.copy(packed) if way == "copy" else copy.deepcopy(packed)
    assert type(twin) is type(packed) is compressed_experts_class(Experts)
    assert_same_tensors(twin.state_dict(), packed.state_dict())
    assert torch.equal(twin(*routed()), packed(*routed()))
    assert (twin.down_proj.scheme, twin.down_proj.num_experts) == (packed.down_proj.scheme, EXPERTS)
    alike = twin.down_proj._parameters[twin.down_proj._weight_name].data_ptr()
    assert (alike == packed.down_proj._parameters[packed.down_proj._weight_name].data_ptr()) is (way == "copy")
    if way != "copy":
        assert type(decompress(nn.Sequential(twin))[0]) is Experts


@pytest.mark.parametrize("scheme", FEW)
def test_the_state_dict_round_trips(scheme: str) -> None:
    packed = packed_experts(scheme, "biased")
    other = copy.deepcopy(packed)
    for parameter in other.parameters():
        parameter.data.view(torch.uint8).zero_()
    assert not torch.equal(other(*routed()), packed(*routed()))
    other.load_state_dict({name: tensor.clone() for name, tensor in packed.state_dict().items()})
    assert torch.equal(other(*routed()), packed(*routed()))
    broken = {**packed.state_dict(), "down_proj.weight": torch.zeros(2)}
    with pytest.raises(RuntimeError, match="down_proj"):
        other.load_state_dict(broken)


def test_a_change_of_dtype_leaves_codes_and_scales() -> None:
    packed = packed_experts("int4 group asymmetric", "biased")
    before = {name: tensor.dtype for name, tensor in packed.state_dict().items()}
    moved = copy.deepcopy(packed).to(torch.bfloat16)
    after = {name: tensor.dtype for name, tensor in moved.state_dict().items()}
    assert {name for name in before if before[name] is not after[name]} == {"gate_up_proj_bias", "down_proj_bias"}
    assert moved.up_proj.dtype is moved.up_proj.weight.dtype is torch.bfloat16
    hidden, index, weights = routed()
    found = moved(hidden.bfloat16(), index, weights.bfloat16())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), packed(hidden, index, weights), rtol=0.1, atol=0.5)
    meta = copy.deepcopy(packed).to("meta")
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert meta(*(value.to("meta") for value in routed())).shape == (10, HIDDEN)


def test_hooks_and_mode_come_along() -> None:
    calls: list[str] = []
    for training in (True, False):
        dense = dense_experts().train(training)
        dense.register_forward_pre_hook(lambda *_: calls.append("before"))
        handle = dense.register_forward_hook(lambda *_: calls.append("after"))
        dense.note = "kept"
        packed = compress(nn.Sequential(dense), config("int4 group"))[0]
        assert packed.training is packed.down_proj.training is training
        assert packed.note == "kept"
        calls.clear()
        packed(*routed())
        assert calls == ["before", "after"]
        handle.remove()
        back = decompress(nn.Sequential(packed))[0]
        assert back.training is training
        calls.clear()
        back(*routed())
        assert calls == ["before"]


def test_autocast() -> None:
    packed = packed_experts("int4 group", "biased")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed(*routed())
    torch.testing.assert_close(found.float(), packed(*routed()), rtol=0.05, atol=0.5)


def test_what_is_shown() -> None:
    packed = packed_experts("int4 group")
    text = repr(packed)
    assert text.startswith("CompressedExperts(\n  num_experts=4\n")
    assert "(up_proj): CompressedExpertLinear(num_experts=4, in_features=16, out_features=24, " in text


def test_training_is_refused() -> None:
    packed = packed_experts("int4 group")
    with pytest.raises(UnsupportedFormatError, match="has nothing to train"):
        packed.up_proj.requires_grad_(True)
    packed.requires_grad_(False)


def test_a_stack_that_cannot_be_replaced() -> None:
    dense = dense_experts()
    with pytest.raises(QuantizationError, match="cannot be replaced in place, for it is the model itself"):
        compress(dense, config("int4 group"))
    dense.forward = lambda *args: args[0]
    with pytest.raises(QuantizationError, match="0: its forward has been replaced on the object itself"):
        compress(nn.Sequential(dense), config("int4 group"))
    with pytest.raises(TargetError, match="is the model itself"):
        decompress(packed_experts("int4 group"))


# Targets -------------------------------------------------------------------------------------------------------------

ALL = [
    f"layers.{layer}.mlp.experts.{expert}.{projection}"
    for layer in (0, 1)
    for expert in range(EXPERTS)
    for projection in ("gate_proj", "up_proj", "down_proj")
]
PLAIN = ["layers.0.proj", "layers.0.mlp.shared_expert.0"]


def test_experts_are_linears_and_routers_are_not() -> None:
    resolution = resolve_targets(seeded(Layers), config("int4 group"))
    assert sorted(resolution.assignments) == sorted([*ALL, *PLAIN, *(name.replace("0.", "1.", 1) for name in PLAIN)])
    assert resolution.warnings == ()
    model = compress(seeded(Layers), config("int4 group"))
    for layer in model.layers:
        assert type(layer["mlp"].gate) is type(layer["mlp"].shared_expert_gate) is nn.Linear
        assert isinstance(layer["mlp"].experts, CompressedExperts)


@pytest.mark.parametrize("router", ["layers.0.mlp.gate", "layers.1.mlp.shared_expert_gate"])
def test_a_router_is_compressed_where_it_is_named_exactly(router: str, tmp_path: Path) -> None:
    for target in ("Linear", "re:.*gate$", "re:.*layers.*"):
        with recorded_warnings():
            found = resolve_targets(seeded(Layers), config("int8 channel", target, "Linear"))
        assert router not in found.assignments
    model = compress(seeded(Layers), config("int8 channel", router, "Linear"))
    assert isinstance(model.get_submodule(router), CompressedLinear)
    assert sum(name.endswith("gate") for name in compressed_modules(model)) == 1
    save_compressed(model, tmp_path / "x")
    again = load_compressed(tmp_path / "x", model=seeded(Layers, seed=3))
    assert torch.equal(again(calibration()[0]), model(calibration()[0]))


def test_a_large_router_may_be_none_and_is_told() -> None:
    model = nn.Sequential(nn.ModuleDict({"gate": nn.Linear(32, 64), "up": nn.Linear(32, 64)}))
    with pytest.warns(CompressedFormatWarning, match=r"^0\.gate: 1 Linear modules are taken for routers .* 50% of"):
        compress(model, config("int8 channel"))
    assert type(model[0]["gate"]) is nn.Linear
    assert isinstance(model[0]["up"], CompressedLinear)
    compress(decompress(model), config("int8 channel", ignore=("0.gate",)))


def test_routers_by_name_alone() -> None:
    names = {"mlp.gate": "Linear", "mlp.gate_proj": "Linear", "mlp.experts.0.up_proj": "Linear"}
    assert set(resolve_targets(names, config("int8 channel")).assignments) == {"mlp.gate_proj", "mlp.experts.0.up_proj"}
    assert set(resolve_targets(names, config("int8 channel", "mlp.gate")).assignments) == {"mlp.gate"}
    inside = {"mlp.router.layer": "Linear", "mlp.router.layer.norm": "Linear", "mlp.norm": "Linear"}
    assert set(resolve_targets(inside, config("int8 channel")).assignments) == {"mlp.router.layer.norm", "mlp.norm"}
    # Those of a checkpoint that somebody else has compressed are what they are.
    assert set(resolve_targets(names, config("int8 channel"), quantized=names).assignments) == set(names)


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (("layers.0.mlp.experts",), ["layers.0.mlp.experts"]),
        (("Experts",), ["layers.0.mlp.experts", "layers.1.mlp.experts"]),
        (("re:.*experts.*",), ["layers.0.mlp.experts", "layers.1.mlp.experts"]),
        ((r"re:.*layers\.1\..*experts\.\d+\..*",), ["layers.1.mlp.experts"]),
        (tuple(name for name in ALL if name.startswith("layers.0")), ["layers.0.mlp.experts"]),
    ],
)
def test_experts_that_are_ignored(ignore: tuple[str, ...], left: list[str], tmp_path: Path) -> None:
    model = compress(seeded(Layers), config("int4 group", ignore=ignore))
    assert [name for name, module in model.named_modules() if type(module) is Experts] == left
    save_compressed(model, tmp_path / "x")
    written = read_config(tmp_path / "x")["quantization_config"]["ignore"]
    if len(ignore) == 1:
        assert {f"re:{re.escape(name)}" + r"\.\d+\..*" for name in left} <= set(written)
    assert {"layers.0.mlp.gate", "layers.1.mlp.shared_expert_gate"} <= set(written)
    again = load_compressed(tmp_path / "x", model=seeded(Layers, seed=3))
    assert torch.equal(again(calibration()[0]), model(calibration()[0]))


@pytest.mark.parametrize("scheme", FEW)
def test_one_projection_stays_dense_beside_the_others(scheme: str, tmp_path: Path) -> None:
    made = config(scheme, ignore=("re:.*experts.*down_proj",))
    model = compress(seeded(Layers), made, calibration=calibration())
    down = model.layers[0]["mlp"].experts.down_proj
    assert isinstance(down, CompressedExpertLinear)
    assert down.scheme is None
    assert_same_bits(down.weight.clone(), seeded(Layers).layers[0]["mlp"].experts.down_proj.detach())
    save(model, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    assert stored["layers.0.mlp.experts.3.down_proj.weight"].shape == (HIDDEN, INNER)
    again = load_compressed(tmp_path / "x", model=seeded(Layers, seed=3))
    assert torch.equal(again(calibration()[0]), model(calibration()[0]))
    back = decompress(again)
    assert_same_bits(
        back.layers[1]["mlp"].experts.down_proj.detach(), seeded(Layers).layers[1]["mlp"].experts.down_proj.detach()
    )


@pytest.mark.parametrize(
    ("targets", "ignore", "place"),
    [
        (("Linear",), ("layers.1.mlp.experts.2.up_proj",), "layers.1.mlp.experts.2.up_proj"),
        (("re:.*experts.1.down_proj",), (), "layers.0.mlp.experts.1.down_proj"),
        (("re:.*experts.[01].gate_proj",), (), "layers.0.mlp.experts.0.gate_proj"),
    ],
)
def test_experts_that_the_config_tells_apart(targets: tuple[str, ...], ignore: tuple[str, ...], place: str) -> None:
    model = seeded(Layers)
    match = "experts of one layer have to be compressed alike"
    with recorded_warnings(), pytest.raises(TargetError, match=match) as caught:
        compress(model, config("int4 group", *targets, ignore=ignore))
    assert place in {problem.place for problem in caught.value.problems}
    assert "must reach all of a layer's experts or none" in caught.value.problems[0].message
    assert not compressed_modules(model)


def test_a_scheme_for_each_projection(tmp_path: Path) -> None:
    groups = {
        "up": {"targets": ["re:.*experts.*(gate|up)_proj$"], **SCHEMES["int4 group asymmetric"]},
        "down": {"targets": ["re:.*experts.*down_proj$"], **SCHEMES["fp8 token"]},
    }
    with recorded_warnings() as texts:
        model = compress(seeded(Layers), {"config_groups": groups})
    assert texts == []
    experts = model.layers[1]["mlp"].experts
    assert experts.up_proj.format.value == "pack-quantized"
    assert experts.down_proj.format.value == "float-quantized"
    save_compressed(model, tmp_path / "x")
    again = load_compressed(tmp_path / "x", model=seeded(Layers, seed=3))
    assert torch.equal(again(calibration()[0]), model(calibration()[0]))


def test_targets_that_name_the_stack_itself() -> None:
    for target in ("Experts", "layers.0.mlp.experts"):
        with pytest.raises(TargetError, match="holds the weights of all experts; they are targets of their own"):
            resolve_targets(seeded(Layers), config("int4 group", target))
    reached = resolve_targets(seeded(Layers), config("int4 group", "re:.*experts.*"))
    assert sorted(reached.assignments) == sorted(ALL)


def test_ignore_has_a_pattern_for_each_stack() -> None:
    model = seeded(Layers)
    reached = resolve_targets(model, config("int4 group", "re:.*proj$", ignore=("layers.1.mlp.experts",)))
    assert expand_ignore(model, reached) == (
        "layers.0.mlp.gate",
        "layers.0.mlp.shared_expert.0",
        "layers.0.mlp.shared_expert_gate",
        "layers.1.mlp.gate",
        r"re:layers\.1\.mlp\.experts\.\d+\..*",
        "layers.1.mlp.shared_expert.0",
        "layers.1.mlp.shared_expert_gate",
    )
    packed = compress(seeded(Layers), config("int4 group", "re:.*proj$", ignore=("layers.1.mlp.experts",)))
    again = resolve_targets(packed, config("int4 group", "re:.*proj$", ignore=("layers.1.mlp.experts",)))
    assert again.assignments.keys() == reached.assignments.keys()
    assert expand_ignore(packed, again) == expand_ignore(model, reached)


def test_what_is_wrong_with_experts_is_said_once() -> None:
    model = seeded(Layers)
    made = QuantizationConfig.from_dict(
        {
            "config_groups": {
                "g": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}
            }
        }
    )
    with pytest.raises(QuantizationError) as caught:
        compress(model, made)
    assert len(caught.value.problems) == 1
    assert "8 modules (layers.0.mlp.experts.0.down_proj, …)" in str(caught.value)
    with torch.no_grad():
        model.layers[1]["mlp"].experts.gate_up_proj[2, INNER + 3, 5] = torch.nan
    with pytest.raises(QuantizationError, match=r"layers\.1\.mlp\.experts\.2\.up_proj"):
        compress(model, config("int4 group"))
    assert not compressed_modules(model)


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["gate over up", "interleaved, transposed, biased", "without gate", "normed"])
@pytest.mark.parametrize("scheme", FEW)
def test_files_have_experts_one_by_one(scheme: str, layout: str, tmp_path: Path) -> None:
    model = compress(seeded(Layers, **LAYOUTS[layout]), config(scheme), calibration=calibration())
    save(model, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    dense = seeded(Layers, **LAYOUTS[layout])
    for expert in range(EXPERTS):
        for name, weight in expert_weights(dense.layers[1]["mlp"].experts, expert).items():
            single = nn.ModuleDict({"proj": nn.Linear(weight.shape[1], weight.shape[0], bias=False)})
            single["proj"].weight = nn.Parameter(weight.clone())
            single.forward = lambda x, single=single: single["proj"](x)
            expected = compress(single, config(scheme), calibration=[torch.zeros(1, weight.shape[1])]).state_dict()
            for suffix, tensor in expected.items():
                if not suffix.startswith("proj.input_"):
                    place = f"layers.1.mlp.experts.{expert}.{suffix.replace('proj', name, 1)}"
                    assert_same_bits(stored[place], tensor, place)
    again = load_compressed(tmp_path / "x", model=seeded(Layers, **LAYOUTS[layout], seed=3))
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert torch.equal(again(calibration()[0]), model(calibration()[0]))


def test_experts_with_more_and_with_fewer_zeros(tmp_path: Path) -> None:
    model = seeded(Layers)
    for layer in model.layers:
        for parameter in layer["mlp"].experts.parameters():
            for expert in range(EXPERTS):
                parameter.data[expert][parameter.data[expert].abs() < 0.3 * expert] = 0
    dense = copy.deepcopy(model)
    made = {"config_groups": {}, "sparsity_config": {"format": "sparse-bitmask", "targets": ["re:.*experts.*"]}}
    compress(model, made)
    packed = model.layers[0]["mlp"].experts.up_proj
    assert packed.compressed.shape[0] == EXPERTS
    torch.testing.assert_close(model(calibration()[0]), dense(calibration()[0]))
    save(model, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    sizes = [stored[f"layers.0.mlp.experts.{expert}.up_proj.compressed"].numel() for expert in range(EXPERTS)]
    assert sizes == [int(weight.count_nonzero()) for weight in dense.layers[0]["mlp"].experts.gate_up_proj[:, INNER:]]
    assert len(set(sizes)) == EXPERTS
    again = load_compressed(tmp_path / "x", model=seeded(Layers, seed=3))
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert_same_tensors(decompress(again).state_dict(), dense.state_dict())


def test_saving_what_was_changed_by_hand() -> None:
    model = compress(seeded(Layers), config("int4 group"))
    model.layers[1]["mlp"].experts.down_proj.scheme = config("int2 channel").config_groups["group_0"]
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.experts\.0\.down_proj: is compressed as"):
        save_compressed(model, "never-written")


def test_quantized_weights_are_those_of_every_expert() -> None:
    packed = packed_experts("int4 group asymmetric")
    found = packed.up_proj.quantized_weight()
    args = packed.up_proj.scheme.weights
    for expert in range(EXPERTS):
        expected = quantize(expert_weights(dense_experts(), expert)["up_proj"], args)
        for name in ("codes", "scale", "zero_point"):
            assert_same_bits(getattr(found, name)[expert], getattr(expected, name), name)
    assert dequantize(found, args).shape == packed.up_proj.weight.shape == (EXPERTS, INNER, HIDDEN)


# What stays dense ----------------------------------------------------------------------------------------------------


class OddExperts(nn.Module):
    """Experts that say nothing of their layout, as those of Llama 4."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INNER))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_what_stays_dense_is_told_with_its_share() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(HIDDEN, HIDDEN, bias=False), "experts": OddExperts()})
    size = EXPERTS * 3 * INNER * HIDDEN
    share = f"{size / (size + HIDDEN * HIDDEN):.0%}"
    with recorded_warnings() as texts:
        compress(model, config("int4 group"))
    assert len(texts) == 1
    assert texts[0].startswith("experts.gate_up_proj, …: 2 parameters (OddExperts.gate_up_proj [4, 16, 48], ")
    assert f"stay dense, {share} of the model's bytes" in texts[0]
    model = nn.ModuleDict({"proj": nn.Linear(HIDDEN, HIDDEN, bias=False), "experts": OddExperts()})
    with recorded_warnings() as texts:
        compress(model, config("int4 group", ignore=("experts",)))
    assert texts == []  # who ignores it knows of it


def test_nothing_is_told_where_all_is_reached() -> None:
    with recorded_warnings() as texts:
        compress(seeded(Layers), config("int4 group", ignore=("layers.0.mlp.experts",)))
    assert texts == []


def test_modules_with_other_flags_or_parameters_are_no_experts() -> None:
    dense = dense_experts()
    assert expert_stack(dense).projections == ("gate_proj", "up_proj", "down_proj")
    assert expert_stack(dense_experts("without gate")).projections == ("up_proj", "down_proj")
    assert expert_stack(dense).num_experts == EXPERTS
    assert expert_stack(OddExperts()) is None
    assert expert_stack(nn.Linear(2, 2)) is None
    assert expert_stack(None) is None
    dense.down_proj = nn.Parameter(dense.down_proj[0].detach())
    assert expert_stack(dense) is None
    assert SLOTS < EXPERTS
