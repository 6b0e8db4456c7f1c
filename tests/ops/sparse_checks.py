"""Checks of sparse weights for one instruction set, which a process chooses when it starts: run as a program."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from compressed_format import ops
from tests.checks import assert_same_bits
from tests.ops.activation_checks import misaligned

native = torch.ops.compressed_format
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = (*FLOATS, torch.int8, torch.float8_e4m3fn)
COLUMNS = (4, 8, 12, 28, 32, 36, 60, 64, 68, 128, 252)


def values(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Few different magnitudes, so that there are ties; zeros of both signs; and what is not a number."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-4, 5, shape, generator=generator).to(torch.float32) * (1.5 if dtype != torch.int8 else 1)
    weight[torch.rand(shape, generator=generator) < (seed % 4) / 4] = -0.0
    if dtype != torch.int8 and seed % 3 == 0:
        weight[torch.rand(shape, generator=generator) < 0.1] = torch.nan
        weight[torch.rand(shape, generator=generator) < 0.1] = -torch.inf
    return weight.to(dtype)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(op: str, weight: torch.Tensor, case: Any) -> None:
    expected = getattr(native, f"{op}_reference")(weight)
    found = getattr(ops, op)(weight)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for one, other in pairs:
        assert (one.dtype, one.shape) == (other.dtype, other.shape), case
        assert one.is_contiguous(), case
        assert torch.equal(bits_of(one), bits_of(other)), case


def check_against_the_reference() -> None:
    for seed, (columns, dtype) in enumerate(itertools.product(COLUMNS, DTYPES)):
        for rows in (1, 5):
            weight = values((rows, columns), dtype, seed)
            case = rows, columns, dtype, seed
            pruned = ops.prune_2_of_4(weight) if dtype in FLOATS else weight
            for given in (weight, misaligned(weight), pruned):
                same("compress_2_of_4", given, case)
                same("compress_bitmask", given, case)
            if dtype in FLOATS:
                same("prune_2_of_4", misaligned(weight), case)
                assert int(ops.compress_2_of_4(pruned)[2]) == -1, case
    for columns, dtype in itertools.product((1, 7, 9, 63, 65, 129), DTYPES):
        same("compress_bitmask", misaligned(values((3, columns), dtype, columns)), (columns, dtype))


def check_all_patterns_of_four() -> None:
    """Every order of four magnitudes, equal ones among them, in every place of a vector."""
    quads = torch.tensor(list(itertools.product((0.0, -0.0, 1.0, -1.0, 2.0, -3.0, torch.nan), repeat=4)))
    for dtype in FLOATS:
        for weight in (quads.reshape(1, -1).to(dtype), quads.to(dtype)):
            same("prune_2_of_4", weight, dtype)
            same("compress_2_of_4", weight, dtype)


def check_parts_and_threads() -> None:
    whole = values((1000, 800), torch.bfloat16, 1)
    for part in (whole[17:, 3:259], whole.t(), whole[:, ::2], whole[:, 4:8]):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for op in ("prune_2_of_4", "compress_2_of_4", "compress_bitmask"):
                same(op, part, (op, threads))
            found.append(ops.compress_bitmask(part))
        for one, other in zip(*found, strict=True):
            assert_same_bits(one, other)


def check_that_the_first_crowded_four_is_found() -> None:
    for dtype, columns in itertools.product(DTYPES, (64, 100)):
        weight = torch.zeros(3000, columns).to(dtype)
        assert int(ops.compress_2_of_4(weight)[2]) == -1
        for row, column in ((2999, columns - 4), (2000, 8), (1999, 60), (7, 0)):
            weight[row, column + 1 : column + 4] = 1
            assert int(ops.compress_2_of_4(weight)[2]) == row * columns + column
            assert int(native.compress_2_of_4_reference(weight)[2]) == row * columns + column


def same_way_back(weight: torch.Tensor, case: Any) -> None:
    values, bitmask, _ = ops.compress_bitmask(weight)
    columns = weight.shape[1]
    counts = native.count_bits_reference(bitmask, columns)
    assert torch.equal(ops.count_bits(bitmask, columns), counts), case
    # Bits beyond the last column are anybody's.
    dirty = bitmask.clone()
    if columns % 8:
        dirty[:, -1] |= 0xFF << columns % 8 & 0xFF
    for mask in (bitmask, misaligned(dirty)):
        expanded = ops.expand_bitmask(misaligned(values), mask, columns)
        assert (expanded.dtype, expanded.shape) == (weight.dtype, weight.shape), case
        expected = native.expand_bitmask_reference(values, mask, columns)
        assert torch.equal(bits_of(expanded), bits_of(expected)), case
        assert torch.equal(ops.count_bits(mask, columns), counts), case


def check_the_way_back() -> None:
    for seed, (columns, dtype) in enumerate(itertools.product((*COLUMNS, 1, 7, 9, 63, 65, 129, 1300), DTYPES)):
        for rows in (1, 5):
            same_way_back(values((rows, columns), dtype, seed), (rows, columns, dtype))
    large = values((1000, 801), torch.int8, 1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        same_way_back(large, threads)


def check_that_the_first_uneven_quad_is_found() -> None:
    for columns in (4, 60, 64, 72, 800):
        bitmask = ops.compress_2_of_4(values((3000, columns), torch.int8, 2))[1]
        assert int(ops.find_uneven_quad(bitmask, columns)) == -1
        if columns % 8:
            bitmask[:, -1] |= 0xF0
            assert int(ops.find_uneven_quad(bitmask, columns)) == -1
        for row, column, bits in ((2999, columns - 4, 0), (2000, columns // 8 * 4, 7), (7, 0, 15), (7, 0, 1)):
            byte, shift = column // 8, column % 8
            bitmask[row, byte] = int(bitmask[row, byte]) & ~(15 << shift) | bits << shift
            for op in (native.find_uneven_quad, native.find_uneven_quad_reference):
                assert int(op(bitmask, columns)) == (row * columns + column) // 4, (columns, row)


if __name__ == "__main__":
    check_the_way_back()
    check_that_the_first_uneven_quad_is_found()
    check_against_the_reference()
    check_all_patterns_of_four()
    check_parts_and_threads()
    check_that_the_first_crowded_four_is_found()
    print(ops.backend_info()["cpu"]["instructions"])
