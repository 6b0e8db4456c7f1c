"""Quantizing weights: the numbers worked out by hand, those of the peer, and what cannot be quantized."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.naive_quantized.base import (
    FloatQuantizationCompressor,
    IntQuantizationCompressor,
    NaiveQuantizationCompressor,
)
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs as PeerArgs
from compressed_tensors.quantization import QuantizationScheme as PeerScheme
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from compressed_format.config import CompressionFormat, QuantizationArgs
from compressed_format.errors import QuantizationError, UnsupportedFormatError
from compressed_format.formats import FORMATS
from compressed_format.quantization import (
    QuantizedWeight,
    block_shape,
    dequantize,
    fake_quantize,
    quantize,
    scale_shape,
    weight_scales,
)
from tests.checks import FLOATS, assert_same_bits, assert_same_tensors, hexadecimal

PEERS = {
    CompressionFormat.PACK_QUANTIZED: PackedQuantizationCompressor,
    CompressionFormat.INT_QUANTIZED: IntQuantizationCompressor,
    CompressionFormat.FLOAT_QUANTIZED: FloatQuantizationCompressor,
    CompressionFormat.NAIVE_QUANTIZED: NaiveQuantizationCompressor,
}


# By hand -------------------------------------------------------------------------------------------------------------


def test_symmetric_int4_by_hand() -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel")
    weight = torch.tensor([[-7.5, -3.0, -0.5, 0.0, 0.5, 1.5, 2.5, 7.5]])
    quantized = quantize(weight, args)
    # 7.5 / 7.5: the scale is 1. Ties go to even, and 7.5, which would be 8, to the largest code.
    assert quantized.scale.tolist() == [[1.0]]
    assert quantized.codes.tolist() == [[-8, -3, 0, 0, 0, 2, 2, 7]]
    assert quantized.codes.dtype == torch.int8
    assert quantized.zero_point is None
    assert quantized.shape == (1, 8)
    assert dequantize(quantized, args).tolist() == [[-8.0, -3.0, 0.0, 0.0, 0.0, 2.0, 2.0, 7.0]]


def test_asymmetric_int4_by_hand() -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel", symmetric=False)
    weight = torch.tensor([[-1.0, 0.0, 0.25, 2.75], [1.0, 2.0, 3.0, 3.75]])
    quantized = quantize(weight, args)
    # Row 0 spans 3.75 in 15 steps of 0.25, and -8 - (-1 / 0.25) = -4 stands for zero. Row 1 is widened to hold zero.
    assert quantized.scale.tolist() == [[0.25], [0.25]]
    assert quantized.zero_point.tolist() == [[-4], [-8]]
    assert quantized.zero_point.dtype == torch.int8
    assert quantized.codes.tolist() == [[-8, -4, -3, 7], [-4, 0, 4, 7]]
    assert torch.equal(dequantize(quantized, args), weight)


def test_float8_by_hand() -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    weight = torch.tensor([[448.0, -448.0, 1.0, 0.0, -0.0, 17.0, 19.0, 0.0009]])
    quantized = quantize(weight, args)
    assert quantized.scale.tolist() == [1.0]
    # S.EEEE.MMM: 448 = 1.75 * 2**8; between 16 and 32 the step is 2, and ties go to even; below 2**-10 all is zero.
    assert hexadecimal(quantized.codes) == "7efe38000058" + "5a00"
    assert dequantize(quantized, args).tolist() == [[448.0, -448.0, 1.0, 0.0, 0.0, 16.0, 20.0, 0.0]]


def test_each_strategy_has_its_own_rectangles() -> None:
    weight = torch.zeros(4, 6)
    weight[0, 0], weight[1, 5], weight[2, 3], weight[3, 4] = 127.5, 255.0, 510.0, 1020.0
    epsilon = 2**-23
    expected = {
        QuantizationArgs(strategy="tensor"): [8.0],
        QuantizationArgs(strategy="channel"): [[1.0], [2.0], [4.0], [8.0]],
        QuantizationArgs(strategy="group", group_size=3): [
            [1.0, epsilon],
            [epsilon, 2.0],
            [epsilon, 4.0],
            [epsilon, 8.0],
        ],
        QuantizationArgs(strategy="block", block_structure=(3, 4)): [[4.0, 2.0], [epsilon, 8.0]],
    }
    for args, scale in expected.items():
        quantized = quantize(weight, args)
        assert quantized.scale.tolist() == scale
        assert tuple(quantized.scale.shape) == scale_shape(args, weight.shape)
        assert torch.equal(dequantize(quantized, args) != 0, weight != 0)


@pytest.mark.parametrize(
    ("dtype", "epsilon"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10), (torch.float32, 2**-23)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_have_the_scale_epsilon(dtype: torch.dtype, epsilon: float, symmetric: bool) -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel", symmetric=symmetric)
    quantized = quantize(torch.zeros(2, 8, dtype=dtype), args)
    assert quantized.scale.tolist() == [[epsilon]] * 2
    assert quantized.codes.tolist() == [[0] * 8] * 2
    if not symmetric:
        assert quantized.zero_point.tolist() == [[0]] * 2
    assert_same_bits(dequantize(quantized, args), torch.zeros(2, 8, dtype=dtype))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_is_off_by_half_a_step_at_most(bits: int, symmetric: bool) -> None:
    """What quantizing promises: within the range, the nearest code. A symmetric range clips its last half step."""
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=16, symmetric=symmetric)
    weight = torch.rand(8, 64, generator=torch.Generator().manual_seed(bits), dtype=torch.float64) * 2 - 1
    quantized = quantize(weight, args)
    error = (dequantize(quantized, args) - weight).abs().unflatten(-1, (4, 16)).amax(dim=-1)
    steps = 1.0 if symmetric or bits == 1 else 0.5 + 0.5
    assert (error <= steps * quantized.scale * (1 + 1e-9)).all()


# The peer ------------------------------------------------------------------------------------------------------------

ROWS, COLUMNS = st.integers(1, 40), st.integers(1, 70)


@st.composite
def schemes(draw: st.DrawFn, *, integers_only: bool = False) -> QuantizationArgs:
    is_float = not integers_only and draw(st.integers(0, 4)) == 0
    strategy = draw(st.sampled_from(["tensor", "channel", "group", "block"]))
    return QuantizationArgs(
        num_bits=8 if is_float else draw(st.integers(1, 8)),
        type="float" if is_float else "int",
        symmetric=draw(st.booleans()),
        strategy=strategy,
        group_size=draw(st.sampled_from([1, 2, 5, 8, 16, 32])) if strategy == "group" else None,
        block_structure=draw(st.tuples(st.integers(1, 9), st.integers(1, 9))) if strategy == "block" else None,
    )


@st.composite
def weights(draw: st.DrawFn, args: QuantizationArgs, leading: tuple[int, ...] = ()) -> torch.Tensor:
    rows, columns = draw(ROWS), draw(COLUMNS)
    if args.group_size:
        columns = args.group_size * draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(*leading, rows, columns, generator=generator) * 10.0 ** draw(st.integers(-5, 3))
    kind = draw(st.sampled_from(["plain", "zeros", "pruned", "one-sided", "outlier"]))
    if kind == "zeros":
        weight[..., torch.rand(rows, generator=generator) < 0.5, :] = 0
    elif kind == "pruned":  # by a mask, which leaves negative zeros behind
        weight *= torch.rand(weight.shape, generator=generator) < 0.5
    elif kind == "one-sided":
        weight = weight.abs()
    elif kind == "outlier":
        weight[..., 0, 0] *= 30
    return weight.to(draw(st.sampled_from(FLOATS)))


def peer_scheme(args: QuantizationArgs) -> Any:
    own = args.to_dict()
    fields = {key: own[key] for key in own if key in ("num_bits", "type", "symmetric", "strategy", "group_size")}
    if args.block_structure is not None:
        fields["block_structure"] = list(args.block_structure)
    return PeerScheme(targets=["Linear"], weights=PeerArgs(**fields))


def ranges_by_slices(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each rectangle, cut out one by one."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    height, width = block_shape(args, weight.shape)
    bounds = [
        [
            (block.amin(dim=(-2, -1)), block.amax(dim=(-2, -1)))
            for column in range(0, weight.shape[-1], width)
            for block in [weight[..., row : row + height, column : column + width]]
        ]
        for row in range(0, weight.shape[-2], height)
    ]
    minimum, maximum = (
        torch.stack([torch.stack([bound[which] for bound in row], dim=-1) for row in bounds], dim=-2)
        for which in (0, 1)
    )
    return minimum, maximum


def formats_of(args: QuantizationArgs) -> list[CompressionFormat]:
    if args.type == "float":
        return [CompressionFormat.FLOAT_QUANTIZED, CompressionFormat.NAIVE_QUANTIZED]
    return [CompressionFormat.PACK_QUANTIZED, CompressionFormat.INT_QUANTIZED, CompressionFormat.NAIVE_QUANTIZED]


def peer_decompress(format: CompressionFormat, tensors: dict[str, torch.Tensor], scheme: Any) -> torch.Tensor | None:
    """What the peer makes of tensors; None where it fails on packed zero points of a single word a column."""
    try:
        return PEERS[format].decompress(dict(tensors), scheme)["weight"]
    except RuntimeError as error:
        assert "stride(-1) must be 1" in str(error)
        assert scheme.weights.num_bits == 4
        assert tensors["weight_zero_point"].shape[-2] == 1
        return None


def assume_numbers(zero_point: torch.Tensor) -> None:
    """Pass over asymmetric float8 codes of a rectangle of zeros, for which the peer's zero point is NaN."""
    assume(not zero_point.to(torch.float32).isnan().any())


def agrees_with_the_peer(weight: torch.Tensor, args: QuantizationArgs) -> None:
    scheme = peer_scheme(args)
    scale, zero_point = calculate_qparams(*ranges_by_slices(weight, args), scheme.weights)
    assume_numbers(zero_point)
    quantized = quantize(weight, args)
    assert_same_bits(quantized.scale, scale, "scale")
    if args.symmetric:
        assert quantized.zero_point is None
        assert not zero_point.to(torch.float32).any()
    else:
        assert_same_bits(quantized.zero_point, zero_point, "zero_point")
    dense = dequantize(quantized, args)
    for name in formats_of(args):
        format = FORMATS[name]
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        theirs = PEERS[name].compress(state, scheme)
        ours = format.encode(quantized, args, place="lin")
        assert_same_tensors(ours, theirs)
        assert_same_bits(dequantize(format.decode(theirs, args, place="lin", **_now(name)), args), dense, name)
        decompressed = peer_decompress(name, ours, scheme)
        if decompressed is not None:
            assert_same_bits(decompressed, dense, f"{name} by the peer")


def _now(name: CompressionFormat) -> dict[str, str]:
    return {"version": "0.20.0"} if name is CompressionFormat.PACK_QUANTIZED else {}


@given(data=st.data())
@settings(max_examples=250)
def test_matrices_are_those_of_the_peer(data: st.DataObject) -> None:
    args = data.draw(schemes())
    agrees_with_the_peer(data.draw(weights(args)), args)


@given(data=st.data(), experts=st.integers(1, 3))
@settings(max_examples=80)
def test_stacks_of_matrices_are_those_of_the_peer(data: st.DataObject, experts: int) -> None:
    args = data.draw(schemes().filter(lambda args: args.strategy != "block"))
    agrees_with_the_peer(data.draw(weights(args, (experts,))), args)


@given(data=st.data(), experts=st.integers(1, 3))
@settings(max_examples=80)
def test_stacks_of_matrices_are_quantized_one_by_one(data: st.DataObject, experts: int) -> None:
    """Blocks of three-dimensional weights, which the peer cannot cut, and every other strategy."""
    args = data.draw(schemes().filter(lambda args: args.strategy != "tensor"))
    weight = data.draw(weights(args, (experts,)))
    stacked = quantize(weight, args)
    single = [quantize(matrix, args) for matrix in weight]
    assert_same_bits(stacked.codes, torch.stack([one.codes for one in single]))
    assert_same_bits(stacked.scale, torch.stack([one.scale for one in single]))
    assert_same_bits(dequantize(stacked, args), torch.stack([dequantize(one, args) for one in single]))
    for name in formats_of(args):
        tensors = FORMATS[name].encode(stacked, args)
        assert_same_bits(dequantize(FORMATS[name].decode(tensors, args, **_now(name)), args), dequantize(stacked, args))
        matrices = [FORMATS[name].encode(one, args) for one in single]
        for suffix in tensors:
            if suffix != "weight_shape":
                assert_same_bits(tensors[suffix], torch.stack([one[suffix] for one in matrices]), suffix)


@given(data=st.data())
@settings(max_examples=60)
def test_scales_from_outside_are_those_of_the_peer(data: st.DataObject) -> None:
    """Scales that a calibration found: of the weight's dtype or wider, smaller than the weight's range or larger."""
    args = data.draw(schemes())
    weight = data.draw(weights(args))
    scheme = peer_scheme(args)
    minimum, maximum = ranges_by_slices(weight, args)
    factor = data.draw(st.sampled_from([0.5, 0.8, 3.0]))
    scale, zero_point = calculate_qparams(minimum * factor, maximum * factor, scheme.weights)
    assume_numbers(zero_point)
    if data.draw(st.booleans()):
        scale = scale.to(torch.float32) * 1.001
    quantized = quantize(weight, args, scale=scale, zero_point=None if args.symmetric else zero_point)
    for name in formats_of(args):
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        theirs = PEERS[name].compress(state, scheme)
        assert_same_tensors(FORMATS[name].encode(quantized, args), theirs)


def test_zeros_with_asymmetric_float8_codes_have_a_zero_point() -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=False)
    weight = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    quantized = quantize(weight, args)
    assert quantized.zero_point.to(torch.float32).tolist() == [[0.0], [0.0]]
    assert torch.equal(dequantize(quantized, args)[0], weight[0])


def test_negative_zeros_become_the_code_of_zero() -> None:
    """As in the peer, which adds a zero point of 0 to symmetric codes: -0.0 + 0.0 is 0.0."""
    args = QuantizationArgs(num_bits=8, type="float", strategy="channel")
    weight = torch.tensor([[-0.0, 0.0, 1.0, -1.0]])
    assert hexadecimal(quantize(weight, args).codes) == "00007efe"
