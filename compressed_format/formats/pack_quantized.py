"""``pack-quantized``: integer codes of 1 to 8 bits, packed into int32 words along each row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import Enum
from functools import partial

import torch

from compressed_format import bitpack, ops
from compressed_format.blocks import scale_shape
from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_format.errors import FormatError, Problem, UnsupportedFormatError
from compressed_format.formats.base import (
    FLOAT_DTYPES,
    Format,
    TensorSpec,
    check_codes,
    check_scales,
    check_tensors,
    check_zero_point,
    decode_g_idx,
    dense_weight,
    g_idx_spec,
    require_args,
)
from compressed_format.quantization import QuantizedWeight, quantize_at_once
from compressed_format.scales import zero_point_dtype

__all__ = ["PackLayout", "PackQuantized", "pack_layout"]

# The first release of compressed-tensors that wrote odd widths as one dense bit string.
_FIRST_DENSE_VERSION = (0, 18)


class PackLayout(str, Enum):
    """The two bit layouts that have gone by the name ``pack-quantized``."""

    DENSE = "dense"
    WORD_ALIGNED = "word-aligned"


def pack_layout(packed: torch.Tensor, bits: int, columns: int, *, version: str | None, place: str = "") -> PackLayout:
    """Which layout ``weight_packed`` ``[..., words]`` of ``columns`` codes has.

    ``version`` is the config's ``version``, the release that wrote the file. The number of words decides where the
    layouts differ in it. Where they do not, the word-aligned layout is ruled out by a bit set in the part of a word
    that it leaves empty; otherwise a release before 0.18 means word-aligned, and without a version the empty bits
    themselves are the evidence.

    Raises :class:`FormatError` if the number of words fits neither layout.
    """
    if 32 % bits == 0:
        return PackLayout.DENSE
    words, dense, aligned = (
        packed.shape[-1],
        bitpack.packed_words(columns, bits),
        bitpack.word_aligned_words(columns, bits),
    )
    if words not in (dense, aligned):
        message = f"has {words} words a row, expected {dense} for {columns} codes of {bits} bits"
        if aligned != dense:
            message += f" (or {aligned} in the word-aligned layout of releases before 0.18)"
        raise FormatError(problems=[Problem(f"{place}.weight_packed", message)])
    if dense != aligned:
        return PackLayout.DENSE if words == dense else PackLayout.WORD_ALIGNED
    written_by = _release(version)
    if packed.is_meta or (written_by is not None and written_by >= _FIRST_DENSE_VERSION):
        return PackLayout.DENSE
    used_bits = (1 << (32 // bits * bits)) - 1
    empty = not bool(((packed.to(torch.int64) & 0xFFFFFFFF) & ~used_bits).any())
    return PackLayout.WORD_ALIGNED if empty else PackLayout.DENSE


class PackQuantized(Format):
    """``weight_packed``, ``weight_scale``, ``weight_shape``; ``weight_zero_point`` if asymmetric, packed along dim -2
    for channel and group strategies; ``weight_g_idx`` if columns were reordered."""

    name = CompressionFormat.PACK_QUANTIZED

    def tensor_specs(self, shape: tuple[int, ...], args: QuantizationArgs | None) -> dict[str, TensorSpec]:
        args = _require_packable(args)
        scales = scale_shape(args, shape)
        specs = {
            "weight_packed": TensorSpec((torch.int32,), (*shape[:-1], bitpack.packed_words(shape[-1], args.num_bits))),
            "weight_scale": TensorSpec(FLOAT_DTYPES, scales),
            "weight_shape": TensorSpec((torch.int64, torch.int32), (len(shape),)),
        }
        if not args.symmetric and self.packs_zero_points(args):
            rows = bitpack.packed_words(scales[-2], args.num_bits)
            specs["weight_zero_point"] = TensorSpec((torch.int32,), (*scales[:-2], rows, scales[-1]))
        elif not args.symmetric:
            specs["weight_zero_point"] = TensorSpec((zero_point_dtype(args),), scales)
        return specs | g_idx_spec(shape, args)

    @classmethod
    def packs_zero_points(cls, args: QuantizationArgs) -> bool:
        """Whether zero points are packed along the rows; the other strategies store them as they are."""
        return args.strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL)

    @classmethod
    def legacy_specs(cls, shape: tuple[int, ...], args: QuantizationArgs) -> dict[str, list[TensorSpec]]:
        """What each tensor looked like in older releases: word-aligned, or with zero points that were not packed."""
        older = {suffix: [spec] for suffix, spec in cls.word_aligned_specs(shape, args).items()}
        if "weight_zero_point" in older:
            older["weight_zero_point"].append(TensorSpec((torch.int8,), scale_shape(args, shape)))
        return older

    @classmethod
    def word_aligned_specs(cls, shape: tuple[int, ...], args: QuantizationArgs) -> dict[str, TensorSpec]:
        """As :meth:`tensor_specs`, for the word-aligned layout that is read but no longer written."""
        specs = cls().tensor_specs(shape, args)
        words = bitpack.word_aligned_words(shape[-1], args.num_bits)
        specs["weight_packed"] = TensorSpec((torch.int32,), (*shape[:-1], words))
        if "weight_zero_point" in specs and cls.packs_zero_points(args):
            rows, groups = scale_shape(args, shape)[-2:]
            packed_rows = bitpack.word_aligned_words(rows, args.num_bits)
            specs["weight_zero_point"] = TensorSpec((torch.int32,), (*shape[:-2], packed_rows, groups))
        return specs

    def encode(
        self, quantized: QuantizedWeight, args: QuantizationArgs | None, *, place: str = ""
    ) -> dict[str, torch.Tensor]:
        args = _require_packable(args)
        codes, scale, zero_point = quantized.codes, quantized.scale, quantized.zero_point
        check_tensors({"weight": codes}, {"weight": TensorSpec((torch.int8,), (*codes.shape,))}, place)
        check_zero_point(quantized, args, place)
        check_codes(codes, args, f"{place}.weight")
        if scale is None:
            raise FormatError(problems=[Problem(f"{place}.weight_scale", "is missing")])
        if zero_point is not None:
            check_codes(zero_point, args, f"{place}.weight_zero_point")
        packed = ops.pack_codes(codes, args.num_bits)
        tensors = self._tensors(packed, tuple(codes.shape), scale, zero_point, args)
        if quantized.g_idx is not None:
            tensors["weight_g_idx"] = quantized.g_idx
        check_tensors(tensors, self.tensor_specs(tuple(codes.shape), args), place, optional=("weight_g_idx",))
        check_scales(scale, f"{place}.weight_scale")
        decode_g_idx(quantized.g_idx, codes.shape[-1], scale.shape[-1], place)
        return tensors

    def encode_weight(
        self,
        weight: torch.Tensor,
        args: QuantizationArgs,
    ) -> dict[str, torch.Tensor] | None:
        """What :meth:`encode` makes of the quantized ``weight``, straight from its values; None where that is for
        ``quantize`` and :meth:`encode` to do, or to refuse. Nothing is left to check in what was just made."""
        unusual = args.type is not QuantizationType.INT or args.scale_dtype is not None
        group_size = args.group_size if args.strategy is QuantizationStrategy.GROUP else None
        if unusual or not 1 <= args.num_bits <= 8 or (group_size and weight.shape[-1] % group_size):
            return None
        made = quantize_at_once(weight, args, pack=True)
        return None if made is None else self._tensors(made[0], tuple(weight.shape), made[1], made[2], args)

    def _tensors(
        self,
        packed: torch.Tensor,
        shape: tuple[int, ...],
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        args: QuantizationArgs,
    ) -> dict[str, torch.Tensor]:
        tensors = {
            "weight_packed": packed,
            "weight_scale": scale,
            "weight_shape": torch.tensor(shape, dtype=torch.int64, device=packed.device),
        }
        if zero_point is not None:
            if self.packs_zero_points(args):
                zero_point = _along_rows(ops.pack_codes, zero_point, args.num_bits)
            tensors["weight_zero_point"] = zero_point
        return tensors

    def decode(
        self,
        tensors: Mapping[str, torch.Tensor],
        args: QuantizationArgs | None,
        *,
        place: str = "",
        layout: PackLayout = PackLayout.DENSE,
    ) -> QuantizedWeight:
        """As :meth:`Format.decode`, of a file whose ``layout`` :func:`pack_layout` has told."""
        args = _require_packable(args)
        scales = self._checked(tensors, args, place, layout)
        return replace(scales, codes=_unpack(layout, scales.codes, args.num_bits, stored_shape(tensors, place)[-1]))

    def dense(
        self,
        tensors: Mapping[str, torch.Tensor],
        args: QuantizationArgs | None,
        *,
        dtype: torch.dtype | None = None,
        place: str = "",
        layout: PackLayout = PackLayout.DENSE,
    ) -> torch.Tensor:
        """``dequantize(decode(...), args, dtype=dtype)`` in one step, without the codes in between."""
        args = _require_packable(args)
        packed = self._checked(tensors, args, place, layout)
        shape = stored_shape(tensors, place)
        codes = packed.codes
        if layout is PackLayout.WORD_ALIGNED:
            codes = _unpack(layout, codes, args.num_bits, shape[-1])
        return dense_weight(replace(packed, codes=codes), shape, args, dtype)

    def _checked(
        self, tensors: Mapping[str, torch.Tensor], args: QuantizationArgs, place: str, layout: PackLayout
    ) -> QuantizedWeight:
        """The weight once nothing contradicts the format, with ``codes`` still packed."""
        shape = stored_shape(tensors, place)
        word_aligned = layout is PackLayout.WORD_ALIGNED
        specs = self.word_aligned_specs(shape, args) if word_aligned else self.tensor_specs(shape, args)
        specs = _with_unpacked_zero_points(specs, tensors, args)
        check_tensors(tensors, specs, place, optional=("weight_g_idx",))
        scale = tensors["weight_scale"]
        check_scales(scale, f"{place}.weight_scale")
        zero_point = None if args.symmetric else tensors["weight_zero_point"]
        if zero_point is not None and zero_point.dtype == torch.int32:
            zero_point = _along_rows(partial(_unpack, layout), zero_point, args.num_bits, scale.shape[-2])
        elif zero_point is not None:
            check_codes(zero_point, args, f"{place}.weight_zero_point")
        g_idx = decode_g_idx(tensors.get("weight_g_idx"), shape[-1], scale.shape[-1], place)
        return QuantizedWeight(tensors["weight_packed"], scale, zero_point, g_idx=g_idx)


def _unpack(layout: PackLayout, packed: torch.Tensor, bits: int, size: int) -> torch.Tensor:
    return ops.unpack_codes(packed, bits, size, layout is PackLayout.WORD_ALIGNED)


def stored_shape(tensors: Mapping[str, torch.Tensor], place: str) -> tuple[int, ...]:
    """The dense shape that ``weight_shape`` holds, once it is known to describe ``weight_packed``.

    Raises :class:`FormatError` if it is missing, has another rank, or names sizes that the packed tensor cannot have;
    nothing is allocated from its values before that.
    """
    name = f"{place}.weight_shape"
    if "weight_shape" not in tensors or "weight_packed" not in tensors:
        missing = "weight_shape" if "weight_shape" not in tensors else "weight_packed"
        found = ", ".join(sorted(tensors)) or "no tensors"
        raise FormatError(problems=[Problem(f"{place}.{missing}", f"is missing; found {found}")])
    stored, packed = tensors["weight_shape"], tensors["weight_packed"]
    if stored.ndim != 1 or stored.dtype not in (torch.int64, torch.int32) or stored.numel() != packed.ndim:
        raise FormatError(
            problems=[Problem(name, f"must be {packed.ndim} int64 values, found {stored.dtype} {list(stored.shape)}")]
        )
    shape = tuple(int(size) for size in stored.tolist())
    if packed.ndim < 2:
        message = f"has shape {list(packed.shape)}, expected a matrix or a stack of them"
        raise FormatError(problems=[Problem(f"{place}.weight_packed", message)])
    words = packed.shape[-1]
    # A word holds at most 32 codes, so the last size is bounded by the bytes that are really there.
    if shape[:-1] != tuple(packed.shape[:-1]) or not (words <= shape[-1] <= 32 * words):
        message = f"says {list(shape)}, which weight_packed of shape {list(packed.shape)} cannot hold"
        raise FormatError(problems=[Problem(name, message)])
    return shape


def _require_packable(args: QuantizationArgs | None) -> QuantizationArgs:
    args = require_args(args, CompressionFormat.PACK_QUANTIZED)
    if args.type is not QuantizationType.INT or not 1 <= args.num_bits <= 8:
        message = f"pack-quantized holds integers of 1 to 8 bits, not {args.type.value} of {args.num_bits} bits"
        raise UnsupportedFormatError(message)
    return args


def _with_unpacked_zero_points(
    specs: dict[str, TensorSpec], tensors: Mapping[str, torch.Tensor], args: QuantizationArgs
) -> dict[str, TensorSpec]:
    """``specs`` for a file of a release up to 0.9.3, which stored zero points like the scales they belong to."""
    zero_point = tensors.get("weight_zero_point")
    if args.symmetric or zero_point is None or zero_point.dtype != torch.int8:
        return specs
    return specs | {"weight_zero_point": TensorSpec((torch.int8,), specs["weight_scale"].shape)}


def _along_rows(pack: Callable[..., torch.Tensor], values: torch.Tensor, *args: int) -> torch.Tensor:
    """Pack or unpack along dim -2 instead of the last one."""
    # Copies, because `contiguous` leaves a dimension of size one the stride it has, and bytes can then not be viewed.
    rows = values.transpose(-1, -2).clone(memory_format=torch.contiguous_format)
    return pack(rows, *args).transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _release(version: str | None) -> tuple[int, int] | None:
    """Major and minor of a version string, or None if it is not one."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})", version or "")
    return (int(match[1]), int(match[2])) if match else None
