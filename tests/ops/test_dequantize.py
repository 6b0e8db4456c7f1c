"""The native dequantize, embedding and unpack_codes: for every set of instructions the bits of their references."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.library import opcheck

from compressed_format import bitpack, ops
from compressed_format.bitmask import pack_bitmask
from compressed_format.errors import OpArgumentError
from compressed_format.ops.extension import INSTRUCTION_SETS
from tests.ops.processes import run_python

CHECKS = Path(__file__).parent / "dequantize_checks.py"
native = torch.ops.compressed_format


@pytest.mark.skipif(ops.native_library() is None or sys.platform != "linux", reason="needs the native library")
@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
def test_every_set_of_instructions(instructions: str) -> None:
    """Formats, shapes, addresses and numbers of threads at random; see the program."""
    own = ops.backend_info()["cpu"]["instructions"]
    if INSTRUCTION_SETS.index(instructions) > INSTRUCTION_SETS.index(own):
        pytest.skip(f"this machine has no {instructions}")
    assert run_python(instructions, CHECKS, "7", "300").strip() == instructions


def test_literal_values() -> None:
    codes = torch.tensor([[-8, -1, 0, 7]], dtype=torch.int8)
    arguments = (bitpack.pack_codes(codes, 4), torch.tensor([[0.5, 3.0]]), torch.tensor([[-2, 1]], dtype=torch.int8))
    found = ops.dequantize(*arguments, None, None, 4, 4, 1, 2)
    assert found.tolist() == [[-3.0, 0.5, -3.0, 18.0]]
    assert ops.dequantize(*arguments, None, None, 4, 4, 1, 2, torch.bfloat16).dtype == torch.bfloat16


def test_a_value_is_rounded_to_the_dtype_of_the_scale_first() -> None:
    """5 * 1.0078125 is 5.0390625; of bfloat16 that is 5.03125, and of float32 it is not rounded."""
    codes = torch.tensor([[5]], dtype=torch.int8)
    scale = torch.tensor([[1.0078125]], dtype=torch.bfloat16)
    arguments = (None, None, None, 8, 1, 1, 1, torch.float32)
    assert ops.dequantize(codes, scale, *arguments).item() == 5.03125
    assert ops.dequantize(codes, scale.float(), *arguments).item() == 5.0390625


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes_and_stacks_that_the_reference_serves(dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (2, 3, 64), dtype=torch.int8)
    scale = torch.rand(2, 3, 2, dtype=torch.float64)
    arguments = (bitpack.pack_codes(codes, 4), scale, None, None, None, 4, 64, 1, 32, dtype)
    expected = (codes * scale.repeat_interleave(32, dim=-1)).to(dtype)
    assert torch.equal(ops.dequantize(*arguments), expected)


def test_masks_that_keep_too_much_are_refused_and_not_followed() -> None:
    values, full = torch.ones(2, 4, dtype=torch.bfloat16), torch.full((2, 1), 255, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        ops.dequantize(values, None, None, None, full, 8, 8, 1, 8)


def test_masks_that_keep_half_of_all_but_not_of_every_row() -> None:
    mask = torch.tensor([[1] * 8, [0] * 8], dtype=torch.bool)
    values = torch.arange(8, dtype=torch.float32).reshape(2, 4)
    dense = ops.dequantize(values, None, None, None, pack_bitmask(mask), 8, 8, 1, 8)
    assert dense.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [0] * 8]


@pytest.mark.parametrize("group", [-1, 2])
def test_groups_that_do_not_exist_are_refused(group: int) -> None:
    codes, scale = torch.ones(2, 4, dtype=torch.int8), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    g_idx = torch.tensor([0, 1, group, 0], dtype=torch.int32)
    if group < 0:  # as an index of torch's, it counts from the end
        assert ops.dequantize(codes, scale, None, g_idx, None, 8, 4, 1, 2).tolist()[0] == [1.0, 2.0, 2.0, 1.0]
        return
    with pytest.raises((IndexError, RuntimeError)):
        ops.dequantize(codes, scale, None, g_idx, None, 8, 4, 1, 2)


def test_a_dtype_that_is_no_float() -> None:
    codes, scale = torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 1)
    arguments = (codes, scale, None, None, None, 8, 4, 1, 4, torch.int32)
    with pytest.raises(OpArgumentError, match=r"dequantize: dtype must be a float dtype, not torch\.int32"):
        ops.dequantize(*arguments)
    with pytest.raises(OpArgumentError, match="dequantize: dtype must be a float dtype"):
        native.dequantize_reference(*arguments)


@pytest.mark.parametrize(
    ("packed", "rest", "message"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), (4, 8, False), "packed must be torch.int32, not torch.int64"),
        (torch.tensor(1, dtype=torch.int32), (4, 8, False), "packed must have at least one dimension"),
        (torch.zeros(2, 1, dtype=torch.int32), (0, 8, False), "bits must lie in 1 to 8, not 0"),
        (torch.zeros(2, 1, dtype=torch.int32), (9, 8, True), "bits must lie in 1 to 8, not 9"),
        (torch.zeros(2, 1, dtype=torch.int32), (4, -1, False), "size must not be negative, not -1"),
        (torch.zeros(2, 1, dtype=torch.int32), (4, 9, False), "packed must have 2 words a row for 9 codes of 4 bits"),
        (torch.zeros(2, 3, dtype=torch.int32), (3, 32, True), "packed must have 4 words a row for 32 codes of 3 bits"),
        (torch.zeros(2, 1, dtype=torch.int32), (8, 2**60, False), "packed must have"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_unpack_codes_does_not_take(packed: torch.Tensor, rest: Any, message: str, device: str) -> None:
    for call in (ops.unpack_codes, native.unpack_codes_reference):
        with pytest.raises(OpArgumentError, match=f"unpack_codes: {message}"):
            call(packed.to(device), *rest)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("word_aligned", [False, True])
def test_opcheck_of_unpack_codes(bits: int, word_aligned: bool) -> None:
    words = bitpack.word_aligned_words(40, bits) if word_aligned else bitpack.packed_words(40, bits)
    opcheck(native.unpack_codes.default, (torch.ones(2, words, dtype=torch.int32), bits, 40, word_aligned))


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_opcheck_of_dequantize_to_a_dtype(dtype: torch.dtype | None) -> None:
    codes, scale = torch.ones(2, 4, dtype=torch.int8), torch.ones(2, 1, dtype=torch.bfloat16)
    opcheck(native.dequantize.default, (codes, scale, None, None, None, 8, 4, 1, 4, dtype))
