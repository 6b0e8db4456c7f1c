"""Checks of the product of quantized activations and weights for one instruction set: run as a program."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from compressed_format import ops
from compressed_format.activations import activation_scale
from compressed_format.scales import round_to_codes
from tests.checks import assert_same_bits
from tests.ops.activation_checks import DTYPES, misaligned, values

REFERENCE = torch.ops.compressed_format.quantized_linear_reference.default


class Weight(NamedTuple):
    """The arguments that describe a weight to an op."""

    tensors: tuple[torch.Tensor | None, ...]
    layout: tuple[int, int, int, int]


def weight_of(
    rows: int, columns: int, *, is_float: bool, strategy: str = "channel", asymmetric: bool = False, seed: int = 0
) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    if is_float:
        codes = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    shape = (rows, 1) if strategy == "channel" else (1,)
    scale = (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(DTYPES[seed % 3])
    zero_point = torch.randint(-20, 20, shape, generator=generator).to(torch.int8) if asymmetric else None
    layout = (8, columns, 1 if strategy == "channel" else rows, columns)
    return Weight((misaligned(codes), scale, zero_point, None, None), layout)


def codes_of(input: torch.Tensor, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero point in float64, by the definition."""
    scale, zero_point, bits, is_float, symmetric, group = arguments
    lowest, highest = (-448.0, 448.0) if is_float else (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    if scale is None:
        bounds = torch.aminmax(input) if group == 0 else (input.amin(-1, keepdim=True), input.amax(-1, keepdim=True))
        scale, zero_point = activation_scale(*bounds, bits, is_float, symmetric)
    ratio = input / scale
    if zero_point is not None:
        ratio = ratio + zero_point.to(input.dtype)
    codes = round_to_codes(ratio, lowest, highest, is_float)
    return codes.double(), scale.double(), torch.zeros(1) if zero_point is None else zero_point.double()


def product_of(input: torch.Tensor, arguments: tuple[Any, ...], weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """The product of the codes with nothing rounded after them, and that of their magnitudes."""
    codes, scale, zero_point = codes_of(input, arguments)
    stored, weight_scale, weight_zero_point, *_ = weight.tensors
    given = stored.double() - (0 if weight_zero_point is None else weight_zero_point.double())
    codes = codes - zero_point
    scales = scale * weight_scale.double().reshape(-1)
    return (codes @ given.T) * scales, (codes.abs() @ given.abs().T) * scales


def check(input: torch.Tensor, arguments: tuple[Any, ...], weight: Weight, bias: torch.Tensor | None) -> None:
    output = ops.quantized_linear(input, *arguments, *weight.tensors, bias, *weight.layout)
    case = tuple(input.shape), input.dtype, arguments, weight.layout, [t if t is None else t.dtype for t in weight[0]]
    product, magnitude = product_of(input, arguments, weight)
    added = torch.zeros(1) if bias is None else bias.double()
    expected = product + added
    assert (output.dtype, output.shape) == (input.dtype, expected.shape), case
    # Half a step of the output's dtype, and few of float32 before: more where E4M3 products are added in it.
    single = torch.finfo(torch.float32).eps
    bound = expected.abs() * torch.finfo(input.dtype).eps * 0.51 + (product.abs() + added.abs()) * single * 2
    if arguments[3]:
        bound = bound + magnitude * single * 8
    wrong = (output.double() - expected).abs() > bound + torch.finfo(input.dtype).smallest_normal
    assert not wrong.any(), (case, wrong.nonzero()[:5], output[wrong][:5], expected[wrong][:5])


def roundings(input: torch.Tensor, seed: int) -> Iterator[tuple[Any, ...]]:
    dtype = DTYPES[seed % 3]
    static = torch.full((1,), float(input.abs().max()) / 90, dtype=dtype)
    yield (None, None, 8, False, True, -1)
    yield (None, None, 8, False, False, (0, -1)[seed % 2])
    yield (None, None, 4, False, True, 0)
    yield (static, None, 8, False, True, 0)
    yield (static, torch.full((1,), -17, dtype=torch.int8), 8, False, False, 0)
    yield (static.expand(*input.shape[:-1], 1).contiguous(), None, 8, False, True, -1)
    yield (None, None, 8, True, True, (0, -1)[seed % 2])
    yield (static, None, 8, True, True, 0)


def check_shapes() -> None:
    tokens = [1, 2, 3, 4, 5, 15, 16, 17, 33, 48, 64, 65, 130]
    sizes = [(1, 1), (7, 63), (16, 64), (49, 130), (97, 259), (5, 2117), (50, 2050)]
    for seed, (count, (rows, columns)) in enumerate(itertools.product(tokens, sizes)):
        generator = torch.Generator().manual_seed(seed)
        input = misaligned(torch.randn(count, columns, generator=generator).to(DTYPES[seed // 7 % 3]))
        bias = torch.randn(rows, generator=generator).to(DTYPES[seed % 3]) if seed % 2 else None
        strategy, asymmetric = ("channel", "tensor")[seed % 3 == 2], seed % 4 == 3
        for arguments in roundings(input, seed):
            is_float = bool(arguments[3])
            weight = weight_of(
                rows, columns, is_float=is_float, strategy=strategy, asymmetric=asymmetric and not is_float, seed=seed
            )
            check(input, arguments, weight, bias)


def check_many_tokens() -> None:
    for count, is_float in itertools.product((256, 300, 577), (False, True)):
        input = torch.randn(count, 96, generator=torch.Generator().manual_seed(count)).bfloat16()
        check(input, (None, None, 8, is_float, True, -1), weight_of(70, 96, is_float=is_float), None)


def check_every_code() -> None:
    """All E4M3 codes of a weight that are numbers, by a one at their place; what is none gives none."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    for count in (1, 128):
        input = torch.eye(128, dtype=torch.float32)[:count]
        one, scale = torch.ones(1), torch.ones(1)
        output = ops.quantized_linear(input, one, None, 8, True, True, 0, codes, scale, *[None] * 4, 8, 128, 2, 128)
        assert output.isnan().all()  # each row holds a 7f or ff
        finite = torch.where(codes.float().isnan(), 0, codes.float())
        given = finite.to(torch.float8_e4m3fn)
        output = ops.quantized_linear(input, one, None, 8, True, True, 0, given, scale, *[None] * 4, 8, 128, 2, 128)
        assert torch.equal(output, input @ finite.T)


def check_extreme_sums() -> None:
    """Sums that pass 2**31 on the way, and come back into 32 bits at the end."""
    for columns, count in itertools.product((65536, 32768), (1, 4, 5, 20)):
        input = torch.full((count, columns), -128.0)
        one = torch.ones(1)
        zero_point = torch.full((1,), 127, dtype=torch.int8)
        weight = Weight(
            (torch.full((3, columns), -128, dtype=torch.int8), one, None, None, None), (8, columns, 3, columns)
        )
        check(input, (one, None, 8, False, True, 0), weight, None)
        check(input - 127, (one, zero_point, 8, False, False, 0), weight, None)
        if columns == 32768:
            offset = Weight((weight.tensors[0], one, zero_point, None, None), weight.layout)
            check(input - 127, (one, zero_point, 8, False, False, 0), offset, None)


def reference_by_token(input: torch.Tensor, arguments: tuple[Any, ...], weight: Weight) -> torch.Tensor:
    """The reference's result, a call for each token: with AMX, torch's product lets a NaN reach the row before it."""
    scale, zero_point, *rounding = arguments
    results = []
    for token in range(input.shape[0]):
        one = slice(token, token + 1)
        given = (None if scale is None else scale[one], None if zero_point is None else zero_point[one])
        results.append(REFERENCE(input[one], *given, *rounding, *weight.tensors, None, *weight.layout))
    return torch.cat(results)


def check_what_is_not_finite() -> None:
    """A token that holds no number gives none, and leaves the others alone."""
    for dtype, value, count, is_float in itertools.product(DTYPES, (torch.nan, torch.inf), (3, 40), (False, True)):
        for symmetric in (True,) if is_float else (True, False):
            weight = weight_of(20, 70, is_float=is_float, seed=4)
            input = torch.randn(count, 70, generator=torch.Generator().manual_seed(9)).to(dtype)
            clean = ops.quantized_linear(
                input, None, None, 8, is_float, symmetric, -1, *weight.tensors, None, *weight.layout
            )
            input[1, 66] = value
            for scale in (None, torch.full((count, 1), 0.05, dtype=dtype)):
                zero_point = None if scale is None or symmetric else torch.zeros(count, 1, dtype=torch.int8)
                arguments = (scale, zero_point, 8, is_float, symmetric, -1)
                output = ops.quantized_linear(input, *arguments, *weight.tensors, None, *weight.layout)
                expected = reference_by_token(input, arguments, weight)
                assert torch.equal(output.isnan(), expected.isnan()), (dtype, value, arguments)
                if scale is None:
                    others = [token for token in range(count) if token != 1]
                    assert_same_bits(output[others], clean[others])


def check_threads() -> None:
    for count, is_float in itertools.product((1, 40, 300), (False, True)):
        weight = weight_of(300, 640, is_float=is_float)
        input = values((count, 640), torch.bfloat16, 6)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            arguments = (None, None, 8, is_float, True, 0)
            results.append(ops.quantized_linear(input, *arguments, *weight.tensors, None, *weight.layout))
        assert_same_bits(*results)


def check_views() -> None:
    """Rows of a weight a stride apart, and inputs of any rank and stride."""
    for is_float in (False, True):
        stored, scale, *_ = weight_of(40, 90, is_float=is_float).tensors
        part = Weight((stored[3:35, 5:85], scale[3:35], None, None, None), (8, 80, 1, 80))
        for count in (3, 20):
            input = torch.randn(count, 80, 2).bfloat16()[..., 1]
            check(input, (None, None, 8, is_float, True, -1), part, None)
            whole = input.reshape(1, count, 80).expand(2, count, 80)
            output = ops.quantized_linear(whole, None, None, 8, is_float, True, -1, *part.tensors, None, *part.layout)
            single = ops.quantized_linear(input, None, None, 8, is_float, True, -1, *part.tensors, None, *part.layout)
            assert_same_bits(output, torch.stack([single, single]))


CHECKS = (
    check_shapes,
    check_many_tokens,
    check_every_code,
    check_extreme_sums,
    check_what_is_not_finite,
    check_threads,
    check_views,
)

if __name__ == "__main__":
    for each in CHECKS:
        each()
    print(ops.backend_info()["cpu"]["instructions"])
