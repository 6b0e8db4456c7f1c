"""Compress a plain ``nn.Module``, save it, and fill a fresh skeleton from the files.

Nothing here needs transformers: a model that is no Hugging Face folder is loaded into a module of the same shape,
built on the meta device, so that no weight is ever made dense.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

from compressed_format import compress, decompress, load_compressed, save_compressed


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))


def main() -> None:
    torch.manual_seed(0)
    model = build()
    inputs = torch.randn(4, 256)
    expected = model(inputs)

    config = {
        "config_groups": {
            "up": {"targets": ["0"], "weights": {"num_bits": 4, "group_size": 64}},
            "down": {"targets": ["2"], "weights": {"num_bits": 8, "strategy": "channel"}},
        }
    }
    compress(model, config)
    print(model)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        save_compressed(model, path)
        with torch.device("meta"):
            skeleton = build()
        loaded = load_compressed(path, model=skeleton)
        assert torch.equal(loaded(inputs), model(inputs))

    error = (loaded(inputs) - expected).norm() / expected.norm()
    print(f"relative error of the output: {error:.3f}")
    dense = decompress(loaded)
    torch.testing.assert_close(dense(inputs), model(inputs))


if __name__ == "__main__":
    main()
