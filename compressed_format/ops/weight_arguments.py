"""The arguments by which ops are given a compressed weight, and what they may be.

Packed tensors, scales and zero points have no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from compressed_format import bitpack
from compressed_format.errors import OpArgumentError
from compressed_format.ops.definition import FLOATS

__all__ = ["LAYOUT", "WEIGHT", "check_weight", "refuse_gradients", "rows_of"]

WEIGHT = "Tensor weight, Tensor? scale, Tensor? zero_point, Tensor? g_idx, Tensor? bitmask"
LAYOUT = "int bits, int columns, int block_rows, int block_columns"


def check_weight(
    op: str,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    g_idx: torch.Tensor | None,
    bitmask: torch.Tensor | None,
    bits: int,
    columns: int,
    block_rows: int,
    block_columns: int,
) -> None:
    def fail(argument: str, message: str) -> None:
        raise OpArgumentError(f"{op}: {argument} {message}")

    packed = weight.dtype == torch.int32
    if not packed and weight.dtype not in (*FLOATS, torch.int8, torch.float8_e4m3fn):
        fail("weight", f"must be int32 words, int8 or float8_e4m3fn codes, or a float dtype, not {weight.dtype}")
    if not 1 <= bits <= 8:
        fail("bits", f"must lie in 1 to 8, not {bits}")
    if block_rows < 1 or block_columns < 1:
        fail("block_rows and block_columns", f"must be positive, not {block_rows} and {block_columns}")
    if scale is None and (packed or weight.dtype in (torch.int8, torch.float8_e4m3fn)):
        fail("scale", "is missing; only a weight of plain values goes without")
    if columns < 0:
        fail("columns", f"must not be negative, not {columns}")
    if bitmask is not None:
        if packed:
            fail("bitmask", "goes with int8 or float8_e4m3fn codes or plain values, not with packed words")
        if bitmask.dtype != torch.uint8 or bitmask.ndim != 2 or bitmask.shape[1] != -(-columns // 8):
            fail("bitmask", f"must be uint8 [rows, {-(-columns // 8)}], not {bitmask.dtype} {list(bitmask.shape)}")
        rows = bitmask.shape[:1]
    else:
        stored = bitpack.packed_words(columns, bits) if packed else columns
        if weight.ndim < 2 or weight.shape[-1] != stored:
            fail("weight", f"must have {stored} elements a row for {columns} columns, not shape {list(weight.shape)}")
        rows = weight.shape[:-1]
    if scale is None:
        return
    if scale.dtype not in FLOATS:
        fail("scale", f"must have a float dtype, not {scale.dtype}")
    expected = (*rows[:-1], -(-rows[-1] // block_rows), -(-columns // block_columns))
    if tuple(scale.shape) not in (expected, (1,)):
        fail("scale", f"must have shape {list(expected)}, or [1] for the whole weight, not {list(scale.shape)}")
    if zero_point is not None:
        if tuple(scale.shape) == (1,):
            expected = (1,)
            if zero_point.dtype == torch.int32:
                fail("zero_point", "must not be packed where the whole weight has one")
        elif zero_point.dtype == torch.int32:
            expected = (*expected[:-2], bitpack.packed_words(expected[-2], bits), expected[-1])
        if tuple(zero_point.shape) != expected:
            fail("zero_point", f"must have shape {list(expected)}, not {list(zero_point.shape)}")
    if g_idx is not None and (g_idx.dtype != torch.int32 or tuple(g_idx.shape) != (columns,)):
        fail("g_idx", f"must be int32 [{columns}], not {g_idx.dtype} {list(g_idx.shape)}")


def rows_of(weight: torch.Tensor, bitmask: torch.Tensor | None) -> torch.Size:
    return weight.shape[:-1] if bitmask is None else bitmask.shape[:1]


def refuse_gradients(op: str, needed: Iterable[bool]) -> None:
    """Raise where a tensor of :data:`WEIGHT` was to be trained: it would stay as it is, without a word."""
    names = [argument.split()[-1] for argument in WEIGHT.split(", ")]
    wanted = [name for name, need in zip(names, needed, strict=True) if need]
    if wanted:
        raise OpArgumentError(
            f"{op}: {', '.join(wanted)} must not require a gradient, as the tensors of a compressed weight have none; "
            "freeze them by requires_grad_(False), or decompress() the model to train its weights"
        )
