"""save_pretrained of a packed model, however it came to be and whether it has run: what save_compressed writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from compressed_format import (
    CheckpointError,
    CompressedFormatWarning,
    FormatError,
    QuantizationConfig,
    compress,
    decompress,
    enable_transformers,
    load_compressed,
    save_compressed,
)
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_bits, assert_same_tensors
from tests.models import (
    LLAMA_CONFIGS,
    compressed_llama,
    logits,
    read_config,
    read_tensors,
    tiny_llama,
    weights,
)

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
)

ASYMMETRIC = weights(4, strategy="group", group_size=32, symmetric=False, ignore=("lm_head",))
CONFIGS = {**LLAMA_CONFIGS, "W4 asymmetric group": QuantizationConfig.from_dict(ASYMMETRIC)}
KEYS = {
    "config_groups",
    "format",
    "global_compression_ratio",
    "ignore",
    "kv_cache_scheme",
    "moe_sparsity_config",
    "quant_method",
    "quantization_status",
    "sparsity_config",
    "transform_config",
    "version",
}


def in_memory(config: Any, folder: Path) -> Any:
    return compressed_llama(config)


def through_load_compressed(config: Any, folder: Path) -> Any:
    save_compressed(compressed_llama(config), folder / "first")
    return load_compressed(folder / "first")


def through_transformers(config: Any, folder: Path) -> Any:
    save_compressed(compressed_llama(config), folder / "first")
    with enable_transformers():
        return AutoModelForCausalLM.from_pretrained(folder / "first")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("origin", [in_memory, through_load_compressed, through_transformers])
def test_what_is_saved(config: Any, origin: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    model = origin(config, tmp_path)
    model.save_pretrained(tmp_path / "before")
    expected = logits(model)
    model.save_pretrained(tmp_path / "after")
    save_compressed(compressed_llama(config), tmp_path / "ours")
    written = read_config(tmp_path / "ours")["quantization_config"]
    assert written.keys() == KEYS
    assert (written["quant_method"], written["quantization_status"]) == ("compressed-tensors", "compressed")
    assert written["ignore"] == ["lm_head"]
    for name in ("before", "after"):
        assert_same_tensors(read_tensors(tmp_path / name), read_tensors(tmp_path / "ours"))
        assert read_config(tmp_path / name)["quantization_config"] == written
        assert_same_bits(logits(load_compressed(tmp_path / name)), expected)
    if config is not CONFIGS["W4 asymmetric group"]:  # which compressed-tensors cannot load
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
        assert type(theirs.hf_quantizer).__module__.startswith("transformers.")
        assert (logits(theirs) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("origin", [in_memory, through_load_compressed, through_transformers])
def test_everything_that_is_dense_is_in_ignore(origin: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    """Readers want every Linear that is not quantized there, also where no target names it."""
    model = origin(weights(8, "re:.*mlp.*"), tmp_path)
    model.save_pretrained(tmp_path / "y")
    ignore = set(read_config(tmp_path / "y")["quantization_config"]["ignore"])
    linears = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert len(linears) == 9
    assert ignore == linears
    assert model.config.to_dict()["quantization_config"] == read_config(tmp_path / "y")["quantization_config"]


def test_compressing_says_at_once_what_will_be_saved(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["mixed"])
    model.save_pretrained(tmp_path / "y")
    fresh = compressed_llama(LLAMA_CONFIGS["mixed"])
    written = read_config(tmp_path / "y")["quantization_config"]
    assert fresh.config.to_dict()["quantization_config"] == written
    assert fresh.is_quantized
    assert fresh.quantization_method == "compressed-tensors"


def test_shards(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["FP8_DYNAMIC"])
    model.save_pretrained(tmp_path / "y", max_shard_size="100KB")
    assert len(list((tmp_path / "y").glob("*.safetensors"))) > 2
    assert_same_bits(logits(load_compressed(tmp_path / "y")), logits(model))


@pytest.mark.parametrize("both", [True, False])
def test_tied_embeddings(both: bool, tmp_path: Path) -> None:
    config = weights(8, "Linear", "Embedding") if both else weights(8, ignore=("lm_head",))
    model = compress(tiny_llama(tie_word_embeddings=True), config)
    model.save_pretrained(tmp_path / "y")
    stored = read_tensors(tmp_path / "y")
    assert not [name for name in stored if name.startswith("lm_head")]
    loaded = load_compressed(tmp_path / "y")
    suffix = "weight_packed" if both else "weight"
    assert loaded.lm_head._parameters[suffix] is loaded.model.embed_tokens._parameters[suffix]
    assert_same_bits(logits(loaded), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int", "float"])
def test_the_dtype_is_the_one_that_the_model_computes_in(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Where the embedding is compressed, the first float of the model is codes or scales."""
    config = weights(8, "Linear", "Embedding", type=name)
    save_compressed(compress(tiny_llama(tie_word_embeddings=True), config), tmp_path / "x")
    with enable_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=dtype)
        assert model.dtype == model.model.dtype == dtype
        model.save_pretrained(tmp_path / "y")
        assert read_config(tmp_path / "y")["dtype"] == str(dtype).removeprefix("torch.")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "y")
    assert_same_tensors(again.state_dict(), model.state_dict())
    assert_same_bits(logits(again), logits(model))
    assert again.dequantize().dtype == dtype


def test_a_head_that_is_compressed_on_its_own_is_saved_untied(tmp_path: Path) -> None:
    with pytest.warns(CompressedFormatWarning, match="they are no longer tied"):
        model = compress(tiny_llama(tie_word_embeddings=True), weights(8))
    model.save_pretrained(tmp_path / "y")
    assert {"lm_head.weight_packed", "model.embed_tokens.weight"} <= read_tensors(tmp_path / "y").keys()
    assert read_config(tmp_path / "y")["tie_word_embeddings"] is False
    assert_same_bits(logits(load_compressed(tmp_path / "y")), logits(model))


def test_a_model_that_is_dense_again_is_saved_dense(tmp_path: Path) -> None:
    model = decompress(compressed_llama(LLAMA_CONFIGS["W4A16 group"]))
    expected = logits(model)
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "y")
    assert "quantization_config" not in read_config(tmp_path / "y")
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "y")), expected)
    assert len(compressed_modules(compress(model, LLAMA_CONFIGS["W8A8"]))) == 14


def test_a_part_of_a_compressed_model_has_no_config(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["W4A16 group"])
    with pytest.raises(FormatError, match="as part of one that was compressed or loaded: save that whole"):
        save_compressed(model.model, tmp_path / "y")
    assert not (tmp_path / "y").exists()


def test_a_model_that_is_not_what_its_config_says(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["W4A16 group"])
    other = compressed_llama(LLAMA_CONFIGS["W8A16"])
    model.model.layers[0].mlp.up_proj = other.model.layers[0].mlp.up_proj
    with pytest.raises(FormatError, match="the model is not what its config says") as caught:
        model.save_pretrained(tmp_path / "y")
    assert [problem.place for problem in caught.value.problems] == ["model.layers.0.mlp.up_proj"]
    assert not list((tmp_path / "y").iterdir())


def test_what_the_trainer_asks() -> None:
    """Packed weights cannot be trained, and adapters on them can."""
    model = compressed_llama(LLAMA_CONFIGS["W4A16 group"])
    assert model.hf_quantizer.is_trainable
    assert not model.hf_quantizer.is_qat_trainable
    packed = {name for module in compressed_modules(model).values() for name in map(id, module.parameters())}
    assert not any(parameter.requires_grad for parameter in model.parameters() if id(parameter) in packed)
    arguments = transformers.TrainingArguments(output_dir="unused", use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match="Please attach trainable adapters"):
        transformers.Trainer(model, arguments)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_part_of_a_compressed_model_is_not_saved_alone(loaded: bool, tmp_path: Path) -> None:
    model = compress(tiny_llama(), LLAMA_CONFIGS["W4A16 group"])
    if loaded:
        model.save_pretrained(tmp_path / "whole")
        model = load_compressed(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="part of a compressed one"):
        model.model.save_pretrained(tmp_path / "part")
    assert not list(tmp_path.glob("part/*.safetensors"))
    decompress(model).model.save_pretrained(tmp_path / "part")
    assert list(tmp_path.glob("part/*.safetensors"))
