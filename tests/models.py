"""Tiny models of random weights, the configs they are compressed with, and what tests ask of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compressed_format import QuantizationConfig, compress
from compressed_format.errors import CompressedFormatWarning

HIDDEN, INTERMEDIATE, VOCABULARY, LAYERS = 128, 256, 256, 2


def tiny_llama(dtype: torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> Any:
    """A Llama of two layers, in evaluation mode; keyword arguments go to its config."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    fields = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    # Not `.to(dtype)`, which would also round the frequencies of rotary embeddings.
    return AutoModelForCausalLM.from_config(LlamaConfig(**fields | config), dtype=dtype).eval()


def token_ids() -> torch.Tensor:
    """Two prompts of twelve tokens."""
    return (torch.arange(24) * 7 % VOCABULARY).reshape(2, 12)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


class Block(nn.Module):
    """Two layers, one of them with a bias, and a buffer between them."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, dtype=dtype)
        self.down = nn.Linear(2 * width, width, bias=False, dtype=dtype)
        self.register_buffer("shift", torch.linspace(-1, 1, 2 * width, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x) + self.shift))


class Nested(nn.Module):
    """Blocks, one of which appears twice, a norm, a dense head with a bias, and buffers of several dtypes."""

    def __init__(self, width: int = 32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width, dtype), Block(width, dtype)])
        self.shared = nn.ModuleDict({"again": self.blocks[0]})
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.head = nn.Linear(width, 5, dtype=dtype)
        self.register_buffer("steps", torch.tensor([3, 1, 2]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in (*self.blocks, self.shared["again"]):
            x = block(x)
        return self.head(self.norm(x)) * self.steps.sum()


class Words(nn.Module):
    """An embedding, a layer and an output layer that may share the embedding's weight."""

    def __init__(self, vocabulary: int = 24, width: int = 16, *, tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.layer(self.embed(ids))))


def seeded(build: Any, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """``build(*args, **kwargs)`` with weights that are the same every time, in evaluation mode."""
    torch.manual_seed(seed)
    return build(*args, **kwargs).eval()


def weights(bits: int = 8, *targets: str, ignore: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    """A config of one group that quantizes weights only."""
    args = {"num_bits": bits, "strategy": "channel", **fields}
    return {"config_groups": {"group_0": {"targets": list(targets or ["Linear"]), "weights": args}}, "ignore": ignore}


_INPUT_INT8 = {"num_bits": 8, "type": "int", "strategy": "tensor", "symmetric": True, "dynamic": False}


def _preset(name: str) -> QuantizationConfig:
    return QuantizationConfig.preset(name).replace(ignore=("lm_head",))


def _static(symmetric: bool) -> QuantizationConfig:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "strategy": "channel"},
        "input_activations": {**_INPUT_INT8, "symmetric": symmetric},
    }
    return QuantizationConfig.from_dict({"config_groups": {"group_0": group}, "ignore": ["lm_head"]})


def _mixed() -> QuantizationConfig:
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    int4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
    groups = {
        "attention": {"targets": [r"re:.*self_attn\.[qkvo]_proj$"], "weights": fp8, "input_activations": token},
        "mlp": {"targets": [r"re:.*mlp\.(gate|up|down)_proj$"], "weights": int4},
    }
    return QuantizationConfig.from_dict({"config_groups": groups, "ignore": ["lm_head"]})


LLAMA_CONFIGS: Mapping[str, QuantizationConfig] = {
    "W4A16 group": QuantizationConfig.from_dict(weights(4, strategy="group", group_size=32, ignore=("lm_head",))),
    "W4A16 preset": _preset("W4A16"),
    "W4A16 channel": QuantizationConfig.from_dict(weights(4, ignore=("lm_head",))),
    "W8A16": _preset("W8A16"),
    "W3A16": _preset("W3A16"),
    "W8A8": _preset("W8A8"),
    "W8A8 static": _static(symmetric=True),
    "W8A8 static asymmetric": _static(symmetric=False),
    "FP8": _preset("FP8"),
    "FP8_DYNAMIC": _preset("FP8_DYNAMIC"),
    "FP8_BLOCK": _preset("FP8_BLOCK"),
    "mixed": _mixed(),
}
"""What this library and compressed-tensors 0.20 both write and both load into a Llama."""


def compressed_llama(config: Any, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A compressed tiny Llama, calibrated with one batch."""
    return compress(tiny_llama(dtype, **fields), config, calibration=[{"input_ids": token_ids()}])


def write_folder(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    """A checkpoint as another program might have written it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": dict(config)}))
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by safetensors itself."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of ``config.json``; ``quantization_config`` is changed key by key."""
    config = read_config(folder)
    config["quantization_config"] |= changes.pop("quantization_config", {})
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, drop: tuple[str, ...] = (), **changes: torch.Tensor) -> None:
    """Change, add or drop tensors of a checkpoint of one file."""
    tensors = {name: tensor for name, tensor in read_tensors(folder).items() if name not in drop}
    save_file(tensors | {name: tensor.clone() for name, tensor in changes.items()}, folder / "model.safetensors")


class recorded_warnings(warnings.catch_warnings):  # noqa: N801  # reads like the function it is used as
    """The texts of this library's warnings in a block; all others stay errors."""

    def __init__(self) -> None:
        super().__init__(record=True)
        self.texts: list[str] = []

    def __enter__(self) -> list[str]:
        self._found = super().__enter__()
        warnings.simplefilter("error")
        warnings.simplefilter("always", CompressedFormatWarning)
        return self.texts

    def __exit__(self, *exception: Any) -> None:
        assert self._found is not None
        self.texts += [str(warning.message) for warning in self._found]
        super().__exit__(*exception)


def file_backed(tensor: torch.Tensor) -> str | None:
    """The file whose mapping holds the memory of a tensor, or None."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, name = line.split(maxsplit=5) if len(line.split()) > 5 else (line.split()[0], "")
        start, stop = (int(address, 16) for address in addresses.split("-"))
        if start <= address < stop:
            return name or None
    return None


def word_aligned(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The layout of releases before 0.18: whole codes only in each word."""
    per_word = 32 // bits
    unsigned = codes.to(torch.int64) + 2 ** (bits - 1)
    padded = nn.functional.pad(unsigned, (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = (padded << torch.arange(per_word) * bits).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
