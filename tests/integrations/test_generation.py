"""Text from packed models: the very tokens of the dense model, however they are searched for and cached."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compressed_format import compress
from tests.integrations.decoders import DECODERS
from tests.integrations.oracles import dense_twin
from tests.models import LLAMA_CONFIGS, token_ids, weights

CONFIGS: dict[str, Any] = {
    **{name: config for name, config in LLAMA_CONFIGS.items() if name not in ("W4A16 preset", "W8A16", "mixed")},
    "W4A16 asymmetric": weights(4, strategy="group", group_size=32, symmetric=False),
    "2:4": {"config_groups": {"g": {"targets": ["Linear"], "weights": None, "sparsity": "2:4"}}},
    "everything": weights(8, "Linear", "Embedding"),
    "mixed": {
        "config_groups": {
            "attention": {
                "targets": [r"re:.*self_attn\.[qkvo]_proj$"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            },
            # Of experts and of plain MLPs.
            "mlp": {
                "targets": ["re:.*(gate|up|down)_proj$"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
            },
        }
    },
}
# One of each kind: weights only, activations rounded dynamically and statically, embedding and head too.
FEW = ["W4A16 group", "W8A8", "W8A8 static asymmetric", "FP8_DYNAMIC", "everything"]
WEIGHTS_ONLY = ("W4A16 group", "W3A16", "W4A16 asymmetric", "2:4", "everything")
NEW = 8
PAD = 0


@pytest.fixture(autouse=True)
def exact_products_of_rounded_activations(request: pytest.FixtureRequest) -> None:
    """Tokens are those of the dense model as long as no code of an activation is another."""
    if request.node.callspec.params["config"] not in WEIGHTS_ONLY:
        request.getfixturevalue("exact_products")


def pair(model: str, config: str, **fields: Any) -> tuple[Any, Any]:
    """A packed model, and the dense one that computes the same."""
    # Larger weights than those of a fresh model, whose next tokens are all but equally likely.
    built = DECODERS[model](initializer_range=0.1, **fields)
    packed = compress(built, CONFIGS[config], calibration=[{"input_ids": token_ids()}])
    return packed, dense_twin(packed)


def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of 12, 7 and 1 tokens, padded on the left."""
    ids = torch.randint(1, 256, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    for row, missing in ((1, 5), (2, 11)):
        ids[row, :missing], mask[row, :missing] = PAD, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, torch.Tensor] | None = None, **options: Any) -> torch.Tensor:
    torch.manual_seed(11)
    fields = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": PAD, "do_sample": False, **options}
    return model.generate(**(prompts() if inputs is None else inputs), **fields)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", DECODERS)
def test_the_same_tokens_for_a_padded_batch(model: str, config: str) -> None:
    packed, dense = pair(model, config)
    tokens = generate(packed)
    assert tokens.shape == (3, 12 + NEW)
    assert torch.equal(tokens, generate(dense))
    assert len(set(tokens[:, 12:].flatten().tolist())) > 3  # no model that repeats itself whatever it reads


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("config", FEW)
@pytest.mark.parametrize("model", DECODERS)
def test_the_same_tokens_in_every_way(model: str, config: str, way: str) -> None:
    packed, dense = pair(model, config)
    tokens = generate(packed, **WAYS[way])
    assert torch.equal(tokens, generate(dense, **WAYS[way]))
    if way in ("no cache", "dynamic cache", "static cache"):
        assert torch.equal(tokens, generate(packed))


@pytest.mark.parametrize("config", FEW)
@pytest.mark.parametrize("model", DECODERS)
def test_the_same_scores(model: str, config: str) -> None:
    packed, dense = pair(model, config)
    options = {"return_dict_in_generate": True, "output_scores": True}
    found, expected = generate(packed, **options), generate(dense, **options)
    assert len(found.scores) == NEW
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", ["W4A16 group", "W8A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("model", DECODERS)
def test_who_else_is_in_the_batch_does_not_matter(model: str, config: str) -> None:
    packed, _ = pair(model, config)
    together = generate(packed)[1:2, 5:]
    alone = {name: tensor[1:2, 5:] for name, tensor in prompts().items()}
    assert torch.equal(together, generate(packed, alone))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("assistant", ["packed", "dense"])
@pytest.mark.parametrize("config", FEW)
@pytest.mark.parametrize("model", DECODERS)
def test_an_assistant(model: str, config: str, assistant: str, options: dict[str, Any]) -> None:
    packed, dense = pair(model, config)
    small, small_dense = pair(model, config, seed=3, num_hidden_layers=1)
    prompt = {name: tensor[:1] for name, tensor in prompts().items()}
    helper = small if assistant == "packed" else small_dense
    tokens = generate(packed, prompt, assistant_model=helper, **options)
    assert torch.equal(tokens, generate(dense, prompt, assistant_model=small_dense, **options))
    if not options:
        assert torch.equal(tokens, generate(packed, prompt))
    assert torch.equal(tokens, generate(dense, prompt, assistant_model=small, **options))
    torch.testing.assert_close(generate(packed, prompt, prompt_lookup_num_tokens=3), generate(dense, prompt))
