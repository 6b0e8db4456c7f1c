"""Train a LoRA adapter on a packed model, save it alone, and load both again.

The weights stay packed in int4 while gradients pass through them; the adapter is all that learns, and all that is
saved. The model is tiny and random, so that this takes seconds; a real one changes nothing but the names.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from compressed_format import UnsupportedFormatError, compress, load_compressed, save_compressed

TEXT = Path(__file__).with_name("lighthouse.txt").read_bytes()
INT4 = {
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}},
    "ignore": ["lm_head"],
}


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    # What PEFT asks of a model has another name in new releases of transformers.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    # A token for each byte, in rows of 64.
    rows = torch.tensor(list(TEXT[: len(TEXT) // 64 * 64])).view(-1, 64)

    with tempfile.TemporaryDirectory() as folder:
        dense_path, model_path, adapter_path = (Path(folder) / name for name in ("dense", "model", "adapter"))
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1)).save_pretrained(dense_path)
        dense = LlamaForCausalLM.from_pretrained(dense_path)
        save_compressed(compress(dense, INT4), model_path)

        model = load_compressed(model_path)
        tuned = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
        tuned.print_trainable_parameters()
        optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=0.01)
        tuned.train()
        for step in range(20):
            loss = tuned(input_ids=rows[:16], labels=rows[:16]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 5 == 0 or step == 19:
                print(f"step {step:2}  loss {loss.item():.3f}")

        tuned.save_pretrained(adapter_path)
        assert all(".lora_" in name for name in load_file(adapter_path / "adapter_model.safetensors"))
        print(f"\nmodel {size(model_path):,} bytes, adapter {size(adapter_path):,} bytes")
        again = PeftModel.from_pretrained(load_compressed(model_path), adapter_path)
        with torch.no_grad():
            assert torch.equal(again(rows[:2]).logits, tuned.eval()(rows[:2]).logits)

        # An adapter is not merged into packed weights, which could not hold the sum: decompress() the model first.
        try:
            again.merge_and_unload()
        except UnsupportedFormatError as error:
            print(f"\nmerging: {error}")


if __name__ == "__main__":
    main()
