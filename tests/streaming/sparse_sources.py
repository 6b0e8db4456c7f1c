"""Checkpoints of any size that take no room: their files have holes where the weights would be."""

from __future__ import annotations

import json
import os
from pathlib import Path

from compressed_format.checkpoint.header import build_header, byte_size

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
SHARD_BYTES = 5 * 10**9


def write_sparse_checkpoint(folder: Path, nbytes: int) -> None:
    """Write a checkpoint of at least ``nbytes`` bytes of bfloat16 zeros, in shards of 5 GB, to a new ``folder``.

    From 1 GB on, its matrices are those of a large model, and the head of a large vocabulary comes first; below, it has
    one small one.
    """
    large = nbytes >= 10**9
    rows, columns = (INTERMEDIATE, HIDDEN) if large else (256, 256)
    tensors: list[tuple[str, tuple[int, ...]]] = [("lm_head.weight", (VOCABULARY, HIDDEN))] if large else []
    total = sum(byte_size("bfloat16", shape) for _, shape in tensors)
    number = 0
    while not number or total < nbytes:
        layer, which = divmod(number, 3)
        shape = (columns, rows) if which == 2 else (rows, columns)
        tensors.append((f"model.layers.{layer}.mlp.{('gate', 'up', 'down')[which]}_proj.weight", shape))
        tensors.append((f"model.layers.{layer}.norm_{which}.weight", (columns,)))
        total += sum(byte_size("bfloat16", shape) for _, shape in tensors[-2:])
        number += 1
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors:
        if shards[-1] and size + byte_size("bfloat16", shape) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += byte_size("bfloat16", shape)
    folder.mkdir()
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        header = build_header(((name, "bfloat16", shape) for name, shape in shard), {"format": "pt"})
        path = folder / file
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(byte_size("bfloat16", shape) for _, shape in shard))
        weight_map |= {name: file for name, _ in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
