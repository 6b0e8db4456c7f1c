"""Tensor parallelism on ``torch.distributed.tensor``: weights split between processes, each computing on its part.

:func:`parallelize_module` takes the plans of ``torch.distributed.tensor.parallel``, with torch's own styles, for models
whose modules are compressed or not. The tensors of a split module are ``DTensor``; they stay packed. Results are those
of the unsplit module, but for the order in which partial sums are added.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, parallel

from compressed_format.errors import Problem, UnsupportedFormatError
from compressed_format.modules.base import CompressedModule
from compressed_format.modules.linear import CompressedEmbedding, CompressedLinear
from compressed_format.parallel.split_weight import Sharding, plan_of, shard_module

__all__ = ["ColwiseParallel", "Layouts", "RowwiseParallel", "add_layout_hooks", "parallelize_module"]


@dataclass(frozen=True)
class Layouts:
    """What a split module is given and gives, as the styles of ``torch.distributed.tensor.parallel`` say it."""

    input: Placement
    output: Placement
    use_local_output: bool = True


def add_layout_hooks(module: CompressedModule, mesh: DeviceMesh, layouts: Layouts) -> None:
    """Make a split ``module`` take inputs and give outputs in ``layouts``."""
    sharding = module._sharding
    assert isinstance(sharding, Sharding)
    of_linear, by_rows = isinstance(module, nn.Linear), sharding.plan.dim == 0
    wanted: Placement = Shard(-1) if of_linear and not by_rows else Replicate()
    # A forward that does more than these computes on plain tensors.
    plain = type(module).forward not in (CompressedLinear.forward, CompressedEmbedding.forward)

    def prepare_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        input: Any = inputs[0]
        if not isinstance(input, DTensor):
            input = DTensor.from_local(input, mesh, [layouts.input], run_check=False)
        if plain:
            input = input.redistribute(placements=[wanted]).to_local()
        return (input, *inputs[1:])

    def prepare_output(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> torch.Tensor:
        if not isinstance(output, DTensor):
            output = (
                sharding.split_outputs(output)
                if by_rows == of_linear
                else DTensor.from_local(output, mesh, [Replicate()], run_check=False)
            )
        if tuple(output.placements) != (_positive(layouts.output, output.ndim),):
            output = output.redistribute(placements=[layouts.output])
        return cast(torch.Tensor, output.to_local() if layouts.use_local_output else output)

    module.register_forward_pre_hook(prepare_input)
    module.register_forward_hook(prepare_output)


class ColwiseParallel(parallel.ColwiseParallel):
    """torch's own style, which also splits compressed modules: the outputs of a Linear, the columns of an Embedding."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _apply(self, module, device_mesh) or super()._apply(module, device_mesh)


class RowwiseParallel(parallel.RowwiseParallel):
    """torch's own style, which also splits compressed modules: the inputs of a Linear, the rows of an Embedding."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return _apply(self, module, device_mesh) or super()._apply(module, device_mesh)


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh,
    parallelize_plan: parallel.ParallelStyle | Mapping[str, parallel.ParallelStyle],
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """As ``torch.distributed.tensor.parallel.parallelize_module``, for models with compressed modules.

    torch's ``ColwiseParallel`` and ``RowwiseParallel`` may be used as they are. Nothing is split before all compressed
    modules that the plan reaches are known to allow it.

    Raises :class:`UnsupportedFormatError` that lists every module which cannot be split so, with the parallel sizes
    that work, or which has another style.
    """
    names = {part: name for name, part in module.named_modules()}
    problems: list[Problem] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the second pass warns
        _parallelize(module, device_mesh, parallelize_plan, lambda style: _Check(style, names, problems), None)
    if problems:
        raise UnsupportedFormatError("the model cannot be split like this:", problems)
    return _parallelize(module, device_mesh, parallelize_plan, _Serve, src_data_rank)


def _parallelize(module: nn.Module, mesh: DeviceMesh, plan: Any, wrap: Any, src_data_rank: int | None) -> nn.Module:
    wrapped = {name: wrap(style) for name, style in plan.items()} if isinstance(plan, Mapping) else wrap(plan)
    return parallel.parallelize_module(module, mesh, wrapped, src_data_rank=src_data_rank)


class _Check(parallel.ParallelStyle):
    """Collects what hinders the compressed modules that a style is applied to, and changes nothing."""

    def __init__(self, style: parallel.ParallelStyle, names: Mapping[nn.Module, str], problems: list[Problem]) -> None:
        self.style, self.names, self.problems = style, names, problems

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, CompressedModule):
            place = self.names[module]
            dim = _dimension(self.style, module)
            if dim is None:
                if type(self.style).__name__ not in _PREPARE_ONLY:
                    message = f"is compressed, and cannot be split by {type(self.style).__name__}"
                    self.problems.append(Problem(place, message))
            else:
                try:
                    plan_of(module, dim, device_mesh.size(), place)
                except UnsupportedFormatError as error:
                    self.problems.extend(error.problems)
        return module


# Styles that look after inputs and outputs, and leave parameters alone.
_PREPARE_ONLY = frozenset({"PrepareModuleInput", "PrepareModuleInputOutput", "PrepareModuleOutput"})


class _Serve(parallel.ParallelStyle):
    """A style of torch that splits compressed modules too."""

    def __init__(self, style: parallel.ParallelStyle) -> None:
        self.style = style

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.style.src_data_rank = self.src_data_rank
        return _apply(self.style, module, device_mesh) or self.style._apply(module, device_mesh)


def _apply(style: parallel.ParallelStyle, module: nn.Module, mesh: DeviceMesh) -> nn.Module | None:
    """Split a compressed ``module`` by a style of torch; None for other modules and styles."""
    dim = _dimension(style, module)
    if dim is None:
        return None
    known = cast(Any, style)
    layouts = Layouts(known.input_layouts[0], known.output_layouts[0], known.use_local_output)
    assert isinstance(module, CompressedModule)  # or there would be no dimension
    shard_module(module, mesh, dim, src_data_rank=style.src_data_rank)
    add_layout_hooks(module, mesh, layouts)
    return module


def _dimension(style: parallel.ParallelStyle, module: nn.Module) -> int | None:
    """The dimension of a compressed module's weight that a style splits."""
    if not isinstance(module, (CompressedLinear, CompressedEmbedding)):
        return None
    embedding = isinstance(module, nn.Embedding)
    if isinstance(style, parallel.ColwiseParallel):
        return 1 if embedding else 0
    if isinstance(style, parallel.RowwiseParallel):
        return 0 if embedding else 1
    return None


def _positive(placement: Placement, ndim: int) -> Placement:
    if isinstance(placement, Shard) and placement.dim < 0:
        return Shard(placement.dim + ndim)
    return placement
