"""Tiny vision-language models with a text model of two layers, and a picture in a prompt for each."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import LlamaConfig

from tests.models import VOCABULARY, seeded

IMAGE = VOCABULARY - 1
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
}


def tiny_llava() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return seeded(transformers.LlavaForConditionalGeneration, config)


def llava_inputs() -> dict[str, torch.Tensor]:
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"input_ids": torch.tensor([[1, 2, *[IMAGE] * 4, 3, 4, 5]]), "pixel_values": pixels}


def tiny_qwen() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
                     "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
                       "patch_size": 8, "spatial_merge_size": 2, "window_size": 32, "fullatt_block_indexes": [1]},
        image_token_id=IMAGE,
        video_token_id=IMAGE - 1,
        vision_start_token_id=IMAGE - 2,
        vision_end_token_id=IMAGE - 3,
        tie_word_embeddings=False,
    )  # fmt: skip
    return seeded(transformers.Qwen2_5_VLForConditionalGeneration, config)


def qwen_inputs() -> dict[str, torch.Tensor]:
    pixels = torch.randn(16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, IMAGE - 2, *[IMAGE] * 4, IMAGE - 3, 4, 5]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
