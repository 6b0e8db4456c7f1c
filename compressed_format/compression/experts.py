"""A layer's experts: taken apart into one Linear for each projection of each expert, compressed, and put back.

What transformers stacks has one of several layouts: gate above up or row by row in turn, and either of them transposed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compressed_format.compression.modules import compress_module, treatment
from compressed_format.config import Assignment, CompressionFormat, TargetResolution
from compressed_format.config.experts import ExpertStack, expert_stack
from compressed_format.errors import Problem, QuantizationError, TargetError
from compressed_format.modules.experts import (
    CompressedExpertLinear,
    CompressedExperts,
    compressed_experts_class,
    fuse_gate_and_up,
    original_class,
    stack_tensors,
)
from compressed_format.modules.module_table import ModuleTable
from compressed_format.modules.offloading import hand_over, is_offloaded, original_forward

__all__ = [
    "compress_experts",
    "compressed_projection",
    "compressed_stack",
    "dense_stacks",
    "expert_linears",
    "observable_experts",
    "plain_experts",
    "projection_assignments",
    "projection_shape",
    "stacked_weight",
]

Assignments = Mapping[str, Assignment | None]
"""What becomes of each projection of a stack; None for one that stays as it is."""


def dense_stacks(model: nn.Module | ModuleTable) -> dict[str, tuple[nn.Module, ExpertStack]]:
    """The modules of ``model`` that hold the uncompressed weights of all experts of a layer."""
    found = ((name, module, expert_stack(module)) for name, module in model.named_modules())
    return {
        name: (module, stack)
        for name, module, stack in found
        if stack is not None and not isinstance(module, CompressedExperts)
    }


def projection_assignments(name: str, stack: ExpertStack, resolution: TargetResolution) -> Assignments:
    """What becomes of each projection of the experts ``name``; empty where nothing does.

    Raises :class:`TargetError` where the config tells experts apart: their tensors could not be stacked.
    """
    of_projection: dict[str, dict[Any, list[int]]] = defaultdict(lambda: defaultdict(list))
    chosen: dict[str, Assignment | None] = {}
    for expert, projection, full_name in stack.names(name):
        assignment = resolution.assignments.get(full_name)
        kind = None if assignment is None else (treatment(assignment), assignment.scheme)
        of_projection[projection][kind].append(expert)
        chosen.setdefault(projection, assignment)
    problems = []
    for projection, kinds in of_projection.items():
        if len(kinds) > 1:
            rarest = min(kinds.values(), key=len)
            others = f" (and {len(rarest) - 1} more)" if len(rarest) > 1 else ""
            message = (
                f"is treated differently from {projection} of the other experts{others}; experts run from stacked "
                "tensors, so a target or an ignore entry must reach all of a layer's experts or none"
            )
            problems.append(Problem(f"{name}.{rarest[0]}.{projection}", message))
    if problems:
        raise TargetError("experts of one layer have to be compressed alike:", problems)
    return chosen if any(chosen.values()) else {}


def expert_linears(module: nn.Module, stack: ExpertStack, name: str) -> dict[str, nn.Linear]:
    """Every projection of every expert as a Linear of its own, whose weight is a view of the stack's."""
    if not name:
        message = "cannot be replaced in place, for it is the model itself; put it into an nn.Sequential"
        raise QuantizationError(problems=[Problem("(the model)", message)])
    if original_forward(module) is not type(module).forward:
        message = "its forward has been replaced on the object itself, which compressed experts would lose"
        raise QuantizationError(problems=[Problem(name, f"{message}; list them in ignore")])
    if is_offloaded(module):
        message = "its experts are offloaded by accelerate; compress the model before, or while it is loaded"
        raise QuantizationError(problems=[Problem(name, message)])
    return {
        full_name: _linear(_view(module, projection, expert)).train(module.training)
        for expert, projection, full_name in stack.names(name)
    }


def compress_experts(
    module: nn.Module,
    stack: ExpertStack,
    assignments: Assignments,
    name: str,
    activation_scales: Mapping[str, Mapping[str, torch.Tensor]],
) -> CompressedExperts:
    """Compressed experts for the stack ``module``, with its hooks and mode. One projection is compressed at a time.

    ``activation_scales`` has those of ``<name>.<expert>.<projection>``. Projections without an assignment are kept as
    they are, each for itself.
    """
    projections = {}
    for projection, assignment in assignments.items():
        tensors: dict[str, list[torch.Tensor]] = defaultdict(list)
        for expert in range(stack.num_experts):
            weight = _view(module, projection, expert)
            if assignment is None:
                tensors["weight"].append(weight)
                continue
            full_name = f"{name}.{expert}.{projection}"
            compressed = compress_module(_linear(weight), assignment, activation_scales.get(full_name, {}), full_name)
            for suffix, tensor in compressed._parameters.items():
                if tensor is not None:
                    tensors[suffix].append(tensor.data)
        stacked = {suffix: stack_tensors(suffix, found) for suffix, found in tensors.items()}
        projections[projection] = compressed_projection(module, projection, stack, stacked, assignment)
    return compressed_stack(module, stack, projections)


def compressed_projection(
    module: nn.Module,
    projection: str,
    stack: ExpertStack,
    tensors: Mapping[str, torch.Tensor],
    assignment: Assignment | None,
) -> CompressedExpertLinear:
    """One projection of the stack ``module``, out of stacked ``tensors``; without an ``assignment``, uncompressed."""
    weight = _view(module, projection, 0)
    return CompressedExpertLinear(
        tensors,
        (stack.num_experts, weight.shape[0], weight.shape[1]),
        None if assignment is None else assignment.scheme,
        CompressionFormat.DENSE if assignment is None else assignment.format,
        sparsity=None if assignment is None else assignment.sparsity,
        dtype=weight.dtype,
    )


def compressed_stack(
    module: nn.Module, stack: ExpertStack, projections: Mapping[str, CompressedExpertLinear]
) -> CompressedExperts:
    """``module`` with compressed ``projections`` in place of its weights; it keeps biases, hooks and mode."""
    kind: Any = type(module)
    compressed = _alike(module, compressed_experts_class(kind))
    for name in _weight_names(module):
        del compressed._parameters[name]
    for name, projection in projections.items():
        compressed._modules[name] = projection.train(module.training)
    compressed.expert_stack = stack
    assert isinstance(compressed, CompressedExperts)
    hand_over(module, compressed, type(module).__name__)
    return compressed


def plain_experts(module: CompressedExperts) -> nn.Module:
    """The stack that compressed experts were made of, with dequantized weights."""
    plain: nn.Module = _alike(module, original_class(type(module)))
    del plain.__dict__["expert_stack"]
    dense = {name: projection.dequantized_weight() for name, projection in module.projections.items()}
    for name in dense:
        del plain._modules[name]
    up = [weight for name, weight in dense.items() if name != "down_proj"]
    for name, parts in zip(_weight_names(module), (up, [dense["down_proj"]]), strict=True):
        plain._parameters[name] = nn.Parameter(stacked_weight(module, parts))
    return plain


def stacked_weight(module: Any, projections: Sequence[torch.Tensor]) -> torch.Tensor:
    """The parameter of the stack ``module`` that holds weights ``[E, O, I]``, of one projection or of gate and up."""
    weight = projections[0]
    if len(projections) > 1:
        gate, up = projections
        weight = fuse_gate_and_up(module, gate, up, dim=-2)
    return weight.mT.contiguous() if module.is_transposed else weight


@contextmanager
def observable_experts(
    stacks: Mapping[str, tuple[nn.Module, ExpertStack]], linears: Mapping[str, nn.Linear]
) -> Iterator[None]:
    """Within the context, the experts of ``stacks`` compute through ``linears``, so that their hooks see the values.

    Every token goes through every expert, so that data which routes none to some experts gives these scales too; what
    comes out is that of the routed ones.
    """

    def watched(name: str, module: Any, stack: ExpertStack) -> Any:
        def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
            for expert in range(stack.num_experts):
                place = f"{name}.{expert}."
                up = linears[f"{place}up_proj"](hidden_states)
                if module.has_gate:
                    fused = fuse_gate_and_up(module, linears[f"{place}gate_proj"](hidden_states), up)
                    bias = module.gate_up_proj_bias[expert] if module.has_bias else 0
                    hidden = module._apply_gate(fused + bias)
                else:
                    hidden = module.act_fn(up + (module.up_proj_bias[expert] if module.has_bias else 0))
                linears[f"{place}down_proj"](hidden)
            return original(hidden_states, top_k_index, top_k_weights)

        original = module.forward
        return forward

    before = {name: module.__dict__.get("forward") for name, (module, _) in stacks.items()}
    try:
        for name, (module, stack) in stacks.items():
            module.forward = watched(name, module, stack)
        yield
    finally:
        for name, (module, _) in stacks.items():
            module.__dict__.pop("forward", None)
            if before[name] is not None:
                module.__dict__["forward"] = before[name]


def projection_shape(module: nn.Module, projection: str) -> tuple[int, int]:
    """The shape ``[O, I]`` of one projection's weight in a stack that is not compressed yet."""
    rows, columns = _view(module, projection, 0).shape
    return rows, columns


def _weight_names(module: nn.Module) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _view(module: nn.Module, projection: str, expert: int) -> torch.Tensor:
    """The weight ``[O, I]`` of one projection of one expert, inside the stack."""
    first, down = _weight_names(module)
    parameter = module._parameters[down if projection == "down_proj" else first]
    assert parameter is not None
    weight = parameter.detach()[expert]
    weight = weight.mT if module.is_transposed else weight
    if projection == "down_proj" or not module.has_gate:
        return weight
    if module.is_concatenated:
        return weight.chunk(2)[0 if projection == "gate_proj" else 1]
    return weight[0 if projection == "gate_proj" else 1 :: 2]


def _linear(weight: torch.Tensor) -> nn.Linear:
    """A Linear of ``weight`` ``[O, I]``. There are many, and most of what the constructor does is to fill them."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None)
    return linear


def _alike(module: nn.Module, kind: type[nn.Module]) -> Any:
    """A module of class ``kind`` with the attributes of ``module``, whose parts can be replaced without changing it."""
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    for parts in ("_parameters", "_buffers", "_modules"):
        new.__dict__[parts] = dict(module.__dict__[parts])
    for replaced in ("forward", "_old_forward", "_hf_hook"):
        new.__dict__.pop(replaced, None)  # these are bound to the other module
    return new
