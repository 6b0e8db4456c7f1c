"""Files of experts that others have written: fused in three dimensions, of older releases, and broken ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compressed_format import CompressedFormatWarning, enable_transformers, load_compressed, save_compressed
from compressed_format.errors import CheckpointError, CompressedFormatError, FormatError
from compressed_format.modules.base import compressed_modules
from compressed_format.modules.experts import CompressedExpertLinear
from tests.checks import assert_same_bits, assert_same_tensors, golden_cases, golden_tensors
from tests.integrations.mixtures import ARCHITECTURES, logits, tiny_mixture
from tests.integrations.test_mixture_of_experts import CONFIGS, config, saved
from tests.models import edit_config, edit_tensors, read_config, read_tensors, word_aligned

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
)

# Fused ---------------------------------------------------------------------------------------------------------------

SPELLINGS = {"underscore": "{parameter}_{rest}", "module": "{parameter}.weight_{rest}"}
PLAIN = {"underscore": "{parameter}", "module": "{parameter}.weight"}


def fuse(architecture: str, folder: Path, spelling: str) -> None:
    """Rewrite a checkpoint whose experts are one by one: stacked, gate and up in one tensor as the model has them."""
    kind = ARCHITECTURES[architecture]
    stored = read_tensors(folder)
    pattern = re.compile(rf"(.*\.{re.escape(kind.experts)})\.(\d+)\.({'|'.join(kind.called.values())})\.(\w+)$")
    own = {called: name for name, called in kind.called.items()}
    parts: dict[tuple[str, str, str], dict[int, torch.Tensor]] = {}
    for name in list(stored):
        found = pattern.match(name)
        if found:
            stack, expert, called, suffix = found.groups()
            parts.setdefault((stack, own[called], suffix), {})[int(expert)] = stored.pop(name)
    stacked = {key: torch.stack([found[expert] for expert in sorted(found)]) for key, found in parts.items()}
    for (stack, projection, suffix), tensor in stacked.items():
        if projection == "up_proj":
            continue
        parameter = "down_proj" if projection == "down_proj" else "gate_up_proj"
        if projection == "gate_proj" and suffix not in ("input_scale", "input_zero_point"):
            up = stacked[stack, "up_proj", suffix]
            if suffix == "weight_shape":
                tensor = tensor * torch.tensor([2, 1])
            elif architecture == "GPT-OSS" and tensor.dim() == 3:
                tensor = torch.stack((tensor, up), 2).flatten(1, 2)
            elif tensor.dim() == 3:
                tensor = torch.cat((tensor, up), 1)
        if suffix == "weight":
            place = PLAIN[spelling].format(parameter=parameter)
        elif suffix.startswith("weight_"):
            place = SPELLINGS[spelling].format(parameter=parameter, rest=suffix.removeprefix("weight_"))
        else:
            place = f"{parameter}{'_' if spelling == 'underscore' else '.'}{suffix}"
        stored[f"{stack}.{place}"] = tensor.contiguous()
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        *(("Qwen3-MoE", name) for name in ("W4A16", "W3A16", "W4A16 asymmetric", "W8A8", "W8A8 static asymmetric")),
        ("Qwen3-MoE", "FP8_DYNAMIC"),
        ("DeepSeek-V3", "FP8_BLOCK"),
        ("Mixtral", "W4A16 asymmetric"),
        ("GPT-OSS", "W4A16"),
        ("GPT-OSS", "FP8_DYNAMIC"),
    ],
)
def test_fused_files(architecture: str, name: str, spelling: str, tmp_path: Path) -> None:
    model = saved(architecture, CONFIGS[name], tmp_path / "x")
    expected, experts = logits(model), model.state_dict()
    one_by_one = read_tensors(tmp_path / "x")
    fuse(architecture, tmp_path / "x", spelling)
    fused = [
        tensor for key, tensor in read_tensors(tmp_path / "x").items() if re.search(r"_proj[._](weight_)?packed", key)
    ]
    assert all(tensor.dim() == 3 for tensor in fused if tensor.shape[0] == 4)
    loaded = load_compressed(tmp_path / "x")
    given = load_compressed(tmp_path / "x", model=tiny_mixture(architecture, seed=1))
    with enable_transformers():
        plain = type(model).from_pretrained(tmp_path / "x")
    for one in (loaded, given, plain):
        assert_same_tensors(one.state_dict(), experts)
        assert_same_bits(logits(one), expected)
    save_compressed(loaded, tmp_path / "y")  # and from here on they are one by one
    assert_same_tensors(read_tensors(tmp_path / "y"), one_by_one)


@pytest.mark.parametrize(
    ("architecture", "weights", "message"),
    [
        # 4 x 24 bits are no whole words; interleaved rows share each word.
        (
            "Qwen3-MoE",
            {"num_bits": 3, "strategy": "group", "group_size": 8, "symmetric": False},
            "its words hold zero points of both (24 of 3 bits each)",
        ),
        (
            "GPT-OSS",
            {"num_bits": 4, "strategy": "group", "group_size": 8, "symmetric": False},
            "its words hold zero points of both (32 of 4 bits each)",
        ),
        (
            "Qwen3-MoE",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 8]},
            "blocks of 16 rows hold rows of both (24 each)",
        ),
    ],
)
@pytest.mark.parametrize("way", ["transformers", "skeleton"])
def test_fused_tensors_that_cannot_be_split(
    architecture: str, weights: dict[str, Any], message: str, way: str, tmp_path: Path
) -> None:
    made = config(weights, targets=r"re:.*\.experts\.\d+\..*")
    fields = {"moe_intermediate_size": 24} if architecture == "Qwen3-MoE" else {}
    saved(architecture, made, tmp_path / "x", **fields)
    fuse(architecture, tmp_path / "x", "underscore")
    suffix = "scale" if "blocks" in message else "zero_point"
    given = {} if way == "transformers" else {"model": tiny_mixture(architecture, **fields)}
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", **given)
    text = str(caught.value)
    for layer in (0, 1):
        expected = (
            f"model.layers.{layer}.mlp.experts.gate_up_proj_{suffix}: cannot be split into gate_proj and up_proj: "
        )
        assert f"{expected}{message}; store experts one by one" in text
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("way", ["transformers", "skeleton"])
def test_fused_tensors_of_another_number_of_experts(way: str, tmp_path: Path) -> None:
    saved("Qwen3-MoE", CONFIGS["W4A16"], tmp_path / "x")
    fuse("Qwen3-MoE", tmp_path / "x", "module")
    name = "model.layers.0.mlp.experts.gate_up_proj.weight_packed"
    edit_tensors(tmp_path / "x", **{name: read_tensors(tmp_path / "x")[name][:3]})
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", **({} if way == "transformers" else {"model": tiny_mixture("Qwen3-MoE")}))
    assert f"{name}: has shape [3, 64, 8], expected one slice for each of the 4 experts" in str(caught.value)
    assert len(caught.value.problems) == 1


# Broken --------------------------------------------------------------------------------------------------------------

PLACE = "model.layers.1.mlp.experts.2.up_proj"
SCALE = torch.full((32, 2), 0.1)
WIDE = torch.zeros(32, 9, dtype=torch.int32)
PACKED = ("weight_packed", "weight_scale", "weight_shape")


@pytest.mark.parametrize(
    ("drop", "changes", "expected"),
    [
        (("weight_packed",), {}, "weight_packed: is missing from the checkpoint"),
        (("weight_scale",), {}, "weight_scale: is missing from the checkpoint"),
        ((), {"weight_scale": SCALE[:, :1]}, "weight_scale: has shape [32, 1], expected [32, 2]"),
        ((), {"weight_packed": WIDE}, "weight_packed: has shape [32, 9], expected [32, 8]"),
        ((), {"weight_packed": torch.zeros(32, 8)}, "weight_packed: has dtype float32, expected int32"),
        ((), {"weight_scale": SCALE.half()}, "weight_scale: is float16 and float32 in one expert and another"),
        ((), {"weight_scale": torch.full((32, 2), torch.nan)}, "weight_scale: holds nan"),
        (PACKED, {"weight": torch.zeros(32, 64)}, "weight: is stored dense, but"),
        (PACKED, {}, "weight_packed: is missing from the checkpoint"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["transformers", "skeleton"])
def test_one_broken_expert(
    drop: tuple[str, ...], changes: dict[str, torch.Tensor], expected: str, way: str, tmp_path: Path
) -> None:
    saved("Qwen3-MoE", CONFIGS["W4A16"], tmp_path / "x")
    edit_tensors(
        tmp_path / "x",
        drop=tuple(f"{PLACE}.{suffix}" for suffix in drop),
        **{f"{PLACE}.{suffix}": tensor for suffix, tensor in changes.items()},
    )
    skeleton = {} if way == "transformers" else {"model": tiny_mixture("Qwen3-MoE")}
    # Values are looked at when the model runs, and everything else before.
    model = load_compressed(tmp_path / "x", **skeleton) if "holds" in expected else None
    with pytest.raises(CompressedFormatError) as caught:
        load_compressed(tmp_path / "x", **skeleton) if model is None else logits(model)
    assert isinstance(caught.value, FormatError if "holds" in expected else CheckpointError)
    text = str(caught.value)
    place = PLACE.replace(".2.", ".0.") if "one expert and another" in expected else PLACE
    assert f"{place}.{expected}" in text, text
    assert len(caught.value.problems) == max(1, len(drop) if not changes else 1), text
    assert "experts.0" not in text or place != PLACE


def test_what_is_wrong_with_all_experts_is_said_once(tmp_path: Path) -> None:
    saved("Mixtral", CONFIGS["W4A16"], tmp_path / "x")
    scales = tuple(name for name in read_tensors(tmp_path / "x") if name.endswith("w2.weight_scale"))
    edit_tensors(tmp_path / "x", drop=scales)
    for given in ({}, {"model": tiny_mixture("Mixtral")}):
        with pytest.raises(CheckpointError) as caught:
            load_compressed(tmp_path / "x", **given)
        assert len(caught.value.problems) == 2
        text = str(caught.value)
        assert "model.layers.0.mlp.experts.0.down_proj.weight_scale: is missing from the checkpoint" in text
        assert "(the same for 3 more experts)" in text


@pytest.mark.parametrize("way", ["transformers", "skeleton"])
def test_one_expert_too_many(way: str, tmp_path: Path) -> None:
    saved("Qwen3-MoE", CONFIGS["W4A16"], tmp_path / "x")
    tensors = read_tensors(tmp_path / "x")
    added = {name.replace(".3.", ".4."): value for name, value in tensors.items() if ".1.mlp.experts.3.down" in name}
    assert len(added) == 3
    edit_tensors(tmp_path / "x", **added)
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", **({} if way == "transformers" else {"model": tiny_mixture("Qwen3-MoE")}))
    assert {problem.place for problem in caught.value.problems} == set(added)


@pytest.mark.parametrize("way", ["transformers", "skeleton"])
def test_a_model_with_fewer_experts_in_its_config(way: str, tmp_path: Path) -> None:
    saved("Qwen3-MoE", CONFIGS["W4A16"], tmp_path / "x")
    edit_config(tmp_path / "x", num_experts=3, num_local_experts=3)
    given = {} if way == "transformers" else {"model": tiny_mixture("Qwen3-MoE", num_experts=3)}
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", **given)
    text = str(caught.value)
    assert "model.layers.0.mlp.experts.3.up_proj.weight_packed" in text
    assert "model.layers.1.mlp.gate.weight" in text


def test_a_config_that_reaches_no_experts(tmp_path: Path) -> None:
    saved("Qwen3-MoE", CONFIGS["W4A16"], tmp_path / "x")
    for ignore in (["lm_head", "re:.*experts.*"], ["lm_head", r"re:.*experts.*down_proj"]):
        edit_config(tmp_path / "x", quantization_config={"ignore": ignore})
        for given in ({}, {"model": tiny_mixture("Qwen3-MoE")}):
            with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.experts\.(0\.)?\w+_proj"):
                load_compressed(tmp_path / "x", **given)


# Older releases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["transformers", "skeleton"])
def test_the_word_aligned_layout(way: str, tmp_path: Path) -> None:
    model = saved("Mixtral", CONFIGS["W3A16"], tmp_path / "x")
    expected = logits(model)
    current = read_tensors(tmp_path / "x")
    aligned = {}
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    for name, module in compressed_modules(model).items():
        codes = module.quantized_weight().codes
        if not isinstance(module, CompressedExpertLinear):
            aligned[f"{name}.weight_packed"] = word_aligned(codes, 3)
            continue
        stack, _, projection = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")
        for expert in range(4):
            aligned[f"{stack}.{expert}.{names[projection]}.weight_packed"] = word_aligned(codes[expert], 3)
    assert aligned.keys() <= current.keys()
    edit_tensors(tmp_path / "x", **aligned)
    edit_config(tmp_path / "x", quantization_config={"version": "0.17.1"})
    given = {} if way == "transformers" else {"model": tiny_mixture("Mixtral", seed=1)}
    with pytest.warns(CompressedFormatWarning, match="14 modules were stored in the word-aligned layout"):
        loaded = load_compressed(tmp_path / "x", **given)
    assert_same_bits(logits(loaded), expected)
    save_compressed(loaded, tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), current)


def test_zero_points_that_are_not_packed(tmp_path: Path) -> None:
    model = saved("Qwen3-MoE", CONFIGS["W4A16 asymmetric"], tmp_path / "x")
    current = read_tensors(tmp_path / "x")
    unpacked = {}
    for name, module in compressed_modules(model).items():
        points = module.quantized_weight().zero_point.to(torch.int8)
        stack, _, projection = name.rpartition(".")
        if isinstance(module, CompressedExpertLinear):
            unpacked |= {f"{stack}.{e}.{projection}.weight_zero_point": points[e] for e in range(4)}
        else:
            unpacked[f"{name}.weight_zero_point"] = points
    edit_tensors(tmp_path / "x", **unpacked)
    edit_config(tmp_path / "x", quantization_config={"version": "0.9.0"})
    with pytest.warns(CompressedFormatWarning, match="14 modules were stored in the unpacked zero-point layout"):
        loaded = load_compressed(tmp_path / "x")
    assert_same_bits(logits(loaded), logits(model))
    save_compressed(loaded, tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), current)


def test_zero_points_of_a_symmetric_scheme(tmp_path: Path) -> None:
    """Releases up to 0.9 stored them; they must be zero."""
    model = saved("Qwen3-MoE", CONFIGS["W4A16"], tmp_path / "x")
    place = "model.layers.1.mlp.experts.{}.up_proj.weight_zero_point"
    zeros = {place.format(expert): torch.zeros(32, 2, dtype=torch.int8) for expert in range(4)}
    edit_tensors(tmp_path / "x", **zeros)
    for given in ({}, {"model": tiny_mixture("Qwen3-MoE", seed=1)}):
        assert_same_bits(logits(load_compressed(tmp_path / "x", **given)), logits(model))
    edit_tensors(tmp_path / "x", **{place.format(2): torch.ones(32, 2, dtype=torch.int8)})
    for given in ({}, {"model": tiny_mixture("Qwen3-MoE", seed=1)}):
        with pytest.raises(CheckpointError, match=re.escape(place.format(2)) + ": holds zero points that are not zero"):
            load_compressed(tmp_path / "x", **given)


def test_marlin_24(tmp_path: Path) -> None:
    """Of Mixtral's three matrices two have the shape of the golden one."""
    sizes = {"hidden_size": 256, "intermediate_size": 64, "head_dim": 32, "num_hidden_layers": 1}
    golden = golden_tensors(golden_cases("v0.14.0.1_legacy")["marlin24_4_group_64x256"], "lin")
    golden = {suffix: tensor for suffix, tensor in golden.items() if suffix != "bias"}
    dense = tiny_mixture("Mixtral", dtype=torch.float16, **sizes)
    dense.save_pretrained(tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    for name in [name for name in stored if re.search(r"\.w[13]\.weight$", name)]:
        del stored[name]
        stored |= {f"{name.removesuffix('weight')}{suffix}": tensor for suffix, tensor in golden.items()}
    save_file({name: tensor.clone() for name, tensor in stored.items()}, tmp_path / "x" / "model.safetensors")
    linears = [r"re:.*self_attn.*", "lm_head", r"re:.*w2$"]
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 128}}
    old = {"config_groups": {"group_0": group}, "format": "marlin-24", "ignore": linears, "version": "0.9.0",
           "quant_method": "compressed-tensors", "quantization_status": "compressed"}  # fmt: skip
    whole = {**read_config(tmp_path / "x"), "quantization_config": old}
    (tmp_path / "x" / "config.json").write_text(json.dumps(whole))
    with pytest.warns(CompressedFormatWarning, match="2 modules were stored in the marlin-24 layout"):
        loaded = load_compressed(tmp_path / "x")
    experts = loaded.model.layers[0].mlp.experts
    assert experts.up_proj.format.value == "pack-quantized"
    for expert in (1, 3):
        assert_same_bits(experts.up_proj.weight[expert].clone(), experts.gate_proj.weight[0].clone())
    assert 0 < int(experts.up_proj.weight[0].count_nonzero()) <= 64 * 256 // 2
    save_compressed(loaded, tmp_path / "y")
    assert_same_bits(logits(load_compressed(tmp_path / "y")), logits(loaded))


# GPTQ ----------------------------------------------------------------------------------------------------------------


def test_columns_in_the_order_of_their_activations(tmp_path: Path) -> None:
    """``weight_g_idx``, of every expert its own."""
    model = saved("Qwen3-MoE", CONFIGS["W4A16"], tmp_path / "x")
    groups = read_config(tmp_path / "x")["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["actorder"] = "group"
    edit_config(tmp_path / "x", quantization_config={"config_groups": groups, "version": "0.14.0.1"})
    orders = {}
    for name, tensor in read_tensors(tmp_path / "x").items():
        if ".experts." in name and name.endswith("weight_scale"):
            columns = tensor.shape[1] * 32
            order = torch.randperm(columns, generator=torch.Generator().manual_seed(len(orders))) // 32
            orders[name.replace("weight_scale", "weight_g_idx")] = order.to(torch.int32)
    edit_tensors(tmp_path / "x", **orders)
    for given in ({}, {"model": tiny_mixture("Qwen3-MoE", seed=1)}):
        loaded = load_compressed(tmp_path / "x", **given)
        experts, plain = loaded.model.layers[1].mlp.experts, model.model.layers[1].mlp.experts
        for expert in range(4):
            order = orders[f"model.layers.1.mlp.experts.{expert}.up_proj.weight_g_idx"].long()
            codes, scale = plain.up_proj.quantized_weight().codes[expert], plain.up_proj.weight_scale[expert]
            assert_same_bits(experts.up_proj.weight[expert] + 0.0, codes * scale[:, order] + 0.0)
        assert not torch.equal(logits(loaded), logits(model))
        save_compressed(loaded, tmp_path / "y", overwrite=True)
        assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(tmp_path / "x"))
    # What was never set means nothing, and goes.
    edit_tensors(tmp_path / "x", **{name: torch.full_like(order, -1) for name, order in orders.items()})
    loaded = load_compressed(tmp_path / "x")
    assert_same_bits(logits(loaded), logits(model))
    assert not any("g_idx" in name for name in loaded.state_dict())
