"""``sparse-24-bitmask`` and ``sparse-bitmask``: the non-zero values of a weight, and a bit for each place.

A sparsity format lies on top of another format: it replaces that format's tensor ``weight`` (dense values, or int8 or
float8_e4m3fn codes) and leaves scales alone. Its tensors lose the ``weight``: ``<module>.compressed`` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressed_format import ops
from compressed_format.config import CompressionFormat
from compressed_format.errors import FormatError, Problem
from compressed_format.formats.base import FLOAT_DTYPES, TensorSpec, check_tensors

__all__ = ["Sparse24Bitmask", "SparseBitmask", "prune_2_of_4"]

_VALUE_DTYPES = (*FLOAT_DTYPES, torch.int8, torch.float8_e4m3fn)


class SparseBitmask:
    """``shape`` int64 ``[2]``, ``compressed`` ``[non-zeros]`` row-major, ``bitmask`` uint8 ``[O, ceil(I/8)]``,
    ``row_offsets`` int64 ``[O]``: where each row starts in ``compressed``."""

    name = CompressionFormat.SPARSE_BITMASK

    def tensor_specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors of a weight of ``shape`` ``[O, I]``; how many values are not zero depends on the data."""
        rows, columns = shape
        return {
            "shape": TensorSpec((torch.int64,), (2,)),
            "compressed": TensorSpec(_VALUE_DTYPES, (None,)),
            "bitmask": TensorSpec((torch.uint8,), (rows, -(-columns // 8))),
            "row_offsets": TensorSpec((torch.int64,), (rows,)),
        }

    def encode(self, weight: torch.Tensor, *, place: str = "") -> dict[str, torch.Tensor]:
        """The tensors that hold the values or codes ``weight`` ``[O, I]``."""
        _check_matrix(weight, place)
        compressed, bitmask, row_offsets = ops.compress_bitmask(weight)
        return {
            "shape": torch.tensor(weight.shape, dtype=torch.int64, device=weight.device),
            "compressed": compressed,
            "bitmask": bitmask,
            "row_offsets": row_offsets,
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], *, place: str = "") -> torch.Tensor:
        """The values or codes ``[O, I]``. Raises :class:`FormatError` if the tensors contradict each other."""
        _, columns = self.check(tensors, place=place)
        return ops.expand_bitmask(tensors["compressed"], tensors["bitmask"], columns)

    def check(self, tensors: Mapping[str, torch.Tensor], *, place: str = "") -> tuple[int, int]:
        """The shape of the weight, after all checks of :meth:`decode`; the values are not read."""
        shape = _stored_shape(tensors, place, (2,))
        check_tensors(tensors, self.tensor_specs(shape), place)
        counts = _counts_of_values(tensors, shape, place)
        if not torch.equal(tensors["row_offsets"], counts.cumsum(0) - counts):
            raise FormatError(problems=[Problem(f"{place}.row_offsets", "contradicts the bitmask")])
        return shape


class Sparse24Bitmask:
    """``shape`` int64 ``[2, 1]``, ``compressed`` ``[O, I/2]``, ``bitmask`` uint8 ``[O, ceil(I/8)]`` with exactly two
    bits in each group of four columns."""

    name = CompressionFormat.SPARSE_24_BITMASK

    def tensor_specs(self, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors of a weight of ``shape`` ``[O, I]``."""
        rows, columns = shape
        return {
            "shape": TensorSpec((torch.int64,), (2, 1)),
            "compressed": TensorSpec(_VALUE_DTYPES, (rows, columns // 2)),
            "bitmask": TensorSpec((torch.uint8,), (rows, -(-columns // 8))),
        }

    def encode(self, weight: torch.Tensor, *, place: str = "") -> dict[str, torch.Tensor]:
        """The tensors that hold the values or codes ``weight`` ``[O, I]``, which must be 2:4.

        Raises :class:`FormatError` that names the first row and column where a third value is not zero.
        """
        _check_matrix(weight, place)
        _check_quads(weight, place)
        compressed, bitmask, crowded = ops.compress_2_of_4(weight)
        if crowded >= 0:
            row, column = divmod(int(crowded), weight.shape[1])
            message = (
                f"is not 2:4: more than two of the four values from row {row}, column {column} on are not zero; "
                "prune it first"
            )
            raise FormatError(problems=[Problem(place, message)])
        return {
            "shape": torch.tensor(weight.shape, dtype=torch.int64, device=weight.device).unsqueeze(-1),
            "compressed": compressed,
            "bitmask": bitmask,
        }

    def decode(self, tensors: Mapping[str, torch.Tensor], *, place: str = "") -> torch.Tensor:
        """The values or codes ``[O, I]``. Raises :class:`FormatError` if the bitmask is not 2:4."""
        _, columns = self.check(tensors, place=place)
        return ops.expand_bitmask(tensors["compressed"], tensors["bitmask"], columns)

    def check(self, tensors: Mapping[str, torch.Tensor], *, place: str = "") -> tuple[int, int]:
        """The shape of the weight, after all checks of :meth:`decode`; the values are not read."""
        shape = _stored_shape(tensors, place, (2, 1))
        check_tensors(tensors, self.tensor_specs(shape), place)
        _counts_of_values(tensors, shape, place)
        if shape[1] % 4 == 0 and (quad := int(ops.find_uneven_quad(tensors["bitmask"], shape[1]))) >= 0:
            row, column = divmod(4 * quad, shape[1])
            message = f"does not have two bits for row {row}, columns {column} to {column + 3}"
            raise FormatError(problems=[Problem(f"{place}.bitmask", message)])
        return shape


def prune_2_of_4(weight: torch.Tensor, *, place: str = "weight") -> torch.Tensor:
    """``weight`` ``[O, I]`` with the two smaller magnitudes of each four columns set to zero; ties keep the left."""
    _check_quads(weight, place)
    return ops.prune_2_of_4(weight)


def _check_matrix(weight: torch.Tensor, place: str) -> None:
    if weight.ndim != 2:
        message = f"has shape {list(weight.shape)}; sparse formats hold matrices only"
        raise FormatError(problems=[Problem(place, message)])


def _check_quads(weight: torch.Tensor, place: str) -> None:
    if weight.shape[-1] % 4:
        message = f"has {weight.shape[-1]} columns, which is no multiple of 4 and cannot be 2:4"
        raise FormatError(problems=[Problem(place, message)])


def _stored_shape(tensors: Mapping[str, torch.Tensor], place: str, expected: tuple[int, ...]) -> tuple[int, int]:
    shape = tensors.get("shape")
    if shape is None or shape.dtype != torch.int64 or tuple(shape.shape) != expected:
        found = "is missing" if shape is None else f"has dtype {shape.dtype} and shape {list(shape.shape)}"
        raise FormatError(problems=[Problem(f"{place}.shape", f"{found}, expected int64 {list(expected)}")])
    rows, columns = (int(size) for size in shape.flatten().tolist())
    if rows < 0 or columns < 0:
        raise FormatError(problems=[Problem(f"{place}.shape", f"says [{rows}, {columns}], which no weight has")])
    return rows, columns


def _counts_of_values(tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], place: str) -> torch.Tensor:
    """How many values each row has ``[O]``."""
    counts = ops.count_bits(tensors["bitmask"], shape[1])
    values, bits = tensors["compressed"].numel(), int(counts.sum())
    if values != bits:
        raise FormatError(
            problems=[Problem(f"{place}.bitmask", f"has {bits} bits set for the {values} values of compressed")]
        )
    return counts
