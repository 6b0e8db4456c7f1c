"""One packed model on several devices: tensor parallelism of transformers and of torch, and FSDP2 with an adapter.

Two processes on the CPU stand for two devices. On GPUs, start the program with torchrun, which starts the processes and
sets what ``start`` sets here, and say "cuda" and "nccl".
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from transformers import AutoModelForCausalLM, LlamaConfig

from compressed_format import CompressedFormatWarning, compress, load_compressed, save_compressed
from compressed_format.parallel import parallelize_module

PROCESSES = 2
CONFIG = {
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 64}}},
    "ignore": ["lm_head"],
}
TOKENS = torch.arange(16).reshape(2, 8)


def held(model: nn.Module) -> int:
    """The bytes of the parameters that this process has."""
    parts = [value.to_local() if isinstance(value, DTensor) else value for value in model.parameters()]
    return sum(part.numel() * part.element_size() for part in parts)


def tell(text: str) -> None:
    if dist.get_rank() == 0:
        print(text)


def with_transformers(folder: Path) -> None:
    """The plan that the model has; each process reads its part of the files, and no more."""
    whole = load_compressed(folder)
    model = load_compressed(folder, tp_plan="auto")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, whole(TOKENS).logits)
    tell(f"transformers:    {held(model):>9,} of {held(whole):,} bytes in each process")


def with_a_plan(folder: Path) -> None:
    """A plan for any module, with torch's own styles, by a function with torch's own name."""
    whole = load_compressed(folder).model.layers[0].mlp
    plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    mlp = load_compressed(folder).model.layers[0].mlp
    mlp = parallelize_module(mlp, init_device_mesh("cpu", (PROCESSES,)), plan)
    input = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mlp(input), whole(input))
    tell(f"a plan:          {held(mlp):>9,} of {held(whole):,} bytes in each process")


class Adapted(nn.Module):
    """A packed layer that stays as it is, and a small trained product beside it."""

    def __init__(self, layer: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(x))


def with_fsdp(folder: Path) -> None:
    """Parameters that are sharded between the forwards, and gathered for each of them as packed tensors."""
    torch.manual_seed(0)
    model = load_compressed(folder)
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj = Adapted(layer.mlp.down_proj)
    before = held(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=TOKENS, labels=TOKENS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for layer in model.model.layers:
        layer.reshard()
    model.reshard()
    tell(f"FSDP2:           {held(model):>9,} of {before:,} bytes in each process between steps")
    tell(f"                 loss {losses[0]:.4f}, after two steps {losses[-1]:.4f}")


def start(rank: int, folder: str) -> None:
    """What one process does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    checkpoint = Path(folder) / "packed"
    with_transformers(checkpoint)
    with_a_plan(checkpoint)
    with_fsdp(checkpoint)
    dist.destroy_process_group()


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompressedFormatWarning)  # there is no tokenizer to copy
            save_compressed(compress(AutoModelForCausalLM.from_config(config), CONFIG), Path(folder) / "packed")
        torch.multiprocessing.spawn(start, args=(folder,), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
