"""The scales of a quantized KV cache: on attention modules, or under their name of 2024."""

from __future__ import annotations

import math

from compressed_format.checking import codes
from compressed_format.checking.notebook import Notebook
from compressed_format.checking.stored import Stored
from compressed_format.config import QuantizationConfig, QuantizationStrategy
from compressed_format.dtypes import torch_dtype
from compressed_format.formats.base import FLOAT_DTYPES

__all__ = ["CACHE_SCALES", "check_cache_scales"]

CACHE_SCALES = ("k_scale", "v_scale", "q_scale")
_OLD_MODULES = ("k_proj", "v_proj")


def check_cache_scales(config: QuantizationConfig, stored: Stored, notebook: Notebook) -> None:
    """Note scales of a cache that are missing, misshapen, called as in 2024, or without a scheme."""
    for name, tensors in stored.modules.items():
        for suffix in CACHE_SCALES:
            if suffix in tensors and torch_dtype(tensors[suffix].dtype) not in FLOAT_DTYPES:
                message = f"has dtype {tensors[suffix].dtype}, expected float32, float16 or bfloat16"
                notebook.add(codes.DTYPE, f"{name}.{suffix}", message)
    scheme = config.kv_cache_scheme
    with_scales = {
        name: tensors for name, tensors in stored.modules.items() if "k_scale" in tensors or "v_scale" in tensors
    }
    of_attention = any(group.weights is None for group in config.config_groups.values())
    old = [
        name for name, tensors in stored.modules.items() if name.endswith(_OLD_MODULES) and "output_scale" in tensors
    ]
    old = [name for name in old if scheme is not None or not _has_outputs(config)]
    for name in old:
        message = f"is the name of 2024 for a scale of the cache; {codes.CACHE_SCALES.way_out}"
        notebook.alike(codes.CACHE_SCALES, f"{name}.output_scale", message)
    if scheme is None and with_scales and not of_attention:
        message = f"has scales of a cache, and there is no kv_cache_scheme ({len(with_scales)} such modules)"
        notebook.add(codes.CACHE_SCALES, next(iter(with_scales)), message)
    if scheme is not None and not scheme.dynamic:
        if not with_scales and not old:
            message = "no module has k_scale and v_scale; calibrate the cache, or remove the scheme"
            notebook.add(codes.CACHE_SCALES, "kv_cache_scheme", message)
        for name, tensors in with_scales.items():
            for suffix in ("k_scale", "v_scale"):
                if suffix not in tensors:
                    notebook.alike(codes.CACHE_SCALES, f"{name}.{suffix}", "is missing; calibrate the cache again")
                elif scheme.strategy is QuantizationStrategy.TENSOR and math.prod(tensors[suffix].shape) != 1:
                    message = f"has shape {list(tensors[suffix].shape)}, expected [1]"
                    notebook.add(codes.SHAPE, f"{name}.{suffix}", message)


def _has_outputs(config: QuantizationConfig) -> bool:
    return any(group.output_activations is not None for group in config.config_groups.values())
