"""load_compressed into a module: what a file holds is what runs, and what does not fit is one error."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from compressed_format import (
    CheckpointError,
    CompressedFormatWarning,
    CompressedLinear,
    ConfigError,
    FormatError,
    UnsupportedFormatError,
    check,
    compress,
    load_compressed,
    save_compressed,
)
from compressed_format.config import FORMAT_VERSION
from tests.checks import (
    GOLDEN,
    assert_product,
    assert_same_bits,
    assert_same_tensors,
    golden_cases,
    golden_mask,
    golden_weight,
    hexadecimal,
)
from tests.models import (
    Nested,
    Words,
    edit_config,
    edit_tensors,
    file_backed,
    read_config,
    read_tensors,
    recorded_warnings,
    seeded,
    weights,
    word_aligned,
    write_folder,
)

INPUT = torch.linspace(-2, 2, 64).reshape(2, 32)
IDS = torch.arange(24).reshape(2, 12)


class Layer(nn.Module):
    """One layer, under the name that golden checkpoints have for it, beside a dense one."""

    def __init__(self, rows: int, columns: int, *, head: tuple[int, int] | None = None, bias: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(columns, rows, bias=bias)
        if head is not None:
            self.head = nn.Linear(head[1], head[0], bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def saved_nested(folder: Path, config: dict[str, Any] | None = None, **fields: Any) -> nn.Module:
    model = compress(seeded(Nested, **fields), config or weights(8, ignore=("head",)))
    save_compressed(model, folder)
    return model


def problems_of(error: Exception) -> dict[str, str]:
    return {problem.place: problem.message for problem in error.problems}


# A module is filled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fills_a_module(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved = saved_nested(tmp_path / "x", dtype=dtype)
    with torch.device(device):
        model = Nested(dtype=dtype).eval()
    loaded = load_compressed(tmp_path / "x", model=model)
    assert loaded is model
    assert_same_tensors(loaded.state_dict(), saved.state_dict())
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    assert_same_bits(loaded(INPUT.to(dtype)), saved(INPUT.to(dtype)))
    assert loaded.shared["again"] is loaded.blocks[0]
    assert isinstance(loaded.blocks[1].down, CompressedLinear)
    assert [name for name, parameter in loaded.named_parameters() if parameter.requires_grad] == [
        name for name, _ in loaded.named_parameters() if name.endswith("bias") or name.startswith(("norm", "head"))
    ]


def test_every_value_is_the_file_s(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1))
    state = loaded.state_dict()
    stored = read_tensors(tmp_path / "x")
    assert_same_tensors({name: state[name] for name in stored}, stored)
    twins = {name.replace("shared.again", "blocks.0") for name in state.keys() - stored.keys()}
    assert twins <= stored.keys()


def test_tensors_are_mapped_from_the_file(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1), device="cpu")
    for name, tensor in loaded.state_dict().items():
        assert file_backed(tensor) == str(tmp_path / "x" / "model.safetensors"), name


def test_a_module_that_sits_in_two_places_stays_one(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = nn.Linear(8, 8)
        return nn.Sequential(layer, nn.ReLU(), layer)

    saved = compress(seeded(build), weights(8))
    save_compressed(saved, tmp_path / "x")
    assert sorted(read_tensors(tmp_path / "x")) == ["0.bias", "0.weight_packed", "0.weight_scale", "0.weight_shape"]
    loaded = load_compressed(tmp_path / "x", model=seeded(build, seed=1))
    assert loaded[0] is loaded[2]
    x = torch.ones(1, 8)
    assert_same_bits(loaded(x), saved(x))
    # Whoever wrote the file may have kept another of its names.
    stored = {name.replace("0.", "2."): tensor for name, tensor in read_tensors(tmp_path / "x").items()}
    write_folder(tmp_path / "y", stored, read_config(tmp_path / "x")["quantization_config"])
    again = load_compressed(tmp_path / "y", model=seeded(build, seed=1))
    assert again[0] is again[2]
    assert_same_bits(again(x), saved(x))


def test_hooks_of_the_skeleton_stay(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    model, seen = seeded(Nested, seed=1), []
    model.blocks[1].down.register_forward_hook(lambda module, *_: seen.append(module))
    loaded = load_compressed(tmp_path / "x", model=model)
    loaded(torch.ones(1, 32))
    assert seen == [loaded.blocks[1].down]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_what_is_not_packed(dtype: torch.dtype, tmp_path: Path) -> None:
    saved = saved_nested(tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1), dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        stored = saved.state_dict()[name]
        packed = ".weight_" in name
        assert tensor.dtype == (dtype if stored.is_floating_point() and not packed else stored.dtype), name
    assert loaded.blocks[0].up.bias.dtype == dtype
    assert loaded.blocks[0].up.weight.dtype == dtype
    output = loaded(INPUT.to(dtype))
    assert output.dtype == dtype
    assert (output - saved(INPUT)).abs().max() < 0.05 * saved(INPUT).abs().max()


def test_without_dtype_everything_is_as_stored(tmp_path: Path) -> None:
    """Also what is looked up in a packed table, whatever the dtype that the module was built with."""
    saved = compress(seeded(Words, tied=False).to(torch.bfloat16), weights(8, "Embedding"))
    save_compressed(saved, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Words, tied=False))
    assert_same_tensors(loaded.state_dict(), saved.state_dict())
    assert loaded.embed.weight.dtype == torch.bfloat16
    assert_same_bits(loaded(IDS), saved(IDS))


def test_a_table_with_nothing_beside_it_has_the_dtype_of_its_scales(tmp_path: Path) -> None:
    saved = compress(nn.ModuleDict({"words": nn.Embedding(4, 8, dtype=torch.bfloat16)}), weights(8, "Embedding"))
    save_compressed(saved, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=nn.ModuleDict({"words": nn.Embedding(4, 8)}))
    assert loaded["words"].weight.dtype == torch.bfloat16


def test_arguments_of_transformers_are_refused_with_a_model(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    with pytest.raises(TypeError, match="got attn_implementation, revision, which only transformers' from_pretrained"):
        load_compressed(tmp_path / "x", model=seeded(Nested), revision="main", attn_implementation="eager")


def test_a_model_without_a_name_needs_model(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"x: transformers cannot tell which model this is .* pass model="):
        load_compressed(tmp_path / "x")


# Tied weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("bias", [False, True])
def test_tied_weights_that_are_compressed_alike_stay_tied(device: str, bias: bool, tmp_path: Path) -> None:
    saved = compress(seeded(Words, bias=bias), weights(8, "Embedding", "Linear"))
    save_compressed(saved, tmp_path / "x")
    assert [name for name in read_tensors(tmp_path / "x") if name.startswith("head")] == ["head.bias"] * bias
    with torch.device(device):
        model = Words(bias=bias).eval()
    loaded = load_compressed(tmp_path / "x", model=model)
    assert loaded.head.weight_packed is loaded.embed.weight_packed
    assert loaded.head.weight_scale is loaded.embed.weight_scale
    assert_same_bits(loaded(IDS), saved(IDS))
    save_compressed(loaded, tmp_path / "y")
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(tmp_path / "x"))


def test_tied_weights_of_which_the_other_name_is_stored(tmp_path: Path) -> None:
    saved = compress(seeded(Words), weights(8, "Embedding", "Linear"))
    save_compressed(saved, tmp_path / "x")
    stored = {name.replace("embed.", "head."): tensor for name, tensor in read_tensors(tmp_path / "x").items()}
    write_folder(tmp_path / "y", stored, read_config(tmp_path / "x")["quantization_config"])
    loaded = load_compressed(tmp_path / "y", model=seeded(Words, seed=1))
    assert loaded.head.weight_packed is loaded.embed.weight_packed
    assert_same_bits(loaded(IDS), saved(IDS))


def test_tied_weights_that_stay_dense(tmp_path: Path) -> None:
    saved = compress(seeded(Words), weights(8, ignore=("head",)))
    save_compressed(saved, tmp_path / "x")
    assert "head.weight" not in read_tensors(tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Words, seed=1))
    assert loaded.head.weight is loaded.embed.weight
    assert_same_bits(loaded(IDS), saved(IDS))


def test_tied_weights_of_which_one_is_compressed(tmp_path: Path) -> None:
    with pytest.warns(CompressedFormatWarning, match="embed, head share one weight, of which head is compressed"):
        saved = compress(seeded(Words), weights(8))
    save_compressed(saved, tmp_path / "x")
    for tied in (True, False):
        loaded = load_compressed(tmp_path / "x", model=seeded(Words, seed=1, tied=tied))
        assert_same_bits(loaded(IDS), saved(IDS))


def test_a_tied_weight_that_is_stored_dense_under_its_other_name(tmp_path: Path) -> None:
    save_compressed(compress(seeded(Words), weights(8, ignore=("head",))), tmp_path / "x")
    edit_config(tmp_path / "x", quantization_config={"ignore": []})
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", model=seeded(Words))
    assert problems_of(caught.value) == {
        "head.weight": 'is that of embed, which is stored dense, but its class is "Linear", a target of group_0; '
        "list head in ignore"
    }


def test_tied_weights_that_differ_in_the_file(tmp_path: Path) -> None:
    saved = compress(seeded(Words, tied=False), weights(8, ignore=("head",)))
    save_compressed(saved, tmp_path / "x")
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", model=seeded(Words))
    assert problems_of(caught.value) == {
        "head.weight": "is not equal to embed.weight in the checkpoint, and the model has one tensor for both"
    }
    assert_same_bits(load_compressed(tmp_path / "x", model=seeded(Words, tied=False))(IDS), saved(IDS))


def test_tied_weights_whose_groups_differ(tmp_path: Path) -> None:
    save_compressed(compress(seeded(Words), weights(8, "Embedding", "Linear")), tmp_path / "x")
    groups = {
        "words": {"targets": ["Embedding"], "weights": {"num_bits": 8, "strategy": "channel"}},
        "linears": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "channel"}},
    }
    edit_config(tmp_path / "x", quantization_config={"config_groups": groups})
    edit_tensors(tmp_path / "x", **{"layer.weight_packed": torch.zeros(16, 2, dtype=torch.int32)})
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", model=seeded(Words))
    [(place, message)] = problems_of(caught.value).items()
    assert place == "head.weight"
    assert message.startswith('is that of embed, where its class is "Embedding", a target of words, but')


# What does not fit ---------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_one_error(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    edit_tensors(
        tmp_path / "x",
        drop=("norm.bias", "blocks.0.up.weight_scale", "blocks.1.up.bias"),
        **{
            "extra.weight": torch.zeros(3),
            "norm.weight": torch.zeros(33),
            "steps": torch.zeros(3),
            "head.bias": torch.zeros(5, dtype=torch.int8),
            "head.weight": torch.zeros(5, 32, dtype=torch.float8_e4m3fn),
            "blocks.0.down.weight_packed": torch.zeros(32, 15, dtype=torch.int32),
            "blocks.1.down.weight_packed": torch.zeros(32, 16, dtype=torch.int64),
            "blocks.1.shift": torch.zeros(1),
        },
    )
    with pytest.raises(CheckpointError, match=r"x does not fit the model:\n") as caught:
        load_compressed(tmp_path / "x", model=seeded(Nested))
    assert problems_of(caught.value) == {
        "extra.weight": "is in the checkpoint, but the model has no such tensor",
        "norm.weight": "has shape [33] in the checkpoint, and [32] in the model",
        "norm.bias": "is missing from the checkpoint",
        "steps": "has dtype float32 in the checkpoint, expected int64",
        "head.bias": "has dtype int8 in the checkpoint, expected float32",
        "head.weight": "has dtype float8_e4m3fn in the checkpoint, expected float32",
        "blocks.0.up.weight_scale": 'is missing from the checkpoint (its class is "Linear", a target of group_0)',
        "blocks.0.down.weight_packed": "has shape [32, 15], expected [32, 16]",
        "blocks.1.down.weight_packed": "has dtype int64, expected int32",
        "blocks.1.up.bias": "is missing from the checkpoint",
        "blocks.1.shift": "has shape [1] in the checkpoint, and [64] in the model",
    }


def test_a_module_of_which_nothing_is_stored(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    edit_tensors(tmp_path / "x", drop=tuple(f"blocks.1.down.weight_{part}" for part in ("packed", "scale", "shape")))
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", model=seeded(Nested))
    assert list(problems_of(caught.value)) == [f"blocks.1.down.weight_{part}" for part in ("packed", "scale", "shape")]


def test_a_dense_layer_that_is_targeted_belongs_into_ignore(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    edit_config(tmp_path / "x", quantization_config={"ignore": []})
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", model=seeded(Nested))
    assert problems_of(caught.value) == {
        "head.weight": 'is stored dense, but its class is "Linear", a target of group_0; list head in ignore'
    }


def test_a_key_from_the_future_is_an_error_unless_it_may_be_unknown(tmp_path: Path) -> None:
    model = saved_nested(tmp_path / "x")
    groups = read_config(tmp_path / "x")["quantization_config"]["config_groups"]
    groups["group_0"]["weights"]["rotation"] = "hadamard"
    edit_config(tmp_path / "x", quantization_config={"config_groups": groups})
    with pytest.raises(ConfigError, match=r"rotation: unknown key.*allow_unknown=True"):
        load_compressed(tmp_path / "x", model=seeded(Nested))
    with pytest.warns(CompressedFormatWarning, match="rotation: unknown key"):
        loaded = load_compressed(tmp_path / "x", model=seeded(Nested), allow_unknown=True)
    assert torch.equal(loaded(INPUT), model(INPUT))


def test_a_packed_layer_that_is_ignored(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    edit_config(tmp_path / "x", quantization_config={"ignore": ["head", "blocks.1.up"]})
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", model=seeded(Nested))
    assert problems_of(caught.value) == {
        **{
            f"blocks.1.up.weight_{part}": "is in the checkpoint, but the model has no such tensor"
            for part in ("packed", "scale", "shape")
        },
        "blocks.1.up.weight": "is missing from the checkpoint",
    }


def test_values_that_contradict_the_format(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    changes = {f"blocks.{block}.up.weight_shape": torch.tensor([64, 31]) for block in range(2)}
    edit_tensors(tmp_path / "x", **changes)
    with pytest.raises(FormatError, match="contradicts itself") as caught:
        load_compressed(tmp_path / "x", model=seeded(Nested))
    message = "says [64, 31], but the module's weight is [64, 32]"
    assert problems_of(caught.value) == dict.fromkeys(changes, message)


def with_a_nan(folder: Path, name: str) -> None:
    saved_nested(folder)
    scale = read_tensors(folder)[name].clone()
    scale[3, 0] = torch.nan
    edit_tensors(folder, **{name: scale})


@pytest.mark.parametrize(
    "use",
    [
        lambda module: module(torch.ones(2, 32)),
        lambda module: module.dequantized_weight(),
        lambda module: module.weight.sum(),
    ],
)
def test_scales_are_checked_when_they_are_first_used(use: Callable[[Any], object], tmp_path: Path) -> None:
    place = "blocks.1.up.weight_scale"
    with_a_nan(tmp_path / "x", place)
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested))
    use(loaded.blocks[0].up)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(loaded)))
    for model in (loaded, loaded, copied):  # the second time, too
        assert model.blocks[1].up.weight.dtype is torch.float32  # which is known without a value
        with pytest.raises(FormatError) as caught:
            use(model.blocks[1].up)
        assert problems_of(caught.value) == {place: "holds nan at index [3, 0], expected a finite scale"}
    assert [finding.place for finding in check(tmp_path / "x").errors] == [place]


def test_scales_are_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_nested(tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested))
    expected = loaded(INPUT)
    monkeypatch.delattr("compressed_format.modules.first_use.check_scales")
    assert torch.equal(loaded(INPUT), expected)
    with pytest.raises(NameError):
        load_compressed(tmp_path / "x", model=seeded(Nested))(INPUT)


def test_a_check_of_scales_is_no_part_of_a_graph(tmp_path: Path) -> None:
    saved_nested(tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested))
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loaded, backend=backend, fullgraph=True)
    first = compiled(INPUT)  # of modules that have not been used
    assert torch.equal(loaded(INPUT), first)
    assert torch.equal(compiled(INPUT), first)
    assert len(graphs) == 1
    assert "aminmax" not in graphs[0].code


def test_buffers_that_no_checkpoint_holds(tmp_path: Path) -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)
            self.register_buffer("angles", torch.arange(4.0), persistent=False)

    saved = compress(seeded(Rotated), weights(8))
    save_compressed(saved, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Rotated, seed=1))
    assert loaded.angles.tolist() == [0, 1, 2, 3]
    with torch.device("meta"):
        model = Rotated()
    with pytest.raises(CheckpointError) as caught:
        load_compressed(tmp_path / "x", model=model)
    assert problems_of(caught.value) == {
        "angles": "is a non-persistent buffer on the meta device, which no checkpoint holds; build it on the CPU"
    }


_INT8 = {"num_bits": 8, "strategy": "channel"}


@pytest.mark.parametrize(
    ("changes", "place", "message"),
    [
        (
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float",
              "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}}}},
            "blocks.0.up",
            "nvfp4-pack-quantized",
        ),
        (
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float",
              "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}}}},
            "blocks.0.up",
            "mxfp4-pack-quantized",
        ),
        (
            {"transform_config": {"config_groups": {"R4": {"type": "hadamard", "apply": [
                {"targets": ["re:.*down$"], "location": "input"}]}}}},
            "transform_config.config_groups.R4",
            "an online transform at input of re:.*down$ cannot be run yet",
        ),
        (
            {"config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT8},
              "group_1": {"targets": ["TinyAttention"], "input_activations": {**_INT8, "strategy": "tensor"}}}},
            "attention",
            "the group group_1 quantizes attention, which cannot be run yet",
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings(
    # Said of the attention before the model is refused.
    "ignore:.*quantized activations.*are kept:compressed_format.CompressedFormatWarning"
)
def test_what_cannot_run_is_refused_by_feature_and_module(
    changes: dict[str, Any], place: str, message: str, tmp_path: Path
) -> None:
    class TinyAttention(nn.Module):
        pass

    def build() -> nn.Module:
        model = Nested()
        model.attention = TinyAttention()
        return model

    save_compressed(compress(seeded(build), weights(8, ignore=("head",))), tmp_path / "x")
    edit_config(tmp_path / "x", quantization_config={**changes, "format": None})
    with pytest.raises(UnsupportedFormatError) as caught:
        load_compressed(tmp_path / "x", model=seeded(build))
    assert message in problems_of(caught.value)[place]


def test_problems_of_the_config_are_warnings(tmp_path: Path) -> None:
    saved = saved_nested(tmp_path / "x")
    args = {"num_bits": 8, "strategy": "channel", "rounding": None}
    groups = {"group_0": {"targets": ["Linear", "Conv1d"], "weights": args}}
    edit_config(tmp_path / "x", quantization_config={"config_groups": groups, "quant_method": "compressed_tensors2"})
    with recorded_warnings() as texts:
        loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1))
    assert [text for text in texts if text.startswith("config_groups.group_0.weights.rounding: unknown key")]
    assert [text for text in texts if "'Conv1d' matches no module" in text or '"Conv1d" matches no module' in text]
    assert [text for text in texts if text.startswith("quant_method: must be")]
    assert_same_bits(loaded(INPUT), saved(INPUT))


# Activations, caches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
def test_outputs_are_rounded(symmetric: bool, tmp_path: Path) -> None:
    output = {"num_bits": 8, "strategy": "tensor", "symmetric": symmetric, "dynamic": False}
    config = weights(8)
    config["config_groups"]["group_0"]["output_activations"] = output
    saved = compress(seeded(Layer, 4, 32), config, calibration=[INPUT])
    save_compressed(saved, tmp_path / "x")
    stored = read_tensors(tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Layer, 4, 32, seed=1))
    scale = stored["lin.output_scale"]
    zero_point = stored["lin.output_zero_point"].float() if not symmetric else torch.zeros(1)
    plain = INPUT @ loaded.lin.weight.T
    by_hand = (torch.clamp(torch.round(plain / scale + zero_point), -128, 127) - zero_point) * scale
    assert_same_bits(loaded(INPUT), by_hand)
    assert not torch.equal(loaded(INPUT), plain)


def test_outputs_of_an_embedding_are_as_wide_as_its_rows(tmp_path: Path) -> None:
    config = weights(8, "Embedding")
    config["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8, "strategy": "group", "group_size": 8}
    ids = torch.arange(24)
    saved = compress(nn.Sequential(seeded(nn.Embedding, 24, 16)), config, calibration=[ids])
    assert saved[0].output_scale.shape == (2,)
    save_compressed(saved, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=nn.Sequential(nn.Embedding(24, 16)))
    assert_same_bits(loaded(ids), saved(ids))


class CachedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj = nn.Linear(16, 8)
        self.v_proj = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k_proj(x) + self.v_proj(x)


@pytest.mark.parametrize(
    "scales",
    [
        {"self_attn.k_scale": torch.tensor([0.5]), "self_attn.v_scale": torch.tensor([0.25])},
        {"self_attn.k_proj.output_scale": torch.tensor([0.5]), "self_attn.v_proj.output_scale": torch.tensor([0.25])},
    ],
    ids=["current", "of 2024"],
)
def test_scales_of_the_cache_are_kept(scales: dict[str, torch.Tensor], tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"self_attn": CachedAttention()})

    with pytest.warns(CompressedFormatWarning, match="no k_scale or v_scale is computed"):
        saved = compress(
            seeded(build),
            {**weights(8), "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}},
        )
    save_compressed(saved, tmp_path / "x")
    edit_tensors(tmp_path / "x", **scales)
    with pytest.warns(CompressedFormatWarning, match=r"2 KV-cache scales are kept in the state dict, but not applied"):
        narrow = load_compressed(tmp_path / "x", model=seeded(build, seed=1), dtype=torch.bfloat16)
    with recorded_warnings():
        loaded = load_compressed(tmp_path / "x", model=seeded(build, seed=1))
    for name, scale in scales.items():
        assert_same_bits(narrow.state_dict()[name], scale)
        assert_same_bits(loaded.state_dict()[name], scale)
    x = torch.ones(1, 16)
    assert_same_bits(loaded.self_attn(x), saved.self_attn(x))
    save_compressed(loaded, tmp_path / "y")
    again = read_tensors(tmp_path / "y")
    assert_same_tensors({name: again[name] for name in scales}, scales)
    assert sorted(again) == sorted(read_tensors(tmp_path / "x"))


def test_zero_points_of_symmetric_schemes_mean_nothing(tmp_path: Path) -> None:
    saved = saved_nested(tmp_path / "x")
    edit_tensors(tmp_path / "x", **{"blocks.0.up.weight_zero_point": torch.zeros(64, 1, dtype=torch.int8)})
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1))
    assert "blocks.0.up.weight_zero_point" not in loaded.state_dict()
    assert_same_bits(loaded(INPUT), saved(INPUT))


# Files of older releases ---------------------------------------------------------------------------------------------


def golden_folder(release: str, name: str, tmp_path: Path, config: dict[str, Any] | None = None) -> Path:
    folder = GOLDEN / release / name
    content = config or json.loads((folder / "config.json").read_text())["quantization_config"]
    return write_folder(tmp_path / "golden", load_file(folder / "model.safetensors"), content)


def layer_for(folder: Path, rows: int, columns: int, device: str = "cpu") -> Layer:
    stored = read_tensors(folder)
    head = stored.get("head.weight")
    with torch.device(device):
        return Layer(rows, columns, head=None if head is None else (*head.shape,), bias="lin.bias" in stored).eval()


def decompressed(case: dict[str, Any], shape: tuple[int, int]) -> torch.Tensor:
    values = torch.tensor(case["decompressed"]["values"], dtype=torch.float64)
    return values.to(getattr(torch, case["decompressed"]["dtype"].removeprefix("torch."))).reshape(shape)


def assert_runs_and_is_saved(loaded: Layer, weight: torch.Tensor, tmp_path: Path, *, sparse: bool = False) -> None:
    """``loaded`` computes with ``weight``, and what is saved of it is a current file that loads the same."""
    rows, columns = weight.shape
    x = torch.linspace(-1, 1, 3 * columns, dtype=torch.float64).reshape(3, columns).to(weight.dtype)
    bias = None if loaded.lin.bias is None else loaded.lin.bias.to(weight.dtype)
    expected = nn.functional.linear(x, weight, bias)
    assert_same_bits(loaded.lin.weight.to(weight.dtype), weight)
    if loaded.lin.scheme is None or loaded.lin.scheme.input_activations is None:
        assert_product(loaded(x), x, weight, bias)
    else:
        assert (loaded(x) - expected).abs().max() <= 0.1 * expected.abs().max()
    with recorded_warnings() as texts:
        save_compressed(loaded, tmp_path / "current")
    assert [text.startswith("this checkpoint is sparse") for text in texts] == [True] * sparse
    assert read_config(tmp_path / "current")["quantization_config"]["version"] == FORMAT_VERSION
    again = load_compressed(tmp_path / "current", model=layer_for(tmp_path / "current", rows, columns))
    assert_same_tensors(again.state_dict(), loaded.state_dict())
    assert_same_bits(again(x), loaded(x))


CURRENT = [
    name
    for name in golden_cases("v0.20.0")
    if not name.startswith(("nvfp4", "mxfp"))  # not served yet
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CURRENT)
def test_files_of_the_current_release(name: str, device: str, tmp_path: Path) -> None:
    case = golden_cases("v0.20.0")[name]
    rows, columns = case["shape"]
    folder = golden_folder("v0.20.0", name, tmp_path)
    loaded = load_compressed(folder, model=layer_for(folder, rows, columns, device))
    assert_same_tensors(loaded.state_dict(), read_tensors(folder))
    if "error" in case["decompressed"]:  # the release cannot read this one back itself
        weight = loaded.lin.weight
        assert (weight.float() - golden_weight(rows, columns)).abs().max() <= 0.25
    else:
        weight = decompressed(case, (rows, columns)) + 0.0
    if loaded.lin.scheme.output_activations is None:
        assert_runs_and_is_saved(loaded, weight, tmp_path)


@pytest.mark.parametrize("name", [name for name, case in golden_cases("v0.17.1_wordaligned").items()
                                  if (GOLDEN / "v0.17.1_wordaligned" / name / "config.json").exists()])  # fmt: skip
def test_the_word_aligned_layout_becomes_the_dense_one(name: str, tmp_path: Path) -> None:
    case = golden_cases("v0.17.1_wordaligned")[name]
    rows, columns = case["shape"]
    folder = golden_folder("v0.17.1_wordaligned", name, tmp_path)
    with pytest.warns(CompressedFormatWarning, match="1 modules were stored in the word-aligned layout"):
        loaded = load_compressed(folder, model=layer_for(folder, rows, columns))
    assert_runs_and_is_saved(loaded, decompressed(case, (rows, columns)), tmp_path)
    now = golden_cases("v0.20.0").get(name)
    if now is not None:
        stored = read_tensors(tmp_path / "current")["lin.weight_packed"]
        assert hexadecimal(stored) == now["tensors"]["lin.weight_packed"]["hex"]


def test_a_tied_weight_in_the_word_aligned_layout_stays_tied(tmp_path: Path) -> None:
    saved = compress(seeded(Words, vocabulary=8), weights(6, "Embedding", "Linear"))
    codes = {name: saved.get_submodule(name).quantized_weight().codes for name in ("embed", "layer")}
    save_compressed(saved, tmp_path / "x")
    aligned = {f"{name}.weight_packed": word_aligned(value, 6) for name, value in codes.items()}
    edit_tensors(tmp_path / "x", **aligned)
    edit_config(tmp_path / "x", quantization_config={"version": "0.17.1"})
    with pytest.warns(CompressedFormatWarning, match="2 modules were stored in the word-aligned layout"):
        loaded = load_compressed(tmp_path / "x", model=seeded(Words, vocabulary=8, seed=1))
    assert loaded.head.weight_packed is loaded.embed.weight_packed
    ids = torch.arange(8)
    assert_same_bits(loaded(ids), saved(ids))


def test_columns_in_the_order_of_their_activations(tmp_path: Path) -> None:
    case = golden_cases("v0.14.0.1_legacy")["pack4_group8_gidx"]
    folder = golden_folder("v0.14.0.1_legacy", "pack4_group8_gidx", tmp_path)
    loaded = load_compressed(folder, model=layer_for(folder, 4, 16))
    quantized = loaded.lin.quantized_weight()
    by_hand = quantized.codes * quantized.scale[:, quantized.g_idx.long()]
    assert (by_hand - golden_weight(4, 16)).abs().max() < quantized.scale.max()
    assert case["config"]["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    assert_runs_and_is_saved(loaded, by_hand.to(quantized.scale.dtype), tmp_path)
    assert "lin.weight_g_idx" in read_tensors(tmp_path / "current")


def test_an_order_of_columns_that_was_never_set(tmp_path: Path) -> None:
    folder = golden_folder("v0.14.0.1_legacy", "pack4_group8_gidx", tmp_path)
    edit_tensors(folder, **{"lin.weight_g_idx": torch.full((16,), -1, dtype=torch.int32)})
    loaded = load_compressed(folder, model=layer_for(folder, 4, 16))
    assert "lin.weight_g_idx" not in loaded.state_dict()
    quantized = loaded.lin.quantized_weight()
    assert_runs_and_is_saved(loaded, quantized.codes * quantized.scale.repeat_interleave(8, dim=1), tmp_path)


def test_an_order_of_columns_that_no_group_has(tmp_path: Path) -> None:
    folder = golden_folder("v0.14.0.1_legacy", "pack4_group8_gidx", tmp_path)
    edit_tensors(folder, **{"lin.weight_g_idx": torch.full((16,), 2, dtype=torch.int32)})
    with pytest.raises(FormatError, match=r"lin.weight_g_idx: names groups 2 to 2, expected 0 to 1"):
        load_compressed(folder, model=layer_for(folder, 4, 16))


def test_columns_ordered_in_place(tmp_path: Path) -> None:
    folder = golden_folder("v0.14.0.1_legacy", "pack4_group8_actweight", tmp_path)
    loaded = load_compressed(folder, model=layer_for(folder, 4, 16))
    case = golden_cases("v0.14.0.1_legacy")["pack4_group8_actweight"]
    if "values" in (case["decompressed"] or {}):
        weight = decompressed(case, (4, 16))
    else:
        quantized = loaded.lin.quantized_weight()
        weight = quantized.codes * quantized.scale.repeat_interleave(8, dim=1)
    assert_runs_and_is_saved(loaded, weight + 0.0, tmp_path)


def masked(dtype: torch.dtype = torch.bfloat16, rows: int = 4, columns: int = 16) -> torch.Tensor:
    return torch.where(golden_mask(rows, columns), golden_weight(rows, columns), torch.zeros(())).to(dtype)


def test_a_sparse_model(tmp_path: Path) -> None:
    folder = golden_folder("v0.14.0.1_legacy", "sparse24_model_only", tmp_path)
    loaded = load_compressed(folder, model=layer_for(folder, 4, 16))
    assert_same_tensors(loaded.state_dict(), read_tensors(folder))
    assert_runs_and_is_saved(loaded, masked(), tmp_path, sparse=True)
    assert_same_tensors(read_tensors(tmp_path / "current"), read_tensors(folder))


def test_a_model_with_float8_codes_of_sparse_weights(tmp_path: Path) -> None:
    folder = golden_folder("v0.14.0.1_legacy", "fp8dyn_plus_sparse24", tmp_path)
    loaded = load_compressed(folder, model=layer_for(folder, 4, 16))
    assert_same_tensors(loaded.state_dict(), read_tensors(folder))
    assert (loaded.lin.weight.float() - masked().float()).abs().max() < 0.2
    assert_runs_and_is_saved(loaded, loaded.lin.weight, tmp_path, sparse=True)
    assert_same_tensors(read_tensors(tmp_path / "current"), read_tensors(folder))


SPARSE = {"format": "sparse-bitmask", "targets": ["Linear"], "ignore": ["head"], "sparsity_structure": "unstructured"}


@pytest.mark.parametrize("name", ["sparse_bitmask_bfloat16", "sparse_bitmask_float32"])
def test_an_unstructured_bitmask(name: str, tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "sparsity_config": SPARSE, "version": "0.14.0.1"}
    folder = golden_folder("v0.14.0.1_legacy", name, tmp_path, config)
    edit_tensors(folder, drop=("lin.bias",))  # of another layer's size
    loaded = load_compressed(folder, model=layer_for(folder, 4, 16))
    mask = (torch.arange(64) % 3 == 1).reshape(4, 16)
    mask[2] = False
    weight = torch.where(mask, golden_weight(4, 16), torch.zeros(())).to(loaded.lin.dtype)
    assert_runs_and_is_saved(loaded, weight, tmp_path, sparse=True)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"shape": torch.tensor([[4], [8]])}, "lin.shape: says [4, 8], but the module's weight is [4, 16]"),
        ({"bitmask": torch.full((4, 2), 255, dtype=torch.uint8)}, "lin.bitmask: has 64 bits set for the 32 values"),
        ({"bitmask": torch.full((4, 2), 15, dtype=torch.uint8)}, "lin.bitmask: does not have two bits for row 0"),
    ],
)
def test_a_bitmask_that_contradicts_the_rest(tensor: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    folder = golden_folder("v0.14.0.1_legacy", "sparse24_model_only", tmp_path)
    edit_tensors(folder, **{f"lin.{name}": value for name, value in tensor.items()})
    with pytest.raises(FormatError) as caught:
        load_compressed(folder, model=layer_for(folder, 4, 16))
    assert message in str(caught.value)


@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_marlin_24_becomes_pack_quantized(strategy: str, tmp_path: Path) -> None:
    args = {"num_bits": 4, "strategy": strategy} | ({"group_size": 128} if strategy == "group" else {})
    groups = {"group_0": {"targets": ["Linear"], "weights": args}}
    config = {"config_groups": groups, "format": "marlin-24", "ignore": ["head"], "version": "0.9.0",
              "quant_method": "compressed-tensors", "quantization_status": "compressed"}  # fmt: skip
    folder = golden_folder("v0.14.0.1_legacy", f"marlin24_4_{strategy}_64x256", tmp_path, config)
    with pytest.warns(CompressedFormatWarning, match="1 modules were stored in the marlin-24 layout"):
        loaded = load_compressed(folder, model=layer_for(folder, 64, 256))
    dense = seeded(Layer, 64, 256).to(torch.float16)
    dense.lin.weight.data = masked(torch.float16, 64, 256)
    expected = compress(dense, {"config_groups": groups})
    assert_runs_and_is_saved(loaded, expected.lin.weight, tmp_path)
    written = read_config(tmp_path / "current")["quantization_config"]
    assert written["format"] == "pack-quantized"
    assert written["config_groups"]["group_0"]["format"] == "pack-quantized"


def test_what_older_releases_wrote_into_every_config(tmp_path: Path) -> None:
    """Nulls for everything, no format in the groups, an empty sparsity config."""
    saved = saved_nested(tmp_path / "x")
    nulls = dict.fromkeys(("actorder", "block_structure", "group_size"))
    args = nulls | weights(8)["config_groups"]["group_0"]["weights"]
    args |= {"dynamic": False, "observer": "minmax", "observer_kwargs": {}, "symmetric": True, "type": "int"}
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": args}
    old = dict.fromkeys(("kv_cache_scheme", "global_compression_ratio"))
    old |= {"config_groups": {"group_0": group}, "format": "pack-quantized", "ignore": ["head"], "version": "0.9.4"}
    old |= {"quant_method": "compressed-tensors", "quantization_status": "compressed"}
    old |= {"sparsity_config": {"format": "dense", "global_sparsity": 0.1, "sparsity_structure": "unstructured"}}
    config = read_config(tmp_path / "x")
    for key in ("quantization_config", "compression_config"):
        (tmp_path / "x" / "config.json").write_text(json.dumps({key: old}))
        loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1))
        assert_same_bits(loaded(INPUT), saved(INPUT))
    save_compressed(loaded, tmp_path / "y")
    written = read_config(tmp_path / "y")["quantization_config"]
    # An observer says how scales were found, and stays said.
    written["config_groups"]["group_0"]["weights"].pop("observer")
    assert written == config["quantization_config"]


def test_a_loaded_model_can_be_copied_and_saved_again(tmp_path: Path) -> None:
    saved = saved_nested(tmp_path / "x")
    loaded = copy.deepcopy(load_compressed(tmp_path / "x", model=seeded(Nested, seed=1)))
    save_compressed(loaded, tmp_path / "y")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()
    assert_same_bits(loaded(INPUT), saved(INPUT))
