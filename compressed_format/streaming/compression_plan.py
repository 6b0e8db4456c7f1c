"""What becomes of one weight, found from its header: its tensors, and the work, before a byte is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import torch
from frozendict import frozendict
from torch import nn

from compressed_format.calibrate import needs_calibration
from compressed_format.compression.modules import check_modules
from compressed_format.compression.weights import compressed_tensors
from compressed_format.config import (
    Assignment,
    CompressionFormat,
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
    TargetResolution,
)
from compressed_format.dtypes import torch_dtype
from compressed_format.errors import CalibrationError, Problem
from compressed_format.reading.layout import Range, WeightLayout, weight_specs
from compressed_format.streaming.outputs import OutputTensor
from compressed_format.streaming.units import CompressRows, CopyRows, Placement, Task, count_values, unit_ranges
from compressed_format.streaming.weights import SourceWeight

__all__ = ["Count", "PlannedWeight", "check_weights", "plan_weight", "with_counts"]


@dataclass(frozen=True)
class PlannedWeight:
    """A weight that is compressed, or is one of several that are stored together and must be written apart."""

    weight: SourceWeight
    assignment: Assignment | None
    layout: WeightLayout | None
    dtypes: Mapping[str, str]
    device: str | None = None
    counts: tuple[int, ...] = ()
    """For sparse-bitmask: how many values each of :meth:`ranges` has."""

    def outputs(self) -> list[OutputTensor]:
        """The tensors of the destination."""
        module = self.weight.module
        if self.layout is None:
            return [OutputTensor(f"{module}.weight", self.weight.matrix.stored.dtype, self.weight.matrix.shape)]
        found = []
        for suffix, spec in self.layout.specs().items():
            shape = tuple(sum(self.counts) if size is None else size for size in spec.shape)
            found.append(OutputTensor(f"{module}.{suffix}", self.dtypes[suffix], shape))
        return found

    def tasks(self, places: Mapping[str, Placement]) -> list[Task]:
        """The work, given where each tensor goes."""
        module, matrix = self.weight.module, self.weight.matrix
        if self.layout is None or self.assignment is None:
            return [CopyRows(matrix, rows, places[f"{module}.weight"]) for rows in self.ranges()]
        to = frozendict({suffix: places[f"{module}.{suffix}"] for suffix in self.layout.specs()})
        tasks: list[Task] = []
        before = 0
        for number, rows in enumerate(self.ranges()):
            tasks.append(CompressRows(matrix, rows, self.assignment, self.layout, to, before, self.device))
            before += self.counts[number] if self.counts else 0
        return tasks

    def ranges(self) -> list[Range]:
        """The rows of each unit: all of them where the scale is of them all, or they cannot be read apart."""
        matrix, layout = self.weight.matrix, self.layout
        rows = matrix.rows
        args = None if layout is None else layout.args
        whole = args is not None and args.strategy is QuantizationStrategy.TENSOR
        if whole or not matrix.can_be_split:
            return [(0, rows)]
        step = 1 if layout is None else layout.row_step
        return unit_ranges(rows, matrix.nbytes // max(rows, 1), step, self.device) or [(0, 0)]


@dataclass(frozen=True)
class Count:
    """Counts the values of some rows that are not zero once they are compressed; picklable."""

    planned: PlannedWeight
    rows: Range

    def run(self) -> int:
        """The count. Raises as compressing the rows does."""
        planned = self.planned
        assert planned.layout is not None
        assert planned.assignment is not None
        planned.weight.matrix.stored.file.check()
        return count_values(planned.weight.matrix, self.rows, planned.assignment, planned.layout, planned.device)


def plan_weight(weight: SourceWeight, assignment: Assignment | None, device: str | None) -> PlannedWeight:
    """What becomes of ``weight``, but for what only its values tell (see :func:`with_counts`)."""
    if assignment is None:
        return PlannedWeight(weight, None, None, frozendict(), device)
    args = None if assignment.scheme is None else assignment.scheme.weights
    shape = weight.matrix.shape
    suffixes = frozenset(weight_specs(shape, args, assignment.format, assignment.sparsity))
    layout = WeightLayout(weight.module, shape, args, assignment.format, assignment.sparsity, suffixes)
    dtypes = _stored_dtypes(_Likeness.of(assignment), weight.matrix.stored.dtype)
    return PlannedWeight(weight, assignment, layout, dtypes, device)


def with_counts(
    weights: Sequence[PlannedWeight], run: Callable[[Sequence[Count]], Sequence[int]]
) -> list[PlannedWeight]:
    """``weights`` with the counts that the sizes of their tensors depend on, where they do; all counted by one call."""
    counts = [
        [Count(weight, rows) for rows in weight.ranges()]
        if weight.layout is not None and weight.layout.sparsity is CompressionFormat.SPARSE_BITMASK
        else []
        for weight in weights
    ]
    found = iter(run([count for of_weight in counts for count in of_weight]))
    return [
        replace(weight, counts=tuple(islice(found, len(of_weight))))
        for weight, of_weight in zip(weights, counts, strict=True)
    ]


def check_weights(weights: Mapping[str, SourceWeight], resolution: TargetResolution) -> None:
    """Raise one error that lists whatever would keep a weight from being compressed, as far as headers tell.

    :class:`CalibrationError` for static scales of activations, which only a model that runs can give; else as
    :func:`~compressed_format.compression.modules.check_modules`.
    """
    static = [
        Problem(name, f"has static activation scales ({assignment.reason})")
        for name, assignment in resolution.assignments.items()
        if assignment.scheme is not None and needs_calibration(assignment.scheme)
    ]
    if static:
        raise CalibrationError(
            "static activation scales come from data that runs through the model: use compress(model, config, "
            "calibration=…) and save_compressed, or make the activations dynamic",
            static[:1] if len(static) > 3 else static,
        )
    # Modules of the same kind and shape are as one: only these matter here.
    blanks: dict[tuple[str, str, tuple[int, int]], nn.Module] = {}
    modules = {}
    for name in resolution.assignments:
        if name in weights:
            matrix = weights[name].matrix
            key = weights[name].kind, matrix.stored.dtype, matrix.shape
            if key not in blanks:
                blanks[key] = _blank(*key)
            modules[name] = blanks[key]
    check_modules(modules, resolution, values=False)


def _blank(kind: str, dtype: str, shape: tuple[int, int]) -> nn.Module:
    weight = torch.empty(shape, dtype=torch_dtype(dtype), device="meta")
    if kind == "Embedding":
        return nn.Embedding(*shape, _weight=weight)
    linear = nn.Linear(1, 1, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.in_features, linear.out_features = shape[1], shape[0]
    return linear


@dataclass(frozen=True)
class _Likeness:
    """What of an assignment decides the dtypes of its tensors."""

    args: QuantizationArgs | None
    format: CompressionFormat
    sparsity: CompressionFormat | None

    @classmethod
    def of(cls, assignment: Assignment) -> _Likeness:
        args = None if assignment.scheme is None else assignment.scheme.weights
        return cls(args, assignment.format, assignment.sparsity)


@lru_cache(maxsize=256)
def _stored_dtypes(like: _Likeness, dtype: str) -> frozendict[str, str]:
    """The dtype of each tensor of a weight of ``dtype``: that of a tiny one."""
    scheme = None
    args = like.args
    if args is not None:
        scheme = QuantizationScheme(targets=("Linear",), weights=args)
    size = args.group_size if args is not None and args.strategy is QuantizationStrategy.GROUP else None
    tiny = torch.zeros(4, math.lcm(8, size or 1), dtype=torch_dtype(dtype))
    assignment = Assignment(None, scheme, "", "", like.format, like.sparsity)
    found = compressed_tensors(tiny, assignment, "")
    return frozendict({suffix: str(tensor.dtype).removeprefix("torch.") for suffix, tensor in found.items()})
