"""transformers' own ``from_pretrained`` and ``pipeline``, running checkpoints packed through this library.

After ``enable_transformers()`` nothing else of this library is called: checkpoints that say ``compressed-tensors`` load
packed and stay so, ``save_pretrained`` writes them again, and a dense model is compressed while it loads. The model
is tiny and random, so that this takes seconds; a real one changes nothing but the names.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from compressed_format import QuantizationConfig, disable_transformers, enable_transformers

INT4 = {
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    "ignore": ["lm_head"],
}
PROMPT = torch.arange(24).reshape(2, 12)


def write(model: torch.nn.Module) -> list[int]:
    return model.generate(PROMPT, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 12:].tolist()


def megabytes(model: torch.nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 1e6


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 256}
    with tempfile.TemporaryDirectory() as folder:
        dense_path, packed_path = Path(folder) / "dense", Path(folder) / "packed"
        dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1))
        dense.save_pretrained(dense_path)
        print(f"dense   {megabytes(dense):5.2f} MB  {write(dense)}")

        enable_transformers()
        config = QuantizationConfig.from_dict(INT4).to_dict()
        model = AutoModelForCausalLM.from_pretrained(dense_path, quantization_config=config)
        print(f"packed  {megabytes(model):5.2f} MB  {write(model)}  compressed while it was loaded")

        before = write(model)
        model.save_pretrained(packed_path)
        model = AutoModelForCausalLM.from_pretrained(packed_path)
        assert write(model) == before
        print(f"loaded  {megabytes(model):5.2f} MB  {write(model)}  after save_pretrained, still packed")
        disable_transformers()


if __name__ == "__main__":
    main()
