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

from compressed_format.blocks import block_shape, scale_shape
from compressed_format.config import CompressionFormat, QuantizationArgs
from compressed_format.errors import QuantizationError, UnsupportedFormatError
from compressed_format.formats import FORMATS
from compressed_format.quantization import QuantizedWeight, dequantize, fake_quantize, quantize, weight_scales
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


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_larger_than_the_weight_is_all_of_it(symmetric: bool) -> None:
    """A config may say any size; nothing is padded to it."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + 1
    huge = QuantizationArgs(strategy="block", block_structure=(10**12, 10**12), symmetric=symmetric)
    quantized = quantize(weight, huge)
    by_tensor = QuantizationArgs(strategy="tensor", symmetric=symmetric)
    whole = quantize(weight, by_tensor)
    assert scale_shape(huge, weight.shape) == tuple(quantized.scale.shape) == (1, 1)
    assert torch.equal(quantized.codes, whole.codes)
    assert torch.equal(dequantize(quantized, huge), dequantize(whole, by_tensor))


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
    weight = torch.randn(*leading, rows, columns, generator=generator) * 10.0 ** draw(st.integers(-5, 2))
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
        one_word = scheme.weights.num_bits == 4 and tensors["weight_zero_point"].shape[-2] == 1
        if one_word and "stride(-1) must be 1" in str(error):
            return None
        raise


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
        assert_same_bits(dequantize(format.decode(theirs, args, place="lin"), args), dense, name)
        decompressed = peer_decompress(name, ours, scheme)
        if decompressed is not None:
            assert_same_bits(decompressed, dense, f"{name} by the peer")


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
        assert_same_bits(dequantize(FORMATS[name].decode(tensors, args), args), dequantize(stacked, args))
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


# Calibrated elsewhere ------------------------------------------------------------------------------------------------

FORMATS_OF_INT4 = [CompressionFormat.PACK_QUANTIZED, CompressionFormat.INT_QUANTIZED, CompressionFormat.NAIVE_QUANTIZED]


@pytest.mark.parametrize("name", FORMATS_OF_INT4)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scales_given", [True, False])
def test_groups_of_scattered_columns(name: CompressionFormat, symmetric: bool, scales_given: bool) -> None:
    """With ``g_idx``, each group is what it would be if its columns were neighbours."""
    generator = torch.Generator().manual_seed(1)
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=8, symmetric=symmetric)
    in_order = torch.randn(5, 32, generator=generator)
    order = torch.randperm(32, generator=generator)
    g_idx = (order // 8).to(torch.int32)
    weight = in_order[:, order]
    expected = quantize(in_order, args)
    given_ones = {"scale": expected.scale, "zero_point": expected.zero_point} if scales_given else {}
    quantized = quantize(weight, args, g_idx=g_idx, **given_ones)
    assert_same_bits(quantized.scale, expected.scale)
    assert_same_bits(quantized.codes, expected.codes[:, order])
    assert_same_bits(dequantize(quantized, args), dequantize(expected, args)[:, order])
    tensors = FORMATS[name].encode(quantized, args, place="lin")
    assert_same_bits(tensors["weight_g_idx"], g_idx)
    decoded = FORMATS[name].decode(tensors, args, place="lin")
    assert_same_bits(decoded.g_idx, g_idx)
    assert_same_bits(dequantize(decoded, args), dequantize(quantized, args))


def test_groups_of_different_sizes_need_given_scales() -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=2)
    weight, g_idx = torch.tensor([[1.0, 2.0, 3.0, 8.0]]), torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    quantized = quantize(weight, args, scale=torch.tensor([[1.0, 2.0]]), g_idx=g_idx)
    assert quantized.codes.tolist() == [[1, 2, 3, 4]]
    assert torch.equal(dequantize(quantized, args), weight)
    with pytest.raises(QuantizationError, match=r"^lin\.weight: g_idx gives its groups \[3, 1\] columns, exp"):
        quantize(weight, args, g_idx=g_idx, place="lin.weight")


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_group_order_means_nothing_to_other_strategies(strategy: str) -> None:
    args = QuantizationArgs(num_bits=4, strategy=strategy, block_structure=(2, 2) if strategy == "block" else None)
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, args, g_idx=torch.tensor([1, 0, 1, 0], dtype=torch.int32))
    assert quantized.g_idx is None
    assert_same_bits(quantized.codes, quantize(weight, args).codes)


def test_dtype_of_the_dense_weight() -> None:
    args = QuantizationArgs(num_bits=8, strategy="channel")
    quantized = quantize(torch.randn(3, 8, dtype=torch.float32).to(torch.bfloat16), args)
    dense = dequantize(quantized, args)
    assert dense.dtype == torch.bfloat16
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        # Computed and rounded in the dtype of the scale, whatever it is cast to afterwards.
        assert_same_bits(dequantize(quantized, args, dtype=dtype), dense.to(dtype))
    plain = QuantizedWeight(torch.tensor([[0.1, -2.0]]))
    assert dequantize(plain, None) is plain.codes
    assert_same_bits(dequantize(plain, None, dtype=torch.float16), plain.codes.to(torch.float16))


def test_fake_quantize_is_there_and_back() -> None:
    args = QuantizationArgs(num_bits=3, strategy="group", group_size=4, symmetric=False)
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    assert_same_bits(fake_quantize(weight, args), dequantize(quantize(weight, args), args))
    assert_same_bits(fake_quantize(fake_quantize(weight, args), args), fake_quantize(weight, args))


def test_moving_moves_every_tensor() -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=4, symmetric=False)
    quantized = quantize(torch.randn(2, 8), args, g_idx=torch.tensor([0, 1] * 4, dtype=torch.int32)).to("meta")
    tensors = (quantized.codes, quantized.scale, quantized.zero_point, quantized.g_idx)
    assert all(tensor.is_meta for tensor in tensors)
    assert quantized.global_scale is None


def test_the_mse_observer_clips_what_stands_out() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 1024, generator=generator)
    weight[:, 0] = 6.0
    options = {"maxshrink": 0.6, "norm": 2.0}
    plain = QuantizationArgs(num_bits=4, strategy="group", group_size=512)
    clipped = QuantizationArgs(num_bits=4, strategy="group", group_size=512, observer="mse", observer_kwargs=options)
    scales = weight_scales(weight, plain)[0], weight_scales(weight, clipped)[0]
    assert (scales[1] <= scales[0]).all()
    assert (scales[1][:, 0] < scales[0][:, 0]).all()
    errors = [(fake_quantize(weight, args) - weight).square().sum() for args in (plain, clipped)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("strategy", ["tensor", "channel", "block"])
def test_the_mse_observer_of_values_on_a_grid_keeps_their_range(strategy: str) -> None:
    fields = {"num_bits": 8, "strategy": strategy, "block_structure": (2, 5) if strategy == "block" else None}
    weight = torch.arange(-127, 128, 1.0).repeat(2, 1)
    found = weight_scales(weight, QuantizationArgs(**fields, symmetric=False, observer="mse"))
    expected = weight_scales(weight, QuantizationArgs(**fields, symmetric=False, observer="minmax"))
    if strategy != "block":  # blocks of five values are exact in many ranges
        assert_same_bits(found[0], expected[0])
        assert_same_bits(found[1], expected[1])
    assert found[0].shape == expected[0].shape
    assert found[1].shape == expected[1].shape


# What cannot be quantized --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scales_given", [True, False])
@pytest.mark.parametrize("args", [
    QuantizationArgs(num_bits=4, strategy="tensor"),
    QuantizationArgs(num_bits=4, strategy="group", group_size=4),
    QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=(2, 3)),
    QuantizationArgs(num_bits=8, strategy="channel", observer="mse"),
])  # fmt: skip
def test_weights_that_are_not_finite(value: float, scales_given: bool, args: QuantizationArgs) -> None:
    weight = torch.ones(3, 8)
    weight[1, 6] = value
    scale = torch.ones(scale_shape(args, weight.shape)) if scales_given else None
    with pytest.raises(QuantizationError, match=rf"^model\.up\.weight: holds {value} at index \[1, 6\]"):
        quantize(weight, args, scale=scale, place="model.up.weight")


def test_a_group_size_that_does_not_divide() -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
    with pytest.raises(QuantizationError) as caught:
        quantize(torch.ones(2, 960), args, place="model.q.weight")
    assert str(caught.value).startswith("model.q.weight: group_size 128 does not divide its 960 input features")
    assert "group sizes that fit: 96, 64, 48, 32, 16, 8;" in str(caught.value)
    with pytest.raises(QuantizationError, match="no usual group size fits"):
        quantize(torch.ones(2, 13), args)


@pytest.mark.parametrize("shape", [(), (8,), (0, 8), (8, 0), (2, 0, 8)])
def test_weights_without_values_or_columns(shape: tuple[int, ...]) -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel")
    with pytest.raises(QuantizationError, match=r"^lin: has shape .*only matrices"):
        quantize(torch.zeros(shape), args, place="lin")


def test_a_range_that_overflows_the_dtype() -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel", symmetric=False)
    weight = torch.tensor([[6e4, -6e4]], dtype=torch.float16)
    with pytest.raises(QuantizationError, match=r"^lin: spans -60000 to 60000, a range that torch\.float16"):
        quantize(weight, args, place="lin")
    assert quantize(weight.to(torch.float32), args).codes.tolist() == [[7, -8]]


SYMMETRIC, ASYMMETRIC = (QuantizationArgs(num_bits=4, strategy="channel", symmetric=flag) for flag in (True, False))


@pytest.mark.parametrize(
    ("args", "given_ones", "message"),
    [
        (SYMMETRIC, {"scale": torch.ones(2)}, r"the scale has shape \[2\], expected \[2, 1\]"),
        (SYMMETRIC, {"scale": torch.tensor([[1.0], [math.nan]])}, "the scale holds NaN, infinity or zero"),
        (SYMMETRIC, {"scale": torch.tensor([[1.0], [math.inf]])}, "the scale holds NaN, infinity or zero"),
        (SYMMETRIC, {"scale": torch.tensor([[1.0], [0.0]])}, "the scale holds NaN, infinity or zero"),
        (
            SYMMETRIC,
            {"scale": torch.ones(2, 1), "zero_point": torch.zeros(2, 1, dtype=torch.int8)},
            "a zero point was given, but the scheme is symmetric",
        ),
        (ASYMMETRIC, {"scale": torch.ones(2, 1)}, r"needs a zero point of shape \[2, 1\], found none"),
        (
            ASYMMETRIC,
            {"scale": torch.ones(2, 1), "zero_point": torch.zeros(2, dtype=torch.int8)},
            r"needs a zero point of shape \[2, 1\], found one of shape \[2\]",
        ),
        (
            ASYMMETRIC,
            {"scale": torch.ones(2, 1), "zero_point": torch.zeros(2, 1)},
            "needs a zero point of dtype torch.int8, found torch.float32",
        ),
    ],
)
def test_scales_that_do_not_fit(args: QuantizationArgs, given_ones: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(QuantizationError, match=f"^lin: {message}"):
        quantize(torch.ones(2, 8), args, place="lin", **given_ones)


def test_all_that_is_wrong_with_scales_is_listed() -> None:
    with pytest.raises(QuantizationError) as caught:
        quantize(torch.ones(2, 8), ASYMMETRIC, scale=torch.tensor([math.nan]), place="lin")
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        (torch.zeros(8, dtype=torch.int64), r"g_idx must be int32 \[8\], not torch\.int64 \[8\]"),
        (torch.zeros(4, dtype=torch.int32), r"g_idx must be int32 \[8\], not torch\.int32 \[4\]"),
        (torch.tensor([0, 0, 0, 0, 1, 1, 1, 2], dtype=torch.int32), "g_idx names groups 0 to 2, expected 0 to 1"),
        (torch.tensor([0, 0, 0, 0, 1, 1, 1, -1], dtype=torch.int32), "g_idx names groups -1 to 1, expected 0 to 1"),
    ],
)
def test_group_orders_that_do_not_fit(g_idx: torch.Tensor, message: str) -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=4)
    with pytest.raises(QuantizationError, match=f"^lin: {message}"):
        quantize(torch.ones(2, 8), args, g_idx=g_idx, place="lin")


@pytest.mark.parametrize(
    ("observer", "options", "message"),
    [
        ("histogram", {}, "the observer 'histogram' is not known for weights; there are .*mse"),
        ("mse", {"patience": 5}, "observer mse: .*patience"),
        ("mse", {"grid": 0}, "observer mse: .*grid be a positive integer"),
        ("mse", {"grid": 2.5}, "observer mse: .*grid be a positive integer"),
        ("mse", {"maxshrink": 1.0}, r"observer mse: maxshrink must lie in \(0, 1\)"),
        ("mse", {"norm": 0}, "observer mse: .*norm be positive"),
    ],
)
def test_observers_that_do_not_fit(observer: str, options: dict[str, Any], message: str) -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel", observer=observer, observer_kwargs=options)
    with pytest.raises(QuantizationError, match=f"^lin: {message}"):
        quantize(torch.ones(2, 8), args, place="lin")


@pytest.mark.parametrize(
    "args",
    [
        QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32),
        QuantizationArgs(num_bits=6, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"),
        QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"),
    ],
)
def test_number_formats_without_a_decoder(args: QuantizationArgs) -> None:
    with pytest.raises(UnsupportedFormatError, match=rf"^lin: float of {args.num_bits} bits.*\(NVFP4 and MX formats\)"):
        quantize(torch.ones(2, 32), args, place="lin")


def test_strategies_that_are_not_of_weights() -> None:
    args = QuantizationArgs(num_bits=8, strategy="token", dynamic=True)
    with pytest.raises(UnsupportedFormatError, match="strategy 'token' is not one of weights"):
        quantize(torch.ones(2, 8), args)


def test_zero_points_of_another_dtype_are_what_a_file_says() -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel", symmetric=False).model_copy(
        update={"zp_dtype": "torch.int32"}
    )
    quantized = quantize(torch.tensor([[-1.0, 0.0, 0.25, 2.75]]), args)
    assert quantized.zero_point.dtype == torch.int32
    assert quantized.zero_point.tolist() == [[-4]]
    assert dequantize(quantized, args).tolist() == [[-1.0, 0.0, 0.25, 2.75]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_other_dtypes_of_weights(dtype: torch.dtype) -> None:
    """Double precision keeps its own; integers, which have no epsilon, get the scales of float16."""
    weight = torch.tensor([[-15, 0, 3, 15]]).to(dtype)
    quantized = quantize(weight, QuantizationArgs(num_bits=4, strategy="channel"))
    assert quantized.scale.dtype == (dtype if dtype.is_floating_point else torch.float16)
    assert quantized.scale.tolist() == [[2.0]]
    assert quantized.codes.tolist() == [[-8, 0, 2, 7]]
