"""One module: whether it can be compressed as asked, its compressed form, and the way back to a plain one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import torch
from torch import nn

from compressed_format.activations import activation_group_size
from compressed_format.compression.weights import compressed_tensors
from compressed_format.config import Assignment, CompressionFormat, QuantizationStrategy, TargetResolution
from compressed_format.errors import CompressedFormatError, Problem, QuantizationError, UnsupportedFormatError
from compressed_format.formats.module import check_runnable
from compressed_format.modules.base import CompressedModule
from compressed_format.modules.linear import CompressedEmbedding, CompressedLinear
from compressed_format.modules.offloading import is_offloaded, onloaded
from compressed_format.modules.subclasses import (
    HOOKS,
    blank_successor,
    carry_attributes,
    original_class,
    subclass_problem,
)
from compressed_format.quantization import group_size_problem, weight_scales

__all__ = [
    "check_modules",
    "compress_module",
    "compressed_successor",
    "out_features",
    "plain_module",
    "treatment",
    "value_problems",
]

_Successor = TypeVar("_Successor", bound=nn.Module)


def treatment(assignment: Assignment) -> tuple[object, ...]:
    """What of an assignment decides the tensors of the weight, whichever group and target led to it."""
    scheme = assignment.scheme
    return (None if scheme is None else scheme.weights), assignment.format, assignment.sparsity


def check_modules(modules: Mapping[str, nn.Module], resolution: TargetResolution, *, values: bool = True) -> None:
    """Raise one error that lists whatever would keep one of ``modules`` from being compressed; none is changed.

    Without ``values``, nothing is looked for in those of the weights, which may be on the meta device.

    :class:`UnsupportedFormatError` where a scheme cannot be quantized or run here, else :class:`QuantizationError`.
    Modules with the same problem are counted in one line.
    """
    unsupported: dict[str, list[str]] = defaultdict(list)
    unusable: dict[str, list[str]] = defaultdict(list)
    rehearsed: dict[tuple[object, ...], CompressedFormatError | None] = {}
    for name, module in modules.items():
        assignment = resolution.assignments[name]
        refused = check_runnable(assignment.scheme, assignment.format, assignment.sparsity, name)
        messages = [] if refused else list(_problems(name, module, assignment, values))
        if not refused and not messages:
            kind = treatment(assignment)
            if kind not in rehearsed:
                rehearsed[kind] = _rehearse(assignment)
            error = rehearsed[kind]
            if isinstance(error, UnsupportedFormatError):
                refused = list(error.problems)
            else:
                found = () if error is None else error.problems
                if error is None and values:
                    with onloaded(module, name):
                        found = value_problems(module, assignment)
                messages = [problem.message for problem in found]
        for problem in refused:
            unsupported[problem.message].append(name)
        for message in messages:
            unusable[message].append(name)
    _raise_all(UnsupportedFormatError, unsupported, len(modules))
    _raise_all(QuantizationError, unusable, len(modules))


def _raise_all(error: type[CompressedFormatError], found: Mapping[str, list[str]], total: int) -> None:
    if not found:
        return
    problems = []
    for message, names in found.items():
        counted = names[0] or "(the model)" if len(names) == 1 else f"{len(names)} modules ({names[0]}, …)"
        problems.append(Problem(counted, message))
    count = len({name for names in found.values() for name in names})
    raise error(f"{count} of {total} targeted modules cannot be compressed:", problems)


def compress_module(
    module: nn.Module, assignment: Assignment, activation_scales: Mapping[str, torch.Tensor], place: str
) -> CompressedModule:
    """A compressed module for the Linear or Embedding ``module``, with its bias, hooks and mode.

    Raises :class:`QuantizationError` or :class:`FormatError` for what :func:`check_modules` refuses.
    """
    assert isinstance(module, (nn.Linear, nn.Embedding))
    tensors = compressed_tensors(module.weight.detach(), assignment, place)
    return compressed_successor(module, {**tensors, **activation_scales}, assignment)


def compressed_successor(
    module: nn.Linear | nn.Embedding,
    tensors: Mapping[str, torch.Tensor],
    assignment: Assignment,
    weight: torch.Tensor | None = None,
) -> CompressedModule:
    """A compressed module of ``tensors`` in place of a plain one, with its bias, hooks and mode.

    ``weight`` is that of ``module``, for callers who have it: of many modules, asking for it takes long.
    """
    weight = module.weight if weight is None else weight
    sparsity, (rows, columns) = assignment.sparsity, weight.shape
    described = (tensors, (rows, columns), assignment.scheme, assignment.format)
    compressed = blank_successor(module)
    if isinstance(module, nn.Linear):
        CompressedLinear.__init__(
            cast(CompressedLinear, compressed),
            *described,
            sparsity=sparsity,
            bias=module._parameters["bias"],
            dtype=weight.dtype,
        )
    else:
        CompressedEmbedding.__init__(
            cast(CompressedEmbedding, compressed),
            *described,
            sparsity=sparsity,
            padding_idx=module.padding_idx,
            dtype=weight.dtype,
        )
    return compressed.train(module.training) if compressed._modules else compressed


def out_features(module: nn.Linear | nn.Embedding) -> int:
    """How wide the outputs of ``module`` are: a Linear has one for each row of its weight, an Embedding yields rows."""
    rows, columns = module.weight.shape
    return columns if isinstance(module, nn.Embedding) else rows


def plain_module(module: CompressedModule, weight: nn.Parameter) -> nn.Module:
    """A module of the original class with ``weight`` in place of a compressed one, with all else that it has."""
    kind = original_class(module)
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    plain._parameters["weight"] = weight
    if isinstance(module, CompressedLinear):
        plain._parameters["bias"] = module._parameters["bias"]
    carry_attributes(module, plain)
    return _succeed(module, plain)


def _succeed(module: nn.Module, successor: _Successor) -> _Successor:
    """``successor`` in the mode of ``module`` and with its very hooks, so that their handles go on working."""
    vars(successor).update({name: vars(module)[name] for name in HOOKS})
    if successor._modules or successor.training != module.training:
        successor.train(module.training)
    return successor


def _problems(name: str, module: nn.Module, assignment: Assignment, values: bool) -> Iterator[str]:
    """Why ``module`` cannot be replaced, as far as its place, class, scheme and the shape of its weight tell."""
    if not name:
        yield "cannot be replaced in place, for it is the model itself; put it into an nn.Sequential"
        return
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        yield f"{type(module).__name__} is neither torch's Linear nor its Embedding; list it in ignore"
        return
    weight = module._parameters.get("weight")
    if weight is None:
        yield (
            "its weight is no parameter, but computed (by a parametrization, weight normalisation or pruning) or gone; "
            "make it a parameter first, or list the module in ignore"
        )
    elif (values and weight.is_meta and not is_offloaded(module)) or isinstance(weight, nn.UninitializedParameter):
        yield "its weight is on the meta device or uninitialized and holds no data; load the model first"
    elif not weight.is_floating_point() or weight.element_size() < 2:
        yield f"its weight has dtype {weight.dtype}, expected a float of 16 bits or more"
    elif weight.numel() == 0:
        yield f"its weight of shape {list(weight.shape)} is empty; list it in ignore"
    else:
        problem = subclass_problem(module)
        if problem is not None:
            yield f"{problem}; list it in ignore"
        yield from _misfits(module, assignment)


def _misfits(module: nn.Linear | nn.Embedding, assignment: Assignment) -> Iterator[str]:
    """What of the scheme does not fit the shape and the kind of ``module``."""
    scheme, columns = assignment.scheme, module.weight.shape[1]
    args = None if scheme is None else scheme.weights
    group_size = args.group_size if args is not None and args.strategy is QuantizationStrategy.GROUP else None
    if group_size is not None and columns % group_size:
        yield group_size_problem(columns, group_size)
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        yield "an Embedding with max_norm rewrites its weight in forward; list it in ignore"
    inputs, outputs = (None, None) if scheme is None else (scheme.input_activations, scheme.output_activations)
    if isinstance(module, nn.Embedding) and inputs is not None:
        yield "an Embedding has indices for inputs, which cannot be quantized; give it a group of its own"
        inputs = None
    for end, activations, features in (("input", inputs, columns), ("output", outputs, out_features(module))):
        size = 0 if activations is None else activation_group_size(activations)
        if size > 0 and features % size:
            yield (
                f"group_size {size} of its {end}_activations does not divide its {features} {end} features; "
                "choose another, or list the module in ignore"
            )
    if assignment.sparsity is not None:
        problem = _cannot_be_sparse(assignment, assignment.sparsity, columns)
        if problem is not None:
            yield problem


def _cannot_be_sparse(assignment: Assignment, sparsity: CompressionFormat, columns: int) -> str | None:
    args = None if assignment.scheme is None else assignment.scheme.weights
    if sparsity is CompressionFormat.SPARSE_24_BITMASK and columns % 4:
        return f"2:4 sparsity needs a multiple of 4 input features, found {columns}"
    if assignment.format is CompressionFormat.PACK_QUANTIZED:
        return (
            f"{sparsity.value} holds int8, float8 or plain values, which pack-quantized has none of; "
            "use int-quantized, float-quantized or dense with it"
        )
    if args is not None and not args.symmetric:
        return f"{sparsity.value} leaves out values of zero, which asymmetric codes do not keep; use symmetric weights"
    return None


def _rehearse(assignment: Assignment) -> CompressedFormatError | None:
    """What goes wrong with any weight at all: observers that there are not, formats that are not written."""
    args = None if assignment.scheme is None else assignment.scheme.weights
    size = args.group_size if args is not None and args.strategy is QuantizationStrategy.GROUP else None
    columns = math.lcm(4, size or 1)
    layer = nn.Linear(columns, 4, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(4, columns, device="cpu"))
    try:
        compress_module(layer, assignment, {}, "")
    except CompressedFormatError as error:
        problems = [Problem("", problem.message) for problem in error.problems]
        return type(error)(problems=problems or [Problem("", error.message)])
    return None


def value_problems(module: nn.Module, assignment: Assignment) -> tuple[Problem, ...]:
    """NaN, infinity and ranges that the dtype cannot hold. It takes one pass and no memory to see that all is well."""
    assert isinstance(module, (nn.Linear, nn.Embedding))
    weight = module.weight.detach()
    extremes = torch.stack(torch.aminmax(weight))
    if torch.isfinite(extremes * 2).all():
        return ()
    if assignment.scheme is not None and assignment.scheme.weights is not None:
        try:
            weight_scales(weight, assignment.scheme.weights)
        except QuantizationError as error:
            return tuple(Problem("", f"its weight {problem.message}") for problem in error.problems)
    elif not torch.isfinite(extremes).all():
        index = (~torch.isfinite(weight)).nonzero()[0].tolist()
        value = weight[tuple(index)].item()
        return (Problem("", f"its weight holds {value} at index {index}, expected finite values"),)
    return ()
