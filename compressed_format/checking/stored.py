"""The tensors of each compressed module against its scheme, as their headers tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

import torch

from compressed_format.bitpack import packed_words, word_aligned_words
from compressed_format.checking import codes
from compressed_format.checking.chunks import ChunkReader
from compressed_format.checking.notebook import Notebook
from compressed_format.checking.odd_widths import told_layout
from compressed_format.checkpoint import TensorSpec as Found
from compressed_format.config import Assignment, CompressionFormat, QuantizationArgs, QuantizationStrategy
from compressed_format.config.layers import OF_COMPRESSED
from compressed_format.dtypes import torch_dtype
from compressed_format.errors import CheckpointError, UnsupportedFormatError
from compressed_format.formats import FORMATS, PackLayout, PackQuantized, TensorSpec
from compressed_format.formats.base import FLOAT_DTYPES
from compressed_format.formats.module import check_runnable, module_tensor_specs
from compressed_format.reading.layout import weight_specs

__all__ = ["KNOWN_SUFFIXES", "ModuleCheck", "Stored"]

_F, _S = CompressionFormat, QuantizationStrategy
_SPARSE_SUFFIXES = frozenset({"shape", "compressed", "bitmask", "row_offsets"})
_CACHE_OF_LINEAR = frozenset({"output_scale", "output_zero_point"})
KNOWN_SUFFIXES = frozenset(
    {"weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
    | {"weight_global_scale", "weight_scale_inv", "scale_packed", "meta"}
    | {f"{end}_{what}" for end in ("input", "output") for what in ("scale", "zero_point", "global_scale")}
    | _SPARSE_SUFFIXES
)
"""What formats call their tensors; of other suffixes nothing is known."""
_STRUCTURAL = frozenset({"weight", "weight_packed", "weight_shape", "shape", "compressed", "bitmask"})


class Stored:
    """The tensors of a checkpoint by module and suffix; ``reader`` reads them, and is None where nobody shall."""

    def __init__(self, modules: Mapping[str, Mapping[str, Found]], reader: ChunkReader | None) -> None:
        self.modules, self.reader = modules, reader

    @cached_property
    def compressed(self) -> frozenset[str]:
        """The modules with a tensor that only compressed ones have."""
        return frozenset(name for name, tensors in self.modules.items() if not OF_COMPRESSED.isdisjoint(tensors))

    def is_dense(self, name: str) -> bool:
        """Whether the module has a weight, and a dense one."""
        weight = self.modules[name].get("weight")
        if name in self.compressed or weight is None:
            return False
        return torch_dtype(weight.dtype) in FLOAT_DTYPES


class ModuleCheck:
    """One module that the config says is compressed.

    After :meth:`headers`, ``shape`` is that of its dense weight, whose columns are the most that there may be unless
    ``columns_known``, and ``fitting`` are the suffixes of those tensors whose dtype and shape are right, so that their
    values can be looked at.
    """

    def __init__(
        self, name: str, kind: str, stored: Stored, assignment: Assignment, version: str | None, notebook: Notebook
    ) -> None:
        self.name, self.kind, self.assignment, self.version = name, kind, assignment, version
        self.tensors = stored.modules[name]
        self.args: QuantizationArgs | None = None if assignment.scheme is None else assignment.scheme.weights
        self.shape: tuple[int, ...] | None = None
        self.columns_known = True
        self.layout = PackLayout.DENSE
        self.fitting: frozenset[str] = frozenset()
        self._reader, self._notebook = stored.reader, notebook

    @property
    def is_word_aligned(self) -> bool:
        """Whether its codes are in the layout of releases before 0.18."""
        return self.layout is PackLayout.WORD_ALIGNED

    def place(self, suffix: str) -> str:
        """The full name of one of its tensors."""
        return f"{self.name}.{suffix}" if self.name else suffix

    def headers(self) -> None:
        """Note what is missing, misshapen, mistyped, or too much."""
        group = f"config_groups.{self.assignment.group}" if self.assignment.group else "sparsity_config"
        if self.assignment.format not in FORMATS or (self.args is not None and self.args.scale_dtype is not None):
            message = (
                f"{self.assignment.format.value} cannot be decoded here; the tensors of its modules were not checked"
            )
            self._notebook.alike(codes.NOT_DECODED, group, message)
            return
        problems = check_runnable(self.assignment.scheme, self.assignment.format, self.assignment.sparsity, "")
        for problem in problems:
            self._notebook.alike(codes.UNSUPPORTED, group, problem.message)
        try:
            self.shape = self._found_shape()
            specs = {} if self.shape is None else self._specs(self.shape, with_activations=not problems)
        except UnsupportedFormatError as error:
            self._notebook.alike(codes.UNSUPPORTED, group, str(error))
            return
        if specs:
            self._compare(specs)

    def _compare(self, specs: Mapping[str, TensorSpec]) -> None:
        fitting = set()
        for suffix, spec in specs.items():
            found = self.tensors.get(suffix)
            if found is None:
                if suffix != "weight_g_idx":
                    message = f"is missing; the module has {', '.join(sorted(self.tensors))}"
                    self._notebook.add(codes.MISSING, self.place(suffix), message)
                continue
            dtype = torch_dtype(found.dtype)
            problem = spec.problem(dtype, found.shape)
            if problem is None:
                fitting.add(suffix)
            else:
                code = codes.SHAPE if dtype in spec.dtypes else codes.DTYPE
                self._notebook.add(code, self.place(suffix), f"{problem}; {code.way_out}")
        for suffix in self.tensors:
            if suffix in specs or suffix not in KNOWN_SUFFIXES:
                continue
            if suffix in _CACHE_OF_LINEAR and self.name.endswith(("k_proj", "v_proj")):
                continue  # scales of a cache under their name of 2024
            message = f"is none of the tensors of its scheme, which are {', '.join(specs)}; {codes.EXTRA.way_out}"
            self._notebook.add(codes.EXTRA, self.place(suffix), message)
        if "weight_g_idx" in self.tensors:
            self._notebook.alike(codes.G_IDX, self.place("weight_g_idx"), f"reorders columns; {codes.G_IDX.way_out}")
        self.fitting = frozenset(fitting)

    def _specs(self, shape: tuple[int, ...], *, with_activations: bool) -> dict[str, TensorSpec]:
        format, sparsity, matrix = self.assignment.format, self.assignment.sparsity, (shape[-2], shape[-1])
        unpacked = False
        if format is _F.PACK_QUANTIZED and self.args is not None:
            zero_point = self.tensors.get("weight_zero_point")
            packs = PackQuantized.packs_zero_points(self.args) and not self.args.symmetric
            unpacked = packs and zero_point is not None and zero_point.dtype == "int8"
            if unpacked:
                place = self.place("weight_zero_point")
                message = f"is not packed, as up to 0.9.3; {codes.UNPACKED_ZERO_POINT.way_out}"
                self._notebook.alike(codes.UNPACKED_ZERO_POINT, place, message)
            if 32 % self.args.num_bits:
                self._tell_layout(shape[-1], self.args)
        specs: dict[str, TensorSpec] = {}
        if with_activations:
            width = matrix[1] if self.kind == "Embedding" else matrix[0]
            specs |= module_tensor_specs(self.assignment.scheme, format, sparsity, matrix, width)
        specs |= weight_specs(matrix, self.args, format, sparsity, self.layout, zero_points_unpacked=unpacked)
        if "weight_g_idx" in self.tensors and self.args is not None:
            specs["weight_g_idx"] = TensorSpec((torch.int32,), (shape[-1],))
        if not self.columns_known:
            specs["weight_packed"] = TensorSpec((torch.int32,), (matrix[0], None))
        return specs

    def _tell_layout(self, columns: int, args: QuantizationArgs) -> None:
        packed = self.tensors["weight_packed"]
        if len(packed.shape) != 2 or packed.dtype != "int32":
            return
        known = columns if self.columns_known else None
        told = told_layout(packed, args.num_bits, known, self.version, self._reader)
        if told is None:
            return
        self.layout, evidence = told
        code = codes.WORD_ALIGNED if self.is_word_aligned else codes.DENSE_ODD_BITS
        message = f"{args.num_bits} bits are in the {self.layout.value} layout: {evidence}; {code.way_out}"
        self._notebook.alike(code, self.place("weight_packed"), message)

    def _found_shape(self) -> tuple[int, ...] | None:
        """The shape of the dense weight, or None after noting why it is not known."""
        if self.assignment.sparsity is not None:
            return self._sparse_shape()
        if self.assignment.format is _F.PACK_QUANTIZED and self.args is not None:
            return self._packed_shape(self.args)
        if self.assignment.format is _F.MARLIN_24 and self.args is not None:
            packed = self._matrix("weight_packed")
            return None if packed is None else (packed.shape[1] * 2 // self.args.num_bits, packed.shape[0] * 32)
        weight = self._matrix("weight")
        return None if weight is None else weight.shape

    def _matrix(self, suffix: str) -> Found | None:
        """A tensor that must be there and be a matrix, or None after noting that it is not."""
        found = self.tensors.get(suffix)
        if found is None:
            message = f"is missing; the module has {', '.join(sorted(self.tensors)) or 'no tensors'}"
            self._notebook.add(codes.MISSING, self.place(suffix), message)
        elif len(found.shape) != 2:
            message = f"has shape {list(found.shape)}, expected a matrix; {codes.SHAPE.way_out}"
            self._notebook.add(codes.SHAPE, self.place(suffix), message)
        else:
            return found
        return None

    def _packed_shape(self, args: QuantizationArgs) -> tuple[int, ...] | None:
        packed = self._matrix("weight_packed")
        if packed is None:
            return None
        rows, words = packed.shape
        bits = args.num_bits
        most = words * 32 // bits
        stored = self._read_shape("weight_shape", 2)
        if stored is not None:
            columns = stored[1]
            fits = columns > 0 or words == 0
            if fits and stored[0] == rows and words in (packed_words(columns, bits), word_aligned_words(columns, bits)):
                return rows, columns
            expected = f"{rows} rows and {words} words of {bits} bits, which are up to {most} columns"
            message = f"says {list(stored)}, and weight_packed has {expected}; {codes.STORED_SHAPE.way_out}"
            self._notebook.add(codes.STORED_SHAPE, self.place("weight_shape"), message)
        scale, g_idx = self.tensors.get("weight_scale"), self.tensors.get("weight_g_idx")
        if g_idx is not None and len(g_idx.shape) == 1:
            return rows, g_idx.shape[0]
        if args.strategy is _S.GROUP and args.group_size and scale is not None and len(scale.shape) == 2:
            columns = scale.shape[1] * args.group_size
            if words in (packed_words(columns, bits), word_aligned_words(columns, bits)):
                return rows, columns
        self.columns_known = False
        return rows, most

    def _sparse_shape(self) -> tuple[int, ...] | None:
        mask = self._matrix("bitmask")
        if mask is None:
            return None
        rows, most = mask.shape[0], mask.shape[1] * 8
        stored = self._read_shape("shape", 2)
        if stored is not None:
            if stored[0] == rows and max(most - 7, 0) <= stored[1] <= most:
                return stored[0], stored[1]
            message = f"says {list(stored)}, which the bitmask of shape {list(mask.shape)} contradicts"
            self._notebook.add(codes.STORED_SHAPE, self.place("shape"), f"{message}; {codes.STORED_SHAPE.way_out}")
        compressed = self.tensors.get("compressed")
        if compressed is not None and len(compressed.shape) == 2 and -(-compressed.shape[1] * 2 // 8) == mask.shape[1]:
            return rows, compressed.shape[1] * 2
        return rows, most

    def _read_shape(self, suffix: str, length: int) -> tuple[int, ...] | None:
        """The sizes in a tensor, if it is there, looks right and may be read; what else is wrong is told elsewhere."""
        found = self.tensors.get(suffix)
        if found is None or self._reader is None or found.dtype not in ("int64", "int32"):
            return None
        if math.prod(found.shape) != length:
            return None
        try:
            return tuple(int(size) for size in self._reader.whole(found).flatten().tolist())
        except CheckpointError as error:
            self._notebook.add_error(codes.TENSOR_UNREADABLE, error)
            return None
