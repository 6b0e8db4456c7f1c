"""Sub-models of pipelines and of composite models: compressed in place, saved and loaded each on its own."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from safetensors.torch import save_file

import compressed_format.integrations
from compressed_format import (
    CheckpointError,
    CompressedLinear,
    FormatError,
    QuantizationConfig,
    compress,
    decompress,
    load_compressed,
    save_compressed,
)
from compressed_format.integrations.diffusers import build
from compressed_format.modules.base import compressed_modules
from tests.checks import assert_same_bits, assert_same_tensors
from tests.integrations.vision_language import tiny_llava, tiny_qwen
from tests.models import edit_config, read_config, read_tensors, recorded_warnings, seeded, weights

CONFIGS: dict[str, Any] = {
    "W8A16": weights(8),
    "W4A16 in part": weights(4, strategy="group", group_size=4, symmetric=False, ignore=("re:.*attn.*",)),
    "FP8_DYNAMIC": QuantizationConfig.preset("FP8_DYNAMIC"),
}


def tiny_dit(**fields: Any) -> Any:
    """Blocks of a width of 32; its position embedding is a buffer that no checkpoint holds."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    return seeded(DiTTransformer2DModel, in_channels=4, out_channels=8, num_embeds_ada_norm=10, **{**sizes, **fields})


def tiny_flux() -> Any:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return seeded(
        FluxTransformer2DModel,
        in_channels=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        **sizes,
    )


def tiny_unet() -> Any:
    return seeded(
        UNet2DConditionModel,
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )


def run_dit(model: Any) -> torch.Tensor:
    return model(noise(model, 1, 4, 8, 8), timestep=torch.tensor([3]), class_labels=torch.tensor([4])).sample


def run_flux(model: Any) -> torch.Tensor:
    return model(
        hidden_states=noise(model, 1, 16, 4),
        encoder_hidden_states=noise(model, 1, 5, 32),
        pooled_projections=noise(model, 1, 32),
        timestep=torch.tensor([0.5], dtype=model.dtype),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(5, 3),
    ).sample


def run_unet(model: Any) -> torch.Tensor:
    return model(noise(model, 1, 4, 8, 8), torch.tensor(3), encoder_hidden_states=noise(model, 1, 5, 32)).sample


def noise(model: Any, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(model.dtype)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]] = {
    "DiTTransformer2DModel": (tiny_dit, run_dit),
    "FluxTransformer2DModel": (tiny_flux, run_flux),
    "UNet2DConditionModel": (tiny_unet, run_unet),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_compressed(compress(tiny_dit(), weights(8)), tmp_path / "x")
    return tmp_path / "x"


def problem_of(error: Exception) -> tuple[str, str]:
    (problem,) = error.problems
    return problem.place, problem.message


# diffusers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_a_pipeline_on_its_own(name: str, config: str, tmp_path: Path) -> None:
    make, run = MODELS[name]
    with recorded_warnings():  # of attention whose parts are told apart
        model = compress(make(), CONFIGS[config])
    assert model.dtype is torch.float32
    expected = run(model)
    save_compressed(model, tmp_path / "x")
    assert {file.name for file in (tmp_path / "x").iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    written = read_config(tmp_path / "x")
    assert written["_class_name"] == name
    ignored = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert ignored <= set(written["quantization_config"]["ignore"])

    loaded = load_compressed(tmp_path / "x")
    assert type(loaded).__name__ == name
    assert loaded.dtype is torch.float32
    assert not loaded.training
    assert_same_bits(run(loaded), expected)
    stored = read_tensors(tmp_path / "x")
    assert_same_tensors(loaded.state_dict(), stored)  # still after it has run
    assert compressed_modules(loaded).keys() == compressed_modules(model).keys()
    if config != "FP8_DYNAMIC":  # which rounds activations, and the dense model does not
        difference = (run(decompress(loaded)) - expected).abs().max()
        assert difference <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("config", CONFIGS)
def test_the_dtype_of_a_model_is_that_in_which_it_computes(config: str, tmp_path: Path) -> None:
    model = tiny_flux().to(torch.bfloat16)
    with recorded_warnings():
        compress(model, CONFIGS[config])
    save_compressed(model, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x")
    assert loaded.dtype is model.dtype is torch.bfloat16
    assert_same_bits(run_flux(loaded), run_flux(model))
    assert copy.deepcopy(loaded).dtype is torch.bfloat16
    assert loaded.to(torch.float32).dtype is torch.float32
    wide = load_compressed(tmp_path / "x", dtype=torch.float32)
    assert wide.dtype is torch.float32
    decompress(wide)
    assert wide.dtype is torch.float32
    assert "quantization_config" not in wide.config
    assert not hasattr(wide, "_diffusers_hook")


def test_a_pipeline_with_its_transformer_packed(tmp_path: Path) -> None:
    vae = seeded(
        AutoencoderKL,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    pipeline = DiTPipeline(transformer=tiny_dit(), vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "dense")
    compress(pipeline.transformer, weights(8, ignore=("re:.*attn.*",)))
    expected = _picture(pipeline)
    # Written by diffusers itself, and by this library into a folder of the dense pipeline.
    pipeline.save_pretrained(tmp_path / "whole")
    save_compressed(pipeline.transformer, tmp_path / "dense" / "transformer", overwrite=True)
    files = {root: read_tensors(tmp_path / root / "transformer") for root in ("whole", "dense")}
    assert_same_tensors(files["whole"], files["dense"])
    configs = {root: read_config(tmp_path / root / "transformer")["quantization_config"] for root in files}
    assert configs["whole"] == configs["dense"]
    for root in files:
        transformer = load_compressed(tmp_path / root / "transformer")
        again = DiTPipeline.from_pretrained(tmp_path / root, transformer=transformer)
        again.set_progress_bar_config(disable=True)
        assert_same_bits(_picture(again), expected)
        assert_same_tensors(transformer.state_dict(), files[root])
    with pytest.raises(CheckpointError, match=r"model_index\.json: it is a whole pipeline, whose models"):
        load_compressed(tmp_path / "dense")


def _picture(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline([1], guidance_scale=1.0, generator=generator, num_inference_steps=2, output_type="np").images
    return torch.from_numpy(pictures)


def test_one_loads_it_in_a_fresh_process_without_a_network(folder: Path) -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*_): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "from compressed_format import load_compressed\n"
        "print(type(load_compressed(sys.argv[1])).__name__)\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert output == "DiTTransformer2DModel\n"


def test_only_parameters_go_without_memory_while_a_model_is_built(folder: Path) -> None:
    model = build(read_config(folder), folder, torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same_bits(model.pos_embed.pos_embed, tiny_dit().pos_embed.pos_embed)
    assert not any(parameter.is_meta for parameter in tiny_dit().parameters())  # as before
    assert torch.get_default_dtype() is torch.float32


def test_dtype_is_what_from_pretrained_would_make_of_it(tmp_path: Path) -> None:
    """Some classes want part of their parameters in float32 whatever the rest is."""
    dense = seeded(
        WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=16,
    )
    dense.save_pretrained(tmp_path / "dense")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "dense", torch_dtype=torch.bfloat16)
    config = weights(8, "re:.*attn.*", ignore=("re:.*norm.*",))
    with recorded_warnings():  # of the tables, which are in no Linear
        compress(dense, config)
    save_compressed(dense, tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", dtype=torch.bfloat16)
    packed = {
        f"{name}.{suffix}" for name, module in compressed_modules(loaded).items() for suffix in module._parameters
    }
    ours = dict((*loaded.named_parameters(), *loaded.named_buffers()))
    expected = dict((*theirs.named_parameters(), *theirs.named_buffers()))
    dense_names = ours.keys() - packed
    assert {ours[name].dtype for name in dense_names} >= {torch.bfloat16, torch.float32}
    assert_same_tensors(
        {name: ours[name].detach() for name in dense_names}, {name: expected[name].detach() for name in dense_names}
    )
    assert loaded.dtype is theirs.dtype is torch.bfloat16


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("shards", [1, 2])
def test_files_may_have_either_library_s_names(stem: str, shards: int, folder: Path) -> None:
    expected = run_dit(load_compressed(folder))
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "all.safetensors")
    tensors = read_tensors(folder)
    (folder / "all.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        parts = {f"{stem}.safetensors": names}
    else:
        parts = {f"{stem}-0000{part + 1}-of-00002.safetensors": names[part::2] for part in range(2)}
        index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    assert_same_bits(run_dit(load_compressed(folder)), expected)


def test_shards_are_named_as_diffusers_names_them(folder: Path, tmp_path: Path) -> None:
    model = load_compressed(folder)
    save_compressed(model, tmp_path / "y", max_shard_size="50KB")
    files = sorted(file.name for file in (tmp_path / "y").glob("*.safetensors*"))
    assert files[-1] == "diffusion_pytorch_model.safetensors.index.json"
    assert files[0].startswith("diffusion_pytorch_model-00001-of-")
    assert len(files) > 2
    assert_same_bits(run_dit(load_compressed(tmp_path / "y")), run_dit(model))


def test_the_folder_of_the_model_is_its_source_and_that_of_its_pipeline_is_not(tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    tiny_dit().save_pretrained(root / "transformer")
    (root / "model_index.json").write_text("{}")
    (root / "transformer" / "README.md").write_text("one of mine")
    config = read_config(root / "transformer")
    (root / "transformer" / "config.json").write_text(json.dumps(config | {"note": "kept"}))
    own = DiTTransformer2DModel.from_pretrained(root / "transformer")
    save_compressed(compress(own, weights(8)), tmp_path / "own")
    assert read_config(tmp_path / "own")["note"] == "kept"
    assert (tmp_path / "own" / "README.md").read_text() == "one of mine"
    within = DiTTransformer2DModel.from_pretrained(root, subfolder="transformer")
    save_compressed(compress(within, weights(8)), tmp_path / "within")
    names = {file.name for file in (tmp_path / "within").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert str(tmp_path) not in (tmp_path / "within" / "config.json").read_text()


@pytest.mark.parametrize(
    "name",
    ["UnheardOf", "os", "os.system", "attention", "auto_model", "ModelMixin", "AutoModel", "DDIMScheduler",
     "DiTPipeline", "StableDiffusionPipeline", "__builtins__", "", "unets.UNet2DModel"],
)  # fmt: skip
def test_a_class_is_looked_up_among_diffusers_own_models_only(name: str, folder: Path) -> None:
    before = set(sys.modules)
    edit_config(folder, _class_name=name)
    with pytest.raises(CheckpointError) as caught:
        load_compressed(folder)
    place, message = problem_of(caught.value)
    assert place == f"{folder / 'config.json'}: _class_name"
    assert message == (
        f"{name!r} is no model of diffusers {diffusers.__version__}; install one that has it, or pass model="
    )
    assert not {module for module in set(sys.modules) - before if not module.startswith("diffusers.")}


def test_a_config_that_its_class_does_not_take(folder: Path) -> None:
    edit_config(folder, norm_type="unheard_of")
    with pytest.raises(CheckpointError, match=r"diffusers cannot build a DiTTransformer2DModel .* pass model="):
        load_compressed(folder)
    edit_config(folder, norm_type="ada_norm_zero", num_layers=1)
    with pytest.raises(CheckpointError) as caught:
        load_compressed(folder)
    places = {problem.place for problem in caught.value.problems}
    assert "transformer_blocks.1.attn1.to_q.weight_packed" in places
    assert all(place.startswith("transformer_blocks.1.") for place in places)


def test_without_diffusers_the_error_says_so_and_model_is_the_way_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = tiny_dit()
    expected = run_dit(load_compressed(folder))
    monkeypatch.delattr(compressed_format.integrations, "diffusers")
    monkeypatch.delitem(sys.modules, "compressed_format.integrations.diffusers")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(CheckpointError) as caught:
        load_compressed(folder)
    assert "names DiTTransformer2DModel, a model of diffusers, which cannot be imported" in problem_of(caught.value)[1]
    monkeypatch.undo()
    assert_same_bits(run_dit(load_compressed(folder, model=skeleton)), expected)


def test_nothing_goes_on_to_diffusers(folder: Path) -> None:
    with pytest.raises(TypeError, match="got use_cache, which only transformers' from_pretrained takes, and this is"):
        load_compressed(folder, use_cache=False)


# transformers --------------------------------------------------------------------------------------------------------


def tiny_clip_text() -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    return seeded(transformers.CLIPTextModel, config)


@pytest.mark.filterwarnings("ignore:no source folder is known:compressed_format.CompressedFormatWarning")
def test_a_text_encoder_is_loaded_as_its_class(tmp_path: Path) -> None:
    model = compress(tiny_clip_text(), weights(8))
    ids = torch.arange(12).reshape(1, 12)
    expected = model(ids).last_hidden_state
    save_compressed(model, tmp_path / "text_encoder")
    assert read_config(tmp_path / "text_encoder")["architectures"] == ["CLIPTextModel"]
    loaded = load_compressed(tmp_path / "text_encoder")
    assert type(loaded) is transformers.CLIPTextModel
    assert_same_bits(loaded(ids).last_hidden_state, expected)
    assert_same_tensors(loaded.state_dict(), read_tensors(tmp_path / "text_encoder"))
    assert sum(isinstance(module, CompressedLinear) for module in loaded.modules()) == 12


@pytest.mark.filterwarnings("ignore:no source folder is known:compressed_format.CompressedFormatWarning")
@pytest.mark.parametrize(
    ("make", "part", "name"),
    [
        (tiny_llava, "model.language_model", "LlamaModel"),
        (tiny_llava, "model.vision_tower", "CLIPVisionModel"),
        (tiny_qwen, "model.language_model", "Qwen2_5_VLTextModel"),
    ],
)
def test_a_part_of_a_composite_model_on_its_own(make: Callable[[], Any], part: str, name: str, tmp_path: Path) -> None:
    model = make()
    submodel = model.get_submodule(part)
    inputs = (
        {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
        if name == "CLIPVisionModel"
        else {"input_ids": torch.arange(12).reshape(1, 12)}
    )
    compress(submodel, weights(8))
    expected = submodel(**inputs).last_hidden_state
    save_compressed(submodel, tmp_path / "x")
    assert read_config(tmp_path / "x")["architectures"] == [name]
    loaded = load_compressed(tmp_path / "x")
    assert type(loaded).__name__ == name
    assert_same_bits(loaded(**inputs).last_hidden_state, expected)
    linears = sum(isinstance(module, torch.nn.Linear) for module in submodel.modules())
    assert sum(isinstance(module, CompressedLinear) for module in loaded.modules()) == linears
    # The whole was not compressed, and says where it was.
    with pytest.raises(FormatError, match=f"compress\\(\\) was called with {part} alone: save that"):
        save_compressed(model, tmp_path / "whole")


def test_the_folder_of_the_whole_gives_a_part_its_tokenizer_and_not_its_config(tmp_path: Path) -> None:
    tiny_llava().save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "dense")
    part = compress(whole.model.language_model, weights(8))
    save_compressed(part, tmp_path / "x", source=tmp_path / "dense")
    content = read_config(tmp_path / "x")
    assert (content["model_type"], content["architectures"]) == ("llama", ["LlamaModel"])
    assert (tmp_path / "x" / "tokenizer.json").read_text() == "{}"
    ids = torch.arange(12).reshape(1, 12)
    assert_same_bits(load_compressed(tmp_path / "x")(ids)[0], part(ids)[0])
