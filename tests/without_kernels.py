"""A process that compresses a small model in every format, saves it, and computes with what it loads of that.

    python -m tests.without_kernels FOLDER

``FOLDER`` gets a checkpoint for each format, and ``outputs.safetensors``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from safetensors.torch import save_file

from compressed_format import CompressedFormatWarning, compress, load_compressed, save_compressed
from tests.models import LLAMA_CONFIGS, logits, tiny_llama, token_ids, weights

CONFIGS = {
    **LLAMA_CONFIGS,
    "W5A16": weights(5, strategy="group", group_size=32, symmetric=False),
    "2:4": {"config_groups": {"g": {"targets": ["Linear"], "weights": None, "sparsity": "2:4"}}},
    "everything": weights(8, "Linear", "Embedding"),
}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore", CompressedFormatWarning)
    outputs = {}
    for name, config in CONFIGS.items():
        model = compress(tiny_llama(), config, calibration=[{"input_ids": token_ids()}])
        save_compressed(model, folder / name)
        outputs[name] = logits(load_compressed(folder / name))
    save_file(outputs, folder / "outputs.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
