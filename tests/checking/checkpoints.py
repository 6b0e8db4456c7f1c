"""Small compressed checkpoints, and ways to damage them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from frozendict import frozendict
from safetensors.torch import save_file
from torch import nn

from compressed_format import check, compress, save_compressed
from compressed_format.errors import CompressedFormatWarning
from tests.models import read_tensors

HIDDEN, INNER, VOCABULARY = 64, 96, 40
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"

FLOAT8 = frozendict({"type": "float", "strategy": "channel"})
TOKEN = frozendict({"type": "float", "strategy": "token", "dynamic": True})
GROUPS: Mapping[str, Mapping[str, Any]] = frozendict(
    {
        "int4": {"weights": {"num_bits": 4, "group_size": 32}},
        "int4 asymmetric": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": False}},
        "int5": {"weights": {"num_bits": 5, "strategy": "channel"}},
        "int5 asymmetric": {"weights": {"num_bits": 5, "strategy": "channel", "symmetric": False}},
        "int8": {"weights": {"strategy": "channel"}, "input_activations": {"strategy": "token", "dynamic": True}},
        "int3 in bytes": {"weights": {"num_bits": 3, "symmetric": False}, "format": "naive-quantized"},
        "float8": {"weights": FLOAT8, "input_activations": TOKEN},
        "float8 static": {"weights": {"type": "float"}, "input_activations": {"type": "float"}},
        "float8 blocks": {"weights": {"type": "float", "strategy": "block", "block_structure": [16, 16]}},
        "float8 2:4": {"weights": FLOAT8, "input_activations": TOKEN, "sparsity": "2:4"},
    }
)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.up_proj(x))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = Mlp(), nn.LayerNorm(HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.mlp(x))


class Decoder(nn.Module):
    """Named as a language model is."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {"embed_tokens": nn.Embedding(VOCABULARY, HIDDEN), "layers": nn.ModuleList([Layer()])}
        )
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.model["embed_tokens"](tokens)
        for layer in self.model["layers"]:
            x = layer(x)
        return self.lm_head(x)


def save(folder: Path, group: str = "int4", **config: Any) -> Path:
    """A checkpoint of :class:`Decoder` whose Linear modules but the head are one of :data:`GROUPS`."""
    torch.manual_seed(0)
    tokens = torch.arange(12).reshape(2, 6)
    whole = {"config_groups": {"g": {"targets": ["Linear"], **GROUPS[group]}}, "ignore": ["lm_head"], **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressedFormatWarning)
        save_compressed(compress(Decoder(), whole, calibration=[tokens]), folder)
    return folder


def with_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change one tensor of a checkpoint of one file, in place."""
    tensors = read_tensors(folder)
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def found(path: Path, **options: Any) -> list[tuple[str, str]]:
    """Code and place of each finding that is worse than a note."""
    report = check(path, **options)
    return [(finding.code, finding.place) for finding in (*report.errors, *report.warnings)]
