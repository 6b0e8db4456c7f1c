"""Tiny models that write text, by name: what is said of one of them is tested with all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from frozendict import frozendict

from tests.models import tiny_llama

_SIZES = {
    "hidden_size": 128,  # groups of 128 fit
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "dtype": torch.float32,
}


def tiny_mixtral(*, seed: int = 0, **config: Any) -> Any:
    """A Mixtral of four experts, two for each token, in evaluation mode."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(seed)
    fields = {**_SIZES, "intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2, **config}
    return AutoModelForCausalLM.from_config(MixtralConfig(**fields), dtype=torch.float32).eval()


def tiny_qwen3_moe(*, seed: int = 0, **config: Any) -> Any:
    """A Qwen3-MoE of six experts, three for each token, whose second layer has none, in evaluation mode."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(seed)
    experts = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 128, "mlp_only_layers": [1]}
    fields = {**_SIZES, "intermediate_size": 128, "head_dim": 32, **experts, **config}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**fields), dtype=torch.float32).eval()


DECODERS: Mapping[str, Callable[..., Any]] = frozendict(
    {"Llama": tiny_llama, "Mixtral": tiny_mixtral, "Qwen3-MoE": tiny_qwen3_moe}
)
