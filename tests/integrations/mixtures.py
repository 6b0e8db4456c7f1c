"""Tiny mixtures of experts of several architectures, and what their experts are called in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from frozendict import frozendict

from compressed_format import QuantizationConfig, quantize
from compressed_format.config import CompressionFormat
from compressed_format.config.experts import expert_stack
from compressed_format.formats import FORMATS, SPARSITY_FORMATS, prune_2_of_4
from tests.mixtures import expert_weights
from tests.models import seeded

SIZES: Mapping[str, Any] = frozendict(
    {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "num_experts_per_tok": 2,
        "initializer_range": 0.1,  # larger than usual, so that tokens differ and so do the outputs of experts
    }
)
_QWEN: Mapping[str, Any] = frozendict({"num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1})
_OWN = frozendict({name: name for name in ("gate_proj", "up_proj", "down_proj")})


class _Architecture(NamedTuple):
    kind: str
    fields: Mapping[str, Any]
    experts: str = "mlp.experts"
    called: Mapping[str, str] = _OWN


ARCHITECTURES: Mapping[str, _Architecture] = frozendict(
    {
        "Mixtral": _Architecture(
            "Mixtral",
            {"num_local_experts": 4},
            "block_sparse_moe.experts",
            {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        ),
        "Qwen3-MoE": _Architecture("Qwen3Moe", _QWEN),
        "Qwen2-MoE": _Architecture("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 64}),
        "DeepSeek-V3": _Architecture(
            "DeepseekV3",
            {
                "n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 2, "topk_group": 1,
                "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
                "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
            },
        ),
        "GPT-OSS": _Architecture("GptOss", {"num_local_experts": 4, "layer_types": ["full_attention"] * 2}),
    }
)  # fmt: skip
each_architecture = list(ARCHITECTURES)


def tiny_mixture(architecture: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> Any:
    """A causal language model with four experts a layer, two for each token, in evaluation mode."""
    kind, own, *_ = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **fields})
    return seeded(transformers.AutoModelForCausalLM.from_config, config, dtype=dtype, seed=seed)


def ids() -> torch.Tensor:
    return (torch.arange(24) * 7 % 63 + 1).reshape(2, 12)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids()).logits


def dense_experts_of(architecture: str, model: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Of every expert's projection: its name in a checkpoint, its name as targets have it, and its dense weight."""
    found = ARCHITECTURES[architecture]
    for name, module in model.named_modules():
        stack = expert_stack(module)
        if stack is None:
            continue
        layer = name.removesuffix(".mlp.experts")
        for expert in range(stack.num_experts):
            for projection, weight in expert_weights(module, expert).items():
                stored = f"{layer}.{found.experts}.{expert}.{found.called[projection]}"
                yield stored, f"{name}.{expert}.{projection}", weight


def encoded(weight: torch.Tensor, config: QuantizationConfig) -> dict[str, torch.Tensor]:
    """What a file holds of one weight that the only group of ``config`` reaches."""
    (scheme,) = config.config_groups.values()
    sparsity = config.sparsity_config
    if sparsity is not None and sparsity.format is CompressionFormat.SPARSE_24_BITMASK:
        weight = prune_2_of_4(weight)
    assert scheme.weights is not None
    tensors = FORMATS[config.format_of(scheme)].encode(quantize(weight, scheme.weights), scheme.weights)
    if sparsity is not None:
        tensors |= SPARSITY_FORMATS[sparsity.format].encode(tensors.pop("weight"))
    return tensors
