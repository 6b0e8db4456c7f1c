"""Checks of quantized weights for one instruction set, which a process chooses when it starts: run as a program."""

from __future__ import annotations

import itertools

import pytest
import torch

from compressed_format import bitpack, ops
from compressed_format.errors import OpArgumentError
from compressed_format.ops.quantize import Quantized
from tests.ops.activation_checks import DTYPES, misaligned, values

reference = torch.ops.compressed_format.quantize_reference.default
SCHEMES = [(bits, False, symmetric) for bits in range(1, 9) for symmetric in (True, False)] + [(8, True, True)]


def assert_same(actual: Quantized, expected: Quantized, case: object) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), case
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), case


def check_against_the_reference() -> None:
    seed = 0
    for shape, dtype, scheme in itertools.product([(1, 1), (3, 16), (5, 67), (2, 6, 40), (2, 4200)], DTYPES, SCHEMES):
        rows, columns = shape[-2:]
        for block in ((1, columns), (1, 8), (rows, columns), (4, 16)):
            seed += 1
            pack = seed % 2 == 0 and not scheme[1]
            weight = misaligned(values(shape, dtype, seed))
            case = shape, dtype, scheme, block, pack, seed
            expected = reference(weight, None, None, *scheme, *block, pack)
            assert_same(ops.quantize(weight, None, None, *scheme, *block, pack), expected, case)
            given = expected[1] * 0.75, None if scheme[2] else expected[2] // 2
            expected = reference(weight, *given, *scheme, *block, pack)
            assert_same(ops.quantize(weight, *given, *scheme, *block, pack), expected, case)


def check_parts_and_threads() -> None:
    whole = values((300, 400), torch.bfloat16, 6)
    for part in (whole[17:, 3:259], whole.t(), whole[:, ::2]):
        for block in ((1, 128), (64, 64), part.shape):
            expected = reference(part, None, None, 3, False, False, *block, True)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                assert_same(ops.quantize(part, None, None, 3, False, False, *block, True), expected, (block, threads))


def check_values_that_are_not_finite() -> None:
    for dtype, bad, (bits, is_float, symmetric) in itertools.product(
        DTYPES, (torch.inf, -torch.inf, torch.nan), SCHEMES
    ):
        weight = values((4, 100), dtype, 12)
        weight[2, 77] = bad
        for block in ((1, 20), (4, 100), (2, 50)):
            found = ops.quantize(weight, None, None, bits, is_float, symmetric, *block, False)[1]
            expected = torch.zeros_like(found, dtype=torch.bool)
            expected[2 // block[0], 77 // block[1]] = True
            assert torch.equal(~found.isfinite(), expected), (dtype, bad, bits, block)


def check_packing() -> None:
    for bits, size in itertools.product(range(1, 9), (1, 7, 8, 31, 64, 67, 70_001)):
        half = 1 << (bits - 1)
        codes = misaligned(torch.randint(-half, half, (3 if size < 100 else 1, size), dtype=torch.int8))
        assert torch.equal(ops.pack_codes(codes, bits), bitpack.pack_codes(codes.clone(), bits)), (bits, size)


def check_bad_arguments() -> None:
    weight = torch.zeros(4, 64)
    for argument, bad in (
        ("bits", (weight, None, None, 9, False, True, 1, 32, True)),
        ("weight", (weight.double(), None, None, 4, False, True, 1, 32, True)),
        ("scale", (weight, weight, None, 4, False, True, 1, 32, True)),
        ("zero_point", (weight, weight[:, :2], None, 4, False, False, 1, 32, True)),
    ):
        with pytest.raises(OpArgumentError, match=f"quantize: {argument} must"):
            ops.quantize(*bad)


if __name__ == "__main__":
    check_bad_arguments()
    check_against_the_reference()
    check_parts_and_threads()
    check_values_that_are_not_finite()
    check_packing()
    print(ops.backend_info()["cpu"]["instructions"])
