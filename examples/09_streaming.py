"""From a checkpoint to a compressed one and back as it streams: no model is built, and no tensor is whole in memory.

The job tells how far it is, is interrupted, and goes on from there when it is called again. The result is
checked, and a few rows of one weight are read without the rest. The checkpoint is tiny and random; one of hundreds of
gigabytes takes the same calls and the same few megabytes of memory.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from compressed_format import check, compress_checkpoint, decompress_checkpoint, open_checkpoint

CONFIG = {
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}},
    "ignore": ["lm_head"],
}
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 32, 128, 384, 1024
UP = "model.layers.20.mlp.up_proj"


def write_model(folder: Path) -> None:
    """A checkpoint in two shards with their index, as it would come from a hub."""
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,), "lm_head": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")}
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"model.layers.{layer}.{name}_layernorm": (HIDDEN,) for name in ("input", "post_attention")}
    tensors = {f"{name}.weight": torch.randn(shape).bfloat16() * 0.02 for name, shape in shapes.items()}
    folder.mkdir()
    weight_map = {}
    for number in (1, 2):
        file = f"model-{number:05}-of-00002.safetensors"
        names = [name for name in tensors if (name < "model.layers.2") == (number == 1)]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def interrupt(done: int, total: int) -> None:
    """Called with the bytes of the source that are done, and all of them; what it raises ends the job."""
    print(f"  {done / total:4.0%} of {total:,} bytes")
    if done > total / 3:
        raise KeyboardInterrupt


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense, packed, again = folder / "dense", folder / "packed", folder / "again"
        write_model(dense)

        try:
            compress_checkpoint(dense, packed, CONFIG, workers=1, progress=interrupt)
        except KeyboardInterrupt:
            print(f"interrupted, and left: {sorted(path.name for path in folder.iterdir())}")
        assert not packed.exists()

        calls: list[int] = []
        compress_checkpoint(dense, packed, CONFIG, progress=lambda done, _: calls.append(done))
        print(f"the same call went on from {calls[0]:,} bytes: {sorted(path.name for path in packed.iterdir())}")

        report = check(packed)
        assert report.ok, report.findings

        reader = open_checkpoint(packed)
        module = reader.modules[UP]
        rows = module.dense(rows=(128, 132))
        print(f"{UP}: {', '.join(module.tensors)}; rows 128 to 131 are {list(rows.shape)} of {list(module.shape)}")
        error = (rows - open_checkpoint(dense)[f"{UP}.weight"][128:132]).abs().max()
        print(f"  off by at most {error:.4f}")

        decompress_checkpoint(packed, again)
        assert torch.equal(open_checkpoint(again)[f"{UP}.weight"][128:132], rows)
        for path in (dense, packed, again):
            size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
            print(f"{path.name:<7}{size:>10,} bytes")


if __name__ == "__main__":
    main()
