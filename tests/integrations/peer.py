"""compressed-tensors as the peer: a dense model compressed and saved the way its own documentation does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, apply_quantization_config
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized
from torch import nn

from tests.models import token_ids


def compress_with_peer(
    model: Any, config: dict[str, Any], folder: Path, inputs: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Compress a dense transformers model by a ``quantization_config`` object, and save it to ``folder``.

    Scales come from minima and maxima; those of static activations from one batch, ``inputs`` or :func:`token_ids`.
    Returns the dense weight that each quantized module now stands for, as the peer itself rounds it.
    """
    rounded: dict[str, torch.Tensor] = {}
    observed = _observed_inputs(model, inputs or {"input_ids": token_ids()})
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    for name, module in model.named_modules():
        if not is_module_quantized(module):
            continue
        scheme = module.quantization_scheme
        _set(module, "weight", *_weight_range(module.weight.data, scheme.weights), scheme.weights)
        scale, zero_point = module.weight_scale, getattr(module, "weight_zero_point", None)
        rounded[f"{name}.weight"] = fake_quantize(module.weight.data, scale, zero_point, scheme.weights)
        activations = scheme.input_activations
        if activations is not None and not activations.dynamic:
            _set(module, "input", *(bound.reshape(1) for bound in observed[name]), activations)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return rounded


def _set(module: nn.Module, name: str, minimum: torch.Tensor, maximum: torch.Tensor, args: QuantizationArgs) -> None:
    scale, zero_point = calculate_qparams(minimum, maximum, args)
    for suffix, value in (("scale", scale), ("zero_point", zero_point)):
        parameter = getattr(module, f"{name}_{suffix}", None)
        if parameter is not None:
            parameter.data = value.to(parameter.dtype).reshape(parameter.shape)


def _weight_range(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    padded = nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    return blocks.amin(dim=(1, 3)), blocks.amax(dim=(1, 3))


def _observed_inputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The smallest and the largest value that goes into each Linear."""
    observed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            observed[name] = torch.aminmax(inputs[0])

        return hook

    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return observed
