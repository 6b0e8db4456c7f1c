"""A compressed weight that is split between processes, each of which computes on its part of the packed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from compressed_format import ops
from compressed_format.activations import WHOLE_TENSOR, WHOLE_TOKEN, activation_scale
from compressed_format.errors import FormatError, Problem, UnsupportedFormatError
from compressed_format.formats import SPARSITY_FORMATS, PackLayout, pack_layout
from compressed_format.formats.base import check_scales, decode_g_idx
from compressed_format.modules.base import CompressedModule
from compressed_format.parallel.sharding import ShardPlan, plan_sharding

__all__ = ["Sharding", "plan_of", "shard_module", "shard_tensor"]

_ONE_PROCESS = "load the checkpoint in one process, which re-encodes it, and save it again"


@dataclass(frozen=True)
class Sharding:
    """How the weight of a module is split over ``mesh``, and how the module computes on its part of it.

    Inputs and outputs may be ``DTensor`` or the plain local part of one. A Linear with split rows takes a replicated
    input, and its output is split along the last dimension; with split columns the input is split along the last
    dimension, and the partial outputs are summed, by the time somebody looks at a plain one. An Embedding takes
    replicated indices; split columns make split outputs, split rows make partial ones.
    """

    plan: ShardPlan
    mesh: DeviceMesh

    def linear(self, module: CompressedModule, input: torch.Tensor) -> torch.Tensor:
        """``input`` ``[..., in_features]``, or the local columns of it, to ``[..., out_features]`` likewise."""
        by_rows = self.plan.dim == 0
        local = self._local_input(input, Replicate() if by_rows else Shard(input.ndim - 1))
        tensors = local_tensors(module)
        if module._input is not None:
            local = self._fake_quantize(local, module._input, tensors, "input", split=not by_rows)
        bias = tensors.get("bias") if by_rows else None
        output = ops.linear(local, *_weight_of(module, tensors), bias, *self._layout(module))
        return self._finish(module, output, isinstance(input, DTensor), split=by_rows)

    def embedding(self, module: CompressedModule, indices: torch.Tensor) -> torch.Tensor:
        """``indices`` of any shape to ``[*indices.shape, embedding_dim]``, or the local columns of it."""
        local = self._local_input(indices, Replicate())
        weight = _weight_of(module, local_tensors(module))
        if self.plan.dim == 1:
            rows = ops.embedding(local, *weight, *self._layout(module))
        else:
            first, last = self.plan.bounds(self.mesh.get_local_rank())
            own = (local >= first) & (local < last)
            # Any row of this part stands in for those of others; what is in no part is refused by the op.
            unknown = (local < 0) | (local >= self.plan.shape[0])
            positions = torch.where(own, local - first, torch.where(unknown, last - first, 0))
            rows = ops.embedding(positions, *weight, *self._layout(module))
            rows = torch.where(own.unsqueeze(-1), rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
        rows = rows.to(module.dtype)
        return self._finish(module, rows, isinstance(indices, DTensor), split=self.plan.dim == 1)

    def problems(self, module: CompressedModule, version: str | None, place: str) -> list[Problem]:
        """What is wrong with the values of this process's part, that only the values tell.

        ``version`` is that of the config of the checkpoint, and ``place`` the module's name.
        """
        tensors = local_tensors(module)
        found = []
        try:
            for suffix in tensors.keys() & {"weight_scale", "input_scale", "output_scale"}:
                check_scales(tensors[suffix], f"{place}.{suffix}")
            if "weight_g_idx" in tensors:
                columns = self.plan.columns(self.mesh.get_local_rank())
                groups = tensors["weight_scale"].shape[-1]
                if decode_g_idx(tensors["weight_g_idx"], columns, groups, place) is None:
                    found.append(Problem(f"{place}.weight_g_idx", f"was never set; {_ONE_PROCESS}"))
        except FormatError as error:
            found.extend(error.problems)
        for suffix in tensors.keys() & {"weight_shape", "shape"}:
            said = tensors[suffix].flatten().tolist()
            if said != list(self.plan.shape):
                message = f"says {said}, but the module's weight is {list(self.plan.shape)}"
                found.append(Problem(f"{place}.{suffix}", message))
        if "weight_packed" in tensors and self.plan.dim == 0:
            # Parts of columns are whole words in one of the two layouts only.
            packed, bits = tensors["weight_packed"], module._layout[0]
            if pack_layout(packed, bits, self.plan.shape[1], version=version, place=place) is not PackLayout.DENSE:
                message = f"is stored in the word-aligned layout of old releases; {_ONE_PROCESS}"
                found.append(Problem(f"{place}.weight_packed", message))
        if module.sparsity is not None and not found:
            rows, columns = tensors["bitmask"].shape[0], self.plan.columns(self.mesh.get_local_rank())
            shape = tensors["shape"].new_tensor([rows, columns]).reshape(tensors["shape"].shape)
            try:
                SPARSITY_FORMATS[module.sparsity].check({**tensors, "shape": shape}, place=place)
            except FormatError as error:
                found.extend(error.problems)
        rank = self.mesh.get_local_rank()
        return [Problem(problem.place, f"{problem.message} (in the part of process {rank})") for problem in found]

    def _local_input(self, input: torch.Tensor, placement: Placement) -> torch.Tensor:
        if not isinstance(input, DTensor):
            if not input.requires_grad:
                return input
            input = DTensor.from_local(input, self.mesh, [placement], run_check=False)
        spread = input
        if tuple(spread.placements) != (placement,):
            spread = spread.redistribute(placements=[placement])
        # Each process finds a part of the gradient of an input that all of them have.
        return spread.to_local(grad_placements=[Partial() if isinstance(placement, Replicate) else placement])

    def _layout(self, module: CompressedModule) -> tuple[int, int, int, int]:
        bits, _, block_rows, _ = module._layout
        return bits, self.plan.columns(self.mesh.get_local_rank()), block_rows, self.plan.block_columns

    def _finish(
        self, module: CompressedModule, output: torch.Tensor, distributed: bool, *, split: bool
    ) -> torch.Tensor:
        """Sum what is partial, where a bias or a rounding waits for the sum, and return what the input was."""
        if split:
            if module._output is not None:
                output = self._fake_quantize(output, module._output, local_tensors(module), "output", split=True)
            return self.split_outputs(output) if distributed else output
        partial: Any = DTensor.from_local(output, self.mesh, [Partial()], run_check=False)
        bias = module._parameters.get("bias")
        if distributed and bias is None and module._output is None:
            return cast(torch.Tensor, partial)
        whole: Any = partial.redistribute(placements=[Replicate()])
        if bias is not None:
            whole = whole + bias.to(whole.dtype)
        if module._output is not None:
            rounded = self._fake_quantize(
                whole.to_local(), module._output, local_tensors(module), "output", split=False
            )
            whole = DTensor.from_local(rounded, self.mesh, [Replicate()], run_check=False)
        return cast(torch.Tensor, whole if distributed else whole.to_local())

    def split_outputs(self, local: torch.Tensor) -> DTensor:
        """This process's outputs as a ``DTensor`` of all; their number need not be the same everywhere."""
        shape = torch.Size((*local.shape[:-1], self.plan.shape[self.plan.dim]))
        stride = torch.empty(shape, device="meta").stride()
        split = [Shard(local.ndim - 1)]
        return DTensor.from_local(local, self.mesh, split, run_check=False, shape=shape, stride=stride)

    def _fake_quantize(
        self,
        values: torch.Tensor,
        arguments: tuple[int, bool, bool, int],
        tensors: Mapping[str, torch.Tensor],
        name: str,
        *,
        split: bool,
    ) -> torch.Tensor:
        """Round activations of which this process has all columns, or those of its part (``split``).

        Scales that are found from a whole token or tensor are found from all its columns: the range is reduced over the
        processes first, so that codes are those of the unsplit module.
        """
        scale, zero_point = tensors.get(f"{name}_scale"), tensors.get(f"{name}_zero_point")
        bits, is_float, symmetric, group_size = arguments
        if split and group_size >= self.plan.shape[self.plan.dim]:
            group_size = WHOLE_TOKEN if scale is None else WHOLE_TENSOR
        if split and scale is None and group_size in (WHOLE_TENSOR, WHOLE_TOKEN) and values.numel():
            scale, zero_point = self._scale_of_all_columns(values.detach(), bits, is_float, symmetric, group_size)
        return ops.fake_quantize(values, scale, zero_point, bits, is_float, symmetric, group_size)

    def _scale_of_all_columns(
        self, values: torch.Tensor, bits: int, is_float: bool, symmetric: bool, group_size: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if group_size == WHOLE_TOKEN:
            minimum, maximum = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
        else:
            minimum, maximum = (bound.reshape(1) for bound in torch.aminmax(values))
        both = DTensor.from_local(torch.stack((-minimum, maximum)), self.mesh, [Partial("max")], run_check=False)
        negated, maximum = both.redistribute(placements=[Replicate()]).to_local()
        return activation_scale(-negated, maximum, bits, is_float, symmetric)


def plan_of(module: CompressedModule, dim: int, parts: int, place: str = "") -> ShardPlan:
    """How ``module`` would be split along ``dim`` of its weight ``[O, I]``; raises what :func:`plan_sharding` does."""
    tensors = {name: value for name, value in module._parameters.items() if value is not None}
    outputs = 1 if isinstance(module, nn.Embedding) else 0
    return plan_sharding(
        tensors,
        module._weight_shape,
        module.scheme,
        module.sparsity,
        dim,
        parts,
        outputs=outputs,
        place=place or f"{type(module).__name__}({module.extra_repr()})",
    )


def shard_module(
    module: CompressedModule, mesh: DeviceMesh, dim: int, *, src_data_rank: int | None = 0, place: str = ""
) -> None:
    """Split the tensors of ``module`` along ``dim`` of its weight ``[O, I]`` over the one-dimensional ``mesh``.

    The values are those of ``src_data_rank`` in the mesh; with None, each process takes its part of its own. Tensors on
    the meta device stay there. Raises :class:`UnsupportedFormatError` where the split would cut what belongs together.
    """
    if module._sharding is not None:
        raise UnsupportedFormatError(problems=[Problem(place, "is split already; a module can be split only once")])
    plan = plan_of(module, dim, mesh.size(), place)
    for name in plan.splits:
        shard_tensor(module, name, plan, mesh, src_data_rank)
    module._sharding = Sharding(plan, mesh)


def shard_tensor(
    module: CompressedModule, name: str, plan: ShardPlan, mesh: DeviceMesh, src_data_rank: int | None
) -> None:
    """Split one tensor of ``module`` as ``plan`` says."""
    parameter = module._parameters[name]
    assert parameter is not None  # a plan names nothing else
    values = parameter.detach()
    if src_data_rank is not None and not values.is_meta:
        values = values.to(mesh.device_type).clone(memory_format=torch.contiguous_format)
        # As bytes, because not every backend knows every dtype.
        dist.broadcast(values.view(-1).view(torch.uint8), group=mesh.get_group(), group_src=src_data_rank)
    split = plan.splits[name]
    placement = Replicate() if split is None else Shard(split)
    module._parameters[name] = nn.Parameter(
        distribute_tensor(values, mesh, [placement], src_data_rank=None), requires_grad=parameter.requires_grad
    )


def local_tensors(module: CompressedModule) -> dict[str, torch.Tensor]:
    """This process's part of each tensor of ``module``, by suffix."""
    return {
        name: value.to_local() if isinstance(value, DTensor) else value
        for name, value in module._parameters.items()
        if value is not None
    }


def _weight_of(module: CompressedModule, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
    names = (module._weight_name, "weight_scale", "weight_zero_point", "weight_g_idx", "bitmask")
    return tuple(tensors.get(name) for name in names)
