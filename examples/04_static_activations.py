"""Static activation scales come from data: W8A8 with scales of a few calibration batches.

``calibration`` is any iterable of model inputs. The observers are those that the config names.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from compressed_format import CalibrationError, QuantizationConfig, compress

CONFIG = Path(__file__).parents[1] / "schema" / "examples" / "w8a8-static.json"


def main() -> None:
    torch.manual_seed(0)
    layers = {"up": nn.Linear(128, 256), "relu": nn.ReLU(), "down": nn.Linear(256, 128), "lm_head": nn.Linear(128, 64)}
    model = nn.Sequential(OrderedDict(layers))
    config = QuantizationConfig.from_file(CONFIG)
    batches = [torch.randn(8, 128) for _ in range(16)]
    expected = model(batches[0])

    try:
        compress(model, config)
    except CalibrationError as error:
        print(f"{error}\n")

    compress(model, config, calibration=batches)
    for name, tensor in model.state_dict().items():
        print(f"{name:<18} {str(tensor.dtype).removeprefix('torch.'):<9} {list(tensor.shape)}")
    error = (model(batches[0]) - expected).norm() / expected.norm()
    print(f"\nrelative error of the output: {error:.4f}")


if __name__ == "__main__":
    main()
