"""What a packed model has to compute, by dense modules alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from compressed_format import decompress
from compressed_format.modules.base import CompressedModule, compressed_modules
from compressed_format.modules.experts import CompressedExpertLinear, CompressedExperts
from tests.modules.test_linear import fake_quantized


def dense_twin(model: Any, *, experts: bool = True) -> Any:
    """``model`` decompressed, and made to round activations as its schemes say, by the numerics of weights.

    Without ``experts``, what goes into those is not rounded.
    """
    dense = decompress(copy.deepcopy(model))
    assert not compressed_modules(dense)
    for name, module in compressed_modules(model).items():
        if not isinstance(module, CompressedExpertLinear):
            plain = dense.get_submodule(name)
            before, after = (_rounding(module, end) for end in ("input", "output"))
            if before is not None:
                plain.register_forward_pre_hook(lambda _, args, before=before: (before(args[0]),))
            if after is not None:
                plain.register_forward_hook(lambda _, args, output, after=after: after(output))
    for name, module in model.named_modules():
        if experts and isinstance(module, CompressedExperts) and _rounding(module.up_proj, "input") is not None:
            dense.get_submodule(name).forward = _rounding_experts(module)
    return dense


def _rounding(module: CompressedModule, end: str, expert: int | None = None) -> Callable[..., torch.Tensor] | None:
    """What rounds the input or output of ``module``, or of one expert of a stack; None where nothing does."""
    args = None if module.scheme is None else getattr(module.scheme, f"{end}_activations")
    if args is None:
        return None
    found = {suffix: module._parameters.get(f"{end}_{suffix}") for suffix in ("scale", "zero_point")}
    static = {suffix: value.data for suffix, value in found.items() if value is not None}
    if expert is not None:
        static = {suffix: value[expert] for suffix, value in static.items()}
    return lambda values: fake_quantized(values, args, **static)


def _rounding_experts(experts: nn.Module) -> Callable[..., torch.Tensor]:
    """One expert after the other, each a gated MLP of dense weights."""
    projections = {name: getattr(experts, name) for name in ("gate_proj", "up_proj", "down_proj")}
    dense = {name: module.weight.clone() for name, module in projections.items()}

    def project(name: str, values: torch.Tensor, expert: int) -> torch.Tensor:
        before = _rounding(projections[name], "input", expert)
        return functional.linear(values if before is None else before(values), dense[name][expert])

    def forward(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        by_slot = hidden.new_zeros((*index.shape, hidden.shape[-1]))
        for expert in index.unique().tolist():
            tokens, slots = (index == expert).nonzero(as_tuple=True)
            gate, up = (project(name, hidden[tokens], expert) for name in ("gate_proj", "up_proj"))
            if experts.has_bias:
                both = experts.gate_up_proj_bias[expert]
                ends = both.chunk(2) if experts.is_concatenated else (both[::2], both[1::2])
                gate, up = gate + ends[0], up + ends[1]
            fused = torch.cat((gate, up), -1) if experts.is_concatenated else torch.stack((gate, up), -1).flatten(-2)
            by_slot[tokens, slots] = project("down_proj", experts._apply_gate(fused), expert)
            if experts.has_bias:
                by_slot[tokens, slots] += experts.down_proj_bias[expert]
        return (by_slot * weights.unsqueeze(-1)).sum(dim=1)

    return forward
