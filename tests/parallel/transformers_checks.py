"""What both processes of :mod:`test_transformers_tp` check: transformers' tensor parallelism on packed checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig
from transformers.distributed import DistributedConfig

from compressed_format import (
    QuantizationConfig,
    compress,
    disable_transformers,
    enable_transformers,
    load_compressed,
    save_compressed,
)
from compressed_format.errors import CompressedFormatWarning, FormatError, UnsupportedFormatError
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_tensors
from tests.integrations.decoders import tiny_mixtral
from tests.models import (
    LLAMA_CONFIGS,
    compressed_llama,
    edit_tensors,
    logits,
    read_tensors,
    seeded,
    tiny_llama,
    token_ids,
    weights,
)
from tests.parallel.processes import INTEGERS_CAN_BE_SHARDED

_HEADS = QuantizationConfig.from_dict(
    weights(4, "Linear", "Embedding", symmetric=False, strategy="group", group_size=32)
)
CONFIGS = {
    "heads": _HEADS,
    **{name: LLAMA_CONFIGS[name] for name in ("W4A16 group", "W3A16", "W8A8", "FP8", "FP8_BLOCK", "mixed")},
}


def _saved(folder: Path, name: str, **fields: Any) -> Path:
    """A checkpoint that the first process has written."""
    path = folder / name
    if dist.get_rank() == 0 and not path.exists():
        with pytest.warns(CompressedFormatWarning, match="no source folder"):
            save_compressed(compressed_llama(CONFIGS[name], **fields), path)
    dist.barrier()
    return path


def _tp(**fields: Any) -> dict[str, Any]:
    return {"distributed_config": DistributedConfig(tp_size=dist.get_world_size(), **fields)}


def _held(model: Any) -> int:
    """The bytes of this process's parts of packed tensors; they may lie in the file, which is mapped."""
    parts = [
        value.to_local() if isinstance(value, DTensor) else value
        for module in compressed_modules(model).values()
        for value in module.parameters()
    ]
    return sum(part.numel() * part.element_size() for part in parts)


def check_logits_and_tokens_are_those_of_one_process(folder: Path) -> None:
    for name in CONFIGS:
        path = _saved(folder, name)
        # In float64 no activation is so near to the middle of two codes that the order of a sum decides.
        whole = load_compressed(path, dtype=torch.float64)
        split = load_compressed(path, dtype=torch.float64, **_tp(tp_plan="auto"))
        torch.testing.assert_close(logits(split), logits(whole), msg=lambda text, name=name: f"{name}: {text}")
        assert set(split.tp_plan.values()) <= {"colwise", "rowwise", "colwise_gather_output", "embedding_rowwise"}
        for place, module in compressed_modules(split).items():
            # Releases before 5.23 leave embeddings whole.
            if place != "model.embed_tokens" or place in split.tp_plan:
                held = [value for value in module._parameters.values() if value is not None]
                assert all(isinstance(value, DTensor) for value in held), (name, place)
            assert module.weight.shape == whole.get_submodule(place).weight.shape
        assert _held(split) < 0.6 * _held(whole), name
        arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(split.generate(token_ids(), **arguments), whole.generate(token_ids(), **arguments))


def check_plain_from_pretrained(folder: Path) -> None:
    path = _saved(folder, "W4A16 group")
    enable_transformers()
    try:
        split = AutoModelForCausalLM.from_pretrained(path, **_tp())
    finally:
        disable_transformers()
    torch.testing.assert_close(logits(split), logits(load_compressed(path)))
    assert isinstance(split.model.layers[0].mlp.up_proj._parameters["weight_packed"], DTensor)


def check_the_argument_tp_plan(folder: Path) -> None:
    path = _saved(folder, "FP8")
    split = load_compressed(path, dtype=torch.float64, tp_plan="auto")
    torch.testing.assert_close(logits(split), logits(load_compressed(path, dtype=torch.float64)))
    assert isinstance(split.model.layers[0].mlp.up_proj._parameters["weight"], DTensor)


def check_a_plan_of_the_caller(folder: Path) -> None:
    path = _saved(folder, "W4A16 group")
    plan = {"model.layers.*.mlp.up_proj": "colwise", "model.layers.*.mlp.gate_proj": "colwise"}
    plan["model.layers.*.mlp.down_proj"] = "rowwise"
    split = load_compressed(path, **_tp(tp_plan=dict(plan)))
    torch.testing.assert_close(logits(split), logits(load_compressed(path)))
    with pytest.raises(UnsupportedFormatError, match=r"layers\.0\.mlp\.up_proj: .* style packed_colwise"):
        load_compressed(path, **_tp(tp_plan={**plan, "model.layers.*.mlp.up_proj": "packed_colwise"}))


def check_gradients_reach_the_embedding(folder: Path) -> None:
    path = _saved(folder, "W8A8")
    gradients = []
    for fields in ({}, _tp()):
        model = load_compressed(path, dtype=torch.float64, **fields)
        embeddings = model.get_input_embeddings()(token_ids())
        embeddings = (embeddings.full_tensor() if isinstance(embeddings, DTensor) else embeddings).detach()
        embeddings.requires_grad_()
        model(inputs_embeds=embeddings).logits.square().mean().backward()
        gradients.append(embeddings.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def check_a_split_that_cuts_a_group(folder: Path) -> None:
    """Two heads of 48 columns: a process would get a group and a half."""
    path = folder / "cut"
    if dist.get_rank() == 0:
        config = QuantizationConfig.from_dict(weights(4, strategy="group", group_size=32, ignore=("lm_head",)))
        fields = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
        with pytest.warns(CompressedFormatWarning, match="no source folder"):
            save_compressed(compressed_llama(config, **fields), path)
    dist.barrier()
    message = r"layers\.0\.self_attn\.o_proj: 96 columns cannot be split over 2 .*parallel sizes that work: 3"
    with pytest.raises(UnsupportedFormatError, match=message):
        load_compressed(path, **_tp())


def check_what_was_split_is_saved_whole(folder: Path) -> None:
    for name in ("FP8", "heads"):
        path = _saved(folder, name)
        split = load_compressed(path, **_tp())
        save_compressed(split, folder / f"again-{name}", source=path)
        assert_same_tensors(read_tensors(folder / f"again-{name}"), read_tensors(path))
        if name == "heads":  # transformers asks gloo to gather float8, which it cannot
            split.save_pretrained(folder / f"transformers-{name}")
            assert_same_tensors(read_tensors(folder / f"transformers-{name}"), read_tensors(path))


def check_tied_and_scaled_embeddings(folder: Path) -> None:
    """Gemma's table is scaled by its class, and is its output layer too."""
    path = folder / "gemma"
    if dist.get_rank() == 0:
        fields = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
        sizes = {"num_hidden_layers": 1, "head_dim": 32, "vocab_size": 256, "tie_word_embeddings": True}
        config = Gemma3TextConfig(**fields, **sizes, sliding_window=8)
        model = seeded(AutoModelForCausalLM.from_config, config, dtype=torch.float32)
        with pytest.warns(CompressedFormatWarning, match="no source folder"):
            save_compressed(compress(model, _HEADS), path)
    dist.barrier()
    whole, split = load_compressed(path), load_compressed(path, **_tp())
    torch.testing.assert_close(logits(split), logits(whole))
    assert isinstance(split.lm_head._parameters["weight_packed"], DTensor)
    save_compressed(split, folder / "gemma-again", source=path)
    assert_same_tensors(read_tensors(folder / "gemma-again"), read_tensors(path))


def check_experts_are_refused_by_name(folder: Path) -> None:
    path = folder / "mixtral"
    if dist.get_rank() == 0:
        with pytest.warns(CompressedFormatWarning, match="no source folder"):
            save_compressed(compress(tiny_mixtral(), CONFIGS["W4A16 group"]), path)
    dist.barrier()
    with pytest.raises(UnsupportedFormatError, match=r"layers\.0\.mlp\.experts: holds compressed modules"):
        load_compressed(path, **_tp())
    with pytest.raises(UnsupportedFormatError, match=r"layers\.0\.mlp\.experts: .* call fully_shard on it"):
        load_compressed(path, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size()))


if INTEGERS_CAN_BE_SHARDED:

    def check_fsdp_of_transformers(folder: Path) -> None:
        for name in ("W4A16 group", "FP8"):
            _check_fsdp(_saved(folder, name), folder / f"fsdp-{name}")


def _check_fsdp(path: Path, again: Path) -> None:
    sharded = load_compressed(path, distributed_config=DistributedConfig(fsdp_size=dist.get_world_size()))
    assert all(isinstance(value, DTensor) for value in sharded.parameters())
    assert _held(sharded) < 0.6 * _held(load_compressed(path))
    torch.testing.assert_close(logits(sharded), logits(load_compressed(path)))
    save_compressed(sharded, again, source=path)
    assert_same_tensors(read_tensors(again), read_tensors(path))


def check_all_processes_refuse_what_one_finds(folder: Path) -> None:
    whole = _saved(folder, "W4A16 group")
    path, name = folder / "spoiled", "model.layers.0.mlp.up_proj"
    if dist.get_rank() == 0:
        shutil.copytree(whole, path)
        scale = read_tensors(path)[f"{name}.weight_scale"]
        scale[-1, -1] = torch.nan
        shape = torch.tensor([1, 1])
        edit_tensors(path, **{f"{name}.weight_scale": scale, "model.layers.1.mlp.up_proj.weight_shape": shape})
    dist.barrier()
    for fields in (_tp(), {"distributed_config": DistributedConfig(fsdp_size=dist.get_world_size())}):
        with pytest.raises(FormatError) as caught:
            load_compressed(path, **fields)
        assert f"{name}.weight_scale: holds nan" in str(caught.value)
        assert "layers.1.mlp.up_proj.weight_shape: says [1, 1]" in str(caught.value)


def check_nothing_is_compressed_from_parts(folder: Path) -> None:
    path = folder / "dense"
    if dist.get_rank() == 0:
        tiny_llama().save_pretrained(path)
    dist.barrier()
    enable_transformers()
    try:
        with pytest.raises(UnsupportedFormatError, match="compress and save it in one, and load that"):
            AutoModelForCausalLM.from_pretrained(path, quantization_config=QuantizationConfig.preset("W8A16"), **_tp())
    finally:
        disable_transformers()
