"""Whether what a checkpoint holds for a module is what its scheme asks for, as far as headers tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from compressed_format.config import Assignment, CompressionFormat
from compressed_format.dtypes import DTYPES, torch_dtype
from compressed_format.errors import Problem
from compressed_format.formats import PackQuantized, TensorSpec
from compressed_format.formats.base import StoredTensor
from compressed_format.formats.module import module_tensor_specs

__all__ = ["Fit", "FitTable", "dtype_misfit", "meta_tensor"]

_ZERO_POINT_SUFFIXES = frozenset({"weight_zero_point", "input_zero_point", "output_zero_point"})


class Fit(NamedTuple):
    """The tensors of a checkpoint that a module takes, by suffix; those it can do without; and what is wrong."""

    tensors: dict[str, StoredTensor]
    needless: frozenset[str]
    problems: list[Problem]


class FitTable:
    """Compares what is stored for modules with what they need; what is alike in many modules, once."""

    def __init__(self) -> None:
        # Which tensors fit, and which are needless, where all is well: problems name the module.
        self._known: dict[tuple[object, ...], tuple[tuple[str, ...], frozenset[str]]] = {}
        self._assignments: dict[int, Assignment] = {}

    def fit(
        self,
        name: str,
        assignment: Assignment,
        stored: Mapping[str, StoredTensor],
        shape: tuple[int, int],
        out_features: int,
    ) -> Fit:
        """What is ``stored`` for the module ``name``, for a weight of ``shape`` ``[O, I]`` as ``assignment`` says."""
        # An assignment goes by its identity, as comparing schemes takes long; it is kept, so that no other one gets it.
        self._assignments[id(assignment)] = assignment
        described = [(suffix, tensor.dtype, tensor.shape) for suffix, tensor in stored.items()]
        kind = (id(assignment), shape, out_features, *described)
        known = self._known.get(kind)
        if known is not None:
            suffixes, needless = known
            return Fit({suffix: stored[suffix] for suffix in suffixes}, needless, [])
        fit = _fit_module(name, assignment, stored, shape, out_features)
        if not fit.problems:
            self._known[kind] = tuple(fit.tensors), fit.needless
        return fit


def _fit_module(
    name: str, assignment: Assignment, stored: Mapping[str, StoredTensor], shape: tuple[int, int], out_features: int
) -> Fit:
    """Compare what is ``stored`` for the module ``name`` with what it needs for a weight of ``shape`` ``[O, I]``."""
    specs = module_tensor_specs(assignment.scheme, assignment.format, assignment.sparsity, shape, out_features)
    tensors = {}
    problems = []
    for suffix, spec in specs.items():
        tensor = stored.get(suffix)
        if tensor is None:
            if suffix != "weight_g_idx":
                problems.append(Problem(f"{name}.{suffix}", f"is missing from the checkpoint ({assignment.reason})"))
            continue
        found = _problem(suffix, spec, tensor, assignment, shape)
        if found is not None:
            problems.append(Problem(f"{name}.{suffix}", found))
        tensors[suffix] = tensor
    weight = stored.get("weight")
    stored_dense = weight is not None and DTYPES[weight.dtype].bits > 8
    if problems and stored_dense and assignment.format is not CompressionFormat.DENSE:
        message = f"is stored dense, but {assignment.reason}; list {name} in ignore"
        problems = [Problem(f"{name}.weight", message)]
    # Old releases stored the zero points of symmetric schemes too; they mean nothing, for they are all zero.
    return Fit(tensors, frozenset(stored.keys() & _ZERO_POINT_SUFFIXES - specs.keys()), problems)


def meta_tensor(tensor: StoredTensor) -> torch.Tensor:
    """A tensor of the same dtype and shape, without values."""
    return torch.empty(tuple(tensor.shape), dtype=torch_dtype(tensor.dtype), device="meta")


def dtype_misfit(stored: StoredTensor, expected: torch.dtype) -> str | None:
    """Why an uncompressed tensor cannot have been stored for one of the dtype ``expected``, or None.

    Any float of 16 bits and more will do for another; a narrower one has lost its scale.
    """
    found = torch_dtype(stored.dtype)
    wide = found.is_floating_point and found.itemsize >= 2
    if found == expected or (wide and expected.is_floating_point and expected.itemsize >= 2):
        return None
    return f"has dtype {stored.dtype} in the checkpoint, expected {str(expected).removeprefix('torch.')}"


def _problem(
    suffix: str, spec: TensorSpec, tensor: StoredTensor, assignment: Assignment, shape: tuple[int, int]
) -> str | None:
    message = spec.problem(torch_dtype(tensor.dtype), tuple(tensor.shape))
    scheme = assignment.scheme
    packed = assignment.format is CompressionFormat.PACK_QUANTIZED and suffix in ("weight_packed", "weight_zero_point")
    if message is None or not packed or scheme is None or scheme.weights is None:
        return message
    older = PackQuantized.legacy_specs(shape, scheme.weights)[suffix]
    fits_older = any(spec.problem(torch_dtype(tensor.dtype), tuple(tensor.shape)) is None for spec in older)
    return None if fits_older else message
