"""Rounding activations: the peer's numbers wherever it follows its own rules, and one scale a token everywhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs as PeerArgs
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as peer_fake_quantize
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from compressed_format.activations import (
    WHOLE_TENSOR,
    WHOLE_TOKEN,
    activation_group_size,
    fake_quantize_activations,
)
from compressed_format.config import QuantizationArgs
from compressed_format.errors import UnsupportedFormatError
from tests.checks import FLOATS


def args_of(
    strategy: str,
    *,
    is_float: bool = False,
    bits: int = 8,
    symmetric: bool = True,
    dynamic: bool = True,
    group: int = 0,
) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits,
        type="float" if is_float else "int",
        symmetric=symmetric,
        strategy=strategy,
        dynamic=dynamic,
        group_size=group or None,
    )


def fake_quantize(
    input: torch.Tensor,
    args: QuantizationArgs,
    scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    return fake_quantize_activations(
        input, scale, zero_point, args.num_bits, args.type == "float", args.symmetric, activation_group_size(args)
    )


def peer_args(args: QuantizationArgs) -> Any:
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
    return PeerArgs(**{key: value for key, value in args.to_dict().items() if key in keys})


def by_peer(input: torch.Tensor, args: QuantizationArgs, **static: torch.Tensor) -> torch.Tensor:
    module = SimpleNamespace(quantization_status=QuantizationStatus.CALIBRATION, **static)
    return forward_quantize(module, input, "input", peer_args(args))


def assert_same_values(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


@st.composite
def inputs(draw: st.DrawFn, group: int = 1) -> torch.Tensor:
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), group * draw(st.integers(1, 6)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-4, 3))
    kind = draw(st.sampled_from(["plain", "positive", "zero tokens"]))
    if kind == "positive":
        values = values.abs()
    elif kind == "zero tokens":
        values[:, 0] = 0
    return values.to(draw(st.sampled_from(FLOATS)))


number_formats = st.one_of(
    st.just({"is_float": True}),
    st.builds(lambda bits, sym: {"bits": bits, "symmetric": sym}, st.integers(1, 8), st.booleans()),
)


@given(input=inputs(), strategy=st.sampled_from(["token", "tensor"]), number=number_formats)
@settings(max_examples=200)
def test_dynamic_scales_are_those_of_the_peer(input: torch.Tensor, strategy: str, number: dict[str, Any]) -> None:
    args = args_of(strategy, **number)
    assert_same_values(fake_quantize(input, args), by_peer(input, args))


@given(data=st.data(), group=st.sampled_from([1, 4, 16]), number=number_formats)
def test_dynamic_groups_are_those_of_the_peer(data: st.DataObject, group: int, number: dict[str, Any]) -> None:
    input, args = data.draw(inputs(group)), args_of("group", group=group, **number)
    assert_same_values(fake_quantize(input, args), by_peer(input, args))


@given(input=inputs(), number=number_formats, scale=st.floats(1e-3, 10), zero_point=st.integers(-128, 127))
def test_a_static_scale_is_that_of_the_peer(
    input: torch.Tensor, number: dict[str, Any], scale: float, zero_point: int
) -> None:
    args = args_of("tensor", dynamic=False, **number)
    scales = torch.tensor([scale], dtype=input.dtype)
    static = {"input_scale": scales}
    half = 1 << (args.num_bits - 1)
    if not args.symmetric:
        static["input_zero_point"] = torch.tensor([max(-half, min(zero_point, half - 1))], dtype=torch.int8)
    expected = by_peer(input, args, **static)
    assert_same_values(fake_quantize(input, args, scales, static.get("input_zero_point")), expected)


@given(data=st.data(), number=number_formats)
def test_static_groups_are_tensors_of_their_own(data: st.DataObject, number: dict[str, Any]) -> None:
    """The peer's static group scales do not broadcast; each group of four is rounded by its own scale."""
    input, args = data.draw(inputs(4)), args_of("group", dynamic=False, group=4, **number)
    groups = input.shape[-1] // 4
    scale = torch.linspace(0.01, 2.0, groups).to(input.dtype)
    zero_point = (
        None if args.symmetric else torch.arange(groups).clamp(max=(1 << (args.num_bits - 1)) - 1).to(torch.int8)
    )
    whole = peer_args(args_of("tensor", dynamic=False, **number))
    expected = [
        peer_fake_quantize(
            input[..., 4 * group : 4 * group + 4],
            scale[group : group + 1],
            None if zero_point is None else zero_point[group : group + 1],
            whole,
        )
        for group in range(groups)
    ]
    assert_same_values(fake_quantize(input, args, scale, zero_point), torch.cat(expected, dim=-1))


@given(input=inputs(), number=number_formats)
def test_a_matrix_has_one_scale_for_each_token(input: torch.Tensor, number: dict[str, Any]) -> None:
    """The peer gives one to the whole matrix; a token is a token in inputs of any rank."""
    args = args_of("token", **number)
    expected = fake_quantize(input, args)
    assert_same_values(fake_quantize(input.flatten(0, 1), args), expected.flatten(0, 1))
    assert_same_values(fake_quantize(input[0, 0], args), expected[0, 0])
    assert_same_values(fake_quantize(input.unsqueeze(0), args), expected.unsqueeze(0))
    for token, rounded in zip(input.flatten(0, 1), expected.flatten(0, 1), strict=True):
        assert_same_values(by_peer(token.reshape(1, 1, -1), args).flatten(), rounded)


def test_by_hand() -> None:
    input = torch.tensor([[127.5, -0.5, 0.6, 1.5], [0.0, 10.0, 255.0, 1.0]])
    symmetric = args_of("token")
    # Scales 1 and 2; 0.5 and 1.5 go to the even code, the largest code is 127.
    assert fake_quantize(input, symmetric).tolist() == [[127.0, 0.0, 1.0, 2.0], [0.0, 10.0, 254.0, 0.0]]
    asymmetric = args_of("token", symmetric=False)
    # Row 1 spans 0 to 255 in steps of 1, with -128 for zero: nothing is lost.
    assert fake_quantize(input, asymmetric)[1].tolist() == [0.0, 10.0, 255.0, 1.0]
    whole = args_of("tensor")
    # One scale of 2: 127.5 is 63.75 steps.
    assert fake_quantize(input, whole).tolist() == [[128.0, 0.0, 0.0, 2.0], [0.0, 10.0, 254.0, 0.0]]
    float8 = args_of("tensor", is_float=True, dynamic=False)
    # 17 and 19 lie between codes 16, 18 and 20; 1000 saturates.
    saturated = fake_quantize(torch.tensor([17.0, 19.0, 1000.0, -1000.0]), float8, torch.tensor([1.0]))
    assert saturated.tolist() == [16.0, 20.0, 448.0, -448.0]


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0), (2, 0, 8)])
@pytest.mark.parametrize("group", [WHOLE_TENSOR, WHOLE_TOKEN])
def test_nothing_stays_nothing(shape: tuple[int, ...], group: int) -> None:
    input = torch.zeros(shape)
    output = fake_quantize_activations(input, None, None, 8, False, True, group)
    assert output is not input
    assert output.shape == shape


@pytest.mark.parametrize("group", [WHOLE_TENSOR, WHOLE_TOKEN, 4])
def test_input_in_any_order_of_memory(group: int) -> None:
    input = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).T
    output = fake_quantize_activations(input, None, None, 8, False, True, group)
    assert output.is_contiguous()
    assert_same_values(output, fake_quantize_activations(input.contiguous(), None, None, 8, False, True, group))


@pytest.mark.parametrize("symmetric", [True, False])
def test_double_precision_keeps_its_own(symmetric: bool) -> None:
    """As precise as a step of double precision allows, and close to what single precision finds."""
    input = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for strategy in ("tensor", "token"):
        args = args_of(strategy, symmetric=symmetric)
        output = fake_quantize(input, args)
        assert output.dtype == torch.float64
        close = (output - fake_quantize(input.to(torch.float32), args)).abs() < 1e-5
        assert close.to(torch.float64).mean() > 0.97


def test_group_sizes_by_strategy() -> None:
    assert activation_group_size(args_of("tensor")) == WHOLE_TENSOR
    assert activation_group_size(args_of("token")) == WHOLE_TOKEN
    assert activation_group_size(args_of("group", group=64)) == 64


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
            "activations of float 4 bits by tensor_group (dynamic: local) cannot be run yet",
        ),
        (
            {"type": "float", "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": "torch.uint8"},
            "activations of float 8 bits by group (dynamic: True) cannot be run yet",
        ),
        ({"strategy": "channel"}, "activations of int 8 bits by channel (dynamic: False) cannot be run yet"),
        ({"num_bits": 6, "type": "float", "strategy": "tensor"}, "activations of float 6 bits by tensor"),
    ],
)
def test_what_no_op_can_round_to(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedFormatError) as caught:
        activation_group_size(QuantizationArgs(**fields), "model.lin")
    assert str(caught.value).startswith(f"model.lin: {message}")
