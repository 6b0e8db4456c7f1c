"""Scales of a quantized KV cache: kept with the model, so that they are saved again; nothing here applies them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

import torch
from torch import nn

from compressed_format.dtypes import torch_dtype
from compressed_format.errors import CompressedFormatWarning
from compressed_format.formats.base import StoredTensor

__all__ = ["keep_cache_scales"]

# On attention modules; `output_scale` on k_proj and v_proj is their name of 2024.
_CACHE_SUFFIXES = frozenset(f"{part}_{what}" for part in "qkv" for what in ("scale", "zero_point"))
_OLD_CACHE_SUFFIXES = frozenset({"output_scale", "output_zero_point"})
_OLD_CACHE_MODULES = frozenset({"k_proj", "v_proj"})


def keep_cache_scales(
    model: nn.Module, by_module: Mapping[str, Mapping[str, StoredTensor]], explained: Collection[str]
) -> set[str]:
    """Make room in ``model`` for the KV-cache scales among a checkpoint's tensors, and return their names.

    Names in ``explained`` are left out: a problem has told of them.
    """
    kept = set()
    for name, stored in by_module.items():
        suffixes = stored.keys() & _CACHE_SUFFIXES
        if name.rpartition(".")[2] in _OLD_CACHE_MODULES:
            suffixes |= stored.keys() & _OLD_CACHE_SUFFIXES
        if not suffixes:
            continue
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        for suffix in sorted(suffixes - module._parameters.keys()):
            if f"{name}.{suffix}" in explained:
                continue
            tensor = stored[suffix]
            empty = torch.empty(tuple(tensor.shape), dtype=torch_dtype(tensor.dtype), device="meta")
            module._parameters[suffix] = nn.Parameter(empty, requires_grad=False)
            kept.add(f"{name}.{suffix}")
    if kept:
        message = (
            f"{len(kept)} KV-cache scales are kept in the state dict, but not applied: the cache stays unquantized"
        )
        warnings.warn(message, CompressedFormatWarning, stacklevel=5)
    return kept
