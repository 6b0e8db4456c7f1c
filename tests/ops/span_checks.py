"""Checks of products whose scales change along the columns, for one instruction set: run as a program."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from compressed_format import ops
from compressed_format.activations import activation_scale
from compressed_format.bitpack import pack_codes
from compressed_format.scales import round_to_codes
from tests.checks import assert_same_bits
from tests.ops.activation_checks import DTYPES, misaligned
from tests.ops.quantized_linear_checks import Weight, reference_by_token

FLOAT = (8, True, True)
SYMMETRIC, ASYMMETRIC = (8, False, True), (8, False, False)


class Problem:
    """A weight in the tensors of a checkpoint, and what its codes are worth in float64."""

    def __init__(self, rows: int, columns: int, kind: str, block: tuple[int, int], offsets: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        bits = int(kind.removeprefix("packed ")) if kind.startswith("packed") else 8
        half = 2 ** (bits - 1)
        if kind == "float8":
            codes = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        else:
            codes = torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)
        shape = -(-rows // block[0]), -(-columns // block[1])
        scale = (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(DTYPES[seed % 3])
        low, high = max(-half, -128), min(half, 128)
        zero_point = torch.randint(low, high, shape, generator=generator).to(torch.int8) if offsets else None
        stored_zeros = zero_point
        if zero_point is not None and offsets == "packed":
            stored_zeros = pack_codes(zero_point.T.contiguous(), bits).T.contiguous()
        stored = pack_codes(codes, bits) if kind.startswith("packed") else codes
        tensors = (misaligned(stored), misaligned(scale), stored_zeros, None, None)
        self.weight = Weight(tensors, (bits, columns, *block))
        steps = codes.double()
        if zero_point is not None:
            steps = steps - spread(zero_point.double(), block, (rows, columns))
        self.dense = steps * spread(scale.double(), block, (rows, columns))


def spread(values: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    rows = values.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def rounded(input: torch.Tensor, arguments: tuple[Any, ...]) -> torch.Tensor:
    """What the codes of activations stand for, in float64 and with nothing rounded after them."""
    scale, zero_point, bits, is_float, symmetric, group = arguments
    lowest, highest = (-448.0, 448.0) if is_float else (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    values = input.unflatten(-1, (-1, group)) if group > 0 else input
    if scale is None:
        bounds = torch.aminmax(values) if group == 0 else (values.amin(-1, keepdim=True), values.amax(-1, keepdim=True))
        scale, zero_point = activation_scale(*bounds, bits, is_float, symmetric)
    elif group > 0:
        scale = scale.unsqueeze(-1)
        zero_point = None if zero_point is None else zero_point.unsqueeze(-1)
    ratio = values / scale
    if zero_point is not None:
        ratio = ratio + zero_point.to(values.dtype)
    codes = round_to_codes(ratio, lowest, highest, is_float).double()
    if zero_point is not None:
        codes = codes - zero_point.double()
    return (codes * scale.double()).reshape(input.shape)


def check(input: torch.Tensor, arguments: tuple[Any, ...], problem: Problem, bias: torch.Tensor | None) -> None:
    weight = problem.weight
    output = ops.quantized_linear(input, *arguments, *weight.tensors, bias, *weight.layout)
    case = tuple(input.shape), input.dtype, arguments, weight.layout, [t if t is None else t.dtype for t in weight[0]]
    x = rounded(input, arguments)
    expected = x @ problem.dense.T + (0 if bias is None else bias.double())
    # Half a step of the output's dtype; before, sums of float32, each of them by so little of the magnitudes. What
    # rounds the dense weight, or the activations, to a half first misses that by far.
    magnitude = x.abs() @ problem.dense.abs().T + (0 if bias is None else bias.double().abs())
    bound = expected.abs() * torch.finfo(input.dtype).eps * 0.51 + magnitude * torch.finfo(torch.float32).eps * 16
    wrong = (output.double() - expected).abs() > bound + torch.finfo(input.dtype).smallest_normal
    assert not wrong.any(), (case, wrong.nonzero()[:5], output[wrong][:5], expected[wrong][:5])
    assert (output.dtype, output.shape) == (input.dtype, expected.shape), case


def cases(columns: int) -> Iterator[tuple[str, tuple[int, int], str, tuple[Any, ...], int]]:
    """Kinds of weights, rows and columns that share a scale, zero points, and how to round how many activations."""
    groups = [size for size in (8, 32, 64, 128, 192) if columns % size == 0]
    for bits in range(1, 9):
        yield f"packed {bits}", (1, columns), "", SYMMETRIC, -1
    for group in groups:
        yield "packed 4", (1, group), "packed", SYMMETRIC, -1
        yield "packed 4", (1, group), "", ASYMMETRIC, -1
        yield "packed 3", (1, group), "packed", ASYMMETRIC, 0
        yield "int8", (1, group), "int8", SYMMETRIC, group
        yield "packed 8", (1, group), "packed", ASYMMETRIC, group
        yield "int8", (1, columns), "", ASYMMETRIC, group
        yield "packed 4", (1, 2 * group), "int8", SYMMETRIC, group
        yield "packed 5", (1, group), "int8", SYMMETRIC, -1
        yield "float8", (16, group), "", FLOAT, group
        yield "float8", (1, group), "", FLOAT, -1
        yield "float8", (16, 2 * group), "", FLOAT, group
    yield "int8", (1, columns), "packed", SYMMETRIC, -1
    yield "packed 4", (16, 64), "int8", SYMMETRIC, -1
    yield "float8", (16, 64), "", FLOAT, -1


def check_shapes() -> None:
    tokens = itertools.cycle([1, 5, 2, 17, 3, 64, 4, 33, 1, 130, 16, 65])
    sizes = [(1, 8), (7, 40), (49, 192), (33, 259), (16, 384), (97, 1536)]
    for seed, (rows, columns) in enumerate(sizes):
        for number, (kind, block, offsets, rounding, group) in enumerate(cases(columns)):
            generator = torch.Generator().manual_seed(seed * 1000 + number)
            count = next(tokens)
            input = misaligned(torch.randn(count, columns, generator=generator).to(DTYPES[number // 2 % 3]))
            bias = torch.randn(rows, generator=generator).to(DTYPES[seed % 3]) if number % 2 else None
            problem = Problem(rows, columns, kind, block, offsets, seed + number)
            check(input, (None, None, *rounding, group), problem, bias)


def check_static_groups() -> None:
    for dtype, count, asymmetric in itertools.product(DTYPES, (1, 3, 20), (False, True)):
        generator = torch.Generator().manual_seed(count)
        input = torch.randn(count, 256, generator=generator).to(dtype)
        for shape in ((4,), (count, 4)):
            scale = (torch.rand(shape, generator=generator) * 0.05 + 0.01).to(dtype)
            zero_point = torch.randint(-90, 90, shape, generator=generator).to(torch.int8) if asymmetric else None
            for kind in ("packed 4", "int8"):
                check(
                    input,
                    (scale, zero_point, 8, False, not asymmetric, 64),
                    Problem(20, 256, kind, (1, 128), "int8", 1),
                    None,
                )


def check_long_rows() -> None:
    """More columns than a span may have, and groups that are longer."""
    for count, (columns, group) in itertools.product((1, 4, 70), ((4099, 4099), (8192, 4096), (6144, 3072))):
        input = torch.randn(count, columns, generator=torch.Generator().manual_seed(count)).bfloat16()
        check(input, (None, None, *ASYMMETRIC, -1), Problem(50, columns, "packed 4", (1, group), "int8", 1), None)
        whole = group == columns
        check(
            input, (None, None, *FLOAT, -1 if whole else group), Problem(18, columns, "float8", (1, group), "", 2), None
        )


def check_extremes() -> None:
    """The largest sums of integers that a span can have, of both signs."""
    for count, sign in itertools.product((1, 20), (1, -1)):
        input, one = torch.full((count, 4096), -128.0), torch.ones(1)
        zero_point = torch.full((1,), 127, dtype=torch.int8)
        for kind in ("packed 8", "packed 1"):
            problem = Problem(3, 4096, kind, (1, 2048), "int8", 0)
            stored, scale, offsets, *_ = problem.weight.tensors
            assert stored is not None
            assert scale is not None
            assert offsets is not None
            stored.fill_(0 if sign < 0 else -1)
            scale.fill_(1)
            half = 128 if kind == "packed 8" else 1
            offsets.fill_(half - 1 if sign < 0 else -half)
            problem.dense = torch.full((3, 4096), float((2 * half - 1) * sign), dtype=torch.float64)
            check(input - 127, (one, zero_point, *ASYMMETRIC, 0), problem, None)


def check_what_is_not_finite() -> None:
    """A token that holds no number gives none, and leaves the others alone."""
    for dtype, value, count, kind in itertools.product(
        DTYPES, (torch.nan, torch.inf), (3, 40), ("packed 4", "int8", "float8")
    ):
        group = 32 if kind == "float8" else -1
        arguments = (None, None, *(FLOAT if kind == "float8" else ASYMMETRIC), group)
        weight = Problem(20, 96, kind, (1, 32), "", 3).weight
        input = torch.randn(count, 96, generator=torch.Generator().manual_seed(9)).to(dtype)
        clean = ops.quantized_linear(input, *arguments, *weight.tensors, None, *weight.layout)
        input[1, 66] = value
        output = ops.quantized_linear(input, *arguments, *weight.tensors, None, *weight.layout)
        expected = reference_by_token(input, arguments, weight)
        assert expected[1].isnan().all()
        assert torch.equal(output.isnan(), expected.isnan()), (dtype, value, kind)
        others = [token for token in range(count) if token != 1]
        assert_same_bits(output[others], clean[others])


def check_threads() -> None:
    for count, kind in itertools.product((1, 40, 300), ("packed 4", "float8")):
        weight = Problem(300, 640, kind, (1, 128), "", 5).weight
        input = torch.randn(count, 640, generator=torch.Generator().manual_seed(count)).bfloat16()
        rounding = (None, None, *(FLOAT if kind == "float8" else ASYMMETRIC), 128)
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.quantized_linear(input, *rounding, *weight.tensors, None, *weight.layout))
        assert_same_bits(*results)


def check_views() -> None:
    """Rows of a weight a stride apart, and inputs of any rank and stride."""
    for kind in ("packed 4", "int8", "float8"):
        stored, scale, *_ = Problem(40, 256, kind, (1, 64), "", 6).weight.tensors
        assert stored is not None
        assert scale is not None
        per_row = stored.shape[1] // 2
        weight = Weight(
            (stored[3:35, per_row:], scale[3:35, 2:].contiguous(), None, None, None),
            (4 if kind == "packed 4" else 8, 128, 1, 64),
        )
        whole = Weight((stored[3:35, per_row:].contiguous(), *weight.tensors[1:]), weight.layout)
        for count in (3, 20):
            input = torch.randn(count, 128, 2).bfloat16()[..., 1]
            rounding = (None, None, *(FLOAT if kind == "float8" else SYMMETRIC), -1)
            output = ops.quantized_linear(input, *rounding, *weight.tensors, None, *weight.layout)
            expected = ops.quantized_linear(input, *rounding, *whole.tensors, None, *whole.layout)
            assert_same_bits(output, expected)
            twice = input.reshape(1, count, 128).expand(2, count, 128)
            output = ops.quantized_linear(twice, *rounding, *weight.tensors, None, *weight.layout)
            assert_same_bits(output, torch.stack([expected, expected]))


CHECKS = (
    check_shapes,
    check_static_groups,
    check_long_rows,
    check_extremes,
    check_what_is_not_finite,
    check_threads,
    check_views,
)

if __name__ == "__main__":
    for each in CHECKS:
        each()
    print(ops.backend_info()["cpu"]["instructions"])
