"""Mixtures of experts of transformers: what is written of them, what is read, and what runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme as PeerScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM

from compressed_format import (
    QuantizationConfig,
    compress,
    decompress,
    enable_transformers,
    load_compressed,
    save_compressed,
)
from compressed_format.errors import CalibrationError, TargetError
from compressed_format.integrations.quantization_config import CompressedTensorsConfig
from compressed_format.modules.base import compressed_modules
from compressed_format.modules.experts import CompressedExpertLinear, CompressedExperts
from compressed_format.modules.linear import CompressedLinear
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.mixtures import (
    ARCHITECTURES,
    SIZES,
    dense_experts_of,
    each_architecture,
    encoded,
    ids,
    logits,
    tiny_mixture,
)
from tests.integrations.oracles import dense_twin
from tests.integrations.peer import _weight_range
from tests.models import read_config, read_tensors, recorded_warnings, seeded

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
    "ignore:this checkpoint is sparse:compressed_format.CompressedFormatWarning",
    # The names of transformers before 5.23, which PEFT uses too.
    "ignore:`(is_)?gradient_checkpointing(_enable)?` is deprecated:FutureWarning",
)

GROUP = {"strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "strategy": "tensor", "dynamic": False}


def config(
    weights: dict[str, Any] | None, *, targets: str = "Linear", ignore: tuple[str, ...] = (), **fields: Any
) -> QuantizationConfig:
    sparsity = {key: fields.pop(key) for key in ("sparsity_config",) if key in fields}
    group = {"targets": [targets], "weights": weights, **fields}
    return QuantizationConfig.from_dict(
        {"config_groups": {"group_0": group}, "ignore": ["lm_head", *ignore], **sparsity}
    )


def preset(name: str) -> QuantizationConfig:
    return QuantizationConfig.preset(name).replace(ignore=("lm_head",))


CONFIGS = {
    "W2A16": config({"num_bits": 2, **GROUP}),
    "W3A16": config({"num_bits": 3, "strategy": "channel"}),
    "W4A16": config({"num_bits": 4, **GROUP}),
    "W4A16 asymmetric": config({"num_bits": 4, **GROUP, "symmetric": False}),
    "W8A16": config({"num_bits": 8, "strategy": "channel"}, format="pack-quantized"),
    "W8A8": preset("W8A8"),
    "W8A8 static asymmetric": config(
        {"num_bits": 8, "strategy": "channel"}, input_activations={**STATIC, "symmetric": False}
    ),
    "FP8": preset("FP8"),
    "FP8_DYNAMIC": preset("FP8_DYNAMIC"),
    "FP8_BLOCK": config(
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 24]},
        input_activations={"num_bits": 8, "type": "float", "dynamic": True, **GROUP},
    ),
    "2:4 FP8": config({"num_bits": 8, "type": "float", "strategy": "channel"}, sparsity="2:4"),
    "bitmask FP8": config(
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        sparsity_config={"format": "sparse-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]},
    ),
}
FEW = ["W4A16 asymmetric", "W8A8 static asymmetric", "FP8_BLOCK"]
# Every format in an architecture whose names are others in memory, and in one of another layout; a few in the rest.
CASES = [
    (architecture, name)
    for architecture in ARCHITECTURES
    for name in (CONFIGS if architecture in ("Mixtral", "GPT-OSS") else FEW)
]
W4A16 = CONFIGS["W4A16"]


def packed(architecture: str, made: Any, **fields: Any) -> Any:
    return compress(tiny_mixture(architecture, **fields), made, calibration=[{"input_ids": ids()}])


def saved(architecture: str, made: Any, folder: Path, **fields: Any) -> Any:
    model = packed(architecture, made, **fields)
    save_compressed(model, folder)
    return model


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def peer_tolerance(name: str) -> float:
    """Before 5.23, transformers dequantizes float8 experts to bfloat16, whatever the rest of the model is in."""
    older = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
    return 1e-2 if older and "FP8" in name else 1e-4


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_files_hold_every_expert_for_itself(architecture: str, name: str, tmp_path: Path) -> None:
    model = saved(architecture, CONFIGS[name], tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    experts = {place for place in stored if ".experts." in place and not place.endswith("_bias")}
    for place, _, weight in dense_experts_of(architecture, tiny_mixture(architecture)):
        for suffix, tensor in encoded(weight, CONFIGS[name]).items():
            assert_same_bits(stored[f"{place}.{suffix}"], tensor, f"{place}.{suffix}")
            experts.remove(f"{place}.{suffix}")
    assert {place.rpartition(".")[2] for place in experts} <= {"input_scale", "input_zero_point"}
    inputs = CONFIGS[name].config_groups["group_0"].input_activations
    assert bool(experts) == (inputs is not None and not inputs.dynamic)
    expected = logits(model)
    loaded = load_compressed(tmp_path / "x")
    assert type(loaded) is type(model)
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert_same_bits(logits(loaded), expected)
    given = load_compressed(tmp_path / "x", model=tiny_mixture(architecture, seed=1))
    assert_same_bits(logits(given), expected)
    # And again, after it has run, through transformers.
    loaded.save_pretrained(tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), stored)
    ours, theirs = (read_config(tmp_path / folder)["quantization_config"] for folder in ("x", "y"))
    assert set(ours["ignore"]) == set(theirs["ignore"])
    with enable_transformers():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "y")
    assert_same_bits(logits(again), expected)


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_outputs_are_those_of_dense_experts_that_round(
    architecture: str, name: str, request: pytest.FixtureRequest
) -> None:
    if CONFIGS[name].config_groups["group_0"].input_activations:
        request.getfixturevalue("exact_products")
    model = packed(architecture, CONFIGS[name])
    found, expected = logits(model), logits(dense_twin(model))
    dense = logits(tiny_mixture(architecture))
    assert (found - expected).square().mean() <= 1e-4**2 * (expected - dense).square().mean()


@pytest.mark.parametrize("architecture", each_architecture)
def test_every_expert_is_packed_and_stays_so(architecture: str, tmp_path: Path) -> None:
    model = saved(architecture, W4A16, tmp_path / "x")
    dense = tiny_mixture(architecture)
    loaded = load_compressed(tmp_path / "x")
    routers = [module for name, module in loaded.named_modules() if name.endswith((".gate", ".router", "expert_gate"))]
    assert routers
    assert not any(isinstance(module, (CompressedLinear, CompressedExperts)) for module in routers)
    in_file = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "x").values())
    for _ in range(2):
        assert sum(tensor.nbytes for tensor in loaded.state_dict().values()) == in_file
        kept = [value for module in loaded.modules() for value in vars(module).values()]
        assert not any(isinstance(value, torch.Tensor) and value.numel() > 64 for value in kept)
        logits(loaded)
    experts = [module for module in loaded.modules() if isinstance(module, CompressedExpertLinear)]
    weights = sum(weight.numel() for *_, weight in dense_experts_of(architecture, dense))
    assert sum(module.weight_packed.nbytes for module in experts) == weights // 2
    back = decompress(model)
    assert type(back) is type(dense)
    shapes = [{name: tensor.shape for name, tensor in one.state_dict().items()} for one in (back, dense)]
    assert shapes[0] == shapes[1]
    back.save_pretrained(tmp_path / "back")
    dense.save_pretrained(tmp_path / "dense")
    assert read_tensors(tmp_path / "back").keys() == read_tensors(tmp_path / "dense").keys()
    assert_same_bits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "back")), logits(back))


OTHERS = {
    # Fused in dense files, under names of its own.
    "Granite": ("GraniteMoe", {"num_local_experts": 4}, "model.layers.1.block_sparse_moe.experts.3.gate_proj"),
    "LFM2": ("Lfm2Moe", {"num_experts": 4, "num_dense_layers": 1}, "model.layers.1.feed_forward.experts.3.w1"),
    "Phi": ("Phimoe", {"num_local_experts": 4}, "model.layers.0.block_sparse_moe.experts.3.w2"),
    "Qwen3-Next": ("Qwen3Next", {"num_experts": 4, "decoder_sparse_step": 1}, "model.layers.1.mlp.experts.3.up_proj"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures(kind: str, tmp_path: Path) -> None:
    name, fields, place = OTHERS[kind]
    if name in ("Lfm2Moe", "Qwen3Next"):
        fields = {**fields, "layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 32}
    sizes = {**SIZES, "moe_intermediate_size": 32, **fields}
    made = getattr(transformers, f"{name}Config")(**sizes)
    model = compress(seeded(AutoModelForCausalLM.from_config, made), W4A16)
    expected = logits(model)
    save_compressed(model, tmp_path / "x")
    model.save_pretrained(tmp_path / "y")
    stored = read_tensors(tmp_path / "x")
    assert stored[f"{place}.weight_packed"].dim() == 2
    assert_same_tensors(read_tensors(tmp_path / "y"), stored)
    for folder in ("x", "y"):
        assert_same_bits(logits(load_compressed(tmp_path / folder)), expected)
    assert_close(logits(decompress(model)), expected)


def test_shards(tmp_path: Path) -> None:
    model = packed("Mixtral", W4A16)
    save_compressed(model, tmp_path / "x", max_shard_size=20_000)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 3
    assert_same_bits(logits(load_compressed(tmp_path / "x")), logits(model))
    assert_same_bits(logits(load_compressed(tmp_path / "x", model=tiny_mixture("Mixtral", seed=1))), logits(model))
    model.save_pretrained(tmp_path / "y", max_shard_size="20KB")
    assert len(list((tmp_path / "y").glob("*.safetensors"))) > 3
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(tmp_path / "x"))


@pytest.mark.parametrize("architecture", each_architecture)
@pytest.mark.parametrize(
    "ignore", [r"re:.*layers\.1\.mlp.*experts.*", "re:.*experts.*", r"re:.*\.experts\.\d+\.down_proj$"]
)
def test_some_experts_stay_dense(architecture: str, ignore: str, tmp_path: Path) -> None:
    model = saved(architecture, W4A16.replace(ignore=("lm_head", ignore)), tmp_path / "x")
    stacks = [module for module in model.modules() if isinstance(module, CompressedExperts)]
    layers = 1 if architecture == "DeepSeek-V3" else 2
    assert len(stacks) == (0 if ignore == "re:.*experts.*" else layers if "down" in ignore else layers - 1)
    assert all((stack.down_proj.scheme is None) == ("down" in ignore) for stack in stacks)
    stored = read_tensors(tmp_path / "x")
    for place, _, weight in dense_experts_of(architecture, tiny_mixture(architecture)):
        if f"{place}.weight" in stored:
            assert_same_bits(stored[f"{place}.weight"], weight.contiguous(), place)
    expected = logits(model)
    loaded = load_compressed(tmp_path / "x")
    assert_same_bits(logits(loaded), expected)
    given = load_compressed(tmp_path / "x", model=tiny_mixture(architecture, seed=1))
    assert_same_bits(logits(given), expected)
    loaded.save_pretrained(tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), stored)
    assert_same_bits(logits(load_compressed(tmp_path / "y")), expected)
    assert_close(expected, logits(dense_twin(model)))


MIXED = {
    "config_groups": {
        "attention": {
            "targets": [r"re:.*self_attn\..*"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {**TOKEN, "type": "float"},
        },
        "experts": {"targets": [r"re:.*\.experts\.\d+\..*"], "weights": {"num_bits": 4, **GROUP}},
    },
    "ignore": ["lm_head"],
}


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3-MoE"])
def test_attention_and_experts_of_two_schemes(architecture: str, tmp_path: Path) -> None:
    model = saved(architecture, MIXED, tmp_path / "x")
    assert_same_bits(logits(load_compressed(tmp_path / "x")), logits(model))
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "x")), logits(model))


def test_experts_by_the_names_of_the_checkpoint(tmp_path: Path) -> None:
    """An author may speak of what a file calls them, of one projection too."""
    made = config({"num_bits": 4, **GROUP}, targets=r"re:.*block_sparse_moe\.experts\.\d+\.w[13]$")
    model = saved("Mixtral", made, tmp_path / "x")
    experts = model.model.layers[0].mlp.experts
    assert [experts.get_submodule(name).scheme is None for name in ("gate_proj", "up_proj", "down_proj")] == [
        False,
        False,
        True,
    ]
    assert_same_bits(logits(load_compressed(tmp_path / "x")), logits(model))
    apart = "model.layers.0.block_sparse_moe.experts.1.w2"
    with pytest.raises(TargetError, match="experts of one layer have to be compressed alike"), recorded_warnings():
        compress(tiny_mixture("Mixtral"), config({"num_bits": 4, **GROUP}, ignore=(apart,)))


# The peer ------------------------------------------------------------------------------------------------------------

ONLY_EXPERTS = r"re:.*\.experts\.\d+\..*"
READ_THERE = {
    "W4A16": CONFIGS["W4A16"],
    "W3A16": CONFIGS["W3A16"],
    "W8A16": CONFIGS["W8A16"],
    # Inputs of experts are not rounded there.
    "FP8_DYNAMIC": config(
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        input_activations={**TOKEN, "type": "float"},
        targets=ONLY_EXPERTS,
    ),
}


@pytest.mark.parametrize("name", READ_THERE)
@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3-MoE", "DeepSeek-V3"])
def test_the_peer_reads_ours(architecture: str, name: str, tmp_path: Path) -> None:
    model = saved(architecture, READ_THERE[name], tmp_path / "x")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert_close(logits(theirs), logits(decompress(model)), peer_tolerance(name))


def compress_as_the_peer(architecture: str, made: QuantizationConfig, folder: Path) -> dict[str, torch.Tensor]:
    """The experts of a dense checkpoint, each by the peer's own compressor; returns the weights as it rounds them."""
    dense = tiny_mixture(architecture)
    dense.save_pretrained(folder)
    content = made.to_dict()
    (scheme,) = content["config_groups"].values()
    peer = PeerScheme.model_validate({key: value for key, value in scheme.items() if key != "format"})
    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    tensors = read_tensors(folder)
    rounded = {}
    for stored, own, weight in dense_experts_of(architecture, dense):
        scale, zero_point = calculate_qparams(*_weight_range(weight, peer.weights), peer.weights)
        rounded[own] = fake_quantize(weight, scale, zero_point, peer.weights)
        state = {"weight": weight.contiguous(), "weight_scale": scale, "weight_zero_point": zero_point}
        for suffix, tensor in compressor.compress(state, peer).items():
            if suffix != "weight_zero_point" or not peer.weights.symmetric:
                tensors[f"{stored}.{suffix}"] = tensor
        if f"{stored}.weight" in tensors and scheme["format"] == "pack-quantized":
            del tensors[f"{stored}.weight"]
    if architecture == "GPT-OSS":
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            del tensors[name]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    linears = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear)]
    written = {**read_config(folder), "quantization_config": {**content, "ignore": linears}}
    (folder / "config.json").write_text(json.dumps(written))
    return rounded


@pytest.mark.parametrize("name", ["W3A16", "W4A16", "W4A16 asymmetric", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"])
@pytest.mark.parametrize("architecture", ["Mixtral", "DeepSeek-V3", "GPT-OSS"])
def test_what_the_peer_writes_loads_here(architecture: str, name: str, tmp_path: Path) -> None:
    rounded = compress_as_the_peer(architecture, CONFIGS[name], tmp_path / "theirs")
    ours = load_compressed(tmp_path / "theirs")
    for place, weight in rounded.items():
        stack, expert, projection = place.rsplit(".", 2)
        found = ours.get_submodule(f"{stack}.{projection}").weight[int(expert)]
        assert_same_bits(found + 0.0, weight + 0.0, place)
    assert len(compressed_modules(ours)) == 3 * (1 if architecture == "DeepSeek-V3" else 2)
    # The same weights under dense modules, inputs of experts rounded where the scheme says so.
    scheme = CONFIGS[name].config_groups["group_0"].model_dump(exclude_none=True)
    only = QuantizationConfig.from_dict({"config_groups": {"g": {**scheme, "targets": [ONLY_EXPERTS]}}})
    here = compress(tiny_mixture(architecture), only)
    assert_same_tensors(ours.state_dict(), here.state_dict())
    assert_same_bits(logits(ours), logits(here))
    if name in READ_THERE and architecture != "GPT-OSS":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
        assert_close(logits(theirs), logits(decompress(ours)), peer_tolerance(name))


# Compressed while they are loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["W4A16 asymmetric", "FP8_BLOCK", "2:4 FP8"])
@pytest.mark.parametrize("architecture", each_architecture)
def test_compressed_while_loading(architecture: str, name: str, tmp_path: Path) -> None:
    dense = tiny_mixture(architecture)
    dense.save_pretrained(tmp_path / "dense")
    with enable_transformers():
        carried = CompressedTensorsConfig.of(CONFIGS[name])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=carried)
    expected = compress(dense, CONFIGS[name])
    assert_same_tensors(model.state_dict(), expected.state_dict())
    assert_same_bits(logits(model), logits(expected))
    save_compressed(model, tmp_path / "x")
    assert_same_bits(logits(load_compressed(tmp_path / "x")), logits(expected))


def test_static_scales_need_data(tmp_path: Path) -> None:
    tiny_mixture("Mixtral").save_pretrained(tmp_path / "dense")
    only_experts = config({"num_bits": 8, "strategy": "channel"}, targets=ONLY_EXPERTS, input_activations=STATIC)
    with enable_transformers(), pytest.raises(CalibrationError, match="has static activation scales, which need data"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=CompressedTensorsConfig.of(only_experts)
        )


# What runs -----------------------------------------------------------------------------------------------------------

PROMPTS = {
    "input_ids": torch.cat((ids()[:1], torch.cat((torch.zeros(1, 5, dtype=torch.int64), ids()[1:, 5:]), 1))),
    "attention_mask": torch.cat((torch.ones(1, 12), torch.cat((torch.zeros(1, 5), torch.ones(1, 7)), 1))).long(),
}


@pytest.mark.parametrize("architecture", ["Qwen2-MoE", "DeepSeek-V3", "GPT-OSS"])
def test_generation(architecture: str) -> None:
    """Of Mixtral and Qwen3-MoE there is more in test_generation and test_compile."""
    model = packed(architecture, CONFIGS["W4A16 asymmetric"])
    dense = dense_twin(model)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = dense.generate(**PROMPTS, **options)
    assert torch.equal(model.generate(**PROMPTS, **options), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**PROMPTS, **options, **static), expected)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "name"),
    [("DeepSeek-V3", "W4A16 asymmetric"), ("GPT-OSS", "FP8_BLOCK")],
)
def test_one_graph_serves_every_batch(architecture: str, name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fields = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "first_k_dense_replace": 0}
    model = packed(architecture, CONFIGS[name], **fields)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 5):
            tokens = torch.randint(1, 64, (batch, 12), generator=torch.Generator().manual_seed(batch))
            found = compiled(input_ids=tokens, use_cache=False).logits
            torch.testing.assert_close(found, model(input_ids=tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("architecture", ["Qwen2-MoE", "DeepSeek-V3"])
def test_adapters_train_beside_packed_experts(architecture: str, tmp_path: Path) -> None:
    saved(architecture, CONFIGS["W4A16 asymmetric"], tmp_path / "x")
    model = load_compressed(tmp_path / "x")
    torch.manual_seed(0)
    # PEFT takes names such as up_proj for those of dense experts, here those of shared ones included.
    targets = ["q_proj" if architecture == "Qwen2-MoE" else "q_b_proj", "o_proj"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(6):
        loss = tuned(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.unload()
    assert_same_tensors(merged.state_dict(), before)


def test_gradients_pass_through_the_experts() -> None:
    model = packed("GPT-OSS", CONFIGS["W4A16 asymmetric"])
    results = []
    for one in (model, dense_twin(model)):
        embeddings = one.get_input_embeddings()(ids()).detach().requires_grad_()
        one(inputs_embeds=embeddings).logits.square().sum().backward()
        results.append(embeddings.grad)
    assert results[0].abs().max() > 0
    assert_close(*results)


# What stays dense ----------------------------------------------------------------------------------------------------


def test_experts_that_compute_in_their_own_way_are_told_of() -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    made = Llama4TextConfig(
        hidden_size=64, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, vocab_size=64, num_local_experts=4, moe_layers=[1],
        attention_chunk_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(made).eval()
    experts = model.model.layers[1].feed_forward.experts
    share = sum(p.nbytes for p in experts.parameters()) / sum(p.nbytes for p in model.parameters())
    with recorded_warnings() as texts:
        compress(model, W4A16)
    (told,) = [text for text in texts if "stay dense" in text]
    assert told.startswith("model.layers.1.feed_forward.experts.gate_up_proj, …: 2 parameters (Llama4TextExperts.")
    assert f"stay dense, {share:.0%} of the model's bytes" in told
    assert type(model.model.layers[1].feed_forward.experts) is type(experts)
    assert isinstance(model.model.layers[1].feed_forward.shared_expert.up_proj, CompressedLinear)
    assert not isinstance(model.model.layers[1].feed_forward.router, CompressedLinear)
