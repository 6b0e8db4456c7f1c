"""The kernel of ``linear`` for many tokens, with every set of instructions that this machine runs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from compressed_format import bitpack, ops
from tests.ops.processes import run_tests

LEVELS = ("portable", "avx2", "avx512", "amx")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def random_weight(
    rows: int,
    columns: int,
    generator: torch.Generator,
    *,
    kind: str = "packed",
    bits: int = 4,
    block: tuple[int, int] = (1, 128),
    scale_dtype: torch.dtype = torch.bfloat16,
    zero_points: str = "",
    g_idx: bool = False,
    offset: int = 0,
) -> list[Any]:
    """The arguments after ``input``, without a bias; with ``offset``, tensors begin that many bytes off."""

    def placed(tensor: torch.Tensor) -> torch.Tensor:
        data = bytearray(offset) + bytearray(tensor.contiguous().view(torch.uint8).reshape(-1).numpy().tobytes())
        return torch.frombuffer(data, dtype=tensor.dtype, offset=offset).reshape(tensor.shape)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    codes: torch.Tensor
    if kind == "packed":
        codes = integers(-(2**31), 2**31, (rows, bitpack.packed_words(columns, bits))).to(torch.int32)
    elif kind == "float8":
        codes = (torch.rand(rows, columns, generator=generator) * 16 - 8).to(torch.float8_e4m3fn)
    elif kind == "int8":
        codes = integers(-128, 128, (rows, columns)).to(torch.int8)
    elif kind == "2:4":
        kept = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1) < 2
        mask = torch.nn.functional.pad(kept.reshape(rows, columns), (0, -columns % 8)).reshape(rows, -1, 8)
        bytes_of_mask = (mask * 2 ** torch.arange(8)).sum(-1).to(torch.uint8)
        codes = torch.randn(rows, columns // 2, generator=generator).to(scale_dtype)
        return [placed(codes), None, None, None, placed(bytes_of_mask), 8, columns, 1, 1]
    else:
        codes = torch.randn(rows, columns, generator=generator).to(scale_dtype)
        return [placed(codes), None, None, None, None, 8, columns, 1, 1]
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    scale = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(scale_dtype)
    zero_point = None
    if zero_points == "int8":
        zero_point = placed(integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).to(torch.int8))
    elif zero_points == "packed":
        words = (bitpack.packed_words(shape[0], bits), shape[1])
        zero_point = placed(integers(-(2**31), 2**31, words).to(torch.int32))
    groups = placed(integers(0, shape[1], (columns,)).to(torch.int32)) if g_idx else None
    return [placed(codes), placed(scale), zero_point, groups, None, bits, columns, *block]


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact).pow(2).mean().sqrt())


def check(x: torch.Tensor, weight: list[Any], bias: torch.Tensor | None) -> torch.Tensor:
    """Compare the kernel with the definition: neither is exact, and the kernel errs no more than a tenth more."""
    tensors, layout = weight[:5], weight[5:]
    y = torch.ops.compressed_format.linear(x, *tensors, bias, *layout)
    reference = torch.ops.compressed_format.linear_reference(x, *tensors, bias, *layout)
    wide = [tensors[0] if tensors[1] is not None else tensors[0].double(), *tensors[1:]]
    if wide[1] is not None:
        wide[1] = wide[1].double()
    exact = x.double() @ torch.ops.compressed_format.dequantize_reference(*wide, *layout).T
    if bias is not None:
        exact += bias.double()
    assert y.dtype == x.dtype
    assert y.shape == reference.shape
    assert error(y, exact) <= 1.1 * error(reference, exact) + 1e-7 * float(exact.abs().max())
    return y


CASES: list[dict[str, Any]] = [
    {},
    {"block": (1, 64)},
    {"block": (1, 32), "zero_points": "int8"},
    {"block": (1, 256), "zero_points": "packed"},
    {"block": (1, 4096)},
    {"block": (1, 40), "zero_points": "int8"},
    {"block": (1, 32), "g_idx": True},
    {"bits": 1, "block": (1, 4096)},
    {"bits": 2, "block": (1, 64), "zero_points": "packed"},
    {"bits": 3, "block": (1, 64)},
    {"bits": 3, "block": (3, 192), "zero_points": "packed"},
    {"bits": 5, "block": (1, 128), "zero_points": "int8"},
    {"bits": 6, "block": (1, 128)},
    {"bits": 8, "block": (1, 48), "zero_points": "packed"},
    {"kind": "int8", "bits": 8, "block": (1, 4096)},
    {"kind": "int8", "bits": 8, "block": (1, 128), "zero_points": "int8"},
    {"bits": 8, "block": (1, 4096)},
    {"kind": "float8", "bits": 8, "block": (16, 32)},
    {"kind": "float8", "bits": 8, "block": (7, 4096)},
    {"block": (8, 64)},
    {"kind": "plain"},
    {"kind": "2:4"},
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_errs_no_more_than_the_definition(case: dict[str, Any], dtype: torch.dtype) -> None:
    # Enough values for the mean error to mean something, and sizes beyond one block, and of no multiple of anything.
    generator = torch.Generator().manual_seed(0)
    # One panel, an odd number of them, and more than a block has.
    sizes = ((16, 96, 640), (33, 101, 777), (300, 13, 1056))
    for (tokens, rows, columns), scale_dtype in zip(sizes, FLOATS, strict=True):
        columns -= columns % 4 if case.get("kind") == "2:4" else 0
        weight = random_weight(rows, columns, generator, scale_dtype=scale_dtype, **case)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype) if tokens % 2 else None
        check(x, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_small_size(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for size in range(1, 40, 3):
        tokens, rows, columns = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(3))
        for shape in ((size, rows, columns), (tokens, size, columns), (tokens, rows, size)):
            weight = random_weight(*shape[1:], generator, block=(1, 32))
            x = torch.randn(shape[0], shape[2], generator=generator).to(dtype)
            tensors, layout = weight[:5], weight[5:]
            y = torch.ops.compressed_format.linear(x, *tensors, None, *layout)
            expected = torch.ops.compressed_format.linear_reference(x, *tensors, None, *layout)
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neither_alignment_nor_threads_matter(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for offset, count in ((0, 1), (1, threads), (3, threads)):
            torch.set_num_threads(count)
            generator = torch.Generator().manual_seed(2)
            weight = random_weight(500, 1030, generator, offset=offset, block=(1, 64), zero_points="int8")
            x = torch.randn(77, 1040, generator=generator).to(dtype)[:, 5:1035]
            results.append(check(x, weight, torch.randn(500, generator=generator)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_every_code_of_a_byte_is_exact(kind: str) -> None:
    # One token that is 1 in a single column: y is that column of the weight, and every code is in it.
    codes = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(768, 1).repeat(1, 70)
    weight = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn)
    if kind == "float8":
        codes = codes.where(codes & 127 != 127, torch.tensor(0, dtype=torch.uint8))  # which is no number
        weight = codes.view(torch.float8_e4m3fn)
    scale = torch.ones(768, 1, dtype=torch.bfloat16)
    for column in (0, 7, 8, 33, 63, 64, 69):
        x = torch.zeros(20, 70, dtype=torch.bfloat16)
        x[11, column] = 1
        y = torch.ops.compressed_format.linear(x, weight, scale, None, None, None, None, 8, 70, 1, 70)
        assert torch.equal(y[11].float(), weight[:, column].float())
        assert not y[:11].any()


def test_values_that_are_no_numbers_stay_in_their_rows_and_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = random_weight(40, 200, generator)
    weight[1][3, 1] = torch.inf
    x = torch.randn(50, 200, generator=generator).bfloat16()
    x[7, 11] = torch.nan
    y = torch.ops.compressed_format.linear(x, *weight[:5], None, *weight[5:])
    bad = torch.zeros(50, 40, dtype=torch.bool)
    bad[7] = True
    bad[:, 3] = True
    assert torch.equal(~torch.isfinite(y), bad)


@pytest.mark.skipif(not os.environ.get("COMPRESSED_FORMAT_ISA"), reason="no set of instructions is asked for")
def test_the_set_of_instructions_is_the_one_asked_for() -> None:
    assert ops.backend_info()["cpu"]["instructions"] == os.environ["COMPRESSED_FORMAT_ISA"]


@pytest.mark.skipif("COMPRESSED_FORMAT_ISA" in os.environ, reason="is what the other tests are run by")
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_every_set_of_instructions(level: str) -> None:
    here = ops.backend_info()["cpu"]["instructions"]
    if here not in LEVELS or LEVELS.index(level) >= LEVELS.index(here):
        pytest.skip(f"the tests above ran {here}, and nothing higher runs here")
    run_tests(level, __file__)
