"""accelerate: models spread over memory and disk keep their packed tensors packed, and compute the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import (
    align_module_device,
    compute_module_sizes,
    named_module_tensors,
    set_module_tensor_to_device,
)
from accelerate.utils.modeling import get_state_dict_from_offload
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from compressed_format import (
    CheckpointError,
    FormatError,
    QuantizationConfig,
    QuantizationError,
    UnsupportedFormatError,
    compress,
    decompress,
    enable_transformers,
    load_compressed,
    save_compressed,
)
from compressed_format.checkpoint import read_checkpoint
from compressed_format.loading.skeleton import Skeleton
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_bits, assert_same_tensors
from tests.models import (
    LLAMA_CONFIGS,
    Nested,
    Words,
    compressed_llama,
    edit_config,
    edit_tensors,
    logits,
    read_tensors,
    recorded_warnings,
    seeded,
    tiny_llama,
    token_ids,
    weights,
    word_aligned,
)

pytestmark = pytest.mark.filterwarnings(
    # Models built in a test come from nowhere.
    "ignore:no source folder is known:compressed_format.CompressedFormatWarning",
)

NAMES = ["W4A16 group", "W8A8 static asymmetric", "FP8_BLOCK", "mixed"]
"""Codes in words, int8 codes, float8 codes, and two formats at once."""

SPREAD = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
ON_DISK = ("model.layers.1.", "lm_head.")


def saved(folder: Path, name: str = "W4A16 group", dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    save_compressed(compressed_llama(LLAMA_CONFIGS[name], dtype, **fields), folder / "x")
    return folder / "x"


def bytes_held(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters() if not value.is_meta)


def skeleton(model: nn.Module, folder: Path) -> Skeleton:
    config, _ = QuantizationConfig.from_checkpoint(folder)
    checkpoint = read_checkpoint(folder)
    return Skeleton(model, config, {name: checkpoint.spec(name) for name in checkpoint})


def assert_spread(model: nn.Module, stored: dict[str, torch.Tensor], offloaded: tuple[str, ...] = ON_DISK) -> None:
    """What belongs on disk is there, everything else in memory, and all of it in the shape and dtype of the file."""
    for name, tensor in model.state_dict().items():
        assert (tensor.dtype, tensor.shape) == (stored[name].dtype, stored[name].shape), name
        assert tensor.is_meta == name.startswith(offloaded), name
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(offloaded)}
    assert bytes_held(model) == sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_layers_on_disk_stay_packed_and_compute_the_same(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    stored = read_tensors(folder)
    whole = load_compressed(folder)
    model = load_compressed(folder, device_map=SPREAD, offload_folder=tmp_path / "offload")
    assert model.hf_device_map == SPREAD
    assert_spread(model, stored)
    for _ in range(2):
        assert_same_bits(logits(model), logits(whole))
        assert_spread(model, stored)
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(token_ids(), **arguments), whole.generate(token_ids(), **arguments))
    assert_spread(model, stored)
    # Packed tensors are read from the checkpoint itself, and not written anew.
    assert not any((tmp_path / "offload").iterdir())


def test_device_map_auto_counts_packed_bytes(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    whole = load_compressed(folder)
    sizes = compute_module_sizes(whole)
    assert sizes["model.layers.0"] < compute_module_sizes(tiny_llama())["model.layers.0"] / 4
    largest = max(sizes[name] for name in ("model.embed_tokens", "model.layers.0", "lm_head"))
    enough = sizes[""] + largest + 1024  # accelerate keeps room for the largest layer that may come back
    everything = load_compressed(folder, device_map="auto", max_memory={"cpu": enough})
    assert not any(tensor.is_meta for tensor in everything.parameters())
    room = sizes["model.embed_tokens"] + sizes["model.layers.0"] + largest + 1024
    model = load_compressed(folder, device_map="auto", max_memory={"cpu": room})
    places = {name: str(place) for name, place in model.hf_device_map.items()}
    assert places["model.embed_tokens"] == places["model.layers.0"] == "cpu"
    assert places["model.layers.1"] == places["lm_head"] == "disk"
    assert_same_bits(logits(model), logits(whole))
    assert bytes_held(model) < bytes_held(whole)


def test_dtype_of_what_is_not_packed_reaches_what_is_on_disk(tmp_path: Path) -> None:
    folder = saved(tmp_path, "W8A8")
    model = load_compressed(folder, device_map=SPREAD, dtype=torch.bfloat16)
    whole = load_compressed(folder, dtype=torch.bfloat16)
    assert_same_bits(logits(model), logits(whole))
    assert model.model.layers[1].mlp.up_proj.weight.dtype is torch.bfloat16
    dtypes = {name: tensor.dtype for name, tensor in whole.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dtypes


def test_values_on_disk_are_checked(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight_scale"
    scale = read_tensors(folder)[name]
    scale[3, 1] = float("nan")
    edit_tensors(folder, **{name: scale})
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight_scale"):
        logits(load_compressed(folder, device_map=SPREAD))


def as_word_aligned(folder: Path, model: nn.Module) -> None:
    changed = {
        f"{name}.weight_packed": word_aligned(module.quantized_weight().codes, 3)
        for name, module in compressed_modules(model).items()
    }
    edit_tensors(folder, **changed)
    edit_config(folder, quantization_config={"version": "0.17.0"})


def test_older_layouts_on_disk_are_written_anew_where_there_is_room(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["W3A16"])
    save_compressed(model, tmp_path / "x")
    as_word_aligned(tmp_path / "x", model)
    with recorded_warnings() as texts:
        loaded = load_compressed(tmp_path / "x", device_map=SPREAD, offload_folder=tmp_path / "offload")
    assert any("14 modules were stored in the word-aligned layout" in text for text in texts)
    for _ in range(2):
        assert_same_bits(logits(loaded), logits(model))
        assert_spread(loaded, {name: tensor.data for name, tensor in model.state_dict().items()})
    save_compressed(loaded, tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), dict(model.state_dict()))


def test_tied_weights_of_an_older_layout_on_disk(tmp_path: Path) -> None:
    model = compressed_llama(weights(3, "Linear", "Embedding"), tie_word_embeddings=True)
    save_compressed(model, tmp_path / "x")
    as_word_aligned(tmp_path / "x", model)
    edit_tensors(tmp_path / "x", drop=("lm_head.weight_packed",))
    places = SPREAD | {"model.embed_tokens": "disk"}
    with recorded_warnings() as texts:
        loaded = load_compressed(tmp_path / "x", device_map=places, offload_folder=tmp_path / "offload")
    assert any("15 modules were stored in the word-aligned layout" in text for text in texts)
    for _ in range(2):
        assert_same_bits(logits(loaded), logits(model))


def test_compressing_while_loading_leaves_packed_tensors_on_disk(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    config = LLAMA_CONFIGS["W4A16 group"]
    with enable_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=config, device_map=SPREAD, offload_folder=tmp_path / "offload"
        )
    plain = compressed_llama(config)
    for _ in range(2):
        assert_same_bits(logits(model), logits(plain))
        assert_spread(model, {name: tensor.data for name, tensor in plain.state_dict().items()})


def test_unpacked_zero_points_on_disk_are_packed(tmp_path: Path) -> None:
    config = weights(4, symmetric=False, strategy="group", group_size=32, ignore=("lm_head",))
    model = compressed_llama(config)
    save_compressed(model, tmp_path / "x")
    found = compressed_modules(model).items()
    edit_tensors(
        tmp_path / "x",
        **{f"{name}.weight_zero_point": module.quantized_weight().zero_point.to(torch.int8) for name, module in found},
    )
    with recorded_warnings() as texts:
        loaded = load_compressed(tmp_path / "x", device_map=SPREAD, offload_folder=tmp_path / "offload")
    assert any("14 modules were stored in the unpacked zero-point layout" in text for text in texts)
    assert_same_bits(logits(loaded), logits(model))
    assert_spread(loaded, {name: tensor.data for name, tensor in model.state_dict().items()})


def test_older_layouts_need_values(tmp_path: Path) -> None:
    """Whoever fills a skeleton later, as sharding libraries do, would fill it with what is not run."""
    model = compress(nn.Sequential(seeded(nn.Linear, 32, 8)), weights(3))
    save_compressed(model, tmp_path / "x")
    empty = nn.Sequential(nn.Linear(32, 8, device="meta"))
    skeleton(copy.deepcopy(empty), tmp_path / "x").finish()
    edit_tensors(tmp_path / "x", **{"0.weight_packed": word_aligned(model[0].quantized_weight().codes, 3)})
    with pytest.raises(UnsupportedFormatError, match="0: is stored in the word-aligned layout"):
        skeleton(empty, tmp_path / "x").finish()


def test_sparse_weights_on_disk(tmp_path: Path) -> None:
    config = weights(8, type="float", ignore=("lm_head",))
    config["config_groups"]["group_0"]["sparsity"] = "2:4"
    model = compressed_llama(config)
    with recorded_warnings():
        save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", device_map=SPREAD)
    for _ in range(2):
        assert_same_bits(logits(loaded), logits(model))
        assert_spread(loaded, read_tensors(tmp_path / "x"))


def test_device_and_device_map_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="both device and device_map"):
        load_compressed(tmp_path, device="cpu", device_map="auto")


def test_plain_from_pretrained_offloads_packed_tensors(tmp_path: Path) -> None:
    folder = saved(tmp_path, "W8A8")
    whole = load_compressed(folder)
    with enable_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, device_map=SPREAD)
    for _ in range(2):
        assert_same_bits(logits(model), logits(whole))
        assert_spread(model, read_tensors(folder))


def test_older_layouts_on_disk_need_an_offload_folder(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["W3A16"])
    save_compressed(model, tmp_path / "x")
    as_word_aligned(tmp_path / "x", model)
    with pytest.raises(CheckpointError, match="pass offload_folder= to from_pretrained"):
        load_compressed(tmp_path / "x", device_map=SPREAD)


# Saving --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["save_compressed", "save_pretrained"])
def test_an_offloaded_model_is_saved_whole(tmp_path: Path, name: str, method: str) -> None:
    folder = saved(tmp_path, name)
    model = load_compressed(folder, device_map=SPREAD)
    expected = logits(model)
    if method == "save_compressed":
        save_compressed(model, tmp_path / "y")
    else:
        model.save_pretrained(tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(folder))
    assert_same_bits(logits(load_compressed(tmp_path / "y")), expected)
    assert_spread(model, read_tensors(folder))


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_tied_weights_are_saved_once_after_a_forward(tmp_path: Path, offload: str) -> None:
    """A forward under accelerate's hooks leaves tied modules with tensors of their own on the meta device."""
    model = compress(seeded(Words), weights(8, "Embedding", r"re:head"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(6).reshape(2, 3)
    with torch.no_grad():
        expected = model(ids)
        if offload == "cpu":
            accelerate.cpu_offload(model)
        else:
            accelerate.disk_offload(model, tmp_path / "offload")
        assert_same_bits(model(ids), expected)
    save_compressed(model, tmp_path / "x")
    written = read_tensors(tmp_path / "x")
    if offload == "cpu":
        assert not any(name.startswith("head.weight") for name in written)
    for name, tensor in written.items():
        assert_same_bits(tensor, state[name], name)
    with torch.no_grad():
        assert_same_bits(load_compressed(tmp_path / "x", model=seeded(Words, seed=1))(ids), expected)


def test_tensors_on_meta_that_nobody_keeps_are_not_saved(tmp_path: Path) -> None:
    model = compress(seeded(Nested), weights(8)).to("meta")
    with pytest.raises(CheckpointError, match="on the meta device and has no values"):
        save_compressed(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_offload_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    model = load_compressed(folder, device_map=SPREAD)
    folder.rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="was offloaded by accelerate, and cannot be read back"):
        save_compressed(model, tmp_path / "y")


# accelerate's own functions on compressed models --------------------------------------------------------------------


def offloaded_by(how: str, model: nn.Module, folder: Path) -> nn.Module:
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    return accelerate.dispatch_model(model, SPREAD, main_device="cpu", offload_dir=folder)


HOWS = ["cpu_offload", "disk_offload", "dispatch_model"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", HOWS)
def test_offloading_a_compressed_model_and_taking_it_back(tmp_path: Path, name: str, how: str) -> None:
    model = compressed_llama(LLAMA_CONFIGS[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = logits(model)
    offloaded_by(how, model, tmp_path / "offload")
    gone = ON_DISK if how == "dispatch_model" else ("",)
    for _ in range(2):
        assert_spread(model, before, gone)
        assert_same_bits(logits(model), expected)
    remove_hook_from_submodules(model)
    assert_same_tensors(model.state_dict(), before)
    assert_same_bits(logits(model), expected)


def test_accelerate_moves_codes_and_not_the_weight_that_they_stand_for() -> None:
    """The codes of int-quantized are named ``weight``, as is the property that dequantizes them."""
    model = compress(nn.Sequential(seeded(nn.Linear, 16, 8)), LLAMA_CONFIGS["W8A8"].replace(ignore=()))
    layer = model[0]
    codes = layer.state_dict()["weight"].clone()
    assert dict(named_module_tensors(layer))["weight"].dtype is torch.int8
    assert compute_module_sizes(model)["0.weight"] == 8 * 16
    set_module_tensor_to_device(layer, "weight", "meta")
    assert (layer.state_dict()["weight"].dtype, layer.state_dict()["weight"].is_meta) == (torch.int8, True)
    set_module_tensor_to_device(layer, "weight", "cpu", value=codes)
    assert_same_bits(layer.state_dict()["weight"], codes)
    assert layer.weight.dtype is torch.float32
    assert model.get_parameter("0.weight") is layer._parameters["weight"]


def test_reading_from_an_offloaded_module(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIGS["FP8"])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    name = "model.layers.1.mlp.up_proj"
    dense = model.get_submodule(name).weight.clone()
    offloaded_by("disk_offload", model, tmp_path)
    layer = model.get_submodule(name)
    wanted = {f"{name}.weight": "", f"{name}.weight_scale": ""}
    found = get_state_dict_from_offload(layer, f"{name}.weight", wanted)
    assert_same_tensors(found, {key: before[key] for key in wanted})
    with align_module_device(layer):
        assert_same_bits(layer.weight.clone(), dense)
    assert all(value.is_meta for value in layer.parameters())


def test_a_folder_with_the_tensors_of_another_model_is_refused(tmp_path: Path) -> None:
    accelerate.disk_offload(nn.Sequential(seeded(nn.Linear, 16, 8)), tmp_path / "offload")
    model = compress(nn.Sequential(seeded(nn.Linear, 16, 8)), LLAMA_CONFIGS["W8A8"].replace(ignore=()))
    accelerate.disk_offload(model, tmp_path / "offload")  # accelerate finds an index there, and writes nothing
    with pytest.raises(FormatError, match="the folder holds the tensors of another model"):
        save_compressed(model, tmp_path / "x")
    with pytest.raises(KeyError, match="weight_scale"):
        model(torch.ones(1, 16))


# compress and decompress under hooks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", HOWS)
def test_compress_under_hooks_keeps_them_working(tmp_path: Path, name: str, how: str) -> None:
    plain = compressed_llama(LLAMA_CONFIGS[name])
    model = offloaded_by(how, tiny_llama(), tmp_path / "offload")
    compress(model, LLAMA_CONFIGS[name], calibration=[{"input_ids": token_ids()}])
    gone = ON_DISK if how == "dispatch_model" else ("",)
    for _ in range(2):
        assert_spread(model, plain.state_dict(), gone)
        assert_same_bits(logits(model), logits(plain))
    save_compressed(model, tmp_path / "x")
    assert_same_tensors(read_tensors(tmp_path / "x"), dict(plain.state_dict()))
    remove_hook_from_submodules(model)
    assert_same_tensors(model.state_dict(), dict(plain.state_dict()))


@pytest.mark.parametrize("how", HOWS)
def test_decompress_under_hooks_keeps_them_working(tmp_path: Path, how: str) -> None:
    plain = decompress(compressed_llama(LLAMA_CONFIGS["W8A8"]))
    model = offloaded_by(how, compressed_llama(LLAMA_CONFIGS["W8A8"]), tmp_path / "offload")
    assert decompress(model) is model
    assert not compressed_modules(model)
    for _ in range(2):
        assert_same_bits(logits(model), logits(plain))
    remove_hook_from_submodules(model)
    assert_same_tensors(model.state_dict(), dict(plain.state_dict()))


def test_blocks_that_are_loaded_at_once(tmp_path: Path) -> None:
    """Modules of ``preload_module_classes`` keep the tensors of all that is in them, under one hook."""
    model = compressed_llama(LLAMA_CONFIGS["W8A8"])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = logits(model)
    accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"])
    for _ in range(2):
        assert_spread(model, before, ("",))
        assert_same_bits(logits(model), expected)
    save_compressed(model, tmp_path / "x")
    assert_same_tensors(read_tensors(tmp_path / "x"), before)
    with pytest.raises(UnsupportedFormatError, match="is offloaded by accelerate as a part of the block around it"):
        decompress(model)
    assert len(compressed_modules(model)) == 14
    dense = accelerate.cpu_offload(tiny_llama(), preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(QuantizationError, match="its weight is on the meta device"):
        compress(dense, LLAMA_CONFIGS["W8A8"])


# Mixtures of experts -------------------------------------------------------------------------------------------------


def tiny_mixtral() -> Any:
    fields = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**fields, num_key_value_heads=2, num_local_experts=4, vocab_size=256)
    return seeded(MixtralForCausalLM, config)


EXPERT_CONFIGS = {
    "int4": weights(4, strategy="group", group_size=32, ignore=("lm_head",)),
    "int8": LLAMA_CONFIGS["W8A8"],
    # Experts differ in how many of their values are not zero.
    "float8 without zeros": {
        **weights(8, type="float", strategy="channel", ignore=("lm_head",)),
        "sparsity_config": {"format": "sparse-bitmask", "targets": ["Linear"], "ignore": ["lm_head"]},
    },
}


@pytest.mark.filterwarnings(
    "ignore:Attempting to save a model with offloaded modules:UserWarning", "ignore:this checkpoint is sparse"
)
@pytest.mark.parametrize("name", EXPERT_CONFIGS)
def test_experts_on_disk(tmp_path: Path, name: str) -> None:
    whole = compress(tiny_mixtral(), EXPERT_CONFIGS[name])
    save_compressed(whole, tmp_path / "x")
    model = load_compressed(tmp_path / "x", device_map=SPREAD, offload_folder=tmp_path / "offload")
    for _ in range(2):
        assert_same_bits(logits(model), logits(whole))
        assert_spread(model, {key: tensor.data for key, tensor in whole.state_dict().items()})
    save_compressed(model, tmp_path / "y")
    model.save_pretrained(tmp_path / "z")
    for folder in ("y", "z"):
        assert_same_tensors(read_tensors(tmp_path / folder), read_tensors(tmp_path / "x"))
    with pytest.raises(UnsupportedFormatError, match="is offloaded by accelerate as stacked experts"):
        decompress(model)
    assert len(compressed_modules(model)) == len(compressed_modules(whole))


def test_experts_under_hooks(tmp_path: Path) -> None:
    """Hooks that only move inputs stay with the experts; those that keep the weights would lose them."""
    plain = compress(tiny_mixtral(), EXPERT_CONFIGS["int4"])
    model = accelerate.dispatch_model(tiny_mixtral(), {"": "cpu"}, force_hooks=True)
    compress(model, EXPERT_CONFIGS["int4"])
    assert hasattr(model.model.layers[0].mlp.experts, "_hf_hook")
    assert_same_bits(logits(model), logits(plain))
    assert_same_bits(logits(decompress(model)), logits(decompress(plain)))
    spread = accelerate.dispatch_model(tiny_mixtral(), SPREAD, main_device="cpu", offload_dir=tmp_path)
    with pytest.raises(QuantizationError, match="its experts are offloaded by accelerate"):
        compress(spread, EXPERT_CONFIGS["int4"])
    assert not compressed_modules(spread)


def test_calibration_leaves_the_hooks_of_experts() -> None:
    config = LLAMA_CONFIGS["W8A8 static"]
    plain, model = tiny_mixtral(), accelerate.dispatch_model(tiny_mixtral(), {"": "cpu"}, force_hooks=True)
    for each in (plain, model):
        compress(each, config, calibration=[{"input_ids": token_ids()}])
    assert hasattr(model.model.layers[0].mlp.experts, "_old_forward")
    assert_same_bits(logits(model), logits(plain))


def test_a_dense_model_with_layers_on_disk_is_compressed(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    before = read_tensors(tmp_path / "dense")
    load = {"device_map": SPREAD, "offload_folder": tmp_path / "offload"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **load)
    compress(model, LLAMA_CONFIGS["W4A16 group"])
    plain = compressed_llama(LLAMA_CONFIGS["W4A16 group"])
    assert_spread(model, plain.state_dict())
    assert_same_bits(logits(model), logits(plain))
    assert_same_tensors(read_tensors(tmp_path / "dense"), before)
    written = [read_tensors(tmp_path / "offload")]
    assert all(name.startswith("model.layers.1.") for tensors in written for name in tensors)

    without_folder = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", device_map=SPREAD)
    with pytest.raises(CheckpointError, match=r"model.layers.1.*pass offload_folder= to from_pretrained"):
        compress(without_folder, LLAMA_CONFIGS["W4A16 group"])


def test_values_of_an_offloaded_weight_are_checked_before_anything_is_touched(tmp_path: Path) -> None:
    model = seeded(Nested)
    with torch.no_grad():
        model.blocks[1].down.weight[2, 3] = float("inf")
    accelerate.disk_offload(model, tmp_path)
    with pytest.raises(QuantizationError, match=r"blocks\.1\.down"):
        compress(model, weights(8))
    assert not compressed_modules(model)


def test_a_hook_of_one_s_own_moves_along() -> None:
    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return 2 * output

    model = nn.Sequential(seeded(nn.Linear, 16, 8))
    plain = compress(nn.Sequential(seeded(nn.Linear, 16, 8)), weights(8))
    add_hook_to_module(model[0], Doubling())
    compress(model, weights(8))
    x = torch.linspace(-1, 1, 16)
    assert_same_bits(model(x), 2 * plain(x))
    remove_hook_from_submodules(model)
    assert_same_bits(model(x), plain(x))
    compress(decompress(model), weights(8))  # what a removed hook leaves behind is no obstacle
    assert_same_bits(model(x), compress(decompress(plain), weights(8))(x))


def test_a_forward_replaced_under_a_hook_is_refused() -> None:
    model = nn.Sequential(seeded(nn.Linear, 16, 8))
    model[0].forward = lambda x: x
    add_hook_to_module(model[0], accelerate.hooks.ModelHook())
    with pytest.raises(QuantizationError, match="its forward has been replaced on the object itself"):
        compress(model, weights(8))
