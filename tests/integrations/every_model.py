"""Tiny random models of every kind, and the formats that each of them is compressed to.

All sizes that a scheme divides are 128, so that every format fits every kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import transformers
from frozendict import frozendict

from compressed_format import QuantizationConfig
from tests.integrations.vision_language import qwen_inputs
from tests.models import VOCABULARY, seeded, token_ids

Inputs = dict[str, torch.Tensor]

TEXT: Mapping[str, Any] = frozendict(
    {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
)
IMAGE = VOCABULARY - 1


class Kind(NamedTuple):
    """A kind of model: how to build one, what goes in, what stays dense, and what ``generate`` starts from."""

    build: Callable[[], Any]
    inputs: Callable[[], Inputs]
    ignore: tuple[str, ...] = ("lm_head",)
    prompt: tuple[str, ...] | None = ("input_ids",)
    """The inputs that ``generate`` starts from; None for what writes no text."""
    embeddings: bool = False
    """Whether the embedding is quantized too, and the head that is tied to it."""
    experts: bool = False


def _decoder(kind: str, **fields: Any) -> Callable[[], Any]:
    def build() -> Any:
        config = getattr(transformers, f"{kind}Config")(**TEXT | fields)
        return seeded(getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM"), config)

    return build


def _llava() -> Any:
    vision = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=128),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return seeded(transformers.LlavaForConditionalGeneration, config)


def _llava_inputs() -> Inputs:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[1, 7, *[IMAGE] * 4, 3, 4, 5]]), "pixel_values": pixels}


def _qwen_vl() -> Any:
    vision = {"depth": 1, "hidden_size": 128, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128,
              "patch_size": 8, "spatial_merge_size": 2, "window_size": 32, "fullatt_block_indexes": [0]}  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]}},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        vision_start_token_id=IMAGE - 2,
        vision_end_token_id=IMAGE - 3,
        tie_word_embeddings=False,
    )
    return seeded(transformers.Qwen2_5_VLForConditionalGeneration, config)


def _t5() -> Any:
    config = transformers.T5Config(
        d_model=128, d_kv=64, d_ff=128, num_layers=1, num_heads=2, vocab_size=VOCABULARY, decoder_start_token_id=0,
        dropout_rate=0.0,
    )  # fmt: skip
    return seeded(transformers.T5ForConditionalGeneration, config)


def _whisper() -> Any:
    config = transformers.WhisperConfig(
        d_model=128, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=VOCABULARY, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return seeded(transformers.WhisperForConditionalGeneration, config)


def _whisper_inputs() -> Inputs:
    features = torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32)
    return {"input_features": features, "decoder_input_ids": token_ids()[:, :5]}


def _bert() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return seeded(transformers.BertForMaskedLM, transformers.BertConfig(**sizes, vocab_size=VOCABULARY))


def _ids() -> Inputs:
    return {"input_ids": token_ids()}


_GEMMA3 = {"tie_word_embeddings": True, "layer_types": ["sliding_attention"], "sliding_window": 8}
_DEEPSEEK = {
    "num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 128, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": 128,
    "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "head_dim": 32,
}  # fmt: skip
_WHOLE: Mapping[str, Any] = frozendict({"ignore": (), "embeddings": True})

KINDS: Mapping[str, Kind] = frozendict(
    {
        "Llama": Kind(_decoder("Llama"), _ids),
        "Llama, tied": Kind(_decoder("Llama", tie_word_embeddings=True), _ids),
        "Llama, tied, embedding and head quantized": Kind(_decoder("Llama", tie_word_embeddings=True), _ids, **_WHOLE),
        "Gemma, tied": Kind(_decoder("Gemma", tie_word_embeddings=True), _ids),
        "Gemma 3, tied": Kind(_decoder("Gemma3Text", **_GEMMA3), _ids),
        "Gemma 3, tied, embedding and head quantized": Kind(_decoder("Gemma3Text", **_GEMMA3), _ids, **_WHOLE),
        "Mixtral": Kind(_decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2), _ids, experts=True),
        "Qwen3-MoE": Kind(
            _decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128), _ids,
            experts=True,
        ),
        "DeepSeek-V3": Kind(_decoder("DeepseekV3", **_DEEPSEEK), _ids, experts=True),
        "GPT-OSS": Kind(
            _decoder("GptOss", num_local_experts=4, num_experts_per_tok=2, sliding_window=8), _ids,
            experts=True,
        ),
        "Llava": Kind(
            _llava, _llava_inputs, ignore=("lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"),
            prompt=("input_ids", "pixel_values"),
        ),
        "Qwen2.5-VL": Kind(
            _qwen_vl, qwen_inputs, ignore=("lm_head", "re:.*visual.*"),
            prompt=("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"),
        ),
        "T5": Kind(_t5, lambda: {**_ids(), "decoder_input_ids": token_ids()[:, :5]}),
        "Whisper": Kind(_whisper, _whisper_inputs, ignore=("proj_out",), prompt=("input_features",)),
        "BERT": Kind(_bert, _ids, ignore=("cls.predictions.decoder",), prompt=None),
    }
)  # fmt: skip


class Format(NamedTuple):
    """The keys of a config's group."""

    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None
    sparsity: str | None = None

    def config(self, kind: Kind) -> QuantizationConfig:
        group: dict[str, Any] = {"weights": dict(self.weights)}
        if self.sparsity is not None:
            group["sparsity"] = self.sparsity
        groups = {"linears": {**group, "targets": ["Linear"]}}
        if self.inputs is not None:
            groups["linears"]["input_activations"] = dict(self.inputs)
        if kind.embeddings:
            # Indices cannot be rounded, and the head stays tied to what is compressed as it is.
            groups["embeddings"] = {**group, "targets": ["Embedding", "lm_head"]}
        return QuantizationConfig.from_dict({"config_groups": groups, "ignore": kind.ignore})


_INT8: Mapping[str, Any] = frozendict({"num_bits": 8, "type": "int"})
_FP8: Mapping[str, Any] = frozendict({"num_bits": 8, "type": "float"})
_TOKEN: Mapping[str, Any] = frozendict({"strategy": "token", "dynamic": True})
_INT4: Mapping[str, Any] = frozendict({"num_bits": 4, "strategy": "group", "group_size": 32})

FORMATS: Mapping[str, Format] = frozendict(
    {
        "W4A16": Format(_INT4),
        "W4A16 asymmetric": Format({**_INT4, "symmetric": False}),
        "W3A16": Format({"num_bits": 3, "strategy": "channel"}),
        "W8A16": Format({**_INT8, "strategy": "group", "group_size": 128}),
        "W8A8": Format({**_INT8, "strategy": "channel"}, {**_INT8, **_TOKEN}),
        "W8A8 static": Format({**_INT8, "strategy": "channel"}, {**_INT8, "strategy": "tensor"}),
        "FP8_DYNAMIC": Format({**_FP8, "strategy": "channel"}, {**_FP8, **_TOKEN}),
        "FP8": Format({**_FP8, "strategy": "tensor"}, {**_FP8, "strategy": "tensor"}),
        "FP8_BLOCK": Format(
            {**_FP8, "strategy": "block", "block_structure": (128, 128)},
            {**_FP8, "strategy": "group", "group_size": 128, "dynamic": True},
        ),
        "2:4 FP8": Format({**_FP8, "strategy": "channel"}, {**_FP8, **_TOKEN}, sparsity="2:4"),
    }
)
