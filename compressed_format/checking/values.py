"""The values of compressed modules: scales, codes, zero points, padding, bitmasks; read once, in parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from compressed_format.bitpack import packed_words, word_aligned_words
from compressed_format.checking import codes
from compressed_format.checking.bitmasks import check_bitmask
from compressed_format.checking.cache_scales import CACHE_SCALES
from compressed_format.checking.chunks import ChunkReader
from compressed_format.checking.findings import Code
from compressed_format.checking.notebook import Notebook
from compressed_format.checking.stored import ModuleCheck
from compressed_format.checkpoint import TensorSpec
from compressed_format.config import QuantizationArgs, QuantizationType
from compressed_format.dtypes import torch_dtype
from compressed_format.formats.base import FLOAT_DTYPES

__all__ = ["check_cache_values", "check_values"]

_WEIGHT_SCALES = ("weight_scale", "scale_packed")
_STATIC = ("input", "output")
_FEW = 8
"""Bytes that are looked for one by one; of more of them, all others are taken away."""


def check_values(check: ModuleCheck, reader: ChunkReader, notebook: Notebook) -> None:
    """Note what is wrong with the values of those tensors of a module whose headers are right.

    Raises :class:`CheckpointError` for a file that cannot be read.
    """
    for suffix in _WEIGHT_SCALES:
        if suffix in check.fitting:
            _check_positive(reader, check.tensors[suffix], check.place(suffix), codes.SCALE, notebook)
    scheme = check.assignment.scheme
    for end, args in zip(
        _STATIC,
        (None, None) if scheme is None else (scheme.input_activations, scheme.output_activations),
        strict=True,
    ):
        if f"{end}_scale" in check.fitting:
            place = check.place(f"{end}_scale")
            _check_positive(reader, check.tensors[f"{end}_scale"], place, codes.ACTIVATION_SCALE, notebook)
        if args is not None and f"{end}_zero_point" in check.fitting:
            _check_codes(check, f"{end}_zero_point", args, codes.ZERO_POINT, reader, notebook)
    args = check.args
    if args is not None:
        for suffix in ("weight", "compressed"):
            if suffix in check.fitting:
                _check_codes(check, suffix, args, codes.CODES_RANGE, reader, notebook)
        if "weight_zero_point" in check.fitting:
            _check_zero_points(check, args, reader, notebook)
        if "weight_packed" in check.fitting and check.shape is not None and "meta" not in check.tensors:
            _check_padding(check, "weight_packed", check.shape[-1], args, reader, notebook)
        if "weight_g_idx" in check.fitting:
            _check_g_idx(check, reader, notebook)
    if "bitmask" in check.fitting and check.shape is not None:
        check_bitmask(check, reader, notebook)
    if "meta" in check.fitting:
        _check_marlin(check, reader, notebook)


def check_cache_values(
    modules: Mapping[str, Mapping[str, TensorSpec]], reader: ChunkReader, notebook: Notebook
) -> None:
    """Note scales of a KV cache that are NaN, infinite, zero or negative. Raises as :func:`check_values` does."""
    for name, tensors in modules.items():
        for suffix in CACHE_SCALES:
            if suffix in tensors and torch_dtype(tensors[suffix].dtype) in FLOAT_DTYPES:
                _check_positive(reader, tensors[suffix], f"{name}.{suffix}", codes.ACTIVATION_SCALE, notebook)


def _check_positive(reader: ChunkReader, spec: TensorSpec, place: str, code: Code, notebook: Notebook) -> None:
    """Note scales that are NaN, infinite, zero or negative."""
    faults = _Faults()
    for start, part in reader.chunks(spec):
        values = part.to(torch.float32) if part.dtype != torch.float64 else part
        faults.look(start, ~(torch.isfinite(values) & (values > 0)), values)
    faults.note(code, place, spec, "a finite number above zero", notebook)


@dataclass
class _Faults:
    """The values of one tensor that are wrong: how many, and the first one."""

    count: int = 0
    first: int = 0
    value: object = field(default=None)

    def look(self, start: int, wrong: torch.Tensor, values: torch.Tensor, step: int = 1) -> None:
        """Take in ``values`` of which the first is at ``start``, the next ``step`` behind it: which are ``wrong``."""
        # As bytes, because torch takes its time with bools; nearly always, nothing is wrong.
        if len(wrong) == 0 or not int(wrong.view(torch.uint8).max()):
            return
        found = int(wrong.sum())
        if not self.count:
            index = int(wrong.nonzero()[0, 0])
            self.first, self.value = start + index * step, values[index].item()
        self.count += found

    def note(self, code: Code, place: str, spec: TensorSpec, allowed: str, notebook: Notebook) -> None:
        """One finding, if anything is wrong."""
        if self.count:
            index, rest = [], self.first
            for size in reversed(spec.shape):
                index.append(rest % size)
                rest //= size
            value = f"{self.value:g}" if isinstance(self.value, float) else str(self.value)
            many = f"{self.count} such value{'s' if self.count > 1 else ''}"
            message = f"holds {value} at index {index[::-1]}, expected {allowed} ({many}); {code.way_out}"
            notebook.add(code, place, message)


def _check_codes(
    check: ModuleCheck, suffix: str, args: QuantizationArgs, code: Code, reader: ChunkReader, notebook: Notebook
) -> None:
    """Integer codes against ``num_bits``, float8 codes against NaN; for whatever else, nothing can be said."""
    spec = check.tensors[suffix]
    if spec.dtype == "float8_e4m3fn":
        allowed = "a finite float8_e4m3fn value"
        right = bytes(byte for byte in range(256) if byte & 0x7F != 0x7F)  # NaN is all bits but the sign
    elif spec.dtype == "int8" and args.type is QuantizationType.INT and args.num_bits < 8:
        lowest, highest = -(1 << (args.num_bits - 1)), (1 << (args.num_bits - 1)) - 1
        allowed = f"{lowest} to {highest} for {args.num_bits} bits"
        right = bytes(code & 0xFF for code in range(lowest, highest + 1))
    else:
        return
    rare = [byte for byte in range(256) if byte not in right]
    faults = _Faults()
    wrong = torch.ones(256, dtype=torch.bool)
    wrong[list(right)] = False
    for start, data in reader.parts(spec):
        # Nearly always nothing is wrong, which bytes tell in a fraction of the time that tensors take.
        if any(byte in data for byte in rare) if len(rare) <= _FEW else data.translate(None, right):
            part = torch.frombuffer(data, dtype=torch_dtype(spec.dtype))
            faults.look(start, wrong[part.view(torch.uint8).to(torch.int64)], part)
    faults.note(code, check.place(suffix), spec, allowed, notebook)


def _check_zero_points(check: ModuleCheck, args: QuantizationArgs, reader: ChunkReader, notebook: Notebook) -> None:
    spec = check.tensors["weight_zero_point"]
    if spec.dtype != "int32" or check.shape is None:
        _check_codes(check, "weight_zero_point", args, codes.ZERO_POINT, reader, notebook)
        return
    # They are packed along the rows, so that the padding is in the last row of words; every pattern is a code.
    rows, words = check.shape[0], spec.shape[0]
    if words == 0 or spec.shape[1] == 0:
        return
    unused = _unused_bits(rows, args.num_bits, words, word_aligned=check.is_word_aligned)
    if unused:
        start = spec.stop - spec.shape[1] * 4
        last = torch.frombuffer(reader.read(spec, start, spec.stop), dtype=torch.int32)
        faults = _Faults()
        faults.look((words - 1) * spec.shape[1], (last & unused) != 0, last)
        faults.note(codes.PADDING, check.place("weight_zero_point"), spec, "zero bits behind the last row", notebook)


def _check_padding(
    check: ModuleCheck, suffix: str, columns: int, args: QuantizationArgs, reader: ChunkReader, notebook: Notebook
) -> None:
    """The bits of each row behind its last code. Where there are none, nothing is read: every pattern is a code."""
    spec = check.tensors[suffix]
    words = spec.shape[-1]
    if words not in (packed_words(columns, args.num_bits), word_aligned_words(columns, args.num_bits)):
        return
    in_last = _unused_bits(columns, args.num_bits, words, word_aligned=check.is_word_aligned)
    in_all = 0
    if check.is_word_aligned:
        in_all = -1 << (32 // args.num_bits * args.num_bits)
    if not (in_last or in_all) or spec.nbytes == 0:
        return
    faults = _Faults()
    for start, part in reader.chunks(spec):
        behind = (words - 1 - start) % words  # where the first last word of a row is
        ends = part[behind::words]
        if in_all:
            wrong = (part & in_all) != 0
            wrong[behind::words] |= (ends & in_last) != 0
            faults.look(start, wrong, part)
        else:
            faults.look(start + behind, (ends & in_last) != 0, ends, words)
    faults.note(codes.PADDING, check.place(suffix), spec, f"zero bits behind the {columns} codes", notebook)


def _unused_bits(size: int, bits: int, words: int, *, word_aligned: bool) -> int:
    """The bits, as an int32, of the last of ``words`` that none of ``size`` codes uses."""
    if words == 0:
        return 0
    used = (size - (words - 1) * (32 // bits)) * bits if word_aligned else size * bits - (words - 1) * 32
    return 0 if used >= 32 else -1 << max(used, 0)


def _check_g_idx(check: ModuleCheck, reader: ChunkReader, notebook: Notebook) -> None:
    scale, spec = check.tensors.get("weight_scale"), check.tensors["weight_g_idx"]
    if scale is None or "weight_scale" not in check.fitting:
        return
    groups = scale.shape[-1]
    faults, unset = _Faults(), 0
    for start, part in reader.chunks(spec):
        unset += int((part == -1).sum())
        faults.look(start, (part < -1) | (part >= groups), part)
    if unset not in (0, spec.shape[0]) and not faults.count:
        message = f"is -1 (not set) for {unset} of {spec.shape[0]} columns; {codes.G_IDX_RANGE.way_out}"
        notebook.add(codes.G_IDX_RANGE, check.place("weight_g_idx"), message)
    faults.note(codes.G_IDX_RANGE, check.place("weight_g_idx"), spec, f"a group from 0 to {groups - 1}", notebook)


def _check_marlin(check: ModuleCheck, reader: ChunkReader, notebook: Notebook) -> None:
    """Each int16 of the metadata holds four pairs of columns within a group of four; a pair must differ."""
    spec = check.tensors["meta"]
    faults = _Faults()
    for start, part in reader.chunks(spec):
        wide = part.to(torch.int32)
        twice = torch.zeros(wide.shape, dtype=torch.bool)
        for pair in range(4):
            nibble = wide >> (4 * pair)
            twice |= (nibble & 3) == (nibble >> 2 & 3)
        faults.look(start, twice, part)
    faults.note(codes.MARLIN, check.place("meta"), spec, "pairs of different columns", notebook)
