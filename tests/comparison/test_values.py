"""Differences of values against numpy and torch on the whole tensors at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compressed_format.comparison import values
from compressed_format.comparison.difference import ValueDifference
from compressed_format.comparison.values import byte_difference, bytes_differ, numbers, word_difference
from compressed_format.dtypes import DTYPES, torch_dtype


def data(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def differ(first: torch.Tensor, second: torch.Tensor) -> ValueDifference | None:
    dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in (first, second))
    return byte_difference(data(first), data(second), (dtypes[0], dtypes[1]), tuple(first.shape))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_numbers_of_every_dtype(dtype: str) -> None:
    """All bytes of 8-bit dtypes, and all of 65,536 words of the others, are what torch makes of them."""
    width = DTYPES[dtype].bits // 8
    raw = torch.arange(256, dtype=torch.uint8)
    if dtype == "bool":
        raw = raw[:2]
    if width > 1:
        words = torch.arange(65536, dtype=torch.int32)
        raw = torch.stack([words.to(torch.uint8), (words >> 8).to(torch.uint8)] * (width // 2), dim=1).flatten()
    tensor = raw.view(torch_dtype(dtype))
    wanted = (
        tensor if dtype in ("int64", "uint64") else tensor.to(torch.complex128 if "complex" in dtype else torch.float64)
    )
    np.testing.assert_array_equal(numbers(raw.numpy(), dtype), wanted.numpy())


def test_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_PIECE_VALUES", 64)  # so that pieces end inside of rows
    monkeypatch.setattr(values, "_PIECE_BYTES", 100)
    torch.manual_seed(0)
    first = torch.randn(7, 50, dtype=torch.bfloat16)
    second = first.clone()
    assert not bytes_differ(data(first), data(second))
    assert differ(first, second) is None
    second[3, 20:] += 0.25
    second[6, 49] = -4
    a, b = first.double(), second.double()
    relative = math.sqrt(float(((a - b) ** 2).sum() / (a**2).sum()))
    assert bytes_differ(data(first), data(second))
    assert differ(first, second) == ValueDifference(
        unit="value",
        count=350,
        differing=int((first != second).sum()),
        first=(3, 20),
        max_abs=float((a - b).abs().max()),
        relative_rms=pytest.approx(relative, rel=1e-12),
        snr_db=pytest.approx(-20 * math.log10(relative), rel=1e-12),
        unpaired=0,
    )


def test_nan_and_infinity_are_counted_apart() -> None:
    nan, inf = math.nan, math.inf
    first = torch.tensor([nan, nan, 1.0, inf, inf, 3.0, inf])
    second = torch.tensor([nan, 2.0, nan, inf, -inf, 4.0, 5.0])
    found = differ(first, second)
    assert found is not None
    assert (found.differing, found.first, found.unpaired) == (5, (1,), 4)
    assert (found.max_abs, found.relative_rms) == (1.0, pytest.approx(1 / 3))
    # None of the differing pairs is finite: nothing can be said of distances.
    found = differ(first[:2], second[:2])
    assert found is not None
    assert (found.differing, found.max_abs, found.relative_rms, found.snr_db) == (1, None, None, None)


def test_other_bits_of_the_same_values() -> None:
    found = differ(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]))
    assert found is not None
    assert (found.differing, found.max_abs, found.relative_rms, found.snr_db) == (1, 0.0, 0.0, None)
    # Another NaN has other bits, and counts as unpaired, for no distance can be told.
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    found = differ(nan[:1], nan[1:])
    assert found is not None
    assert (found.differing, found.unpaired, found.max_abs) == (1, 1, None)


def test_two_dtypes_are_compared_as_numbers() -> None:
    values = torch.tensor([[1.0, 2.5], [-3.0, 0.0]])
    assert differ(values, values.bfloat16()) is None
    found = differ(values, values.bfloat16() + torch.tensor([[0, 0], [1, 0]]))
    assert found is not None
    assert (found.differing, found.first, found.max_abs) == (1, (1, 0), 1.0)


def test_large_integers_and_numbers() -> None:
    found = differ(torch.tensor([2**62]), torch.tensor([2**62 + 1]))
    assert found is not None
    assert found.max_abs == 1.0
    found = differ(torch.tensor([-(2**63)]), torch.tensor([2**63 - 1]))
    assert found is not None
    assert found.max_abs == float(2**64 - 1)
    # Squares beyond float64: the ratio is unknown, and is not said to be infinite or zero.
    found = differ(torch.tensor([1e300], dtype=torch.float64), torch.tensor([2e300], dtype=torch.float64))
    assert found is not None
    assert (found.max_abs, found.relative_rms, found.snr_db) == (1e300, None, None)


def test_a_first_tensor_of_zeros_has_no_ratio() -> None:
    found = differ(torch.zeros(4), torch.ones(4))
    assert found is not None
    assert (found.differing, found.max_abs, found.relative_rms) == (4, 1.0, None)


def test_words_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_PIECE_VALUES", 3)
    first = torch.arange(20, dtype=torch.int32).reshape(4, 5)
    second = first.clone()
    second[2, 1] ^= 0x10000
    second[3, 4] = -1
    found = word_difference(data(first), data(second), "int32", (4, 5))
    assert found == ValueDifference("word", 20, 2, (2, 1), None, None, None, 0)
