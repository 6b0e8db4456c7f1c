"""enable_transformers: plain from_pretrained and pipelines run packed, strictly, and give back what is not served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from compressed_format import (
    CheckpointError,
    CompressedFormatWarning,
    FormatError,
    QuantizationConfig,
    compress,
    decompress,
    disable_transformers,
    enable_transformers,
    load_compressed,
    save_compressed,
)
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.peer import compress_with_peer
from tests.models import (
    LLAMA_CONFIGS,
    VOCABULARY,
    compressed_llama,
    edit_config,
    edit_tensors,
    logits,
    read_config,
    read_tensors,
    recorded_warnings,
    tiny_llama,
    weights,
)

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
    # transformers says of every argument that it was given.
    "ignore:You passed `quantization_config` or equivalent parameters:UserWarning",
)

LAYER = "model.layers.0.mlp.up_proj"
CONFIGS = {
    **LLAMA_CONFIGS,
    "W4 asymmetric group": weights(4, strategy="group", group_size=32, symmetric=False, ignore=("lm_head",)),
    "W4 asymmetric channel": weights(4, symmetric=False, ignore=("lm_head",)),
    "all layers": weights(8, "Linear", "Embedding"),
}
SCHEMES = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
TABLES = (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_compressed(compressed_llama(LLAMA_CONFIGS["W4A16 group"]), tmp_path / "x")
    return tmp_path / "x"


def plain(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def entries() -> list[Any]:
    return [table["compressed-tensors"] for table in TABLES]


def held_bytes(model: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def problems_of(error: Exception) -> dict[str, str]:
    return {problem.place: problem.message for problem in error.problems}


# What runs -----------------------------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.usefixtures("enabled")
def test_from_pretrained_runs_packed(config: Any, tmp_path: Path) -> None:
    model = compressed_llama(config)
    save_compressed(model, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    loaded = plain(tmp_path / "x")
    assert compressed_modules(loaded).keys() == compressed_modules(model).keys()
    assert_same_bits(logits(loaded), logits(model))
    # Also after it has run, which is when transformers' own goes dense.
    assert_same_tensors(loaded.state_dict(), stored)
    assert held_bytes(loaded) == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


@SCHEMES
@pytest.mark.usefixtures("enabled")
def test_what_the_peer_writes_runs_packed(config: Any, tmp_path: Path) -> None:
    """Among these are those that compressed-tensors cannot load itself."""
    config = config if isinstance(config, QuantizationConfig) else QuantizationConfig.from_dict(config)
    rounded = compress_with_peer(tiny_llama(), config.to_dict(), tmp_path / "x")
    loaded = plain(tmp_path / "x")
    assert len(compressed_modules(loaded)) == len(rounded) >= 14
    for name, weight in rounded.items():
        # Rounding to a negative zero is rounding to zero.
        found = loaded.get_submodule(name.removesuffix(".weight")).dequantized_weight() + 0.0
        assert_same_bits(found, weight + 0.0, name)
    if all(scheme.input_activations is None for scheme in config.config_groups.values()):
        dense = tiny_llama()
        dense.load_state_dict(rounded, strict=False)
        expected = logits(dense)
        assert (logits(loaded) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.usefixtures("enabled")
def test_both_ways_share_one_quantizer(folder: Path) -> None:
    ours, theirs = load_compressed(folder), plain(folder)
    assert type(ours.hf_quantizer) is type(theirs.hf_quantizer)
    assert ours.quantization_method == theirs.quantization_method == "compressed-tensors"
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert_same_tensors(ours.state_dict(), theirs.state_dict())


@pytest.mark.usefixtures("enabled")
def test_a_pipeline_runs_packed(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)
    generate = transformers.pipeline("text-generation", model=str(folder))
    assert len(compressed_modules(generate.model)) == 14
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    text = generate("w7 w14 w21", **arguments)[0]["generated_text"]
    tokens = load_compressed(folder).generate(torch.tensor([[7, 14, 21]]), max_new_tokens=5, do_sample=False)
    assert text.split() == [f"w{token}" for token in tokens[0, 3:].tolist()]


WITHOUT_PEER = """
import sys
sys.modules["compressed_tensors"] = None  # what is not installed
import json, warnings
import torch, transformers
from transformers.utils import is_compressed_tensors_available
from compressed_format import CompressedFormatError, compress, enable_transformers
from compressed_format.modules.base import compressed_modules
assert not is_compressed_tensors_available()
torch.set_num_threads(1)
folder, dense, unserved, config = sys.argv[1:]
config = json.loads(config)
enable_transformers()
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(folder)
assert len(compressed_modules(model)) == 14
tokens = model.generate(torch.arange(8).reshape(1, 8), max_new_tokens=4, do_sample=False, pad_token_id=0)
compressed = load(dense, quantization_config=config)
expected = compress(load(dense), config).state_dict()
assert all(torch.equal(expected[name], tensor) for name, tensor in compressed.state_dict().items())
try:
    load(unserved)
except CompressedFormatError as error:
    assert "compressed-tensors, with which transformers could load it, is not installed" in str(error), error
    assert "nvfp4-pack-quantized" in str(error), error
else:
    raise AssertionError
print(json.dumps(tokens.tolist()))
"""


def test_compressed_tensors_need_not_be_installed(folder: Path, tmp_path: Path) -> None:
    expected = load_compressed(folder).generate(
        torch.arange(8).reshape(1, 8), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_llama().save_pretrained(tmp_path / "unserved")
    content = read_config(tmp_path / "unserved") | {"quantization_config": NVFP4}
    (tmp_path / "unserved" / "config.json").write_text(json.dumps(content))
    config = json.dumps(LLAMA_CONFIGS["W4A16 group"].to_dict())
    folders = [str(folder), str(tmp_path / "dense"), str(tmp_path / "unserved")]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEER, *folders, config],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("enabled")
def test_dtype_and_device_map_are_transformers_own(folder: Path, dtype: torch.dtype) -> None:
    model = plain(folder, dtype=dtype, device_map="cpu")
    reference = load_compressed(folder, dtype=dtype)
    assert model.get_submodule(LAYER).dtype is dtype
    assert_same_tensors(model.state_dict(), reference.state_dict())
    assert_same_bits(logits(model), logits(reference))


@pytest.mark.usefixtures("enabled")
def test_a_quantized_projection_of_few_rows(tmp_path: Path) -> None:
    """Zero points of eight rows are one row of words, over which compressed-tensors trips."""
    config = weights(4, strategy="group", group_size=32, symmetric=False, ignore=("lm_head",))
    fields = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
    model = compressed_llama(config, **fields)
    expected = logits(model)
    save_compressed(model, tmp_path / "x")
    assert read_tensors(tmp_path / "x")["model.layers.0.self_attn.k_proj.weight_zero_point"].shape == (1, 4)
    assert_same_bits(logits(plain(tmp_path / "x")), expected)
    dense = plain(tmp_path / "x", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert (logits(dense) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.usefixtures("enabled")
def test_activations_are_rounded_token_by_token_in_any_rank(tmp_path: Path) -> None:
    save_compressed(compressed_llama(LLAMA_CONFIGS["W8A8"]), tmp_path / "x")
    layer = plain(tmp_path / "x").get_submodule(LAYER)
    values = torch.linspace(-1, 1, 6 * 128).reshape(2, 3, 128) * torch.logspace(-3, 3, 6).reshape(2, 3, 1)
    assert_same_bits(layer(values.reshape(6, 128)).reshape(2, 3, -1), layer(values))
    alone = torch.stack([layer(row) for row in values.reshape(6, 128)]).reshape(2, 3, -1)
    torch.testing.assert_close(layer(values), alone, rtol=1e-4, atol=1e-5)


# How configs may be written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [None, "frozen", "initialized"])
@pytest.mark.usefixtures("enabled")
def test_the_status_does_not_decide_what_is_packed(status: str | None, folder: Path, tmp_path: Path) -> None:
    expected = logits(load_compressed(folder))
    content = read_config(folder)
    content["quantization_config"].pop("quantization_status")
    if status is not None:
        content["quantization_config"]["quantization_status"] = status
    (folder / "config.json").write_text(json.dumps(content))
    model = plain(folder)
    assert_same_bits(logits(model), expected)
    model.save_pretrained(tmp_path / "y")
    assert read_config(tmp_path / "y")["quantization_config"]["quantization_status"] == "compressed"


@pytest.mark.usefixtures("enabled")
def test_a_minimal_config(folder: Path) -> None:
    expected = logits(load_compressed(folder))
    minimal = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
        },
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"quantization_config": minimal}))
    assert_same_bits(logits(plain(folder)), expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.usefixtures("enabled")
def test_the_integers_of_weight_shape(dtype: torch.dtype, folder: Path) -> None:
    expected = logits(load_compressed(folder))
    edit_tensors(folder, **{f"{LAYER}.weight_shape": torch.tensor([256, 128], dtype=dtype)})
    assert_same_bits(logits(plain(folder)), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("enabled")
def test_the_floats_of_scales(dtype: torch.dtype, folder: Path) -> None:
    scale = read_tensors(folder)[f"{LAYER}.weight_scale"].to(dtype)
    edit_tensors(folder, **{f"{LAYER}.weight_scale": scale})
    model = plain(folder)
    assert model.get_submodule(LAYER).weight_scale.dtype is dtype
    assert_same_bits(logits(model), logits(load_compressed(folder)))


@pytest.mark.usefixtures("enabled")
def test_problems_of_the_config_are_warnings(folder: Path) -> None:
    content = read_config(folder)
    content["quantization_config"]["kv_cache_schema"] = content["quantization_config"].pop("kv_cache_scheme")
    (folder / "config.json").write_text(json.dumps(content))
    with recorded_warnings() as texts:
        plain(folder)
    assert texts == ["kv_cache_schema: unknown key, did you mean kv_cache_scheme?"]


# What does not fit ---------------------------------------------------------------------------------------------------


def drop(suffix: str) -> dict[str, Any]:
    return {"drop": (f"{LAYER}.{suffix}",)}


@pytest.mark.parametrize(
    ("tensors", "config", "place", "message"),
    [
        (drop("weight_scale"), {}, f"{LAYER}.weight_scale", "is missing from the checkpoint"),
        (drop("weight_packed"), {}, f"{LAYER}.weight_packed", "is missing from the checkpoint"),
        (drop("weight_shape"), {}, f"{LAYER}.weight_shape", "is missing from the checkpoint"),
        (
            {f"{LAYER}.weight_scale": torch.ones(256)},
            {},
            f"{LAYER}.weight_scale",
            "has shape [256], expected [256, 4]",
        ),
        (
            {f"{LAYER}.weight_packed": torch.zeros(256, 16, dtype=torch.int64)},
            {},
            f"{LAYER}.weight_packed",
            "has dtype int64, expected int32",
        ),
        (
            {f"{LAYER}.weight_zero_point": torch.ones(256, 4, dtype=torch.int8)},
            {},
            f"{LAYER}.weight_zero_point",
            "holds zero points that are not zero, but the scheme is symmetric",
        ),
        (
            {f"{LAYER}.weight_zero_point": torch.full((32, 4), 0x77777777, dtype=torch.int32)},
            {},
            f"{LAYER}.weight_zero_point",
            "holds zero points that are not zero, but the scheme is symmetric",
        ),
        (
            {},
            {"config_groups": weights(4, "re:.*down_proj", strategy="group", group_size=32)["config_groups"]},
            f"{LAYER}.weight_packed",
            f"is in the checkpoint, but no target of the config reaches {LAYER}, which would stay random",
        ),
        ({}, {"ignore": []}, "lm_head.weight", "is stored dense, but its class is"),
    ],
    ids=["no scale", "no codes", "no shape", "1-D scale", "wrong dtype", "zero points", "packed zero points",
         "wrong targets", "dense head not ignored"],
)  # fmt: skip
@pytest.mark.usefixtures("enabled")
def test_what_does_not_fit_is_an_error_and_never_random(
    tensors: dict[str, Any], config: dict[str, Any], place: str, message: str, folder: Path
) -> None:
    edit_tensors(folder, **tensors)
    edit_config(folder, quantization_config=config)
    with pytest.raises(CheckpointError, match="x does not fit the model LlamaForCausalLM") as caught:
        plain(folder)
    assert message in problems_of(caught.value)[place]
    with pytest.raises(CheckpointError) as caught:
        load_compressed(folder)
    assert place in problems_of(caught.value)


@pytest.mark.usefixtures("enabled")
def test_all_problems_are_one_error(folder: Path) -> None:
    edit_tensors(folder, drop=(f"{LAYER}.weight_scale", "model.layers.1.mlp.down_proj.weight_shape"))
    with pytest.raises(CheckpointError) as caught:
        plain(folder)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("zero", [torch.zeros(256, 4, dtype=torch.int8),
                                  torch.full((32, 4), 0x88888888 - 2**32, dtype=torch.int32)])  # fmt: skip
@pytest.mark.usefixtures("enabled")
def test_zero_points_that_are_zero_mean_nothing(zero: torch.Tensor, folder: Path) -> None:
    expected = logits(load_compressed(folder))
    edit_tensors(folder, **{f"{LAYER}.weight_zero_point": zero})
    assert_same_bits(logits(plain(folder)), expected)


@pytest.mark.usefixtures("enabled")
def test_values_that_contradict_the_format(folder: Path) -> None:
    scale = read_tensors(folder)[f"{LAYER}.weight_scale"]
    scale[3, 1] = torch.nan
    edit_tensors(folder, **{f"{LAYER}.weight_scale": scale})
    model = plain(folder)
    with pytest.raises(FormatError) as caught:
        logits(model)
    assert problems_of(caught.value) == {f"{LAYER}.weight_scale": "holds nan at index [3, 1], expected a finite scale"}


@pytest.mark.usefixtures("enabled")
def test_a_missing_bias(tmp_path: Path) -> None:
    save_compressed(compressed_llama(LLAMA_CONFIGS["W4A16 group"], attention_bias=True), tmp_path / "x")
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_tensors(tmp_path / "x", drop=(name,))
    with pytest.raises(CheckpointError) as caught:
        plain(tmp_path / "x")
    assert problems_of(caught.value) == {name: "is missing from the checkpoint"}


@pytest.mark.usefixtures("enabled")
def test_a_plain_tensor_of_another_shape(folder: Path) -> None:
    """Releases before 5.23 load it as it is where there is a quantizer."""
    edit_tensors(folder, **{"model.norm.weight": torch.ones(127)})
    with pytest.raises((CheckpointError, RuntimeError)):
        plain(folder)


# Models that are not quite the checkpoint's --------------------------------------------------------------------------


@pytest.mark.usefixtures("enabled")
def test_a_new_head_is_left_to_transformers(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, quantization_config={"ignore": []})
    edit_tensors(folder, drop=("lm_head.weight",))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    assert type(model.score) is torch.nn.Linear
    assert len(compressed_modules(model)) == 14
    model.save_pretrained(tmp_path / "y")
    assert "score" in read_config(tmp_path / "y")["quantization_config"]["ignore"]
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "y")
    assert_same_tensors(again.state_dict(), model.state_dict())


@pytest.mark.usefixtures("enabled")
def test_the_model_without_its_head(tmp_path: Path) -> None:
    """Its head is quantized, and nothing of the model has room for it."""
    model = compressed_llama(weights(8))
    save_compressed(model, tmp_path / "x")
    base = transformers.AutoModel.from_pretrained(tmp_path / "x")
    assert_same_tensors(base.state_dict(), model.model.state_dict())


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:ignore. .lm_head. matches no module")
def test_what_a_model_without_its_head_misses_is_not_random(folder: Path) -> None:
    place = "model.layers.0.self_attn.q_proj"
    edit_tensors(folder, drop=tuple(name for name in read_tensors(folder) if name.startswith(place)))
    with pytest.raises(CheckpointError) as caught:
        transformers.AutoModel.from_pretrained(folder)
    assert all(problem.place.startswith("layers.0.self_attn.q_proj.") for problem in caught.value.problems)


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:ignore. .cls.predictions.decoder. matches no module")
def test_a_layer_that_the_saved_class_has_not(tmp_path: Path) -> None:
    """A pooler is part of the base model, but of that of a masked language model it is not."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=VOCABULARY)).eval()
    save_compressed(compress(model, weights(8, ignore=("cls.predictions.decoder",))), tmp_path / "x")
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "x")
    assert type(loaded.bert.pooler.dense) is type(loaded.classifier) is torch.nn.Linear
    assert_same_tensors(loaded.bert.encoder.state_dict(), model.bert.encoder.state_dict())


# Mixtures of experts -------------------------------------------------------------------------------------------------

EXPERTS = {name: CONFIGS[name] for name in ("W4A16 group", "W4 asymmetric group", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK")}


@pytest.fixture
def mixtral() -> Any:
    torch.manual_seed(0)
    fields = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.MixtralConfig(
        **fields, vocab_size=VOCABULARY, num_local_experts=3, num_key_value_heads=2, tie_word_embeddings=False
    )
    return transformers.MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("config", EXPERTS.values(), ids=EXPERTS.keys())
@pytest.mark.usefixtures("enabled")
def test_experts_run_packed(config: Any, mixtral: Any, tmp_path: Path) -> None:
    model = compress(mixtral, config)
    model.save_pretrained(tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    loaded = plain(tmp_path / "x")
    assert_same_bits(logits(loaded), logits(model))
    assert held_bytes(loaded) == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    loaded.save_pretrained(tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), stored)
    dense = plain(tmp_path / "x", quantization_config=CompressedTensorsConfig(dequantize=True))
    assert_same_tensors(dense.state_dict(), decompress(load_compressed(tmp_path / "x")).state_dict())


@pytest.mark.usefixtures("enabled")
def test_experts_that_do_not_fit(mixtral: Any, tmp_path: Path) -> None:
    compress(mixtral, CONFIGS["W4A16 group"]).save_pretrained(tmp_path / "x")
    edit_config(tmp_path / "x", quantization_config={"ignore": ["lm_head", "re:.*experts.*"]})
    with pytest.raises(CheckpointError) as caught:
        plain(tmp_path / "x")
    found = problems_of(caught.value)
    assert len(found) == 9
    place = "model.layers.0.mlp.experts.2.up_proj"
    assert f"no target of the config reaches {place}" in found[f"{place}.weight_packed"]
    edit_config(tmp_path / "x", quantization_config={"ignore": ["lm_head"]})
    (lost,) = (name for name in read_tensors(tmp_path / "x") if name.endswith("experts.1.w3.weight_scale"))
    edit_tensors(tmp_path / "x", drop=(lost,))
    with pytest.raises(CheckpointError) as caught:
        plain(tmp_path / "x")
    assert "is missing" in problems_of(caught.value)["model.layers.0.mlp.experts.1.up_proj.weight_scale"]


# What loading can be told --------------------------------------------------------------------------------------------


@SCHEMES
@pytest.mark.parametrize(
    "argument", [{"dequantize": True}, {"run_compressed": False}], ids=lambda value: next(iter(value))
)
@pytest.mark.usefixtures("enabled")
def test_dequantized(config: Any, argument: dict[str, bool], tmp_path: Path) -> None:
    save_compressed(compressed_llama(config, torch.bfloat16), tmp_path / "x")
    dense = plain(tmp_path / "x", quantization_config=CompressedTensorsConfig(**argument))
    assert not compressed_modules(dense)
    expected = decompress(load_compressed(tmp_path / "x"))
    assert_same_tensors(dense.state_dict(), expected.state_dict())
    assert_same_bits(logits(dense), logits(expected))
    assert not hasattr(dense.config, "quantization_config")
    assert not getattr(dense, "is_quantized", False)
    assert getattr(dense, "hf_quantizer", None) is None
    dense.save_pretrained(tmp_path / "y")
    assert "quantization_config" not in read_config(tmp_path / "y")
    assert_same_tensors(plain(tmp_path / "y").state_dict(), dense.state_dict())


@pytest.mark.usefixtures("enabled")
def test_a_loaded_model_can_be_dequantized(folder: Path) -> None:
    dense = plain(folder).dequantize()
    assert_same_tensors(dense.state_dict(), decompress(load_compressed(folder)).state_dict())
    assert not hasattr(dense.config, "quantization_config")


@pytest.mark.usefixtures("enabled")
def test_load_compressed_is_told_by_its_own_arguments(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"takes no quantization_config: .* decompress\(\) the loaded model"):
        load_compressed(folder, quantization_config=CompressedTensorsConfig(dequantize=True))
    with pytest.raises(TypeError, match="takes no key_mapping: packed tensors find their modules by the names"):
        load_compressed(folder, key_mapping={"^old": "model"})


@pytest.mark.usefixtures("enabled")
def test_scales_of_the_cache_are_kept(folder: Path, tmp_path: Path) -> None:
    expected = logits(load_compressed(folder))
    scales = {
        f"model.layers.{layer}.self_attn.{part}_scale": torch.tensor([0.5]) for layer in range(2) for part in "kv"
    }
    edit_tensors(folder, **scales)
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    edit_config(folder, quantization_config={"kv_cache_scheme": cache})
    with pytest.warns(CompressedFormatWarning, match="4 KV-cache scales are kept in the state dict, but not applied"):
        model = plain(folder)
    assert_same_bits(logits(model), expected)
    model.save_pretrained(tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(folder))


@pytest.mark.usefixtures("enabled")
def test_optimized_inference_is_what_there_is_anyway(folder: Path) -> None:
    with pytest.warns(CompressedFormatWarning, match="use_optimized_inference means nothing here"):
        model = plain(folder, quantization_config=CompressedTensorsConfig(use_optimized_inference=True))
    assert len(compressed_modules(model)) == 14


# What is not served --------------------------------------------------------------------------------------------------

NVFP4 = {
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
        "dynamic": False, "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}}},
    "format": "nvfp4-pack-quantized", "ignore": ["lm_head"], "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip
R4 = {"R4": {"type": "hadamard", "apply": [{"targets": ["re:.*down_proj$"], "location": "input"}]}}


def test_mx_formats_go_to_the_original(tmp_path: Path) -> None:
    """And come out as they do without this library."""
    args = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    group = {"targets": ["Linear"], "weights": args, "format": "mxfp8-quantized"}
    config = {"config_groups": {"group_0": group}, "format": "mxfp8-quantized", "ignore": ["lm_head"]}
    compress_with_peer(tiny_llama(torch.bfloat16), config, tmp_path / "x")
    expected = plain(tmp_path / "x")
    with enable_transformers():
        with pytest.warns(CompressedFormatWarning, match="cannot be run packed here: config_groups.group_0: .*mxfp8"):
            model = plain(tmp_path / "x")
        assert type(model.hf_quantizer) is type(expected.hf_quantizer)
        assert_same_bits(logits(model), logits(expected))
        arguments = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
        with pytest.warns(CompressedFormatWarning, match="mxfp8"):
            model = plain(tmp_path / "x", **arguments)
        assert not hasattr(model.config, "quantization_config")


def test_what_transformers_saved_after_running_goes_to_the_original(folder: Path, tmp_path: Path) -> None:
    """Its own models go dense when they run, and are saved that way."""
    model = plain(folder)
    expected = logits(model)
    model.save_pretrained(tmp_path / "y")
    assert read_config(tmp_path / "y")["quantization_config"]["quantization_status"] == "decompressed"
    with enable_transformers(), pytest.warns(CompressedFormatWarning, match="quantization_status: is decompressed"):
        again = plain(tmp_path / "y")
    assert_same_bits(logits(again), expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transform_config": {"config_groups": R4}}, "an online transform at input"),
        (
            {"config_groups": {"attention": {"targets": ["LlamaAttention"], "input_activations": {
                "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}}}},
            "config_groups.attention: its target LlamaAttention quantizes attention",
        ),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "later": 1}}}}, "later"),
    ],
    ids=["online transform", "attention", "keys of another release"],
)  # fmt: skip
def test_what_is_not_served_goes_to_the_original(
    changes: dict[str, Any], reason: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_config(folder, quantization_config=changes)

    seen: list[Any] = []

    def original(config: Any, *, pre_quantized: bool) -> Any:
        seen.append((config.content, config.dequantize, pre_quantized))
        raise InterruptedError

    def from_dict(content: dict[str, Any]) -> Any:
        return SimpleNamespace(content=content)

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "compressed-tensors", original)
    monkeypatch.setattr(AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"], "from_dict", from_dict)
    with (
        enable_transformers(),
        pytest.warns(CompressedFormatWarning, match=reason),
        pytest.raises(InterruptedError),
    ):
        plain(folder)
    assert seen == [(read_config(folder)["quantization_config"], False, True)]


# The switch ----------------------------------------------------------------------------------------------------------


def test_what_was_there_comes_back(folder: Path) -> None:
    before = entries()
    enable_transformers()
    inside = entries()
    enable_transformers()
    assert entries() == inside
    assert not set(map(id, inside)) & set(map(id, before))
    disable_transformers()
    assert entries() == before
    disable_transformers()
    assert entries() == before
    assert not compressed_modules(plain(folder))


def test_as_a_context() -> None:
    before = entries()
    with enable_transformers():
        inside = entries()
        with enable_transformers():
            assert entries() == inside
        assert entries() == inside
        with pytest.raises(ZeroDivisionError), enable_transformers():
            raise ZeroDivisionError
        assert entries() == inside
    assert entries() == before


def test_blocks_that_overlap() -> None:
    """As those of two threads, of which neither takes the switch away from the other."""
    before = entries()
    first, second = ExitStack(), ExitStack()
    first.enter_context(enable_transformers())
    inside = entries()
    second.enter_context(enable_transformers())
    first.close()
    assert entries() == inside
    second.close()
    assert entries() == before


def test_what_somebody_else_has_put_there_since_stays() -> None:
    before, other = entries(), object()
    try:
        enable_transformers()
        AUTO_QUANTIZER_MAPPING["compressed-tensors"] = other
        disable_transformers()
        assert entries() == [other, before[1]]
        disable_transformers()
        assert entries() == [other, before[1]]
    finally:
        AUTO_QUANTIZER_MAPPING["compressed-tensors"] = before[0]


def test_models_outlive_the_switch(folder: Path, tmp_path: Path) -> None:
    with enable_transformers():
        model = plain(folder)
    expected = logits(model)
    model.save_pretrained(tmp_path / "y")
    assert_same_bits(logits(load_compressed(tmp_path / "y")), expected)


def test_compress_is_the_same_whether_enabled_or_not(tmp_path: Path) -> None:
    with enable_transformers():
        model = compress(tiny_llama(), LLAMA_CONFIGS["W4A16 group"])
    assert_same_tensors(model.state_dict(), compressed_llama(LLAMA_CONFIGS["W4A16 group"]).state_dict())
