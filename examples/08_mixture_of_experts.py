"""A mixture of experts: most of its weights are stacked in a few parameters, and all of them are compressed.

The target ``Linear`` means the experts too, each projection of each for itself, and never the routers. In memory the
experts stay packed, and only those run that a token is routed to; in the file they stand one by one, under the names
that every server looks for. The model is tiny and random; a real one changes nothing but the names.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from compressed_format import CompressedFormatWarning, compress, load_compressed, resolve_targets, save_compressed
from compressed_format.config import QuantizationConfig

INT4 = QuantizationConfig.from_dict(
    {
        "config_groups": {
            "attention": {"targets": [r"re:.*self_attn\..*_proj$"], "weights": {"num_bits": 8, "strategy": "channel"}},
            "experts": {"targets": [r"re:.*\.experts\.\d+\..*_proj$"], "weights": {"num_bits": 4, "group_size": 32}},
        },
        "ignore": ["lm_head"],
    }
)


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "head_dim": 32}
    experts = {"num_experts": 16, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts, **heads, initializer_range=0.1)).eval()
    tokens = torch.arange(24).reshape(2, 12)
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())

    found = resolve_targets(model, INT4).assignments
    print(f"{len(found)} targets, such as {next(name for name in found if '.experts.' in name)}")
    compress(model, INT4)
    print(model.model.layers[0].mlp)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no source folder is known", CompressedFormatWarning)
        path = Path(folder) / "packed"
        save_compressed(model, path)
        with safe_open(path / "model.safetensors", "pt") as file:
            for name in sorted(file.keys()):
                if "layers.0.mlp.experts.7.up_proj" in name:
                    print(f"{name}  {list(file.get_slice(name).get_shape())}")
        loaded = load_compressed(path)
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        packed_bytes = sum(parameter.nbytes for parameter in loaded.parameters())
        print(f"{dense_bytes / 1e6:.2f} MB dense, {packed_bytes / 1e6:.2f} MB packed, after a forward too")


if __name__ == "__main__":
    main()
