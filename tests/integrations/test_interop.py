"""compressed-tensors 0.20 through transformers: its checkpoints load here, ours load there, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compressed_tensors
import pytest
import torch
import transformers
from compressed_tensors.quantization import QuantizationConfig as PeerConfig
from transformers import AutoModelForCausalLM

from compressed_format import (
    CompressedFormatWarning,
    QuantizationArgs,
    QuantizationConfig,
    load_compressed,
    quantize,
    save_compressed,
)
from compressed_format.bitpack import pack_codes
from compressed_format.formats import prune_2_of_4
from compressed_format.modules.base import compressed_modules
from compressed_format.quantization import fake_quantize
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.peer import compress_with_peer
from tests.models import (
    LLAMA_CONFIGS,
    compressed_llama,
    edit_config,
    edit_tensors,
    logits,
    read_config,
    read_tensors,
    tiny_llama,
    weights,
    word_aligned,
)

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
)

SCHEMES = pytest.mark.parametrize("config", LLAMA_CONFIGS.values(), ids=LLAMA_CONFIGS.keys())


def assert_close_logits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.isfinite().all()
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@SCHEMES
def test_ours_loads_with_the_peer(config: QuantizationConfig, tmp_path: Path) -> None:
    save_compressed(compressed_llama(config), tmp_path / "ours")
    ours = load_compressed(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype is torch.float32
    assert_close_logits(logits(theirs), logits(ours))


@SCHEMES
def test_theirs_loads_here(config: QuantizationConfig, tmp_path: Path) -> None:
    compress_with_peer(tiny_llama(), config.to_dict(), tmp_path / "theirs")
    ours = load_compressed(tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert_close_logits(logits(ours), logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@SCHEMES
def test_both_write_the_same(config: QuantizationConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same bytes in the tensors, and configs that mean the same to the peer."""
    compress_with_peer(tiny_llama(dtype), config.to_dict(), tmp_path / "theirs")
    save_compressed(compressed_llama(config, dtype), tmp_path / "ours")
    assert_same_tensors(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs"))
    ours, theirs = (read_config(tmp_path / name)["quantization_config"] for name in ("ours", "theirs"))
    assert meaning(PeerConfig.model_validate(ours)) == meaning(PeerConfig.model_validate(theirs))
    assert ours["version"] == theirs["version"] == compressed_tensors.__version__
    assert ours.keys() == theirs.keys()


ALL = {"targets": ["Linear", "Embedding"], "weights": {"num_bits": 8, "strategy": "channel"}}
WORDS = {"targets": ["Embedding"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}
LINEARS = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}


@pytest.mark.parametrize(
    "config",
    [
        weights(4, strategy="group", group_size=32, symmetric=False, ignore=("lm_head",)),
        weights(4, symmetric=False, ignore=("lm_head",)),
        weights(3, symmetric=False, ignore=("lm_head",)),
        {"config_groups": {"all": ALL}},
        {"config_groups": {"words": WORDS, "linears": LINEARS}, "ignore": ["lm_head"]},
    ],
    ids=["W4 asymmetric group", "W4 asymmetric channel", "W3 asymmetric channel", "all layers", "embedding, linears"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_peer_writes_and_cannot_load(config: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    config = QuantizationConfig.from_dict(config)
    rounded = compress_with_peer(tiny_llama(dtype), config.to_dict(), tmp_path / "theirs")
    ours = load_compressed(tmp_path / "theirs")
    assert len(rounded) == len(compressed_modules(ours)) >= 14
    for name, weight in rounded.items():
        assert_same_bits(ours.get_submodule(name.removesuffix(".weight")).weight, weight + 0.0, name)
    dense = tiny_llama(dtype)
    dense.load_state_dict(rounded, strict=False)
    if dtype is torch.float32:
        assert_close_logits(logits(ours), logits(dense))
    save_compressed(compressed_llama(config, dtype), tmp_path / "ours")
    assert_same_tensors(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs"))
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23) and "Embedding" not in str(
        config.config_groups
    ):
        # Those releases of transformers do not ask for shapes where there is a quantizer, and this one's were wrong.
        theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")).float()
        assert (theirs - logits(ours).float()).abs().max() <= 0.05 * theirs.abs().max()
        return
    # 0.20 gives up, or reports that it could not make sense of a tensor; should a release learn it, this test says so.
    with pytest.raises((RuntimeError, AttributeError)):
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"))


# Older releases ------------------------------------------------------------------------------------------------------


def with_nulls(group: dict[str, Any], **weights: Any) -> dict[str, Any]:
    """A group as 0.14 wrote it: every key that it knew, with null where it said nothing."""
    known = ("actorder", "block_structure", "group_size", "observer", "scale_dtype", "zp_dtype")
    filled = {
        name: args and {**dict.fromkeys(known), "observer_kwargs": {}, **args}
        for name, args in group.items()
        if name in ("weights", "input_activations", "output_activations")
    }
    return {**group, **filled, "weights": {**filled["weights"], **weights}}


@pytest.mark.parametrize("name", ["W4A16 group", "W8A8 static", "FP8_DYNAMIC", "mixed"])
def test_configs_of_0_14(name: str, tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS[name])
    save_compressed(model, tmp_path / "x")
    old = read_config(tmp_path / "x")["quantization_config"]
    groups = {group: with_nulls(content) for group, content in old["config_groups"].items()}
    edit_config(tmp_path / "x", quantization_config={"config_groups": groups, "version": "0.14.0.1"})
    assert_same_bits(logits(load_compressed(tmp_path / "x")), logits(model))


def test_columns_in_the_order_of_their_activations(tmp_path: Path) -> None:
    """GPTQ with ``actorder: group``, which the peer has not read since 0.19."""
    config = LLAMA_CONFIGS["W4A16 group"]
    save_compressed(compressed_llama(config), tmp_path / "x")
    old = read_config(tmp_path / "x")["quantization_config"]["config_groups"]["group_0"]
    groups = {"group_0": with_nulls(old, actorder="group")}
    edit_config(tmp_path / "x", quantization_config={"config_groups": groups, "version": "0.14.0.1"})
    # Column c belongs to the group of column perm[c]: permute dense columns, and g_idx tells their groups.
    stored = read_tensors(tmp_path / "x")
    dense, args = tiny_llama(), config.config_groups["group_0"].weights
    changes: dict[str, torch.Tensor] = {}
    for name in [name for name in stored if name.endswith("weight_packed")]:
        module = name.removesuffix(".weight_packed")
        columns = dense.get_submodule(module).in_features
        g_idx = (torch.randperm(columns, generator=torch.Generator().manual_seed(0)) // 32).to(torch.int32)
        quantized = quantize(dense.get_submodule(module).weight.detach(), args, g_idx=g_idx)
        changes |= {
            f"{module}.weight_packed": pack_codes(quantized.codes, 4),
            f"{module}.weight_scale": quantized.scale,
            f"{module}.weight_g_idx": g_idx,
        }
        dense.get_submodule(module).weight.data = quantized.codes * quantized.scale[:, g_idx.long()]
    edit_tensors(tmp_path / "x", **changes)
    loaded = load_compressed(tmp_path / "x")
    assert_close_logits(logits(loaded), logits(dense))
    save_compressed(loaded, tmp_path / "y")
    again = load_compressed(tmp_path / "y")
    assert_same_bits(logits(again), logits(loaded))
    assert sum(name.endswith("g_idx") for name in read_tensors(tmp_path / "y")) == 14


def test_the_word_aligned_layout(tmp_path: Path) -> None:
    config = LLAMA_CONFIGS["W3A16"]
    model = compressed_llama(config)
    save_compressed(model, tmp_path / "x")
    aligned = {
        f"{name}.weight_packed": word_aligned(module.quantized_weight().codes, 3)
        for name, module in compressed_modules(model).items()
    }
    current = read_tensors(tmp_path / "x")
    edit_tensors(tmp_path / "x", **aligned)
    edit_config(tmp_path / "x", quantization_config={"version": "0.17.1"})
    with pytest.warns(CompressedFormatWarning, match="14 modules were stored in the word-aligned layout"):
        loaded = load_compressed(tmp_path / "x")
    assert_same_bits(logits(loaded), logits(model))
    # What is held is the dense layout, and whoever saves it says so.
    assert loaded.config.to_dict()["quantization_config"]["version"] == compressed_tensors.__version__
    loaded.save_pretrained(tmp_path / "y")
    save_compressed(loaded, tmp_path / "z")
    for folder in ("y", "z"):
        assert_same_tensors(read_tensors(tmp_path / folder), current)
        assert_same_bits(logits(load_compressed(tmp_path / folder)), logits(model))
    assert_close_logits(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "z")), logits(model))


@pytest.mark.parametrize("stacked", [False, True], ids=["sparse only", "float8 codes"])
def test_2_of_4(stacked: bool, tmp_path: Path) -> None:
    weights_args = {"num_bits": 8, "type": "float", "strategy": "channel"}
    group = {"targets": ["Linear"], "sparsity": "2:4", "weights": weights_args if stacked else None}
    config: dict[str, Any] = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    if not stacked:
        sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]}
        config = {"sparsity_config": sparsity}
    model = compressed_llama(config)
    with pytest.warns(CompressedFormatWarning, match="this checkpoint is sparse"):
        save_compressed(model, tmp_path / "x")
    if not stacked:  # then 0.14 wrote nothing else
        written = read_config(tmp_path / "x")["quantization_config"]
        kept = {key: written[key] for key in ("quant_method", "sparsity_config", "transform_config")}
        whole = read_config(tmp_path / "x") | {"quantization_config": kept | {"version": "0.14.0.1"}}
        (tmp_path / "x" / "config.json").write_text(json.dumps(whole))
    loaded = load_compressed(tmp_path / "x")
    assert len(compressed_modules(loaded)) == 14
    assert_same_tensors(loaded.state_dict(), read_tensors(tmp_path / "x"))
    assert_same_bits(logits(loaded), logits(model))
    dense = tiny_llama()
    for name, module in compressed_modules(loaded).items():
        pruned = prune_2_of_4(dense.get_submodule(name).weight.detach())
        if stacked:
            args = config["config_groups"]["group_0"]["weights"]
            pruned = fake_quantize(pruned, QuantizationArgs(**args))
        assert_same_bits(module.weight, pruned + 0.0, name)
        dense.get_submodule(name).weight.data = pruned
    assert_close_logits(logits(loaded), logits(dense))


def meaning(config: PeerConfig) -> dict[str, Any]:
    """What a config says, but for the names and the order of its groups."""
    content = config.model_dump()
    groups = content.pop("config_groups").values()
    return content | {"groups": sorted(groups, key=lambda group: group["targets"])}
