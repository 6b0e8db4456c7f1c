"""A mixture of experts in plain torch, stacked in any of the layouts that transformers knows, and what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from frozendict import frozendict
from torch import nn
from torch.nn import functional

HIDDEN, INNER, EXPERTS, SLOTS = 16, 24, 4, 2

LAYOUTS: Mapping[str, dict[str, bool]] = frozendict(
    {
        "gate over up": {},
        "interleaved": {"is_concatenated": False},
        "transposed": {"is_transposed": True},
        "interleaved, transposed, biased": {"is_concatenated": False, "is_transposed": True, "has_bias": True},
        "biased": {"has_bias": True},
        "without gate": {"has_gate": False},
        "without gate, transposed, biased": {"has_gate": False, "is_transposed": True, "has_bias": True},
        "normed": {"has_post_expert_norm": True},
    }
)


class Experts(nn.Module):
    """As transformers stacks them, with what its decorator says of them; the expert ``EXPERTS`` stands for none."""

    def __init__(
        self,
        *,
        has_gate: bool = True,
        has_bias: bool = False,
        is_transposed: bool = False,
        is_concatenated: bool = True,
        has_post_expert_norm: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.has_post_expert_norm = has_gate, has_bias, has_post_expert_norm
        self.is_transposed, self.is_concatenated = is_transposed, is_concatenated
        self.num_experts = EXPERTS
        up, rows = ("gate_up_proj", 2 * INNER) if has_gate else ("up_proj", INNER)
        for name, shape in ((up, (rows, HIDDEN)), ("down_proj", (HIDDEN, INNER))):
            stacked = EXPERTS, *(shape[::-1] if is_transposed else shape)
            setattr(self, name, nn.Parameter(torch.randn(stacked, dtype=dtype)))
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, shape[0], dtype=dtype)))
        self.act_fn = nn.SiLU()
        if has_post_expert_norm:
            self.post_expert_norm = nn.LayerNorm(HIDDEN, dtype=dtype)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1) if self.is_concatenated else (both[..., ::2], both[..., 1::2])
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        def project(name: str, values: torch.Tensor, expert: int) -> torch.Tensor:
            weight = getattr(self, name)[expert]
            bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
            return functional.linear(values, weight.mT if self.is_transposed else weight, bias)

        output = torch.zeros_like(hidden_states)
        for expert in range(EXPERTS):
            tokens, slots = (top_k_index == expert).nonzero(as_tuple=True)
            up = project("gate_up_proj" if self.has_gate else "up_proj", hidden_states[tokens], expert)
            inner = self._apply_gate(up) if self.has_gate else self.act_fn(up)
            found = project("down_proj", inner, expert)
            if self.has_post_expert_norm:
                found = self.post_expert_norm(found)
            output = output.index_add(0, tokens, found * top_k_weights[tokens, slots, None])
        return output


class Mixture(nn.Module):
    """Routed experts and a shared one, each behind a gate that is a Linear."""

    def __init__(self, **layout: Any) -> None:
        super().__init__()
        dtype = layout.get("dtype", torch.float32)
        self.gate = nn.Linear(HIDDEN, EXPERTS, bias=False, dtype=dtype)
        self.experts = Experts(**layout)
        self.shared_expert = nn.Sequential(nn.Linear(HIDDEN, HIDDEN, dtype=dtype))
        self.shared_expert_gate = nn.Linear(HIDDEN, 1, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, HIDDEN)
        weights, index = self.gate(tokens).softmax(dim=-1).topk(SLOTS)
        shared = self.shared_expert_gate(tokens).sigmoid() * self.shared_expert(tokens)
        return (self.experts(tokens, index, weights) + shared).reshape(x.shape)


class Layers(nn.Module):
    """Two mixtures behind a Linear each."""

    def __init__(self, **layout: Any) -> None:
        super().__init__()
        dtype = layout.get("dtype", torch.float32)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"proj": nn.Linear(HIDDEN, HIDDEN, dtype=dtype), "mlp": Mixture(**layout)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["mlp"](torch.tanh(layer["proj"](x)))
        return x


def routed(tokens: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What experts are called with: no token goes to the first one, and the last is none in one place."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    index = torch.rand(tokens, EXPERTS - 1, generator=generator).topk(SLOTS).indices + 1
    return hidden, index, torch.rand(tokens, SLOTS, generator=generator)


def expert_weights(experts: Any, expert: int) -> dict[str, torch.Tensor]:
    """The weights ``[O, I]`` of one expert of a dense stack, as a file has them."""
    first = (experts.gate_up_proj if experts.has_gate else experts.up_proj).detach()[expert]
    down = experts.down_proj.detach()[expert]
    if experts.is_transposed:
        first, down = first.T, down.T
    if not experts.has_gate:
        return {"up_proj": first, "down_proj": down}
    rows = len(first) // 2
    gate, up = (first[:rows], first[rows:]) if experts.is_concatenated else (first[::2], first[1::2])
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}
