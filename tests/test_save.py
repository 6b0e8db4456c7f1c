"""save_compressed: the folder it leaves, what it refuses, and that saving over one's own source is safe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressed_format import (
    CheckpointError,
    CheckpointExistsError,
    CompressedFormatWarning,
    ConfigError,
    FormatError,
    QuantizationConfig,
    compress,
    load_compressed,
    save_compressed,
)
from compressed_format.config import FORMAT_VERSION
from tests.checks import assert_same_bits, assert_same_tensors
from tests.models import (
    Nested,
    Words,
    compressed_llama,
    file_backed,
    logits,
    read_config,
    read_tensors,
    recorded_warnings,
    seeded,
    tiny_llama,
    weights,
)

INPUT = torch.linspace(-2, 2, 64).reshape(2, 32)
CONFIG = weights(8, ignore=("head",))
LLAMA_CONFIG = weights(8, ignore=("lm_head",))


def packed_nested() -> nn.Module:
    return compress(seeded(Nested), CONFIG)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A dense Llama's folder, with all sorts of files beside its weights."""
    folder = tmp_path / "dense"
    tiny_llama().save_pretrained(folder)
    config = read_config_of_model(folder)
    (folder / "config.json").write_text(json.dumps(config | {"my_key": {"kept": [1, None]}, "rope_note": "ä"}))
    for name in ("tokenizer.json", "chat_template.jinja", "code/modeling.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"the content of {name}")
    for name in ("pytorch_model.bin", "model.safetensors.index.json", "old/x.gguf", ".cache/tokenizer.json", ".hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def read_config_of_model(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


# What is written -----------------------------------------------------------------------------------------------------


def test_the_files_of_a_plain_module(tmp_path: Path) -> None:
    model = packed_nested()
    save_compressed(model, tmp_path / "x")
    assert files_of(tmp_path / "x") == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    state = model.state_dict()
    stored = read_tensors(tmp_path / "x")
    assert_same_tensors(stored, {name: state[name] for name in stored})
    assert not any(name.startswith("shared") for name in stored)
    assert read_config(tmp_path / "x") == {
        "quantization_config": {
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 8,
                        "type": "int",
                        "symmetric": True,
                        "strategy": "channel",
                        "group_size": None,
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                    "format": "pack-quantized",
                }
            },
            "format": "pack-quantized",
            "global_compression_ratio": None,
            "ignore": ["head"],
            "kv_cache_scheme": None,
            "moe_sparsity_config": None,
            "quant_method": "compressed-tensors",
            "quantization_status": "compressed",
            "sparsity_config": {},
            "transform_config": {},
            "version": FORMAT_VERSION,
        }
    }


def test_shards_and_their_index(tmp_path: Path) -> None:
    model = packed_nested()
    seen: list[tuple[int, int]] = []
    save_compressed(model, tmp_path / "x", max_shard_size="4KB", progress=lambda *done: seen.append(done))
    shards = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(shards) > 2
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    stored = read_tensors(tmp_path / "x")
    assert sorted(index["weight_map"]) == sorted(stored)
    total = sum(tensor.nbytes for tensor in stored.values())
    assert index["metadata"]["total_size"] == total
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1))
    assert_same_bits(loaded(INPUT), model(INPUT))
    assert {file_backed(tensor) for tensor in loaded.state_dict().values()} == {str(shard) for shard in shards}


def test_ignore_lists_every_linear_that_is_not_quantized(tmp_path: Path) -> None:
    targeted = {
        "config_groups": {"group_0": {"targets": ["re:.*up$"], "weights": {"num_bits": 8, "strategy": "channel"}}}
    }
    for config in (targeted, weights(8, ignore=("re:.*down$", "head"))):
        save_compressed(compress(seeded(Nested), config), tmp_path / "x", overwrite=True)
        ignore = read_config(tmp_path / "x")["quantization_config"]["ignore"]
        assert {entry for entry in ignore if not entry.startswith("re:")} == {"blocks.0.down", "blocks.1.down", "head"}
        assert len(ignore) == len(set(ignore))


def test_sparse_checkpoints_come_with_a_warning(tmp_path: Path) -> None:
    config = weights(8, ignore=("head",), type="float")
    config["config_groups"]["group_0"]["sparsity"] = "2:4"
    model = compress(seeded(Nested), config)
    with pytest.warns(CompressedFormatWarning, match="this checkpoint is sparse: it loads here and in"):
        save_compressed(model, tmp_path / "x")
    written = read_config(tmp_path / "x")["quantization_config"]
    assert written["sparsity_config"]["format"] == "sparse-24-bitmask"
    assert "sparsity" not in written["config_groups"]["group_0"]
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1))
    assert_same_bits(loaded(INPUT), model(INPUT))
    zeros = (loaded.blocks[0].up.weight == 0).unflatten(1, (-1, 4)).sum(dim=-1)
    assert zeros.min() >= 2


# The source folder ---------------------------------------------------------------------------------------------------


def test_files_and_keys_of_the_source_are_kept(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = compress(AutoModelForCausalLM.from_pretrained(source), LLAMA_CONFIG)
    save_compressed(model, tmp_path / "x")  # the source is the folder the model came from
    assert files_of(tmp_path / "x") == [
        "chat_template.jinja",
        "code/modeling.py",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    for name in ("chat_template.jinja", "code/modeling.py", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "x" / name).read_bytes() == (source / name).read_bytes()
    written = read_config_of_model(tmp_path / "x")
    assert written.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert written == read_config_of_model(source)


def test_source_wins_over_where_the_model_came_from(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama", "quantization_config": {}, "compression_config": {}}')
    (other / "vocab.txt").write_text("a")
    save_compressed(packed_nested(), tmp_path / "x", source=other)
    assert files_of(tmp_path / "x") == ["config.json", "model.safetensors", "vocab.txt"]
    written = read_config_of_model(tmp_path / "x")
    assert sorted(written) == ["model_type", "quantization_config"]
    assert written["quantization_config"]["config_groups"]


def test_a_model_from_nowhere_is_saved_without_a_tokenizer(tmp_path: Path) -> None:
    model = compressed_llama(LLAMA_CONFIG)
    with pytest.warns(CompressedFormatWarning, match="no tokenizer was written; pass source="):
        save_compressed(model, tmp_path / "x")
    assert files_of(tmp_path / "x") == ["config.json", "generation_config.json", "model.safetensors"]
    written = read_config_of_model(tmp_path / "x")
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert written["model_type"] == "llama"
    assert_same_bits(logits(load_compressed(tmp_path / "x")), logits(model))


def test_a_destination_inside_the_source(source: Path) -> None:
    model = compressed_llama(LLAMA_CONFIG)
    for _ in range(2):
        save_compressed(model, source / "packed", source=source, overwrite=True)
        assert not [name for name in files_of(source / "packed") if name.startswith("packed")]
    assert_same_bits(logits(load_compressed(source / "packed")), logits(model))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", ConfigError, "config.json:1:2: is no valid JSON"),
        ("[" * 100_000, ConfigError, "config.json: is no valid JSON: it is nested too deeply"),
        ("[]", ConfigError, "must be a JSON object, not list"),
        (None, CheckpointError, "the source is not a folder"),
    ],
)
def test_sources_that_are_none(content: str | None, error: type[Exception], message: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    if content is not None:
        source.mkdir()
        (source / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        save_compressed(packed_nested(), tmp_path / "x", source=source)
    assert not (tmp_path / "x").exists()


# The destination -----------------------------------------------------------------------------------------------------


def test_an_existing_destination_is_refused(tmp_path: Path) -> None:
    model = packed_nested()
    save_compressed(model, tmp_path / "x")
    before = {file: (tmp_path / "x" / file).read_bytes() for file in files_of(tmp_path / "x")}
    other = compress(seeded(Nested, seed=1), CONFIG)
    with pytest.raises(CheckpointExistsError, match="overwrite"):
        save_compressed(other, tmp_path / "x")
    assert {file: (tmp_path / "x" / file).read_bytes() for file in files_of(tmp_path / "x")} == before
    save_compressed(other, tmp_path / "x", overwrite=True)
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested))
    assert_same_bits(loaded(INPUT), other(INPUT))


def test_saving_over_the_folder_a_model_is_mapped_from(tmp_path: Path) -> None:
    expected = packed_nested()(INPUT)
    save_compressed(packed_nested(), tmp_path / "x")
    loaded = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1))
    assert file_backed(loaded.blocks[0].up.weight_packed) is not None
    before = (tmp_path / "x" / "model.safetensors").stat().st_ino
    for _ in range(2):
        save_compressed(loaded, tmp_path / "x", overwrite=True)
    assert (tmp_path / "x" / "model.safetensors").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert_same_bits(loaded(INPUT), expected)
    again = load_compressed(tmp_path / "x", model=seeded(Nested, seed=1))
    assert_same_bits(again(INPUT), expected)


def test_saving_a_transformers_model_over_its_own_folder(source: Path, tmp_path: Path) -> None:
    save_compressed(compressed_llama(LLAMA_CONFIG), tmp_path / "x", source=source)
    loaded = load_compressed(tmp_path / "x")
    expected = logits(loaded)
    names, config = files_of(tmp_path / "x"), read_config(tmp_path / "x")
    save_compressed(loaded, tmp_path / "x", overwrite=True)
    assert files_of(tmp_path / "x") == names
    assert read_config(tmp_path / "x") == config
    assert_same_bits(logits(loaded), expected)
    assert_same_bits(logits(load_compressed(tmp_path / "x")), expected)


# What cannot be saved ------------------------------------------------------------------------------------------------


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no compressed modules; call compress\(model, config\) first"):
        save_compressed(seeded(Nested), tmp_path / "x")


def test_a_model_that_is_not_what_its_config_says(tmp_path: Path) -> None:
    model = packed_nested()
    model.more = nn.ModuleDict({"head": compress(seeded(Words, tied=False), weights(4)).layer})
    model.embed = compress(seeded(Words, tied=False), weights(8, "Embedding")).embed
    with pytest.raises(FormatError, match="the model is not what its config says") as caught:
        save_compressed(model, tmp_path / "x")
    messages = {problem.place: problem.message for problem in caught.value.problems}
    assert sorted(messages) == ["embed", "more.head"]
    assert messages["embed"] == "is compressed, but no target of the model's config reaches it"
    assert "int4 channel symmetric" in messages["more.head"]
    assert not (tmp_path / "x").exists()


def test_a_model_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is on the meta device"):
        save_compressed(packed_nested().to("meta"), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_layer_added_after_compressing_is_ignored(tmp_path: Path) -> None:
    """It is dense, and readers must know: `Linear` targets it."""
    model = packed_nested()
    model.late = nn.Linear(4, 4)
    save_compressed(model, tmp_path / "x")
    assert "late" in read_config(tmp_path / "x")["quantization_config"]["ignore"]


# Tied embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("targets", "ignore", "stored", "stays_tied"),
    [
        (("Linear",), ("lm_head",), {"model.embed_tokens.weight"}, True),
        (("Linear",), (), {"model.embed_tokens.weight", "lm_head.weight_packed"}, False),
        (("Embedding",), (), {"model.embed_tokens.weight_packed", "lm_head.weight"}, False),
        (("Embedding", "Linear"), (), {"model.embed_tokens.weight_packed"}, True),
    ],
    ids=["head ignored", "head alone", "embedding alone", "both"],
)
@pytest.mark.filterwarnings("ignore:no source folder is known:compressed_format.CompressedFormatWarning")
def test_tied_embeddings(
    targets: tuple[str, ...], ignore: tuple[str, ...], stored: set[str], stays_tied: bool, meta: bool, tmp_path: Path
) -> None:
    with recorded_warnings() as texts:
        model = compressed_llama(weights(8, *targets, ignore=ignore), tie_word_embeddings=True)
    assert [("share one weight" in text) for text in texts] == [True] * (not stays_tied)
    expected = logits(model)
    save_compressed(model, tmp_path / "x")
    names = read_tensors(tmp_path / "x").keys()
    words = {name for name in names if name.startswith(("lm_head", "model.embed_tokens"))}
    assert {name for name in words if not name.endswith(("_scale", "_shape"))} == stored
    assert read_config(tmp_path / "x")["tie_word_embeddings"] is stays_tied

    if meta:
        with torch.device("meta"):
            skeleton = tiny_llama(tie_word_embeddings=stays_tied)
        # Its rotary frequencies are in no checkpoint.
        skeleton.model.rotary_emb = tiny_llama().model.rotary_emb
        loaded = load_compressed(tmp_path / "x", model=skeleton)
    else:
        loaded = load_compressed(tmp_path / "x")
    assert_same_bits(logits(loaded), expected)
    head, words = (module._parameters for module in (loaded.lm_head, loaded.model.embed_tokens))
    shared = {name for name in head.keys() & words.keys() if head[name] is words[name]}
    assert shared == (words.keys() if stays_tied else set())
    save_compressed(loaded, tmp_path / "y", source=tmp_path / "x")
    assert_same_tensors(read_tensors(tmp_path / "y"), read_tensors(tmp_path / "x"))
    if not meta:
        loaded.tie_weights()  # as transformers does whenever it thinks that something has changed
        assert_same_bits(logits(loaded), expected)


def test_a_config_object_can_be_reused(tmp_path: Path) -> None:
    """Saving expands ignore in the file, not in the object."""
    config = QuantizationConfig.from_dict(CONFIG)
    model = compress(seeded(Nested), config)
    save_compressed(model, tmp_path / "x")
    save_compressed(model, tmp_path / "y")
    assert (tmp_path / "x" / "config.json").read_bytes() == (tmp_path / "y" / "config.json").read_bytes()
    assert (tmp_path / "x" / "model.safetensors").read_bytes() == (tmp_path / "y" / "model.safetensors").read_bytes()
    assert config.ignore == ("head",)
