"""Adapters of PEFT on packed models: they learn, nothing else does, and they are saved without the model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from compressed_format import (
    CheckpointError,
    CompressedEmbedding,
    CompressedLinear,
    UnsupportedFormatError,
    compress,
    decompress,
    load_compressed,
    save_compressed,
)
from compressed_format.modules.base import compressed_modules
from compressed_format.modules.experts import CompressedExperts
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.decoders import DECODERS
from tests.integrations.oracles import dense_twin
from tests.models import LLAMA_CONFIGS, compressed_llama, logits, read_tensors, token_ids, weights

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
    "ignore:this checkpoint is sparse:compressed_format.CompressedFormatWarning",
    # The names of transformers before 5.23, which PEFT uses too.
    "ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning",
)

INT4 = weights(4, strategy="group", group_size=32, ignore=("lm_head",))
# Embedding and head too.
EVERYTHING = weights(8, "Linear", "Embedding")
CONFIGS: dict[str, Any] = {
    **{name: config for name, config in LLAMA_CONFIGS.items() if name not in ("W4A16 preset", "W8A16")},
    "W4A16 asymmetric": weights(4, strategy="group", group_size=32, symmetric=False, ignore=("lm_head",)),
    "2:4": {"config_groups": {"g": {"targets": ["Linear"], "weights": None, "sparsity": "2:4"}}, "ignore": ["lm_head"]},
    "everything": EVERYTHING,
}
WEIGHTS_ONLY = ("W4A16 group", "W3A16", "W4A16 asymmetric", "2:4", "everything")


def adapted(model: nn.Module, *, seed: int = 1, **fields: Any) -> Any:
    """``model`` with adapters on its attention and MLP, those of LoRA unless ``fields`` say otherwise."""
    torch.manual_seed(seed)
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", **fields}))


def train(model: Any, steps: int = 3, *, autocast: bool = False) -> list[float]:
    """The losses of ``steps`` steps on one batch."""
    # An epsilon that float16 can hold.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-4)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=token_ids(), labels=token_ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors below the adapters, under the names that they have without these."""
    state = {name: tensor for name, tensor in model.base_model.model.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items()}


def saved(config: Any, folder: Path) -> Path:
    save_compressed(compressed_llama(config), folder)
    return folder


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_learn_and_nothing_else_does(name: str, tmp_path: Path) -> None:
    model = load_compressed(saved(CONFIGS[name], tmp_path / "x"))
    count = len(compressed_modules(model))
    tuned = adapted(model)
    losses = train(tuned.train())
    assert losses[0] > losses[1] > losses[2]
    assert len(compressed_modules(tuned)) == count > 0
    assert len(trainable(tuned)) == 2 * 3 * 2
    assert all(".lora_" in name for name in trainable(tuned))
    assert gradients(tuned).keys() == trainable(tuned)
    assert_same_tensors(base_tensors(tuned), read_tensors(tmp_path / "x"))


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_gradients_are_those_of_the_decompressed_model(name: str) -> None:
    packed = compressed_llama(CONFIGS[name])
    dense = decompress(copy.deepcopy(packed))
    assert not compressed_modules(dense)
    packed, dense = adapted(packed), adapted(dense)
    for model in (packed, dense):
        train(model, steps=2)
    torch.testing.assert_close(logits(packed), logits(dense))
    assert len(gradients(packed)) == 12
    for name, gradient in gradients(dense).items():
        torch.testing.assert_close(gradients(packed)[name], gradient, msg=name)


@pytest.mark.parametrize("name", ["W4A16 group", "W8A8", "FP8_BLOCK", "2:4"])
@pytest.mark.parametrize("decoder", [name for name in DECODERS if name != "Llama"])
def test_gradients_pass_through_packed_experts(decoder: str, name: str, request: pytest.FixtureRequest) -> None:
    """The adapters of the first layer learn through the experts of all."""
    if name not in WEIGHTS_ONLY:
        request.getfixturevalue("exact_products")
    packed = compress(DECODERS[decoder](initializer_range=0.1), CONFIGS[name])
    dense = dense_twin(packed)
    before = {key: tensor.clone() for key, tensor in packed.state_dict().items()}
    stacks = [module for module in packed.modules() if isinstance(module, CompressedExperts)]
    assert stacks
    packed, dense = (adapted(model, target_modules=["q_proj", "v_proj"]) for model in (packed, dense))
    if name in WEIGHTS_ONLY:  # an oracle that rounds has no straight-through gradient
        for model in (packed, dense):
            train(model, steps=1)
        assert len(gradients(packed)) == 8
        for key, gradient in gradients(dense).items():
            torch.testing.assert_close(gradients(packed)[key], gradient, msg=key)
    torch.testing.assert_close(logits(packed), logits(dense), rtol=1e-3, atol=1e-3)
    losses = train(packed)
    assert losses[0] > losses[1] > losses[2]
    assert_same_tensors(base_tensors(packed), before)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_experts(use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(compress(DECODERS["Mixtral"](use_cache=False), INT4), target_modules=["q_proj"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        train(model, steps=2)
        found.append(gradients(model))
    assert len(found[0]) == 4
    assert_same_tensors(found[1], found[0])


def test_adapters_of_experts_are_refused_by_peft() -> None:
    model = compress(DECODERS["Mixtral"](), INT4)
    with pytest.raises(ValueError, match=r"Target module CompressedExpertLinear\(.* is not supported"):
        adapted(model, target_modules=["up_proj"])
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        adapted(model, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])


def test_adapters_of_embedding_and_head() -> None:
    model = adapted(compressed_llama(EVERYTHING), target_modules=["embed_tokens", "lm_head"])
    base = model.base_model.model
    assert isinstance(base.model.embed_tokens.base_layer, CompressedEmbedding)
    assert isinstance(base.lm_head.base_layer, CompressedLinear)
    before = base_tensors(model)
    before = {name: tensor.clone() for name, tensor in before.items()}
    losses = train(model)
    assert losses[0] > losses[1] > losses[2]
    assert len(gradients(model)) == 4
    assert_same_tensors(base_tensors(model), before)


@pytest.mark.parametrize("name", ["W4A16 group", "W8A8", "FP8_BLOCK"])
def test_dora(name: str) -> None:
    """It reads the dense weight of each layer, and learns its norms."""
    packed = compressed_llama(CONFIGS[name])
    expected = logits(packed)
    model = adapted(packed, use_dora=True)
    torch.testing.assert_close(logits(model), expected)
    losses = train(model)
    assert losses[0] > losses[1] > losses[2]
    assert sum("lora_magnitude_vector" in name for name in gradients(model)) == 6


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["W4A16 group", "W8A8", "FP8_DYNAMIC", "everything"])
def test_gradient_checkpointing(name: str, use_reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(compressed_llama(CONFIGS[name], use_cache=False)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        train(model, steps=2)
        found.append(gradients(model))
    assert_same_tensors(found[1], found[0])


def test_trainer(tmp_path: Path) -> None:
    model = load_compressed(saved(INT4, tmp_path / "x"))
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids()]

    def trainer(model: Any) -> Trainer:
        arguments = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=2,
            learning_rate=0.02,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_steps=2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        return Trainer(model, arguments, train_dataset=rows)

    with pytest.raises(ValueError, match="attach trainable adapters"):
        trainer(model)
    tuned = adapted(model)
    run = trainer(tuned)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert_same_tensors(base_tensors(tuned), read_tensors(tmp_path / "x"))
    again = PeftModel.from_pretrained(load_compressed(tmp_path / "x"), tmp_path / "out" / "checkpoint-2")
    assert_same_bits(logits(again), logits(tuned.eval()))


# Saving and loading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["W4A16 group", "W4A16 asymmetric", "W8A8 static", "FP8_DYNAMIC", "2:4", "everything"])
def test_adapters_are_saved_alone_and_found_again(name: str, tmp_path: Path) -> None:
    tuned = adapted(load_compressed(saved(CONFIGS[name], tmp_path / "x")))
    plain = logits(tuned)
    train(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 12
    assert all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in tensors.items())
    again = PeftModel.from_pretrained(load_compressed(tmp_path / "x"), tmp_path / "adapter")
    assert not torch.equal(logits(again), plain)
    assert_same_bits(logits(again), logits(tuned))
    with again.disable_adapter():
        assert_same_bits(logits(again), plain)
    assert_same_bits(logits(again.unload()), plain)


def test_adapters_of_an_embedding_are_saved_alone(tmp_path: Path) -> None:
    targets = ["embed_tokens", "lm_head", "q_proj"]
    tuned = adapted(load_compressed(saved(EVERYTHING, tmp_path / "x")), target_modules=targets)
    train(tuned)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 8
    assert all(".lora_" in name for name in tensors)
    again = PeftModel.from_pretrained(load_compressed(tmp_path / "x"), tmp_path / "adapter")
    assert_same_bits(logits(again), logits(tuned))


def test_a_model_with_adapters_is_no_checkpoint(tmp_path: Path) -> None:
    """It would have names that nobody looks for."""
    tuned = adapted(load_compressed(saved(INT4, tmp_path / "x")))
    for model in (tuned, tuned.base_model.model):
        with pytest.raises(CheckpointError, match=r"holds adapters of PEFT \(.*unload\(\)"):
            save_compressed(model, tmp_path / "y")
    assert not (tmp_path / "y").exists()
    save_compressed(tuned.unload(), tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(tmp_path / "x"))


def test_transformers_own_adapters(tmp_path: Path) -> None:
    """``model.add_adapter`` puts them into the model itself."""
    model = load_compressed(saved(INT4, tmp_path / "x"))
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    losses = train(model)
    assert losses[0] > losses[1] > losses[2]
    model.save_pretrained(tmp_path / "adapter")
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    again = load_compressed(tmp_path / "x")
    again.load_adapter(str(tmp_path / "adapter"))
    assert_same_bits(logits(again), logits(model))


# What would have to write to packed weights --------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("name", ["W4A16 group", "2:4", "everything"])
def test_merging_needs_a_decompressed_model(name: str, safe: bool) -> None:
    packed = compressed_llama(CONFIGS[name])
    count = len(compressed_modules(packed))
    tuned = adapted(packed, target_modules=["q_proj", "embed_tokens"] if name == "everything" else ["q_proj"])
    train(tuned)
    before, expected = copy.deepcopy(base_tensors(tuned)), logits(tuned)
    with pytest.raises(UnsupportedFormatError, match=r"cannot be written to: .* or decompress\(\) the model"):
        tuned.merge_and_unload(safe_merge=safe)
    assert_same_tensors(base_tensors(tuned), before)
    assert_same_bits(logits(tuned), expected)
    # The way out, and back.
    decompress(tuned.base_model.model)
    merged = tuned.merge_and_unload(safe_merge=safe)
    assert not compressed_modules(merged)
    torch.testing.assert_close(logits(merged), expected)
    assert len(compressed_modules(compress(merged, CONFIGS[name]))) == count


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_adapters_that_take_something_out_of_the_weight_are_refused(init: str) -> None:
    model = compressed_llama(INT4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedFormatError, match=r"cannot be written to: .* or decompress\(\) the model"):
        adapted(model, init_lora_weights=init)
    assert_same_tensors(model.state_dict(), {name.replace(".base_layer", ""): t for name, t in before.items()})


def test_a_head_that_stays_dense_can_be_trained_whole(tmp_path: Path) -> None:
    tuned = adapted(load_compressed(saved(INT4, tmp_path / "x")), modules_to_save=["lm_head"])
    losses = train(tuned)
    assert losses[0] > losses[1] > losses[2]
    tuned.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert [name for name in tensors if ".lora_" not in name] == ["base_model.model.lm_head.weight"]
    again = PeftModel.from_pretrained(load_compressed(tmp_path / "x"), tmp_path / "adapter")
    assert_same_bits(logits(again), logits(tuned))


# Preparing and casting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["W4A16 group", "W8A8", "FP8_DYNAMIC", "everything"])
def test_prepare_model_for_kbit_training(name: str, dtype: torch.dtype) -> None:
    model = compressed_llama(CONFIGS[name], dtype, use_cache=False)
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items() if tensor.element_size() != 2}
    expected = logits(model)
    prepared = prepare_model_for_kbit_training(model)
    assert not trainable(prepared)
    tuned = adapted(prepared).train()
    losses = train(tuned)
    assert losses[0] > losses[1] > losses[2]
    state = base_tensors(tuned)
    assert_same_tensors({name: state[name] for name in codes}, codes)
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned.eval()).float(), expected.float(), rtol=0.05, atol=0.05)


CASTS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "float": (lambda model: model.float(), torch.float32),
    "there and back": (lambda model: model.half().float(), torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("name", ["W4A16 group", "FP8_DYNAMIC", "everything"])
def test_casting_a_model_with_adapters(name: str, cast: str) -> None:
    tuned = adapted(compressed_llama(CONFIGS[name]))
    packed = {name: module.state_dict() for name, module in compressed_modules(tuned).items()}
    packed = copy.deepcopy(packed)
    function, dtype = CASTS[cast]
    function(tuned)
    losses = train(tuned, steps=2)
    assert losses[1] < losses[0]
    assert logits(tuned).dtype == dtype
    assert {parameter.dtype for name, parameter in tuned.named_parameters() if ".lora_" in name} == {dtype}
    for name, module in compressed_modules(tuned).items():
        assert module.dtype == dtype
        assert_same_tensors(module.state_dict(), packed[name])


def test_autocast() -> None:
    tuned = adapted(compressed_llama(INT4)).train()
    losses = train(tuned, autocast=True)
    assert losses[0] > losses[1] > losses[2]
    assert {gradient.dtype for gradient in gradients(tuned).values()} == {torch.float32}
