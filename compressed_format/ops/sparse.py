"""``compressed_format::prune_2_of_4``, ``compress_2_of_4`` and ``compress_bitmask``: sparse weights, made and stored.

Pruning keeps the two larger magnitudes of each four columns, the left of equals; what is not a number is larger than
all others. The other two leave values as they are, of which they store those that are not zero, with a bit for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from compressed_format.bitmask import bytes_of, nonzero, pack_bitmask
from compressed_format.errors import OpArgumentError
from compressed_format.ops.schemas import FLOATS, library

__all__ = ["compress_2_of_4", "compress_bitmask", "prune_2_of_4"]

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_TWO_OF_FOUR = (12, 5, 10, 3, 12, 5, 6, 3, 12, 9, 10, 3, 12, 5, 6, 3)
"""The bits that are kept of four columns, by the bits of those that are not zero. Which zeros fill up fewer than two is
arbitrary, and readers do not care: this is the choice of the files that exist, whose writer left it to a partial sort.
Of more than two, which a 2:4 weight does not have, it is the first."""


def prune_2_of_4(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` ``[O, I]``, of floats, with zeros instead of the two smaller magnitudes of each four columns."""
    return cast(torch.Tensor, _call("prune_2_of_4", weight, _check_pruning))


def compress_2_of_4(weight: torch.Tensor) -> Three:
    """What a 2:4 ``weight`` ``[O, I]`` holds: two values of each four columns ``[O, I/2]``, and their bits.

    The third is an int64 scalar: the first column, counted from the beginning of the matrix, of the first four that
    have more than two values, whose third and fourth are lost; -1 where there are none.
    """
    return cast(Three, _call("compress_2_of_4", weight, _check_quads))


def compress_bitmask(weight: torch.Tensor) -> Three:
    """The values of ``weight`` ``[O, I]`` that are not zero, row by row, their bits, and where each row begins."""
    return cast(Three, _call("compress_bitmask", weight, _check))


def _call(name: str, weight: torch.Tensor, check: Callable[[str, torch.Tensor], None]) -> Any:
    try:
        return getattr(torch.ops.compressed_format, name).default(weight)
    except RuntimeError:
        # All that native code can raise: only now find out whether the argument was wrong, and how.
        check(name, weight)
        raise


def _check(op: str, weight: torch.Tensor) -> None:
    if weight.dtype not in (*FLOATS, torch.int8, torch.float8_e4m3fn):
        raise OpArgumentError(
            f"{op}: weight must be int8 or float8_e4m3fn codes, or have a float dtype, not {weight.dtype}"
        )
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
    # One more at the end, which is crowded in any case: its number says that there was none before.
    first = torch.nn.functional.pad(crowded.to(torch.int64), (0, 1), value=1).argmax()
    return compressed, pack_bitmask(mask), torch.where(first < crowded.numel(), 4 * first, -1)


def _compress_bitmask_reference(weight: torch.Tensor) -> Three:
    _check("compress_bitmask", weight)
    mask = nonzero(weight)
    counts = mask.sum(dim=-1)
    return bytes_of(weight)[mask].view(weight.dtype), pack_bitmask(mask), counts.cumsum(0) - counts


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


for _name, _result, _reference, _fake in (
    ("prune_2_of_4", "Tensor", _prune_reference, _fake_pruning),
    ("compress_2_of_4", "(Tensor, Tensor, Tensor)", _compress_2_of_4_reference, _fake_2_of_4),
    ("compress_bitmask", "(Tensor, Tensor, Tensor)", _compress_bitmask_reference, _fake_bitmask),
):
    for _op in (_name, f"{_name}_reference"):
        library.define(f"{_op}(Tensor weight) -> {_result}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(_op, _reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"compressed_format::{_op}", _fake, lib=library)
