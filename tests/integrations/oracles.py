"""What a packed model has to compute, by dense modules alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from compressed_format import decompress
from compressed_format.linear import CompressedModule, compressed_modules
from tests.test_linear import fake_quantized


def dense_twin(model: Any) -> Any:
    """``model`` decompressed, with hooks that round activations as its schemes say, by the numerics of weights."""
    dense = decompress(copy.deepcopy(model))
    for name, module in compressed_modules(model).items():
        _round(dense.get_submodule(name), module)
    assert not compressed_modules(dense)
    return dense


def _round(plain: nn.Module, module: CompressedModule) -> None:
    if module.scheme is None:
        return
    ends = {"input": module.scheme.input_activations, "output": module.scheme.output_activations}
    static: dict[str, dict[str, torch.Tensor]] = {}
    for end in ends:
        found = {suffix: module._parameters.get(f"{end}_{suffix}") for suffix in ("scale", "zero_point")}
        static[end] = {suffix: value.data for suffix, value in found.items() if value is not None}
    if ends["input"] is not None:
        plain.register_forward_pre_hook(lambda _, args: (fake_quantized(args[0], ends["input"], **static["input"]),))
    if ends["output"] is not None:
        plain.register_forward_hook(lambda _, args, output: fake_quantized(output, ends["output"], **static["output"]))
