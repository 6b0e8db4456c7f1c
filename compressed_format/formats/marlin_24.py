"""``marlin-24``: 4- or 8-bit codes of a 2:4 weight, shuffled for one GPU kernel. Read only.

Releases of compressed-tensors up to 0.14 wrote it. ``schema/README.md`` describes the three shuffles undone here: the
tiles of the codes, the metadata that says which two of four columns a code belongs to, and the scales.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressed_format.blocks import scale_shape
from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_format.errors import FormatError, Problem, UnsupportedFormatError
from compressed_format.formats.base import Format, TensorSpec, check_scales, check_tensors, require_args
from compressed_format.quantization import QuantizedWeight

__all__ = ["Marlin24"]

_TILE = 16
_RUN = 1024  # codes are shuffled in runs of four tiles
_SCALE_RUN = 64


class Marlin24(Format):
    """``weight_packed`` int32 ``[I/32, O*b/2]``, ``scale_packed`` float16 ``[groups, O]``, ``meta`` int16
    ``[I/32, 2*O]``, of a 2:4 weight ``[O, I]``."""

    name = CompressionFormat.MARLIN_24

    def tensor_specs(self, shape: tuple[int, ...], args: QuantizationArgs | None) -> dict[str, TensorSpec]:
        args = _require_marlin(args)
        rows, columns = shape
        groups = scale_shape(args, shape)[-1]
        return {
            "weight_packed": TensorSpec((torch.int32,), (columns // 32, rows * args.num_bits // 2)),
            "scale_packed": TensorSpec((torch.float16,), (groups, rows)),
            "meta": TensorSpec((torch.int16,), (columns // 32, 2 * rows)),
        }

    def encode(
        self, quantized: QuantizedWeight, args: QuantizationArgs | None, *, place: str = ""
    ) -> dict[str, torch.Tensor]:
        message = "marlin-24 is read, not written: no current runtime loads it; use pack-quantized"
        raise UnsupportedFormatError(problems=[Problem(place, message)])

    def decode(
        self, tensors: Mapping[str, torch.Tensor], args: QuantizationArgs | None, *, place: str = ""
    ) -> QuantizedWeight:
        args = _require_marlin(args)
        packed = tensors.get("weight_packed")
        if packed is None or packed.ndim != 2 or packed.dtype != torch.int32:
            found = "is missing" if packed is None else f"has dtype {packed.dtype} and shape {list(packed.shape)}"
            raise FormatError(problems=[Problem(f"{place}.weight_packed", f"{found}, expected an int32 matrix")])
        rows, columns = packed.shape[1] * 2 // args.num_bits, packed.shape[0] * 32
        if rows % 64 or (rows * columns // 2) % _RUN or packed.numel() == 0:
            message = f"has shape {list(packed.shape)}, whose {rows} x {columns} weight marlin-24 cannot tile"
            raise FormatError(problems=[Problem(f"{place}.weight_packed", message)])
        check_tensors(tensors, self.tensor_specs((rows, columns), args), place)
        values = _untile(packed, args.num_bits, columns // 2, rows)
        indices = _column_indices(tensors["meta"], rows, columns)
        twice = (indices[:, ::2] == indices[:, 1::2]).nonzero()
        if len(twice):
            row, quad = twice[0].tolist()
            message = f"puts both values of row {row}, columns {quad * 4} to {quad * 4 + 3}, into the same column"
            raise FormatError(problems=[Problem(f"{place}.meta", message)])
        codes = _scatter(values.T, indices, columns)
        scale = _unshuffle_scales(tensors["scale_packed"], args, columns // 2)
        check_scales(scale, f"{place}.scale_packed")
        return QuantizedWeight(codes, scale)


def _require_marlin(args: QuantizationArgs | None) -> QuantizationArgs:
    args = require_args(args, CompressionFormat.MARLIN_24)
    strategies = (QuantizationStrategy.CHANNEL, QuantizationStrategy.GROUP)
    fits = args.type is QuantizationType.INT and args.num_bits in (4, 8) and args.symmetric
    if not (fits and args.strategy in strategies):
        raise UnsupportedFormatError("marlin-24 holds symmetric int4 or int8 weights by channel or group only")
    return args


def _untile(packed: torch.Tensor, bits: int, rows: int, columns: int) -> torch.Tensor:
    """Codes ``[rows, columns]`` out of 16 x 16 tiles, shuffled in runs of 1024 and packed into words."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, device=packed.device) * bits
    codes = ((packed.to(torch.int64).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)) - (1 << (bits - 1))
    shuffled = codes.to(torch.int8).reshape(-1, _RUN)
    runs = torch.empty_like(shuffled)
    runs[:, _code_order(bits, packed.device)] = shuffled
    tiles = runs.reshape(rows // _TILE, columns // _TILE, _TILE, _TILE)
    return tiles.transpose(1, 2).reshape(rows, columns)


def _code_order(bits: int, device: torch.device) -> torch.Tensor:
    """Where each of 1024 stored codes comes from within its four tiles.

    A warp's thread ``t`` holds, for each of four neighbouring columns, the fragment that ``mma.sp`` wants of it: rows
    ``2(t % 4)`` and the next one, the same eight rows further down, in two blocks of columns. The codes of a thread
    are interleaved at last, so that one word gives up its codes two at a time.
    """
    thread = torch.arange(32, device=device).reshape(32, 1, 1, 1)
    neighbour = torch.arange(4, device=device).reshape(1, 4, 1, 1)
    block = torch.arange(2, device=device).reshape(1, 1, 2, 1)
    row = 2 * (thread % 4) + torch.tensor([0, 1, 8, 9], device=device).reshape(1, 1, 1, 4)
    column = thread // 4
    source = 16 * row + 256 * (column // 2) + 8 * (column % 2) + 4 * block + neighbour
    interleave = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    return source.reshape(-1, len(interleave))[:, interleave].reshape(-1)


def _column_indices(meta: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """For each stored value ``[rows, columns/2]``, its column within its group of four.

    The metadata of row ``r`` and int16 column ``c`` was moved to where the sparse tensor cores expect it.
    """
    r = torch.arange(rows, device=meta.device).reshape(-1, 1)
    c = torch.arange(columns // 16, device=meta.device).reshape(1, -1)
    moved = (r // 64) * 64 + (r % 2) * 2 + (r % 8) // 4 + ((r % 32) % 4) // 2 * 32 + ((r % 64) // 8) * 4
    swap_up, swap_down = (moved % 2 == 0) & (c % 2 == 1), (moved % 2 == 1) & (c % 2 == 0)
    row = moved + swap_up.to(torch.int64) - swap_down.to(torch.int64)
    column = c - swap_up.to(torch.int64) + swap_down.to(torch.int64)
    words = meta.reshape(-1)[(column // 2) * (2 * rows) + 2 * row + column % 2].to(torch.int64)
    shifts = torch.arange(8, device=meta.device) * 2
    return ((words.unsqueeze(-1) >> shifts) & 3).reshape(rows, columns // 2)


def _scatter(values: torch.Tensor, indices: torch.Tensor, columns: int) -> torch.Tensor:
    """Put each pair of values ``[O, I/2]`` into its group of four columns."""
    quads = torch.zeros((values.shape[0], columns // 4, 4), dtype=values.dtype, device=values.device)
    quads.scatter_(-1, indices.unflatten(-1, (-1, 2)), values.contiguous().unflatten(-1, (-1, 2)))
    return quads.flatten(-2)


def _unshuffle_scales(scale: torch.Tensor, args: QuantizationArgs, packed_columns: int) -> torch.Tensor:
    """Scales ``[O, groups]``; only those of groups smaller than the halved columns were shuffled."""
    if args.strategy is QuantizationStrategy.GROUP and args.group_size and args.group_size < packed_columns:
        order = torch.tensor([8 * i + j for i in range(8) for j in (0, 4, 1, 5, 2, 6, 3, 7)], device=scale.device)
        shuffled = scale.reshape(-1, _SCALE_RUN)
        runs = torch.empty_like(shuffled)
        runs[:, order] = shuffled
        scale = runs.reshape(scale.shape)
    return scale.T.contiguous()
