"""One module of a checkpoint: which tensors it has, and its weight, whole or in part, read when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compressed_format.checkpoint.header import TensorSpec
from compressed_format.config import Assignment, QuantizationStrategy
from compressed_format.errors import FormatError, Problem

if TYPE_CHECKING:
    import torch

    from compressed_format.quantization import QuantizedWeight
    from compressed_format.reading.layout import Part, Range, WeightLayout

__all__ = ["StoredModule"]


class StoredModule:
    """What a checkpoint holds of the module ``name``.

    ``tensors`` describes its tensors by suffix (``weight_packed``, ``bias``, …), ``kind`` is the class that its name
    suggests (``"Linear"``, ``"Embedding"``, None for anything else), and ``assignment`` says how it is compressed:
    None where it is not.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, TensorSpec],
        kind: str | None,
        assignment: Assignment | None,
        version: str | None,
        read: Callable[[str], Any],
        read_torch: Callable[[str], torch.Tensor],
    ) -> None:
        self.name, self.tensors, self.kind, self.assignment = name, tensors, kind, assignment
        self._version, self._read, self._read_torch = version, read, read_torch

    def __repr__(self) -> str:
        how = "not compressed" if self.assignment is None else self.assignment.format.value
        return f"StoredModule({self.name!r}, {how}, {len(self.tensors)} tensors)"

    @property
    def nbytes(self) -> int:
        """How many bytes its tensors take in the file."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the dense weight; None for a module without a weight.

        Reads ``weight_shape``, where there is one. Raises :class:`FormatError` for one that contradicts other tensors.
        """
        if self.assignment is not None:
            return self.layout.shape
        return self.tensors["weight"].shape if "weight" in self.tensors else None

    @cached_property
    def layout(self) -> WeightLayout:
        """How the weight is stored. Raises :class:`FormatError` if it is not compressed, or contradicts itself."""
        from compressed_format.reading.stored_layout import layout_of

        if self.assignment is None:
            message = "is not compressed, as far as the config tells; dense() and raw() read it"
            raise FormatError(problems=[Problem(self.name, message)])
        return layout_of(self.name, self.tensors, self.assignment, self._version, self._tensor)

    def raw(self) -> dict[str, Any]:
        """The tensors as they are stored, by suffix: of torch, or of numpy, as the checkpoint was opened for."""
        return {suffix: self._read(self._full(suffix)) for suffix in self.tensors}

    def quantized(self, *, rows: Range | None = None, groups: Range | None = None) -> QuantizedWeight:
        """Codes and scales of the weight, or of a part of it; nothing else of the file is read.

        ``rows`` and ``groups`` are each the first one and the one after the last: of output features, and of the groups
        or blocks of input features that share a scale. Raises :class:`FormatError` for what cannot be cut out, and for
        tensors that contradict their format.
        """
        part = self._part(rows, groups)
        tensors, wide = self._tensors_around(part)
        quantized = self.layout.decode(tensors, _size(wide))
        return self.layout.cropped(quantized, wide, part)

    def dense(
        self, *, rows: Range | None = None, groups: Range | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The dense weight, or a part of it as in :meth:`quantized`, in the dtype of its scale unless told otherwise.

        That of a module that is not compressed is the stored tensor, of which ``rows`` may be a part.
        """
        if self.assignment is None:
            return self._stored_dense(rows, groups, dtype)
        part = self._part(rows, groups)
        tensors, wide = self._tensors_around(part)
        dense = self.layout.dense(tensors, _size(wide), dtype)
        (first, last), (left, right) = part
        top, start = wide[0][0], wide[1][0]
        return dense[first - top : last - top, left - start : right - start]

    def _stored_dense(self, rows: Range | None, groups: Range | None, dtype: torch.dtype | None) -> torch.Tensor:
        if "weight" not in self.tensors or groups is not None:
            message = "has no weight" if groups is None else "is not compressed and has no groups; give rows"
            raise FormatError(problems=[Problem(self.name, message)])
        weight = self._tensor("weight")
        if rows is not None:
            first, last = rows
            if weight.ndim == 0 or not 0 <= first <= last <= weight.shape[0]:
                message = f"has shape {list(weight.shape)}, and rows {first} to {last} were asked for"
                raise FormatError(problems=[Problem(self.name, message)])
            weight = weight[first:last]
        return weight if dtype is None else weight.to(dtype)

    def _part(self, rows: Range | None, groups: Range | None) -> Part:
        """Rows and columns that were asked for."""
        from compressed_format.blocks import block_shape

        layout = self.layout
        part = rows if rows is not None else (0, layout.shape[0])
        if groups is None:
            return part, (0, layout.shape[1])
        args = layout.args
        if args is None or args.strategy not in (QuantizationStrategy.GROUP, QuantizationStrategy.BLOCK):
            strategy = "dense" if args is None else args.strategy.value
            message = f"has no groups of columns, its strategy being {strategy}; give rows"
            raise FormatError(problems=[Problem(self.name, message)])
        if "weight_g_idx" in self.tensors:
            message = (
                "the columns of its groups are scattered (weight_g_idx), so that no range of them is one of groups"
            )
            raise FormatError(problems=[Problem(self.name, message)])
        size = max(block_shape(args, layout.shape)[1], 1)
        count = -(-layout.shape[1] // size)
        if not 0 <= groups[0] <= groups[1] <= count:
            message = f"has {count} groups, and {groups[0]} to {groups[1]} were asked for"
            raise FormatError(problems=[Problem(self.name, message)])
        return part, (min(groups[0] * size, layout.shape[1]), min(groups[1] * size, layout.shape[1]))

    def _tensors_around(self, part: Part) -> tuple[dict[str, torch.Tensor], Part]:
        """The tensors of the smallest part around ``part`` that can be cut out, and which one that is."""
        layout = self.layout
        rows, columns = layout.widened(part[0], 0), layout.widened(part[1], 1)
        row_parts, column_parts = layout.rows_of_tensors(rows), layout.columns_of_tensors(columns)
        tensors = {}
        for suffix in sorted(layout.suffixes):
            tensor = self._tensor(suffix)
            of_rows, of_columns = row_parts[suffix], column_parts[suffix]
            if of_rows is not None:
                tensor = tensor[of_rows[0] : of_rows[1]]
            if of_columns is not None:
                tensor = tensor[..., of_columns[0] : of_columns[1]]
            tensors[suffix] = tensor
        layout.cut_values(tensors, rows, lambda first, last: self._tensor("compressed")[max(first, 0) : max(last, 0)])
        return tensors, (rows, columns)

    def _tensor(self, suffix: str) -> torch.Tensor:
        return self._read_torch(self._full(suffix))

    def _full(self, suffix: str) -> str:
        return f"{self.name}.{suffix}" if self.name else suffix


def _size(part: Part) -> tuple[int, int]:
    (top, bottom), (left, right) = part
    return bottom - top, right - left
