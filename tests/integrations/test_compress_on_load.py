"""from_pretrained(dense, quantization_config=…): what compress makes of the loaded model, one layer at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, core_model_loading

from compressed_format import (
    CalibrationError,
    CheckpointError,
    CompressedFormatWarning,
    ConfigError,
    QuantizationConfig,
    QuantizationError,
    TargetError,
    UnsupportedFormatError,
    compress,
    load_compressed,
    save_compressed,
)
from compressed_format.calibrate import needs_calibration
from compressed_format.integrations import compress_on_load
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_bits, assert_same_tensors
from tests.models import (
    LLAMA_CONFIGS,
    edit_tensors,
    logits,
    read_config,
    read_tensors,
    recorded_warnings,
    tiny_llama,
    weights,
)

pytestmark = [
    pytest.mark.usefixtures("enabled"),
    # Models built in a test come from nowhere.
    pytest.mark.filterwarnings("ignore:no source folder is known:compressed_format.CompressedFormatWarning"),
]

W4A16 = LLAMA_CONFIGS["W4A16 group"]
ASYMMETRIC = weights(4, strategy="group", group_size=32, symmetric=False, ignore=("lm_head",))
CONFIGS = {
    name: config
    for name, config in LLAMA_CONFIGS.items()
    if not any(needs_calibration(scheme) for scheme in config.config_groups.values())
} | {"W4 asymmetric group": QuantizationConfig.from_dict(ASYMMETRIC)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return dense_folder(tmp_path)


def dense_folder(tmp_path: Path, model: Any = None) -> Path:
    # In shards, so that not everything is in one file.
    (model or tiny_llama()).save_pretrained(tmp_path / "dense", max_shard_size="400KB")
    return tmp_path / "dense"


def load(folder: Path, config: Any = None, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **arguments)


def assert_same_model(loaded: Any, folder: Path, config: Any, **arguments: Any) -> None:
    expected = compress(load(folder, **arguments), config)
    assert_same_tensors(loaded.state_dict(), expected.state_dict())
    assert compressed_modules(loaded).keys() == compressed_modules(expected).keys()
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    trainable = (
        {name for name, value in model.named_parameters() if value.requires_grad} for model in (loaded, expected)
    )
    assert next(trainable) == next(trainable)
    assert loaded.config.to_dict()["quantization_config"] == expected.config.to_dict()["quantization_config"]
    assert loaded.training is expected.training is False


def as_config(config: QuantizationConfig) -> Any:
    return config


def as_mapping(config: QuantizationConfig) -> Any:
    return config.to_dict()


def as_transformers(config: QuantizationConfig) -> Any:
    content = config.to_dict()
    return transformers.CompressedTensorsConfig(config_groups=content["config_groups"], ignore=content["ignore"])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("given", [as_config, as_mapping, as_transformers])
def test_it_is_what_compress_makes(
    config: QuantizationConfig, given: Callable[[QuantizationConfig], Any], folder: Path, tmp_path: Path
) -> None:
    loaded = load(folder, given(config))
    expected = compress(load(folder), config)
    assert_same_tensors(loaded.state_dict(), expected.state_dict())
    assert_same_bits(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "y")
    save_compressed(expected, tmp_path / "z", source=folder)
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(tmp_path / "z"))
    assert_same_bits(logits(load_compressed(tmp_path / "y")), logits(expected))
    if given is not as_transformers:  # which names observers, and so on
        written = read_config(tmp_path / "z")["quantization_config"]
        assert read_config(tmp_path / "y")["quantization_config"] == written
        assert_same_model(loaded, folder, config)


@pytest.mark.parametrize("arguments", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}])
def test_arguments_mean_what_they_mean(arguments: dict[str, Any], folder: Path) -> None:
    assert_same_model(load(folder, W4A16, **arguments), folder, W4A16, **arguments)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_layers_that_are_offloaded_to_disk(folder: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    loaded = load(folder, W4A16, device_map=places, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[1].mlp.up_proj.weight_packed.is_meta
    assert_same_bits(logits(loaded), logits(compress(load(folder), W4A16)))


DISK = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "mixed"])
def test_codes_on_disk_are_not_the_dense_weights_of_the_same_name(name: str, folder: Path, tmp_path: Path) -> None:
    """transformers leaves what it offloads where it is stored, but for what it knows to have been converted."""
    config = LLAMA_CONFIGS[name]
    loaded = load(folder, config, device_map={**DISK, "lm_head": "cpu"}, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[1].self_attn.q_proj._parameters["weight"].is_meta
    expected = compress(load(folder), config)
    assert_same_bits(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "y")
    assert_same_tensors(load_compressed(tmp_path / "y").state_dict(), expected.state_dict())


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("name", ["W4A16 group", "FP8_DYNAMIC"])
def test_biases_on_disk(name: str, tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    folder = dense_folder(tmp_path, model)
    config = LLAMA_CONFIGS[name]
    loaded = load(folder, config, device_map={**DISK, "lm_head": "cpu"}, offload_folder=tmp_path / "offload")
    assert loaded.model.layers[0].self_attn.q_proj.bias.is_meta
    expected = compress(load(folder), config)
    assert_same_bits(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "y")
    assert_same_tensors(load_compressed(tmp_path / "y").state_dict(), expected.state_dict())


def test_a_missing_bias_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    tiny_llama(attention_bias=True).save_pretrained(folder)
    edit_tensors(folder, drop=("model.layers.1.self_attn.q_proj.bias",))
    with pytest.raises(CheckpointError) as caught:
        load(folder, W4A16, device_map={**DISK, "lm_head": "cpu"}, offload_folder=tmp_path / "offload")
    assert [problem.place for problem in caught.value.problems] == ["model.layers.1.self_attn.q_proj.bias"]


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("places", ["all", "disk", "cpu"])
@pytest.mark.parametrize("type", ["int", "float"])
def test_a_tied_head_on_disk(type: str, places: str, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path, tiny_llama(tie_word_embeddings=True))
    config = QuantizationConfig.from_dict(weights(8, "Linear", "Embedding", type=type))
    expected = compress(load(folder), config)
    device_map = {**DISK, "lm_head": places, "model.embed_tokens": places} if places != "all" else {"": "disk"}
    loaded = load(folder, config, device_map=device_map, offload_folder=tmp_path / "offload")
    assert loaded.lm_head._parameters["weight_scale"].is_meta is (places != "cpu")
    assert_same_bits(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "y")
    assert_same_tensors(load_compressed(tmp_path / "y").state_dict(), expected.state_dict())


def test_biases(tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    folder = dense_folder(tmp_path, model)
    loaded = load(folder, W4A16)
    assert_same_model(loaded, folder, W4A16)
    assert_same_bits(loaded.model.layers[1].self_attn.v_proj.bias, model.model.layers[1].self_attn.v_proj.bias)


def test_one_layer_is_dense_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts: list[int] = []
    compress_module = compress_on_load.compress_module

    def counted(module: Any, assignment: Any, scales: Any, place: str) -> Any:
        counts.append(len(alive))
        return compress_module(module, assignment, scales, place)

    copy = core_model_loading._materialize_copy

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = copy(*args, **kwargs)
        if tensor.dim() == 2:
            alive.add(tensor)
        return tensor

    monkeypatch.setattr(compress_on_load, "compress_module", counted)
    monkeypatch.setattr(core_model_loading, "_materialize_copy", watched)
    model = load(folder, W4A16)
    assert len(counts) == len(compressed_modules(model)) == 14
    # At most the layer itself, its predecessor that is just being let go, and what stays dense: words and head.
    assert max(counts) <= 3
    assert len(alive) <= 2


# Weights that are tied -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "broken"),
    [
        (weights(8, "Linear", "Embedding"), False),
        (weights(8, "Linear", ignore=("lm_head",)), False),
        (weights(8, "Linear"), True),
        (weights(8, "Embedding"), True),
        (
            {"config_groups": {
                "words": {"targets": ["Embedding"], "weights": {"num_bits": 8, "strategy": "channel"}},
                "layers": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}}}},
            True,
        ),
    ],
    ids=["both", "neither", "the head", "the words", "each in its own way"],
)  # fmt: skip
def test_a_tied_head(config: dict[str, Any], broken: bool, tmp_path: Path) -> None:
    folder = dense_folder(tmp_path, tiny_llama(tie_word_embeddings=True))
    assert "lm_head.weight" not in read_tensors(folder)
    with recorded_warnings() as texts:
        loaded = load(folder, {**config, "quant_method": "compressed-tensors"})
    with recorded_warnings() as expected_texts:
        expected = compress(load(folder), config)
    assert texts == expected_texts
    assert len(texts) == broken
    assert_same_tensors(loaded.state_dict(), expected.state_dict())
    assert loaded.config.tie_word_embeddings is expected.config.tie_word_embeddings is not broken
    heads = [
        {name: id(value) for name, value in model._parameters.items() if value is not None}
        for model in (loaded.lm_head, loaded.model.embed_tokens)
    ]
    assert (heads[0] == heads[1]) is not broken
    assert_same_bits(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "y")
    assert_same_bits(logits(load_compressed(tmp_path / "y")), logits(expected))


def test_a_tied_head_that_is_stored_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    tiny_llama(tie_word_embeddings=True).save_pretrained(folder)
    words = read_tensors(folder)["model.embed_tokens.weight"]
    edit_tensors(folder, **{"lm_head.weight": words})
    config = QuantizationConfig.from_dict(weights(8, "Linear", "Embedding"))
    loaded = load(folder, config)
    expected = compress(load(folder), config)
    assert_same_tensors(loaded.state_dict(), expected.state_dict())
    assert_same_bits(logits(loaded), logits(expected))


@pytest.mark.parametrize("tied", [True, False])
def test_a_pickled_checkpoint(tied: bool, tmp_path: Path) -> None:
    """It has both of two tied weights."""
    model = tiny_llama(tie_word_embeddings=tied)
    expected_tensors = compress(tiny_llama(tie_word_embeddings=tied), weights(8, "Linear", "Embedding")).state_dict()
    folder = dense_folder(tmp_path, model)
    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"):
        file.unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = load(folder, QuantizationConfig.from_dict(weights(8, "Linear", "Embedding")))
    assert_same_tensors(loaded.state_dict(), expected_tensors)


# Mixtures of experts -------------------------------------------------------------------------------------------------


def test_experts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**fields, vocab_size=256, num_local_experts=3, num_key_value_heads=2)
    folder = dense_folder(tmp_path, transformers.MixtralForCausalLM(config))
    scheme = QuantizationConfig.from_dict(weights(4, strategy="group", group_size=32, ignore=("lm_head",)))
    loaded = load(folder, scheme)
    assert_same_model(loaded, folder, scheme)
    assert_same_bits(logits(loaded), logits(compress(load(folder), scheme)))


# What cannot be done -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (
            LLAMA_CONFIGS["W8A8 static"],
            CalibrationError,
            r"has static activation scales, .* compress\(model, config, cal",
        ),
        (weights(4, strategy="group", group_size=48), QuantizationError, "group_size 48"),
        (weights(4, "Nonesuch"), TargetError, "reaches no module"),
        (weights(9), ConfigError, "num_bits: must be 1 to 8"),
        (
            {"config_groups": {"NVFP4A16": ["Linear"]}, "format": "nvfp4-pack-quantized"},
            (UnsupportedFormatError, ConfigError),
            "(?i)nvfp4",
        ),
    ],
    ids=["static scales", "group size", "no target", "bits", "format"],
)
@pytest.mark.filterwarnings("ignore:.*Nonesuch:compressed_format.CompressedFormatWarning")
def test_what_cannot_be_compressed_is_refused_before_a_tensor_is_read(
    config: Any, error: Any, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unread(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError

    monkeypatch.setattr(core_model_loading, "_materialize_copy", unread)
    if isinstance(config, dict):
        config = {**config, "quant_method": "compressed-tensors"}
    with pytest.raises(error, match=message):
        load(folder, config)


def test_values_that_cannot_be_compressed(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    tiny_llama().save_pretrained(folder)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    spoiled = {f"{name}.weight": read_tensors(folder)[f"{name}.weight"] for name in names}
    for weight in spoiled.values():
        weight[2, 5] = torch.nan
    edit_tensors(folder, **spoiled)
    with pytest.raises(QuantizationError, match="weights that cannot be compressed") as caught:
        load(folder, W4A16)
    assert [problem.place for problem in caught.value.problems] == names
    assert all("nan" in problem.message for problem in caught.value.problems)


def test_a_weight_that_is_missing_is_not_compressed_at_random(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    tiny_llama(attention_bias=True).save_pretrained(folder)
    missing = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias")
    edit_tensors(folder, drop=missing)
    with pytest.raises(CheckpointError) as caught:
        load(folder, W4A16)
    assert {problem.place for problem in caught.value.problems} == set(missing)


def test_a_compressed_checkpoint_is_not_compressed_again(folder: Path, tmp_path: Path) -> None:
    load(folder, W4A16).save_pretrained(tmp_path / "y")
    given = transformers.CompressedTensorsConfig(config_groups=LLAMA_CONFIGS["W8A16"].to_dict()["config_groups"])
    with pytest.warns(UserWarning, match="already has a `quantization_config` attribute"):
        loaded = load(tmp_path / "y", given)
    assert_same_tensors(loaded.state_dict(), read_tensors(tmp_path / "y"))


def test_a_cache_scheme_is_only_passed_on(folder: Path) -> None:
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    config = W4A16.to_dict() | {"kv_cache_scheme": cache}
    with pytest.warns(CompressedFormatWarning, match="no k_scale or v_scale is computed"):
        loaded = load(folder, config)
    assert loaded.config.to_dict()["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8
