"""Ops that make sparse weights (``prune_2_of_4``), store them (``compress_2_of_4``, ``compress_bitmask``), look at
their bits (``count_bits``, ``find_uneven_quad``) and expand them (``expand_bitmask``).

Pruning keeps the two larger magnitudes of each four columns, the left of equals; what is not a number is larger than
all others. The others leave values as they are, of which those that are not zero are stored, with a bit for each place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from compressed_format import bitmask as definition
from compressed_format.bitmask import bytes_of, nonzero, pack_bitmask, unpack_bitmask
from compressed_format.errors import OpArgumentError
from compressed_format.ops.definition import FLOATS, library

__all__ = [
    "compress_2_of_4",
    "compress_bitmask",
    "count_bits",
    "expand_bitmask",
    "find_uneven_quad",
    "prune_2_of_4",
]

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_TWO_OF_FOUR = (12, 5, 10, 3, 12, 5, 6, 3, 12, 9, 10, 3, 12, 5, 6, 3)
"""The bits that are kept of four columns, by the bits of those that are not zero. Which zeros fill up fewer than two is
arbitrary, and readers do not care: this is the choice of the files that exist, whose writer left it to a partial sort.
Of more than two, which a 2:4 weight does not have, it is the first."""


def prune_2_of_4(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` ``[O, I]``, of floats, with zeros instead of the two smaller magnitudes of each four columns."""
    return cast(torch.Tensor, _call("prune_2_of_4", _check_pruning, weight))


def compress_2_of_4(weight: torch.Tensor) -> Three:
    """What a 2:4 ``weight`` ``[O, I]`` holds: two values of each four columns ``[O, I/2]``, and their bits.

    The third is an int64 scalar: the first column, counted from the beginning of the matrix, of the first four that
    have more than two values, whose third and fourth are lost; -1 where there are none.
    """
    return cast(Three, _call("compress_2_of_4", _check_quads, weight))


def compress_bitmask(weight: torch.Tensor) -> Three:
    """The values of ``weight`` ``[O, I]`` that are not zero, row by row, their bits, and where each row begins."""
    return cast(Three, _call("compress_bitmask", _check, weight))


def count_bits(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """How many of the ``columns`` bits of each row of ``bitmask`` ``[O, ceil(columns/8)]`` are set: int64 ``[O]``."""
    return cast(torch.Tensor, _call("count_bits", _check_bits, bitmask, columns))


def find_uneven_quad(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """The first four columns of ``bitmask`` ``[O, ceil(columns/8)]`` that have not two bits, as the bits of 2:4 weights
    do: an int64 scalar, ``row * columns / 4 + column / 4``, or -1 where there are none."""
    return cast(torch.Tensor, _call("find_uneven_quad", _check_bits_of_quads, bitmask, columns))


def expand_bitmask(values: torch.Tensor, bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    """The weight ``[O, columns]`` that has ``values``, row by row, where bits of ``bitmask`` are set; zeros elsewhere.

    Raises :class:`~compressed_format.OpArgumentError` if there are not as many values as bits.
    """
    return cast(torch.Tensor, _call("expand_bitmask", _check_number, values, bitmask, columns))


def _call(name: str, check: Callable[..., None], *arguments: Any) -> Any:
    try:
        return getattr(torch.ops.compressed_format, name).default(*arguments)
    except RuntimeError:
        # All that native code can raise: only now find out whether an argument was wrong, and how.
        check(name, *arguments)
        raise


def _check_dtype(op: str, argument: str, values: torch.Tensor) -> None:
    if values.dtype not in (*FLOATS, torch.int8, torch.float8_e4m3fn):
        raise OpArgumentError(
            f"{op}: {argument} must be int8 or float8_e4m3fn codes, or have a float dtype, not {values.dtype}"
        )


def _check(op: str, weight: torch.Tensor) -> None:
    _check_dtype(op, "weight", weight)
    if weight.ndim != 2:
        raise OpArgumentError(f"{op}: weight must be a matrix, not shape {list(weight.shape)}")


def _check_quads(op: str, weight: torch.Tensor) -> None:
    _check(op, weight)
    if weight.shape[1] % 4:
        raise OpArgumentError(f"{op}: weight must have a multiple of 4 columns, not {weight.shape[1]}")


def _check_pruning(op: str, weight: torch.Tensor) -> None:
    _check_quads(op, weight)
    if weight.dtype not in FLOATS:
        raise OpArgumentError(f"{op}: weight must have a float dtype, not {weight.dtype}")


def _check_bits(op: str, bitmask: torch.Tensor, columns: int) -> None:
    if bitmask.dtype != torch.uint8:
        raise OpArgumentError(f"{op}: bitmask must have dtype uint8, not {bitmask.dtype}")
    if columns < 0:
        raise OpArgumentError(f"{op}: columns must not be negative, not {columns}")
    if bitmask.ndim != 2 or bitmask.shape[1] != -(-columns // 8):
        raise OpArgumentError(
            f"{op}: bitmask must be a matrix of {-(-columns // 8)} bytes a row for {columns} columns, "
            f"not {list(bitmask.shape)}"
        )


def _check_bits_of_quads(op: str, bitmask: torch.Tensor, columns: int) -> None:
    _check_bits(op, bitmask, columns)
    if columns % 4:
        raise OpArgumentError(f"{op}: columns must be a multiple of 4, not {columns}")


def _check_expanding(op: str, values: torch.Tensor, bitmask: torch.Tensor, columns: int) -> None:
    _check_dtype(op, "values", values)
    _check_bits(op, bitmask, columns)
    if values.device != bitmask.device:
        raise OpArgumentError(f"{op}: bitmask must be on {values.device}, as values are, not on {bitmask.device}")


def _check_number(op: str, values: torch.Tensor, bitmask: torch.Tensor, columns: int) -> None:
    _check_expanding(op, values, bitmask, columns)
    bits = int(unpack_bitmask(bitmask, columns).sum())
    if values.numel() != bits:
        raise OpArgumentError(f"{op}: values must be as many as the {bits} bits of bitmask, not {values.numel()}")


def _prune_reference(weight: torch.Tensor) -> torch.Tensor:
    _check_pruning("prune_2_of_4", weight)
    quads = weight.abs().unflatten(-1, (-1, 4))
    kept = quads.argsort(dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros(quads.shape, dtype=torch.bool, device=weight.device).scatter_(-1, kept, True).flatten(-2)
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


def _compress_2_of_4_reference(weight: torch.Tensor) -> Three:
    _check_quads("compress_2_of_4", weight)
    rows, columns = weight.shape
    quads = nonzero(weight).reshape(rows, columns // 4, 4)
    places = torch.arange(4, device=weight.device)
    chosen = torch.tensor(_TWO_OF_FOUR, device=weight.device)[(quads.to(torch.int64) << places).sum(dim=-1)]
    mask = (chosen.unsqueeze(-1) >> places & 1).to(torch.bool).flatten(-2)
    compressed = bytes_of(weight)[mask].view(weight.dtype).reshape(rows, columns // 2)
    crowded = (quads.sum(dim=-1) > 2).flatten()
    first = _first(crowded)
    return compressed, pack_bitmask(mask), torch.where(first < 0, first, 4 * first)


def _compress_bitmask_reference(weight: torch.Tensor) -> Three:
    _check("compress_bitmask", weight)
    mask = nonzero(weight)
    counts = mask.sum(dim=-1)
    return bytes_of(weight)[mask].view(weight.dtype), pack_bitmask(mask), counts.cumsum(0) - counts


def _count_bits_reference(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    _check_bits("count_bits", bitmask, columns)
    return unpack_bitmask(bitmask, columns).sum(dim=-1)


def _find_uneven_quad_reference(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    _check_bits_of_quads("find_uneven_quad", bitmask, columns)
    uneven = (unpack_bitmask(bitmask, columns).unflatten(-1, (columns // 4, 4)).sum(dim=-1) != 2).flatten()
    return _first(uneven)


def _expand_bitmask_reference(values: torch.Tensor, bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    _check_number("expand_bitmask", values, bitmask, columns)
    return definition.expand_bitmask(values, bitmask, columns)


def _first(found: torch.Tensor) -> torch.Tensor:
    """The index of the first that is true ``[n]``, or -1."""
    # One more at the end, which is true in any case: its number says that there was none before.
    first = torch.nn.functional.pad(found.to(torch.int64), (0, 1), value=1).argmax()
    return torch.where(first < found.numel(), first, -1)


def _fake_pruning(weight: torch.Tensor) -> torch.Tensor:
    _check_pruning("prune_2_of_4", weight)
    return weight.new_empty(weight.shape)


def _fake_2_of_4(weight: torch.Tensor) -> Three:
    _check_quads("compress_2_of_4", weight)
    rows, columns = weight.shape
    bitmask = weight.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8)
    return weight.new_empty((rows, columns // 2)), bitmask, weight.new_empty((), dtype=torch.int64)


def _fake_bitmask(weight: torch.Tensor) -> Three:
    _check("compress_bitmask", weight)
    rows, columns = weight.shape
    count = torch.library.get_ctx().new_dynamic_size()
    bitmask = weight.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8)
    return weight.new_empty(count), bitmask, weight.new_empty(rows, dtype=torch.int64)


def _fake_counts(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    _check_bits("count_bits", bitmask, columns)
    return bitmask.new_empty(bitmask.shape[0], dtype=torch.int64)


def _fake_quad(bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    _check_bits_of_quads("find_uneven_quad", bitmask, columns)
    return bitmask.new_empty((), dtype=torch.int64)


def _fake_expanding(values: torch.Tensor, bitmask: torch.Tensor, columns: int) -> torch.Tensor:
    _check_expanding("expand_bitmask", values, bitmask, columns)
    return values.new_empty((bitmask.shape[0], columns))


_THREE = "(Tensor, Tensor, Tensor)"
_BITS = "Tensor bitmask, int columns"
for _name, _arguments, _result, _reference, _fake in (
    ("prune_2_of_4", "Tensor weight", "Tensor", _prune_reference, _fake_pruning),
    ("compress_2_of_4", "Tensor weight", _THREE, _compress_2_of_4_reference, _fake_2_of_4),
    ("compress_bitmask", "Tensor weight", _THREE, _compress_bitmask_reference, _fake_bitmask),
    ("count_bits", _BITS, "Tensor", _count_bits_reference, _fake_counts),
    ("find_uneven_quad", _BITS, "Tensor", _find_uneven_quad_reference, _fake_quad),
    ("expand_bitmask", f"Tensor values, {_BITS}", "Tensor", _expand_bitmask_reference, _fake_expanding),
):
    for _op in (_name, f"{_name}_reference"):
        library.define(f"{_op}({_arguments}) -> {_result}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(_op, _reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"compressed_format::{_op}", _fake, lib=library)
