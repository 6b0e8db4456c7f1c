"""Comparing the values of two tensors piece by piece, in a bounded amount of memory. Needs numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressed_format.comparison.difference import ValueDifference
from compressed_format.dtypes import DTYPES

__all__ = ["byte_difference", "bytes_differ", "numbers", "value_difference", "word_difference"]

_PIECE_BYTES = 1 << 20  # small enough for what is made of a piece to stay in the cache
_PIECE_VALUES = 1 << 15

_Bytes = NDArray[np.uint8]
_Pieces = Iterable[tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_] | None]]
"""Values of both, and which of them differ; None for those that are other numbers."""


def bytes_differ(first: memoryview, second: memoryview) -> bool:
    """Whether two tensors of the same size have other bytes; stops at the first piece that does."""
    one, other = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    return any(
        not np.array_equal(one[start : start + _PIECE_BYTES], other[start : start + _PIECE_BYTES])
        for start in range(0, len(one), _PIECE_BYTES)
    )


def byte_difference(
    first: memoryview, second: memoryview, dtypes: tuple[str, str], shape: tuple[int, ...]
) -> ValueDifference | None:
    """How the stored values of two tensors of ``shape`` differ, as ``dtypes`` (names) tell them; None if they do not.

    Of one dtype, values differ that have other bits; of two, those that are other numbers.
    """

    def pieces() -> _Pieces:
        for one, other in _pieces(first, second, dtypes):
            a, b = numbers(one, dtypes[0]), numbers(other, dtypes[1])
            yield a, b, _other_bits(one, other, len(a)) if dtypes[0] == dtypes[1] else None

    return _measured(pieces(), shape)


def word_difference(first: memoryview, second: memoryview, dtype: str, shape: tuple[int, ...]) -> ValueDifference:
    """How many words differ of two tensors of packed codes of ``shape`` and ``dtype``, at least one of which does."""
    differing, start, at = 0, 0, -1
    width = DTYPES[dtype].bits // 8
    for one, other in _pieces(first, second, (dtype, dtype)):
        different = _other_bits(one, other, len(one) // width)
        if at < 0 and different.any():
            at = start + int(different.argmax())
        differing += int(np.count_nonzero(different))
        start += len(different)
    return ValueDifference("word", math.prod(shape), differing, _index(at, shape), None, None, None, 0)


def value_difference(
    slabs: Iterable[tuple[NDArray[Any], NDArray[Any]]], shape: tuple[int, ...]
) -> ValueDifference | None:
    """How two tensors of ``shape`` differ whose values come as pairs of flat arrays of floats; None if they do not."""

    def pieces() -> _Pieces:
        for first, second in slabs:
            for start in range(0, len(first), _PIECE_VALUES):
                a, b = (side[start : start + _PIECE_VALUES].astype(np.float64) for side in (first, second))
                yield a, b, None

    return _measured(pieces(), shape)


def numbers(data: _Bytes, dtype: str) -> NDArray[Any]:
    """The values of the bytes of a tensor: float64; complex128 for complex ones; 64-bit integers as they are."""
    with np.errstate(invalid="ignore"):  # a NaN that signals is one
        return _numbers(data, dtype)


def _numbers(data: _Bytes, dtype: str) -> NDArray[Any]:
    codes = {"uint8": "u1", "int8": "i1", "bool": "u1", "complex64": "<c8"}
    if dtype in ("int64", "uint64"):
        return data.view(f"<{dtype[0]}8")
    if dtype == "bfloat16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "float8_e5m2":  # the upper half of a float16
        return (data.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
    if dtype in ("float8_e4m3fn", "float8_e8m0fnu"):
        return _table(dtype).take(data)
    code = codes.get(dtype) or f"<{dtype[0]}{DTYPES[dtype].bits // 8}"
    return data.view(code).astype(np.complex128 if dtype == "complex64" else np.float64)


@cache
def _table(dtype: str) -> NDArray[np.float64]:
    """The values of all 256 bytes of an 8-bit float."""
    byte = np.arange(256)
    values: NDArray[np.float64]
    if dtype == "float8_e8m0fnu":
        values, nan = np.exp2(byte - 127.0), byte == 255
    else:
        exponent, fraction = byte >> 3 & 15, (byte & 7) / 8
        values = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * np.exp2(exponent - 7.0))
        values, nan = np.where(byte < 128, values, -values), byte & 127 == 127
    values[nan] = np.nan
    return values


def _pieces(first: memoryview, second: memoryview, dtypes: tuple[str, str]) -> Iterator[tuple[_Bytes, _Bytes]]:
    """Pieces of as many values of both."""
    widths = [DTYPES[dtype].bits // 8 for dtype in dtypes]
    one, other = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
    for start in range(0, len(one) // widths[0], _PIECE_VALUES):
        stop = start + _PIECE_VALUES
        yield one[start * widths[0] : stop * widths[0]], other[start * widths[1] : stop * widths[1]]


def _other_bits(one: _Bytes, other: _Bytes, count: int) -> NDArray[np.bool_]:
    different: NDArray[np.bool_] = (one != other).reshape(count, -1).any(axis=1)
    return different


def _other_numbers(a: NDArray[Any], b: NDArray[Any], *, whole: bool) -> NDArray[np.bool_]:
    """Which values are other numbers, NaN being the same as NaN; ``whole`` says that there are none."""
    different: NDArray[np.bool_] = a != b
    return different if whole else different & ~(np.isnan(a) & np.isnan(b))


def _distances(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    if a.dtype == b.dtype and a.dtype.kind in "iu":
        # Exact in the unsigned numbers of that size, where it might not fit, or vanish, in others.
        unsigned = a.dtype.str.replace("i", "u")
        larger, smaller = np.maximum(a, b).astype(unsigned), np.minimum(a, b).astype(unsigned)
        distances: NDArray[np.float64] = (larger - smaller).astype(np.float64)
    else:
        distances = np.abs(a - b)
    return distances


def _energy(values: NDArray[Any]) -> float:
    """The sum of the squares of the magnitudes."""
    magnitudes = np.abs(values) if values.dtype.kind == "c" else values.astype(np.float64, copy=False)
    return float(np.square(magnitudes).sum())  # pairwise, and not by a library with threads of its own


def _measured(pieces: _Pieces, shape: tuple[int, ...]) -> ValueDifference | None:
    differing = unpaired = start = 0
    at = -1
    largest = energy = error = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for a, b, different in pieces:
            finite = np.isfinite(a) & np.isfinite(b)
            whole = bool(finite.all())  # as good as always: nothing has to be picked out
            if different is None:
                different = _other_numbers(a, b, whole=whole)
            energy += _energy(a if whole else a[finite])
            if different.any():
                at = start + int(different.argmax()) if at < 0 else at
                differing += int(np.count_nonzero(different))
                unpaired += 0 if whole else int(np.count_nonzero(different & ~finite))
                distances = _distances(a, b) if whole else _distances(a[finite], b[finite])
                largest = max(largest, float(distances.max(initial=0.0)))
                error += _energy(distances)
            start += len(a)
    if not differing:
        return None
    relative = math.sqrt(error / energy) if energy > 0 and math.isfinite(energy) and math.isfinite(error) else None
    snr = -20 * math.log10(relative) if relative else None
    paired = differing > unpaired and math.isfinite(largest)
    return ValueDifference(
        unit="value",
        count=math.prod(shape),
        differing=differing,
        first=_index(at, shape),
        max_abs=largest if paired else None,
        relative_rms=relative if paired else None,
        snr_db=snr if paired else None,
        unpaired=unpaired,
    )


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(part) for part in np.unravel_index(flat, shape))
