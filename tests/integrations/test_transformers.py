"""load_compressed through transformers: what passes through, what it must not change, and what does not fit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from compressed_format import (
    CheckpointError,
    CompressedFormatWarning,
    CompressedLinear,
    FormatError,
    UnsupportedFormatError,
    compress,
    load_compressed,
    save_compressed,
)
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_bits, assert_same_tensors
from tests.models import (
    LLAMA_CONFIGS,
    compressed_llama,
    edit_config,
    edit_tensors,
    file_backed,
    logits,
    read_config,
    read_tensors,
    recorded_warnings,
    token_ids,
    weights,
)

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
)

CONFIG = weights(8, ignore=("lm_head",))
HEAD, LAYER = "lm_head", "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_compressed(compressed_llama(CONFIG), tmp_path / "x")
    return tmp_path / "x"


def problems_of(error: Exception) -> dict[str, str]:
    return {problem.place: problem.message for problem in error.problems}


def test_nothing_is_left_random_or_on_meta(folder: Path) -> None:
    model = load_compressed(folder)
    assert_same_tensors(model.state_dict(), read_tensors(folder))
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert len(compressed_modules(model)) == 14
    assert not model.training
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(".weight_" in name for name in trainable)


def test_tensors_are_mapped_from_the_file(tmp_path: Path) -> None:
    save_compressed(compressed_llama(CONFIG), tmp_path / "x", max_shard_size="200KB")
    model = load_compressed(tmp_path / "x", device="cpu")
    shards = {str(shard) for shard in (tmp_path / "x").glob("*.safetensors")}
    assert len(shards) > 1
    assert {file_backed(tensor) for tensor in model.state_dict().values()} == shards


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_what_is_not_packed(folder: Path, dtype: torch.dtype) -> None:
    stored = read_tensors(folder)
    model = load_compressed(folder, dtype=dtype)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (stored[name].dtype if ".weight_" in name else dtype), name
    assert model.dtype == dtype
    assert model.get_submodule(LAYER).weight.dtype == dtype
    exact = logits(load_compressed(folder))
    assert logits(model).dtype == dtype
    assert (logits(model) - exact).abs().max() < 0.05 * exact.abs().max()


def test_without_dtype_everything_is_as_stored(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["W4A16 group"], torch.bfloat16, attention_bias=True)
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x")
    assert_same_tensors(loaded.state_dict(), read_tensors(tmp_path / "x"))
    assert loaded.dtype is torch.bfloat16
    assert loaded.get_submodule(LAYER).weight.dtype is torch.bfloat16
    assert_same_bits(logits(loaded), logits(model))
    wide = load_compressed(tmp_path / "x", dtype=torch.float32)
    attention = wide.model.layers[0].self_attn.q_proj
    assert (attention.bias.dtype, attention.weight_scale.dtype) == (torch.float32, torch.bfloat16)


def test_arguments_reach_from_pretrained(folder: Path) -> None:
    eager, sdpa = (load_compressed(folder, attn_implementation=name) for name in ("eager", "sdpa"))
    assert eager.config._attn_implementation == "eager"
    assert sdpa.config._attn_implementation == "sdpa"
    torch.testing.assert_close(logits(eager), logits(sdpa))
    spread = load_compressed(folder, device_map="cpu")
    assert_same_bits(logits(spread), logits(sdpa))
    assert isinstance(spread.get_submodule(LAYER), CompressedLinear)


def test_the_architecture_is_the_config_s(tmp_path: Path) -> None:
    """Not every model is a causal language model."""
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**fields, vocab_size=64, num_labels=3, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    save_compressed(compress(model, weights(8, ignore=("score",))), tmp_path / "x")
    loaded = load_compressed(tmp_path / "x")
    assert type(loaded) is transformers.LlamaForSequenceClassification
    ids = token_ids() % 64
    with torch.no_grad():
        assert_same_bits(loaded(ids).logits, model(ids).logits)


def test_transformers_own_quantizer_stays_what_it_is(folder: Path) -> None:
    def stock() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert not compressed_modules(model)
        return type(model.hf_quantizer)

    before = stock()
    assert before.__module__ == "transformers.quantizers.quantizer_compressed_tensors"
    tables = AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
    entries = [table["compressed-tensors"] for table in tables]
    load_compressed(folder)
    with pytest.raises(CheckpointError):
        load_compressed(folder / "missing")
    assert [table["compressed-tensors"] for table in tables] == entries
    assert stock() is before


def test_the_config_of_a_loaded_model_is_written_as_compressed_tensors(folder: Path, tmp_path: Path) -> None:
    model = load_compressed(folder)
    as_text = json.loads(model.config.to_json_string())
    written = read_config(folder)["quantization_config"]
    assert as_text["quantization_config"] == written
    assert model.config.to_dict()["quantization_config"] == written
    assert copy.deepcopy(model.config).to_dict()["quantization_config"] == written
    model.config.save_pretrained(tmp_path / "config")
    assert read_config(tmp_path / "config")["quantization_config"] == written


def test_save_pretrained_writes_a_file_that_everybody_loads(folder: Path, tmp_path: Path) -> None:
    model = load_compressed(folder)
    expected = logits(model)  # saving after running is what goes wrong elsewhere
    model.save_pretrained(tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(folder))
    assert_same_bits(logits(load_compressed(tmp_path / "y")), expected)
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "y"))
    assert (theirs - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_same_tokens_in_a_fresh_process(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["W4A16 group"], torch.bfloat16)
    save_compressed(model, tmp_path / "x")
    here = model.generate(token_ids(), max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    program = (
        "import json, sys, torch\n"
        "from compressed_format import load_compressed\n"
        "model = load_compressed(sys.argv[1])\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)\n"
        "print(json.dumps(tokens.tolist()))\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "x"), json.dumps(token_ids().tolist())]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    there = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert json.loads(there) == here
    assert len(here[0]) == token_ids().shape[1] + 8


# Names that transformers changes -------------------------------------------------------------------------------------


def tiny_llava() -> Any:
    """A model whose checkpoints say ``language_model.lm_head`` for what it calls ``lm_head``, and so on."""
    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=LlamaConfig(**text, vocab_size=256),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=32),
        image_token_index=255,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "ignore",
    [
        ("lm_head", "re:.*vision_tower.*", "re:.*multi_modal.*"),
        ("lm_head", "re:model.vision_tower", "re:model.multi_modal"),
    ],
    ids=["patterns for both namings", "patterns for the model's names"],
)
def test_names_in_the_config_are_those_of_the_checkpoint_and_of_the_model(
    ignore: tuple[str, ...], tmp_path: Path
) -> None:
    exact = "model.language_model.layers.0.self_attn.v_proj"
    config = weights(8, ignore=ignore)
    config["config_groups"]["exact"] = {"targets": [exact], "weights": {"num_bits": 4, "strategy": "channel"}}
    with recorded_warnings():  # of the value's scheme, which differs from the query's and the key's
        model = compress(tiny_llava(), config)
    expected = logits(model)
    save_compressed(model, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    written = read_config(tmp_path / "x")["quantization_config"]
    assert "language_model.lm_head.weight" in stored
    assert {"lm_head", "language_model.lm_head", "multi_modal_projector.linear_1"} <= set(written["ignore"])
    assert set(written["config_groups"]["exact"]["targets"]) == {exact, exact.removeprefix("model.").replace(
        "language_model.", "language_model.model.")}  # fmt: skip

    with recorded_warnings() as texts:
        loaded = load_compressed(tmp_path / "x")
    assert not [text for text in texts if "matches no module" in text]
    assert_same_bits(logits(loaded), expected)
    loaded.save_pretrained(tmp_path / "y")
    save_compressed(loaded, tmp_path / "z")
    for folder in ("y", "z"):
        assert_same_tensors(read_tensors(tmp_path / folder), stored)
        again = read_config(tmp_path / folder)["quantization_config"]
        assert set(written["ignore"]) <= set(again["ignore"])
        with recorded_warnings():
            assert_same_bits(logits(load_compressed(tmp_path / folder)), expected)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "x")
    assert (logits(theirs) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_file_that_knows_the_checkpoint_s_names_only(tmp_path: Path) -> None:
    model = compress(tiny_llava(), weights(8, ignore=("lm_head", "re:.*vision_tower.*", "re:.*multi_modal.*")))
    save_compressed(model, tmp_path / "x")
    ignore = ["language_model.lm_head", "re:vision_tower.*", "re:multi_modal.*"]
    edit_config(tmp_path / "x", quantization_config={"ignore": ignore})
    assert_same_bits(logits(load_compressed(tmp_path / "x")), logits(model))


def test_the_prefix_of_the_base_model_may_be_missing(folder: Path, tmp_path: Path) -> None:
    expected = logits(load_compressed(folder))
    stored = {name.removeprefix("model."): tensor for name, tensor in read_tensors(folder).items()}
    save_file(stored, folder / "model.safetensors")
    edit_config(folder, quantization_config={"ignore": ["lm_head", "layers.0.mlp.up_proj", "layers.0.mlp.gate_proj"]})
    with pytest.raises(CheckpointError) as caught:
        load_compressed(folder)
    assert set(problems_of(caught.value)) == {
        f"{prefix}layers.0.mlp.{module}.{suffix}"
        for module in ("gate_proj", "up_proj")
        for prefix, suffix in (("model.", "weight"), ("", "weight_packed"), ("", "weight_scale"), ("", "weight_shape"))
    }
    edit_config(folder, quantization_config={"ignore": ["lm_head"]})
    loaded = load_compressed(folder)
    assert_same_bits(logits(loaded), expected)


def test_experts_that_stay_dense_are_saved_one_by_one(tmp_path: Path) -> None:
    """They are one tensor in memory and many in the file."""
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(**fields, vocab_size=256, num_local_experts=2, num_key_value_heads=2)
    model = compress(transformers.MixtralForCausalLM(config).eval(), weights(8, "re:.*self_attn.*"))
    save_compressed(model, tmp_path / "x")
    model.save_pretrained(tmp_path / "y")
    stored = read_tensors(tmp_path / "x")
    assert sum(".experts." in name and tensor.dim() == 2 for name, tensor in stored.items()) == 6
    assert_same_tensors(read_tensors(tmp_path / "y"), stored)
    assert_same_bits(logits(load_compressed(tmp_path / "y")), logits(model))


# What does not fit ---------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_one_error(folder: Path) -> None:
    edit_tensors(
        folder,
        drop=("model.norm.weight", f"{LAYER}.weight_scale"),
        **{
            "model.more.weight": torch.zeros(3),
            "model.layers.0.input_layernorm.weight": torch.zeros(127),
            "model.layers.1.input_layernorm.weight": torch.zeros(128, dtype=torch.int32),
            "lm_head.weight": torch.zeros(256, 128, dtype=torch.float8_e4m3fn),
            "model.layers.1.mlp.up_proj.weight_packed": torch.zeros(256, 31, dtype=torch.int32),
            "model.layers.1.mlp.down_proj.weight_packed": torch.zeros(128, 64, dtype=torch.int64),
        },
    )
    with pytest.raises(CheckpointError, match=r"x does not fit the model LlamaForCausalLM:\n") as caught:
        load_compressed(folder)
    assert problems_of(caught.value) == {
        "model.norm.weight": "is missing from the checkpoint",
        f"{LAYER}.weight_scale": 'is missing from the checkpoint (its class is "Linear", a target of group_0)',
        "model.more.weight": "is in the checkpoint, but the model has no such tensor",
        "model.layers.0.input_layernorm.weight": "has shape [127] in the checkpoint, and [128] in the model",
        "model.layers.1.input_layernorm.weight": "has dtype int32 in the checkpoint, expected float32",
        "lm_head.weight": "has dtype float8_e4m3fn in the checkpoint, expected float32",
        "model.layers.1.mlp.up_proj.weight_packed": "has shape [256, 31], expected [256, 32]",
        "model.layers.1.mlp.down_proj.weight_packed": "has dtype int64, expected int32",
    }


def test_a_dense_head_that_is_targeted_belongs_into_ignore(folder: Path) -> None:
    edit_config(folder, quantization_config={"ignore": []})
    with pytest.raises(CheckpointError) as caught:
        load_compressed(folder)
    assert problems_of(caught.value) == {
        "lm_head.weight": 'is stored dense, but its class is "Linear", a target of group_0; list lm_head in ignore'
    }


def test_a_tied_head_that_is_targeted_belongs_into_ignore(tmp_path: Path) -> None:
    save_compressed(compressed_llama(CONFIG, tie_word_embeddings=True), tmp_path / "x")
    edit_config(tmp_path / "x", quantization_config={"ignore": []})
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x")
    assert problems_of(caught.value) == {
        "lm_head.weight": "is that of model.embed_tokens, which is stored dense, but its class is "
        '"Linear", a target of group_0; list lm_head in ignore'
    }


def test_values_that_contradict_the_format(folder: Path) -> None:
    scale = "model.layers.1.mlp.up_proj.weight_scale"
    edit_tensors(folder, **{scale: torch.full((256, 1), torch.inf)})
    model = load_compressed(folder)  # which reads no scales; whoever computes with them does
    with pytest.raises(FormatError) as caught:
        model(token_ids())
    assert problems_of(caught.value) == {scale: "holds inf at index [0, 0], expected a finite scale"}
    edit_tensors(folder, **{f"{LAYER}.weight_shape": torch.tensor([128, 256])})
    with pytest.raises(FormatError, match="contradicts itself") as caught:
        load_compressed(folder)
    message = "says [128, 256], but the module's weight is [256, 128]"
    assert problems_of(caught.value) == {f"{LAYER}.weight_shape": message}


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        (
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float",
              "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}}}},
            LAYER,
            "nvfp4-pack-quantized",
        ),
        (
            {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": [
                {"targets": ["re:.*down_proj$"], "location": "input"}]}}}},
            "transform_config.config_groups.R4",
            "an online transform at input of re:.*down_proj$ cannot be run yet",
        ),
        (
            {"config_groups": {**CONFIG["config_groups"], "group_1": {"targets": ["LlamaAttention"],
              "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}}}},
            "model.layers.0.self_attn",
            "the group group_1 quantizes attention, which cannot be run yet",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings(
    # Said of the attention before the model is refused.
    "ignore:.*quantized activations.*are kept:compressed_format.CompressedFormatWarning"
)
def test_what_cannot_run_is_refused_by_feature_and_module(
    changes: dict[str, Any], place: str, message: str, folder: Path
) -> None:
    edit_config(folder, quantization_config={**changes, "format": None})
    with pytest.raises(UnsupportedFormatError) as caught:
        load_compressed(folder)
    assert message in problems_of(caught.value)[place]


@pytest.mark.parametrize("names", [("self_attn.k_scale", "self_attn.v_scale"),
                                   ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale")])  # fmt: skip
def test_scales_of_the_cache_are_kept(names: tuple[str, str], folder: Path, tmp_path: Path) -> None:
    expected = logits(load_compressed(folder))
    scales = {f"model.layers.{layer}.{name}": torch.tensor([0.5 + layer]) for layer in range(2) for name in names}
    edit_tensors(folder, **scales)
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    edit_config(folder, quantization_config={"kv_cache_scheme": cache})
    with pytest.warns(CompressedFormatWarning, match="4 KV-cache scales are kept in the state dict, but not applied"):
        model = load_compressed(folder, dtype=torch.bfloat16)
    state = model.state_dict()
    assert_same_tensors({name: state[name] for name in scales}, scales)
    assert not any(model.get_parameter(name).requires_grad for name in scales)
    with recorded_warnings():
        model = load_compressed(folder)
    assert_same_bits(logits(model), expected)
    save_compressed(model, tmp_path / "y", source=folder)
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(folder))
    assert read_config(tmp_path / "y")["quantization_config"]["kv_cache_scheme"]["num_bits"] == 8


def test_problems_of_the_config_are_warnings(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "compressed_tensors2"})
    with recorded_warnings() as texts:
        load_compressed(folder)
    assert len(texts) == 1
    assert texts[0].startswith("quant_method: must be")


def test_zero_points_of_symmetric_schemes_mean_nothing(folder: Path) -> None:
    expected = logits(load_compressed(folder))
    edit_tensors(folder, **{f"{LAYER}.weight_zero_point": torch.zeros(256, 1, dtype=torch.int8)})
    model = load_compressed(folder)
    assert f"{LAYER}.weight_zero_point" not in model.state_dict()
    assert_same_bits(logits(model), expected)


def test_a_model_class_that_transformers_does_not_know(folder: Path) -> None:
    edit_config(folder, model_type="unheard-of")
    with pytest.raises(CheckpointError, match=r"(?s)transformers cannot tell which model this is .*; pass model="):
        load_compressed(folder)
    edit_config(folder, model_type="llama", architectures=["UnheardOf"])
    assert type(load_compressed(folder)) is LlamaForCausalLM
