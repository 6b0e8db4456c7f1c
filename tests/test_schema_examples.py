"""Every hand-written config of ``schema/examples`` compresses a model that comes back from the files the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from compressed_format import QuantizationConfig, compress, load_compressed, save_compressed
from compressed_format.modules.base import compressed_modules

EXAMPLES = Path(__file__).parents[1] / "schema" / "examples"
HIDDEN, VOCABULARY = 128, 64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(HIDDEN, HIDDEN, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.down_proj = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 2, bias=False)
        self.experts = nn.ModuleList(MLP() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.gate(x).softmax(dim=-1)
        return sum(weights[..., index, None] * expert(x) for index, expert in enumerate(self.experts))


class Layer(nn.Module):
    def __init__(self, feed_forward: nn.Module) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = feed_forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(x)
        return x + self.mlp(x)


class Language(nn.Module):
    """The module names of a causal language model with dense layers, one of experts, and a vision tower."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.model.layers = nn.ModuleList([Layer(MLP()), Layer(Experts()), Layer(MLP())])
        self.vision_tower = nn.ModuleDict({"patch_proj": nn.Linear(HIDDEN, HIDDEN)})
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.vision_tower["patch_proj"](self.model.embed_tokens(ids))
        for layer in self.model.layers:
            x = layer(x)
        return self.lm_head(x)


def _build(device: str = "cpu") -> Language:
    torch.manual_seed(0)
    with torch.device(device):
        return Language()


# A config for one kind of model names modules that this one has not got, and says so.
@pytest.mark.filterwarnings("ignore::compressed_format.errors.CompressedFormatWarning")
@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.json")), ids=lambda path: path.stem)
def test_the_example_compresses_a_model_that_comes_back_the_same(example: Path, tmp_path: Path) -> None:
    ids = torch.arange(24).reshape(2, 12)
    model = _build()
    expected = model(ids)

    compress(model, example, calibration=[ids])
    assert compressed_modules(model)
    output = model(ids)
    # Rounding moves the outputs, by no more than pruning half of the weights does.
    assert 0 < (output - expected).norm() < expected.norm()

    save_compressed(model, tmp_path / "model")
    loaded = load_compressed(tmp_path / "model", model=_build("meta"))
    assert torch.equal(loaded(ids), output)
    stored, problems = QuantizationConfig.from_checkpoint(tmp_path / "model")
    assert not problems
    assert "lm_head" in stored.ignore or "lm_head" in compressed_modules(model)
