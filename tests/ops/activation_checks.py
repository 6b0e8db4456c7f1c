"""Checks of rounded activations for one instruction set, which a process chooses when it starts: run as a program."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from compressed_format import ops
from compressed_format.activations import fake_quantize_activations
from tests.checks import assert_same_bits

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins at an odd byte."""
    if tensor.numel() == 0:
        return tensor
    memory = bytearray(tensor.numel() * tensor.element_size() + 1)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, offset=1, count=tensor.numel()).view(tensor.shape)
    copy.copy_(tensor)
    return copy


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(shape, generator=generator) * 10.0 ** (seed % 7 - 4)
    kind = seed % 6
    if kind == 1:
        input = input.abs()
    elif kind == 2 and shape[0] > 1:
        input[1] = 0
    elif kind == 3:
        input = (input * 64 / input.abs().max()).round() / 2  # ties, and zeros of both signs
    elif kind == 4:
        input = -input.abs()
    return input.to(dtype)


def same_bits(actual: torch.Tensor, expected: torch.Tensor, case: Any) -> None:
    """Bit for bit, but for what is not a number, of which there are many."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan), case
    assert_same_bits(torch.where(nan, 0, actual), torch.where(nan, 0, expected))


def check_dynamic() -> None:
    shapes = [(1,), (5, 1), (3, 16), (2, 3, 33), (17, 40), (4, 1000), (300, 257)]
    rounding = [(bits, False, symmetric) for bits in (1, 2, 4, 8) for symmetric in (True, False)] + [(8, True, True)]
    seed = 0
    for shape, dtype, arguments in itertools.product(shapes, DTYPES, rounding):
        groups = [0, -1, *[size for size in (1, 8, 11, 20) if shape[-1] % size == 0]]
        for group in groups:
            seed += 1
            input = misaligned(values(shape, dtype, seed))
            case = shape, dtype, arguments, group, seed
            expected = fake_quantize_activations(input, None, None, *arguments, group)
            same_bits(ops.fake_quantize(input, None, None, *arguments, group), expected, case)


def check_static() -> None:
    seed = 0
    for dtype, scale_dtype, (bits, is_float) in itertools.product(DTYPES, DTYPES, [(8, False), (3, False), (8, True)]):
        for group, by_token, asymmetric in itertools.product([0, -1, 12], [False, True], [False, True]):
            if group == -1 and not by_token:
                continue
            seed += 1
            input = values((5, 3, 36), dtype, seed)
            groups = 3 if group == 12 else 1
            shape = (5, 3, groups) if by_token else (groups,)
            generator = torch.Generator().manual_seed(seed)
            scale = (torch.rand(shape, generator=generator) * 10.0 ** (seed % 5 - 3) + 1e-4).to(scale_dtype)
            zero_point = torch.randint(-8, 8, shape, generator=generator).to(torch.int8) if asymmetric else None
            arguments = (misaligned(scale), zero_point, bits, is_float, not asymmetric, group)
            expected = fake_quantize_activations(input, *arguments)
            same_bits(ops.fake_quantize(input, *arguments), expected, (dtype, scale_dtype, arguments))


def check_what_is_not_finite() -> None:
    for dtype, value, static in itertools.product(DTYPES, (torch.nan, torch.inf, -torch.inf), (False, True)):
        for bits, is_float, symmetric in ((8, False, True), (8, False, False), (8, True, True)):
            for group in (0, -1, 20):
                input = torch.randn(4, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
                input[1, 37] = value
                scale = torch.full((2 if group == 20 else 1,), 0.02, dtype=dtype)
                scale = scale.expand(4, 1).contiguous() if group == -1 else scale
                zero_point = None if symmetric else torch.full_like(scale, 5, dtype=torch.int8)
                given = (scale, zero_point) if static else (None, None)
                arguments = (*given, bits, is_float, symmetric, group)
                expected = fake_quantize_activations(input, *arguments)
                assert expected.isnan().any() or static
                same_bits(ops.fake_quantize(input, *arguments), expected, (dtype, value, arguments))


def check_every_float8() -> None:
    """All values of bfloat16 up to the largest code and beyond: each rounds as torch's conversion does."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    input = bits.view(torch.bfloat16)
    input = input[input.isfinite()]
    one = torch.ones(1, dtype=torch.bfloat16)
    expected = input.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.bfloat16)
    assert_same_bits(ops.fake_quantize(input, one, None, 8, True, True, 0), expected)


def check_slices() -> None:
    input = torch.randn(8, 12, 6)
    for sliced in (input[1:7:2], input.transpose(0, 1), input[..., ::2], input[:, :, 1:]):
        for group in (0, -1):
            expected = fake_quantize_activations(sliced.contiguous(), None, None, 8, False, True, group)
            assert_same_bits(ops.fake_quantize(sliced, None, None, 8, False, True, group), expected)


def check_threads() -> None:
    input = values((300, 513), torch.bfloat16, 6)
    for group in (0, -1, 27):
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(ops.fake_quantize(input, None, None, 8, False, False, group))
        assert_same_bits(*results)


CHECKS = (check_dynamic, check_static, check_what_is_not_finite, check_every_float8, check_slices, check_threads)

if __name__ == "__main__":
    for check in CHECKS:
        check()
    print(ops.backend_info()["cpu"]["instructions"])
