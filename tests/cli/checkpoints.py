"""Small checkpoints for tests of commands. Their configs name no architecture, so that no library builds a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from compressed_format.checkpoint import write_checkpoint

W4A16 = {
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}},
    "ignore": ["lm_head"],
}


def dense_tensors(layers: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(64, 256, dtype=torch.bfloat16)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        tensors[f"{name}.mlp.up_proj.weight"] = torch.randn(512, 256, dtype=torch.bfloat16)
        tensors[f"{name}.mlp.down_proj.weight"] = torch.randn(256, 512, dtype=torch.bfloat16)
        tensors[f"{name}.input_layernorm.weight"] = torch.ones(256, dtype=torch.bfloat16)
    tensors["lm_head.weight"] = torch.randn(64, 256, dtype=torch.bfloat16)
    return tensors


def write_model(folder: Path, layers: int = 2, **options: Any) -> Path:
    """A dense checkpoint; keyword arguments go to ``write_checkpoint``."""
    files = {"config.json": json.dumps({"hidden_size": 256}).encode(), "tokenizer.json": b"{}"}
    write_checkpoint(folder, dense_tensors(layers), files=files, **options)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
