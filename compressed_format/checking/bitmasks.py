"""Bitmasks of sparse weights, read in parts: as many bits as values, 2:4, nothing behind the last column."""

from __future__ import annotations

import math

import torch

from compressed_format.checking import codes
from compressed_format.checking.chunks import ChunkReader
from compressed_format.checking.notebook import Notebook
from compressed_format.checking.stored import ModuleCheck
from compressed_format.config import CompressionFormat

__all__ = ["check_bitmask"]

_BITS = torch.tensor([byte.bit_count() for byte in range(256)])
_LOW, _HIGH = _BITS[torch.arange(256) & 15], _BITS[torch.arange(256) >> 4]


def check_bitmask(check: ModuleCheck, reader: ChunkReader, notebook: Notebook) -> None:
    """Note what is wrong with ``bitmask`` uint8 ``[O, ceil(I/8)]`` and ``row_offsets``, where there are any."""
    assert check.shape is not None
    spec, columns = check.tensors["bitmask"], check.shape[1]
    width = spec.shape[1]
    if width != -(-columns // 8) or width == 0:
        return
    is_two_four = check.assignment.sparsity is CompressionFormat.SPARSE_24_BITMASK
    behind = 0xFF & ~((1 << (columns - (width - 1) * 8)) - 1)
    set_bits, wrong_quad, padded = 0, None, None
    offsets = check.tensors["row_offsets"] if "row_offsets" in check.fitting else None
    wrong_row = None
    for start, part in reader.chunks(spec):
        index = part.to(torch.int64)
        last = (width - 1 - start) % width
        if behind and padded is None:
            outside = (index[last::width] & behind) != 0
            if bool(outside.any()):
                padded = (start + last) // width + int(outside.nonzero()[0, 0])
        if is_two_four and wrong_quad is None:
            wrong = (_LOW[index] != 2) | (_HIGH[index] != 2)
            if columns % 8:
                # The last byte of a row has one group of four only.
                wrong[last::width] = _LOW[index[last::width]] != 2
            if bool(wrong.any()):
                wrong_quad = divmod(start + int(wrong.nonzero()[0, 0]), width)
        counts = _BITS[index]
        if offsets is not None and wrong_row is None:
            wrong_row = _wrong_row(check, reader, start, counts, set_bits)
        set_bits += int(counts.sum())
    place = check.place("bitmask")
    if wrong_quad is not None:
        row, byte = wrong_quad
        message = f"has not two bits in each group of four in row {row}, columns {byte * 8} to {byte * 8 + 7}"
        notebook.add(codes.TWO_FOUR, place, f"{message}; {codes.TWO_FOUR.way_out}")
    if padded is not None:
        message = f"has bits behind column {columns - 1} in row {padded}; {codes.BITMASK.way_out}"
        notebook.add(codes.BITMASK, place, message)
    if "compressed" in check.fitting:
        count = math.prod(check.tensors["compressed"].shape)
        if count != set_bits:
            message = f"has {set_bits} bits set for the {count} values of compressed; {codes.BITMASK.way_out}"
            notebook.add(codes.BITMASK, place, message)
    if wrong_row is not None:
        message = (
            f"says that row {wrong_row[0]} starts at {wrong_row[1]}, and the bitmask that it starts at {wrong_row[2]}"
        )
        notebook.add(codes.BITMASK, check.place("row_offsets"), f"{message}; {codes.BITMASK.way_out}")


def _wrong_row(
    check: ModuleCheck, reader: ChunkReader, start: int, counts: torch.Tensor, before: int
) -> tuple[int, int, int] | None:
    """The first row that starts in this part of the mask and elsewhere by ``row_offsets``: row, found, expected."""
    width, offsets = check.tensors["bitmask"].shape[1], check.tensors["row_offsets"]
    first = -(-start // width)
    starts = torch.arange(first * width - start, len(counts), width)
    if not len(starts):
        return None
    expected = before + counts.cumsum(0)[starts] - counts[starts]
    data = reader.read(offsets, offsets.start + first * 8, offsets.start + (first + len(starts)) * 8)
    found = torch.frombuffer(data, dtype=torch.int64)
    wrong = (found != expected).nonzero()
    if not len(wrong):
        return None
    row = int(wrong[0, 0])
    return first + row, int(found[row]), int(expected[row])
