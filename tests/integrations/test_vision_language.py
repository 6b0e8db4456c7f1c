"""Vision-language models: an ignored tower, a nested text model, and two namings; and what is no causal language model.

Checkpoints of Llava and Qwen2.5-VL name their modules otherwise than transformers does in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForImageTextToText, LlamaConfig

from compressed_format import (
    CompressedLinear,
    QuantizationConfig,
    compress,
    decompress,
    enable_transformers,
    load_compressed,
    save_compressed,
)
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.vision_language import TEXT, llava_inputs, qwen_inputs, tiny_llava, tiny_qwen
from tests.models import read_config, read_tensors, recorded_warnings, seeded, tiny_llama, weights

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
)


class Kind(NamedTuple):
    """A model, its inputs, what its checkpoints call its parts, and ignore entries in either naming."""

    make: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    prefixes: dict[str, str]
    ignore: dict[str, tuple[str, ...]]


KINDS = {
    "Llava": Kind(
        tiny_llava,
        llava_inputs,
        {
            "lm_head": "language_model.lm_head",
            "model.language_model": "language_model.model",
            "model.vision_tower": "vision_tower",
            "model.multi_modal_projector": "multi_modal_projector",
        },
        {
            "checkpoint": ("language_model.lm_head", "re:vision_tower.*", "re:multi_modal_projector"),
            "memory": ("lm_head", "re:model.vision_tower.*", "re:model.multi_modal_projector"),
        },
    ),
    "Qwen2.5-VL": Kind(
        tiny_qwen,
        qwen_inputs,
        {"lm_head": "lm_head", "model.language_model": "model", "model.visual": "visual"},
        {"checkpoint": ("lm_head", "re:visual.*"), "memory": ("lm_head", "re:model.visual.*")},
    ),
}


def stored_name(name: str, kind: Kind) -> str:
    own = next(prefix for prefix in kind.prefixes if name == prefix or name.startswith(prefix + "."))
    return kind.prefixes[own] + name.removeprefix(own)


def run(model: nn.Module, kind: Kind) -> torch.Tensor:
    with torch.no_grad():
        return model(**kind.inputs()).logits


@pytest.mark.parametrize("naming", ["checkpoint", "memory"])
@pytest.mark.parametrize("name", KINDS)
def test_a_tower_ignored_in_either_naming_stays_as_it_is(name: str, naming: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    dense = {stored_name(key, kind): value.clone() for key, value in kind.make().state_dict().items()}
    config = weights(4, strategy="group", group_size=16, ignore=kind.ignore[naming])
    with recorded_warnings() as texts:
        model = compress(kind.make(), config)
    assert texts == []
    reached = compressed_modules(model)
    assert len(reached) == 14
    assert all(place.startswith("model.language_model.layers.") for place in reached)
    expected = run(model, kind)

    save_compressed(model, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    written = read_config(tmp_path / "x")
    packed = {stored_name(f"{place}.{suffix}", kind) for place, module in reached.items() for suffix in
              module._parameters if suffix != "bias"}  # fmt: skip
    untouched = stored.keys() - packed
    assert_same_tensors({key: stored[key] for key in untouched}, {key: dense[key] for key in untouched})
    replaced = {f"{stored_name(place, kind)}.weight" for place in reached}
    assert stored.keys() == (dense.keys() - replaced) | packed
    left = {stored_name(place, kind) for place, module in model.named_modules() if type(module) is nn.Linear}
    assert left <= set(written["quantization_config"]["ignore"])
    assert written["architectures"] == [type(model).__name__]

    with recorded_warnings() as texts:
        loaded = load_compressed(tmp_path / "x")
    assert texts == []
    assert type(loaded) is type(model)
    assert_same_bits(run(loaded, kind), expected)
    size = sum(tensor.nbytes for tensor in stored.values())
    assert sum(tensor.nbytes for tensor in loaded.state_dict().values()) == size  # packed still, after it has run
    assert size < sum(tensor.nbytes for tensor in dense.values())
    save_compressed(loaded, tmp_path / "again")
    assert_same_tensors(read_tensors(tmp_path / "again"), stored)
    theirs = run(AutoModelForImageTextToText.from_pretrained(tmp_path / "x"), kind)
    assert (theirs - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (run(decompress(loaded), kind) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("naming", ["checkpoint", "memory"])
@pytest.mark.parametrize("name", KINDS)
def test_plain_transformers_does_the_same(name: str, naming: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    config = weights(8, ignore=kind.ignore[naming])
    kind.make().save_pretrained(tmp_path / "dense")
    model = compress(kind.make(), config)
    expected = run(model, kind)
    save_compressed(model, tmp_path / "x")
    with enable_transformers():
        on_load = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "dense", quantization_config=QuantizationConfig.from_dict(config)
        )
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    for other in (on_load, loaded):
        assert compressed_modules(other).keys() == compressed_modules(model).keys()
        assert_same_bits(run(other, kind), expected)
    save_compressed(on_load, tmp_path / "again")
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "x"))
    ignore = set(read_config(tmp_path / "x")["quantization_config"]["ignore"])
    assert ignore <= set(read_config(tmp_path / "again")["quantization_config"]["ignore"])


@pytest.mark.parametrize("naming", ["checkpoint", "memory"])
def test_a_pattern_of_either_naming_decides_alike(naming: str, tmp_path: Path) -> None:
    """Of several patterns the first in string order wins, of those that match a module by its checkpoint's name."""
    prefix = {"checkpoint": "language_model.model", "memory": "model.language_model"}[naming]
    config = weights(8, "re:.*down_proj$", ignore=KINDS["Llava"].ignore["memory"])
    groups = config["config_groups"]
    int4 = {"num_bits": 4, "strategy": "channel"}
    groups["layers"] = {"targets": [rf"re:{prefix}\.layers\..*_proj$"], "weights": int4}
    groups["exact"] = {"targets": [f"{prefix}.layers.1.mlp.down_proj"], "weights": int4 | {"num_bits": 2}}
    with recorded_warnings():  # a pattern stands before the exact name for vLLM
        model = compress(tiny_llava(), config)
        save_compressed(model, tmp_path / "x")
        loaded = load_compressed(tmp_path / "x")
    kind = KINDS["Llava"]
    assert_same_bits(run(loaded, kind), run(model, kind))
    theirs = run(AutoModelForImageTextToText.from_pretrained(tmp_path / "x"), kind)
    assert (theirs - run(model, kind)).abs().max() <= 1e-4 * run(model, kind).abs().max()
    for which in (model, loaded):
        layers = which.model.language_model.layers
        bits = [layer.mlp.down_proj.scheme.weights.num_bits for layer in layers]
        assert bits == [8, 2]
        assert {layer.mlp.up_proj.scheme.weights.num_bits for layer in layers} == {4}


@pytest.mark.parametrize("place", ["quantization_config", "text_config.quantization_config", "compression_config"])
def test_the_config_is_found_wherever_readers_look_for_it(place: str, tmp_path: Path) -> None:
    kind = KINDS["Llava"]
    model = compress(tiny_llava(), weights(8, ignore=kind.ignore["memory"]))
    expected = run(model, kind)
    save_compressed(model, tmp_path / "x")
    content = read_config(tmp_path / "x")
    parent, _, key = place.rpartition(".")
    owner = content[parent] if parent else content
    owner[key] = content.pop("quantization_config")
    (tmp_path / "x" / "config.json").write_text(json.dumps(content))
    loaded = load_compressed(tmp_path / "x")
    assert_same_bits(run(loaded, kind), expected)
    save_compressed(loaded, tmp_path / "ours")
    loaded.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        written = read_config(tmp_path / folder)
        assert written["quantization_config"]["quant_method"] == "compressed-tensors"
        assert "quantization_config" not in written["text_config"]
        assert "compression_config" not in written
        assert_same_bits(run(load_compressed(tmp_path / folder), kind), expected)


# Classes that are no causal language models --------------------------------------------------------------------------


def tiny_bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return seeded(transformers.BertModel, transformers.BertConfig(**sizes, vocab_size=64))


def tiny_classifier() -> Any:
    config = LlamaConfig(**TEXT, num_labels=3, pad_token_id=0)
    return seeded(transformers.LlamaForSequenceClassification, config)


CLASSES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "BertModel": (tiny_bert, {"input_ids": torch.arange(12).reshape(1, 12)}),
    "LlamaForSequenceClassification": (tiny_classifier, {"input_ids": torch.arange(12).reshape(1, 12)}),
    "LlamaModel": (lambda: tiny_llama().model, {"input_ids": torch.arange(12).reshape(1, 12)}),
    "LlavaForConditionalGeneration": (tiny_llava, llava_inputs()),
    "LlavaModel": (lambda: tiny_llava().model, llava_inputs()),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_is_loaded_as_the_class_that_was_saved(name: str, tmp_path: Path) -> None:
    make, inputs = CLASSES[name]
    model = make()
    dense = {"score", "model.vision_tower.vision_model.encoder.layers.0.mlp.fc1"}
    compress(model, weights(8, ignore=tuple(dense & {place for place, _ in model.named_modules()})))
    with torch.no_grad():
        expected = model(**inputs)[0]
    save_compressed(model, tmp_path / "x")
    assert read_config(tmp_path / "x")["architectures"] == [name]
    loaded = load_compressed(tmp_path / "x")
    assert type(loaded).__name__ == name
    assert sum(isinstance(module, CompressedLinear) for module in loaded.modules()) == len(compressed_modules(model))
    with torch.no_grad():
        assert_same_bits(loaded(**inputs)[0], expected)
    save_compressed(loaded, tmp_path / "again")
    assert_same_tensors(read_tensors(tmp_path / "again"), read_tensors(tmp_path / "x"))


def test_the_class_that_was_saved_need_not_be_that_of_the_source(tmp_path: Path) -> None:
    """A folder says ``LlamaForCausalLM``, and only the model below the head was taken from it."""
    tiny_llama().save_pretrained(tmp_path / "dense")
    model = compress(transformers.AutoModel.from_pretrained(tmp_path / "dense"), weights(8))
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x")
    assert type(loaded) is transformers.LlamaModel
    ids = torch.arange(12).reshape(1, 12)
    with torch.no_grad():
        assert_same_bits(loaded(ids)[0], model(ids)[0])


def test_a_config_that_names_no_class(tmp_path: Path) -> None:
    model = compress(tiny_llava(), weights(8, ignore=KINDS["Llava"].ignore["memory"]))
    save_compressed(model, tmp_path / "x")
    content = read_config(tmp_path / "x")
    del content["architectures"]
    (tmp_path / "x" / "config.json").write_text(json.dumps(content))
    loaded = load_compressed(tmp_path / "x")
    assert type(loaded) is transformers.LlavaForConditionalGeneration
    assert_same_bits(run(loaded, KINDS["Llava"]), run(model, KINDS["Llava"]))
