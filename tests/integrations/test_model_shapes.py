"""Shapes of models: encoders and decoders, tied and quantized embeddings, layers that are no Linear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from compressed_format import (
    CompressedEmbedding,
    QuantizationConfig,
    QuantizationError,
    TargetError,
    UnsupportedFormatError,
    compress,
    decompress,
    load_compressed,
    save_compressed,
)
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.peer import compress_with_peer
from tests.models import logits, read_config, read_tensors, recorded_warnings, tiny_llama, token_ids, weights

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
)

INT4 = weights(4, strategy="group", group_size=32, ignore=("lm_head",))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def held(model: nn.Module) -> int:
    """The bytes of all parameters and buffers, each memory once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


# Encoder and decoder -------------------------------------------------------------------------------------------------


def tiny_t5(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A T5, whose feed-forward layers cast what goes into ``wo`` to the dtype of its weight."""
    torch.manual_seed(0)
    fields = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 256}
    config = transformers.T5Config(**fields | {"decoder_start_token_id": 0, "dropout_rate": 0.0} | config)
    return transformers.T5ForConditionalGeneration(config).to(dtype).eval()


def tiny_whisper() -> Any:
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, vocab_size=256, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def t5_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": token_ids(), "decoder_input_ids": token_ids()[:, :5]}


def whisper_inputs() -> dict[str, torch.Tensor]:
    features = torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32)
    return {"input_features": features, "decoder_input_ids": token_ids()[:, :5]}


MODELS = {
    "T5": (tiny_t5, t5_inputs, "input_ids", weights(4, strategy="group", group_size=32, ignore=("lm_head",))),
    "T5 gated": (
        lambda: tiny_t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        t5_inputs,
        "input_ids",
        weights(4, strategy="group", group_size=32, symmetric=True, ignore=("lm_head",)),
    ),
    "Whisper": (
        tiny_whisper,
        whisper_inputs,
        "input_features",
        weights(4, strategy="group", group_size=32, ignore=("proj_out",)),
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_encoder_and_decoder(kind: str, dequantized: list[torch.Size], tmp_path: Path) -> None:
    build, inputs, first, config = MODELS[kind]
    model = build()
    before = held(model)
    model = compress(model, config)
    packed = compressed_modules(model)
    assert any(name.startswith("encoder") or ".encoder." in name for name in packed)
    assert any(name.startswith("decoder") or ".decoder." in name for name in packed)
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x")
    assert type(loaded) is type(model)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert loaded.generation_config.decoder_start_token_id == model.generation_config.decoder_start_token_id
    of_weights = sum(parameter.nbytes for module in packed.values() for parameter in module.parameters())
    dense = sum(module.weight.nbytes for module in packed.values())
    biases = sum(module.bias.nbytes for module in packed.values() if module.bias is not None)
    assert held(loaded) == before - dense + of_weights - biases
    with torch.no_grad():
        expected = loaded(**inputs()).logits
        tokens = loaded.generate(inputs()[first], max_new_tokens=6, do_sample=False)
        assert_same_bits(model(**inputs()).logits, expected)
    # Nothing has been made dense to say which dtype it has, and all is as small as it was.
    assert dequantized == []
    assert held(loaded) == before - dense + of_weights - biases < before / 2
    with torch.no_grad():
        decompress(loaded)
        assert_close(loaded(**inputs()).logits, expected)
        assert torch.equal(loaded.generate(inputs()[first], max_new_tokens=6, do_sample=False), tokens)
    assert len(dequantized) == len(packed)


@pytest.mark.parametrize("kind", MODELS)
def test_encoder_and_decoder_with_the_peer(kind: str, tmp_path: Path) -> None:
    build, inputs, _, config = MODELS[kind]
    written = QuantizationConfig.from_dict(config).to_dict()
    rounded = compress_with_peer(build(), written, tmp_path / "theirs", inputs())
    ours = load_compressed(tmp_path / "theirs")
    assert compressed_modules(ours).keys() == {name.removesuffix(".weight") for name in rounded}
    save_compressed(compress(build(), config), tmp_path / "ours")
    assert_same_tensors(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs"))
    with torch.no_grad():
        expected = ours(**inputs()).logits
        dense = build()
        dense.load_state_dict(rounded, strict=False)
        assert_close(expected, dense(**inputs()).logits)
        if kind == "Whisper":
            assert_close(type(ours).from_pretrained(tmp_path / "ours")(**inputs()).logits, expected)
        else:
            # Its modules are to be initialized by weights that they have no more; should it learn this, we will know.
            with pytest.raises(AttributeError, match="has no attribute 'weight'"):
                type(ours).from_pretrained(tmp_path / "ours")


def test_a_decoder_layer_of_another_dtype_is_cast_to_without_dequantizing(dequantized: list[torch.Size]) -> None:
    """``wo`` of T5 stays in float32 where the rest is in half precision."""
    model = compress(tiny_t5(torch.bfloat16), weights(8, "re:.*wo$", "re:.*SelfAttention.*"))
    for name, module in compressed_modules(model).items():
        if name.endswith("wo"):
            module.float()
    with torch.no_grad():
        output = model(**t5_inputs()).logits
    assert output.dtype is torch.bfloat16
    assert dequantized == []


def test_a_table_whose_forward_is_a_slice_of_it_is_refused() -> None:
    model = tiny_whisper()
    with pytest.raises(QuantizationError) as caught:
        compress(model, weights(8, "Embedding"))
    (problem,) = caught.value.problems
    assert problem.place == "model.decoder.embed_positions"
    assert problem.message.startswith("WhisperPositionalEmbedding reads the values of its weight in forward")
    assert not compressed_modules(model)
    with recorded_warnings() as texts:
        compress(model, weights(8, "Embedding", ignore=("model.decoder.embed_positions",)))
    assert ["share one weight" in text for text in texts] == [True]
    assert list(compressed_modules(model)) == ["model.encoder.embed_positions", "model.decoder.embed_tokens"]
    with torch.no_grad():
        assert_close(model(**whisper_inputs()).logits, decompress(model)(**whisper_inputs()).logits)


# Ties ----------------------------------------------------------------------------------------------------------------


def tiny_gemma(kind: str, **config: Any) -> Any:
    """A Gemma, whose embedding scales what it looks up."""
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    fields |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 64}
    config = getattr(transformers, f"{kind}Config")(**fields | config)
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()


FAMILIES = {
    "Llama": tiny_llama,
    "Gemma": lambda **config: tiny_gemma("Gemma", **config),
    "Gemma2": lambda **config: tiny_gemma("Gemma2", **config),
    "Gemma3": lambda **config: tiny_gemma("Gemma3Text", **config),
}
TARGETS = {
    "both": (weights(8, "Linear", "Embedding"), True),
    "the head": (weights(8), False),
    "the embedding": (weights(8, "Embedding", "re:.*mlp.*"), False),
    "neither": (weights(8, ignore=("lm_head",)), True),
}


def shared(model: Any) -> set[str]:
    """The tensors that the head and the embedding have in common."""
    head, words = model.get_output_embeddings()._parameters, model.get_input_embeddings()._parameters
    return {name for name, parameter in head.items() if parameter is not None and parameter is words.get(name)}


def dense_twin(model: Any, build: Any, **config: Any) -> Any:
    """A model that ``build`` makes, with the weights that ``model`` stands for."""
    dense = build(**config)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("_packed")}
    state |= {f"{name}.weight": module.dequantized_weight() for name, module in compressed_modules(model).items()}
    dense.load_state_dict(state, strict=False)
    return dense


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_quantized_embeddings(
    family: str, targets: str, tied: bool, dequantized: list[torch.Size], tmp_path: Path
) -> None:
    build, (config, stays) = FAMILIES[family], TARGETS[targets]
    with recorded_warnings() as texts:
        model = compress(build(tie_word_embeddings=tied), config)
    assert ["share one weight" in text for text in texts] == ([True] if tied and not stays else [])
    model.tie_weights()
    expected = logits(model)
    table = model.get_input_embeddings()
    assert isinstance(table, CompressedEmbedding) == (targets in ("both", "the embedding"))
    assert isinstance(table, type(build().get_input_embeddings()))
    assert bool(shared(model)) == (tied and stays)
    save_compressed(model, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    assert any(name.startswith("lm_head") for name in stored) == (not (tied and stays))
    still_tied = read_config(tmp_path / "x")["tie_word_embeddings"]
    assert still_tied == (tied and stays)

    by_transformers = load_compressed(tmp_path / "x")
    for loaded in (by_transformers, load_compressed(tmp_path / "x", model=build(tie_word_embeddings=still_tied))):
        size = held(loaded)
        assert_same_bits(logits(loaded), expected)
        assert held(loaded) == size == held(model)
        assert shared(loaded) == shared(model)
        assert_same_tensors(loaded.state_dict(), model.state_dict())
        assert type(loaded.get_input_embeddings()) is type(table)
        loaded.tie_weights()
        assert_same_bits(logits(loaded), expected)
    by_transformers.save_pretrained(tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), stored)
    assert dequantized == []
    assert_close(expected, logits(dense_twin(model, build, tie_word_embeddings=still_tied)))

    decompress(by_transformers)
    by_transformers.tie_weights()
    assert shared(by_transformers) == ({"weight"} if still_tied else set())
    assert type(by_transformers.get_input_embeddings()) is type(build().get_input_embeddings())
    assert_close(logits(by_transformers), expected)
    by_transformers.save_pretrained(tmp_path / "z")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "z")
    assert_close(logits(again), expected)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("targets", ["both", "the head", "the embedding"])
@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_quantized_embeddings_that_the_peer_writes(family: str, targets: str, tied: bool, tmp_path: Path) -> None:
    """It writes what is tied twice, and the scale of Gemma's embedding; of all these it loads only untied heads."""
    build, (config, _) = FAMILIES[family], TARGETS[targets]
    dense = build(tie_word_embeddings=tied)
    # The reference: the two tables apart from each other, each as the peer rounds it.
    dense.lm_head.weight = nn.Parameter(dense.lm_head.weight.detach().clone())
    written = QuantizationConfig.from_dict(config).to_dict()
    rounded = compress_with_peer(build(tie_word_embeddings=tied), written, tmp_path / "theirs")
    dense.load_state_dict(rounded, strict=False)
    with recorded_warnings() as texts:
        loaded = load_compressed(tmp_path / "theirs")
    scale = "model.embed_tokens.embed_scale is in the checkpoint, but computed by the model; what is stored is not used"
    assert texts == ([scale] if family == "Gemma3" and targets != "the head" else [])
    assert_close(logits(loaded), logits(dense))
    loaded.tie_weights()
    assert_close(logits(loaded), logits(dense))
    if targets == "the head" and not tied:
        assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")), logits(dense))
    else:
        # Should a release learn it, this test says so.
        with pytest.raises(AttributeError, match=r"has no attribute .weight"):
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"))


@pytest.mark.parametrize("format", ["int-quantized", "sparse"])
def test_ties_in_formats_whose_tensors_have_other_names(format: str, tmp_path: Path) -> None:
    group: dict[str, Any] = {"targets": ["Linear", "Embedding"]}
    if format == "sparse":
        group |= {"weights": None, "sparsity": "2:4"}
    else:
        group |= {"weights": {"num_bits": 8, "strategy": "channel"}, "format": format}
    with recorded_warnings():
        model = compress(tiny_llama(tie_word_embeddings=True), {"config_groups": {"g": group}})
        expected = logits(model)
        save_compressed(model, tmp_path / "x")
        loaded = load_compressed(tmp_path / "x")
    for one in (model, loaded):
        one.tie_weights()
        assert shared(one) == set(model.lm_head._parameters) - {"bias"}
        assert_same_bits(logits(one), expected)


@pytest.mark.parametrize("kind", ["T5", "Whisper"])
def test_ties_of_an_encoder_and_a_decoder(kind: str, tmp_path: Path) -> None:
    build, inputs, *_ = MODELS[kind]
    tables = {
        "T5": ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"],
        "Whisper": ["model.decoder.embed_tokens", "proj_out"],
    }[kind]
    model = compress(build(), weights(8, *tables, "re:.*(wi|wo|fc1|fc2)$"))
    model.tie_weights()
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x")
    assert {name.rpartition(".")[0] for name in read_tensors(tmp_path / "x")} & set(tables) == {tables[0]}
    with torch.no_grad():
        expected = model(**inputs()).logits
        for one in (loaded, load_compressed(tmp_path / "x", model=build())):
            assert_same_bits(one(**inputs()).logits, expected)
            one.tie_weights()
            first, *others = [one.get_submodule(name)._parameters for name in tables]
            assert all(other["weight_packed"] is first["weight_packed"] for other in others)
        assert_close(decompress(loaded)(**inputs()).logits, expected)
        loaded.tie_weights()
        assert len({id(loaded.get_submodule(name).weight) for name in tables}) == 1


def test_ties_of_a_model_within_a_model(tmp_path: Path) -> None:
    """The table of what is tied is kept by the outer model, and asked of the inner ones too."""
    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                       tie_word_embeddings=True)  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    compress(model, weights(8, "Linear", "Embedding", ignore=("re:.*vision_tower.*", "re:.*multi_modal.*")))
    expected = logits(model)
    model.tie_weights()
    assert shared(model) == {"weight_packed", "weight_scale", "weight_shape"}
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x")
    loaded.tie_weights()
    assert shared(loaded) == shared(model)
    assert_same_bits(logits(loaded), expected)
    assert_close(logits(decompress(loaded)), expected)


@pytest.mark.parametrize("tokens", [200, 300])
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_resizing_embeddings(targets: str, tied: bool, tokens: int) -> None:
    """Works where the embedding is dense; else it is refused before anything has changed."""
    config, _ = TARGETS[targets]
    with recorded_warnings():
        model = compress(tiny_llama(tie_word_embeddings=tied), config)
    ids = token_ids() % 200
    with torch.no_grad():
        before = model(ids).logits
    if targets in ("both", "the embedding"):
        with pytest.raises(UnsupportedFormatError, match=r"cannot be written to: .* or decompress\(\) the model"):
            model.resize_token_embeddings(tokens, mean_resizing=False)
        assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 256
        assert_same_bits(model(ids).logits, before)
        return
    model.resize_token_embeddings(tokens, mean_resizing=False)
    assert model.lm_head.weight.shape == model.get_input_embeddings().weight.shape == (tokens, 128)
    with torch.no_grad():
        assert_close(model(ids).logits[..., :200], before[..., :200])


# Encoders, and layers that are no Linear -----------------------------------------------------------------------------


def tiny_bert() -> Any:
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForMaskedLM(transformers.BertConfig(**fields, vocab_size=256)).eval()


@pytest.mark.parametrize("config", [weights(8, ignore=("cls.predictions.decoder",)), weights(8, "Linear", "Embedding")],
                         ids=["Linears", "all"])  # fmt: skip
def test_an_encoder(config: dict[str, Any], dequantized: list[torch.Size], tmp_path: Path) -> None:
    """Its decoder has a bias that is tied to a parameter of the module around it."""
    model = compress(tiny_bert(), config)
    model.tie_weights()
    expected = logits(model)
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x")
    loaded.tie_weights()
    assert_same_bits(logits(loaded), expected)
    predictions = loaded.cls.predictions
    assert predictions.decoder.bias is predictions.bias
    assert shared(loaded) == shared(model) != set()
    assert dequantized == []
    if "Embedding" not in config["config_groups"]["group_0"]["targets"]:
        assert_close(logits(transformers.BertForMaskedLM.from_pretrained(tmp_path / "x")), expected)
    assert_close(logits(decompress(loaded)), expected)


def tiny_gpt2() -> Any:
    torch.manual_seed(0)
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 256, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields, bos_token_id=0, eos_token_id=0)).eval()


TRANSPOSED = (
    "8 Conv1D modules hold weights transposed, [in, out]; no target can compress that, and it stays dense. Put an "
    "nn.Linear in the place of each, with weight.T for its weight and the same bias, or list them in ignore"
)


def test_transposed_layers_that_are_no_linear() -> None:
    with pytest.raises(TargetError, match="reaches no module of this model, so nothing would be") as caught:
        compress(tiny_gpt2(), INT4)
    (problem,) = caught.value.problems
    assert (problem.place, problem.message) == ("transformer.h.0.attn.c_attn, …", TRANSPOSED)


def test_transposed_layers_beside_what_is_compressed() -> None:
    with recorded_warnings() as texts:
        model = compress(tiny_gpt2(), weights(8, "lm_head"))
    assert texts[0] == f"transformer.h.0.attn.c_attn, …: {TRANSPOSED}"
    assert list(compressed_modules(model)) == ["lm_head"]
    with recorded_warnings() as texts:
        compress(tiny_gpt2(), weights(8, "lm_head", ignore=("Conv1D",)))
    assert not [text for text in texts if "transposed" in text]


@pytest.mark.parametrize("target", ["Conv1D", "re:.*c_attn$"])
def test_transposed_layers_by_name(target: str) -> None:
    model = tiny_gpt2()
    with pytest.raises(TargetError, match="names this Conv1D, which stores its weight transposed") as caught:
        compress(model, weights(8, target))
    assert "transformer.h.1.attn.c_attn" in {problem.place for problem in caught.value.problems}
    assert not compressed_modules(model)


def test_what_the_message_about_transposed_layers_advises() -> None:
    model = tiny_gpt2()
    expected = logits(model)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            linear = nn.Linear(*module.weight.shape)
            linear.weight, linear.bias = nn.Parameter(module.weight.T.contiguous()), module.bias
            model.set_submodule(name, linear)
    assert_close(logits(model), expected)
    assert len(compressed_modules(compress(model, INT4))) == 8
