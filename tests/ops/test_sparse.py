"""The ops on sparse weights: literal values, refusals, fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from compressed_format import ops
from compressed_format.errors import OpArgumentError
from tests.ops.sparse_checks import DTYPES, FLOATS, values
from tests.ops.test_reference_ops import opcheck, raises_alike

NAMES = ("prune_2_of_4", "compress_2_of_4", "compress_bitmask")
native = torch.ops.compressed_format


@pytest.fixture(params=["", "_reference"])
def op(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    return lambda name: getattr(native, f"{name}{request.param}").default


def test_literal_values(op: Callable[[str], Any]) -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, torch.nan, torch.inf, 9.0, torch.nan], [0, 0, 0, 0, 1, 1, 1, 0]])
    pruned = op("prune_2_of_4")(weight)
    assert (
        str(pruned.tolist()) == "[[0.0, -3.0, 2.0, 0.0, nan, 0.0, 0.0, nan], [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0]]"
    )
    compressed, bitmask, crowded = op("compress_2_of_4")(pruned)
    assert str(compressed.tolist()) == "[[-3.0, 2.0, nan, nan], [0.0, 0.0, 1.0, 1.0]]"
    assert bitmask.tolist() == [[0b10010110], [0b00111100]]
    assert int(crowded) == -1
    assert int(op("compress_2_of_4")(weight)[2]) == 0
    compressed, bitmask, row_offsets = op("compress_bitmask")(pruned)
    assert str(compressed.tolist()) == "[-3.0, 2.0, nan, nan, 1.0, 1.0]"
    assert bitmask.tolist() == [[0b10010110], [0b00110000]]
    assert row_offsets.tolist() == [0, 4]
    assert op("count_bits")(bitmask, 8).tolist() == [4, 2]
    assert op("count_bits")(bitmask, 5).tolist() == [3, 1]
    assert str(op("expand_bitmask")(compressed, bitmask, 8).tolist()) == str(pruned.tolist())
    assert int(op("find_uneven_quad")(bitmask, 8)) == 2
    assert int(op("find_uneven_quad")(bitmask[:1], 8)) == -1


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, dtype: torch.dtype, op: Callable[[str], Any]) -> None:
    if name != "prune_2_of_4" and dtype in (torch.float8_e4m3fn, torch.int8):
        opcheck_of_codes(op(name), values((3, 40), dtype, 1))
    elif dtype in (*FLOATS, torch.float64):
        opcheck(op(name), (values((3, 40), dtype, 1),))


def opcheck_of_codes(op: Any, weight: torch.Tensor) -> None:
    before = weight.clone()
    torch.library.opcheck(op, (weight,), test_utils=("test_autograd_registration", "test_faketensor"))
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_weights_of_no_values(shape: tuple[int, int], op: Callable[[str], Any]) -> None:
    weight = torch.zeros(shape)
    assert op("prune_2_of_4")(weight).shape == shape
    compressed, bitmask, crowded = op("compress_2_of_4")(weight)
    assert (compressed.shape, bitmask.shape, int(crowded)) == ((shape[0], shape[1] // 2), (shape[0], shape[1] // 8), -1)
    compressed, bitmask, row_offsets = op("compress_bitmask")(weight)
    assert (compressed.shape, bitmask.shape) == ((0,), (shape[0], shape[1] // 8))
    assert row_offsets.tolist() == [0] * shape[0]


@pytest.mark.parametrize(
    ("names", "weight", "message"),
    [
        (NAMES, torch.zeros(2, 4, 8), r"weight must be a matrix, not shape \[2, 4, 8\]"),
        (NAMES, torch.zeros(8), r"weight must be a matrix, not shape \[8\]"),
        (NAMES, torch.zeros(2, 8, dtype=torch.int32), "weight must be int8 or float8_e4m3fn codes, or have a float"),
        (NAMES[:2], torch.zeros(2, 6), "weight must have a multiple of 4 columns, not 6"),
        (NAMES[:1], torch.zeros(2, 8, dtype=torch.int8), "weight must have a float dtype, not torch.int8"),
    ],
)
def test_weights_that_they_do_not_take(names: tuple[str, ...], weight: torch.Tensor, message: str) -> None:
    for name in names:
        raises_alike(getattr(ops, name), (weight,), f"{name}: {message}")


BITS = torch.full((2, 1), 0b01011010, dtype=torch.uint8)


def test_opcheck_of_bits(op: Callable[[str], Any]) -> None:
    opcheck(op("count_bits"), (BITS, 7))
    opcheck(op("find_uneven_quad"), (BITS, 8))
    opcheck(op("expand_bitmask"), (torch.randn(8), BITS, 8))


@pytest.mark.parametrize(
    ("names", "bitmask", "columns", "message"),
    [
        (("count_bits", "find_uneven_quad"), BITS.to(torch.int8), 8, "bitmask must have dtype uint8, not torch.int8"),
        (("count_bits", "find_uneven_quad"), BITS, -8, "columns must not be negative, not -8"),
        (
            ("count_bits", "find_uneven_quad"),
            BITS,
            12,
            r"bitmask must be a matrix of 2 bytes a row for 12 columns, not",
        ),
        (("count_bits", "find_uneven_quad"), BITS[0], 8, r"bitmask must be a matrix of 1 bytes a row .* not \[1\]"),
        (("find_uneven_quad",), BITS, 6, "columns must be a multiple of 4, not 6"),
    ],
)
def test_bits_that_they_do_not_take(names: tuple[str, ...], bitmask: torch.Tensor, columns: int, message: str) -> None:
    for name in names:
        raises_alike(getattr(ops, name), (bitmask, columns), f"{name}: {message}")
    if len(names) > 1:
        arguments = (torch.zeros(8), bitmask, columns)
        raises_alike(ops.expand_bitmask, arguments, f"expand_bitmask: {message}")


def test_values_that_are_not_expanded() -> None:
    message = "expand_bitmask: values must be int8 or float8_e4m3fn codes, or have a float dtype, not torch.int64"
    raises_alike(ops.expand_bitmask, (torch.zeros(8, dtype=torch.int64), BITS, 8), message)
    for count in (7, 9, 0):
        with pytest.raises(OpArgumentError, match=f"values must be as many as the 8 bits of bitmask, not {count}"):
            ops.expand_bitmask(torch.zeros(count), BITS, 8)
