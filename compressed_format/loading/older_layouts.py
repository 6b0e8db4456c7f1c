"""Layouts that older releases wrote and that nothing here runs: once loaded, a module is re-encoded from them.

They are the word-aligned words and the unpacked zero points of early ``pack-quantized``, and ``marlin-24``. All become
``pack-quantized`` as it is written today.
"""

from __future__ import annotations

import torch

from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_format.errors import FormatError, Problem
from compressed_format.formats import Marlin24, PackLayout, PackQuantized, pack_layout
from compressed_format.modules.base import CompressedModule

__all__ = ["modernize", "older_layout", "without_marlin"]


def modernize(name: str, module: CompressedModule, version: str | None) -> str | None:
    """Check ``weight_shape``, and re-encode a layout that is not run; returns the layout's name if it was one."""
    scheme = module.scheme
    if scheme is None or scheme.weights is None:
        return None
    args, marlin = scheme.weights, module.format is CompressionFormat.MARLIN_24
    if marlin:
        parts = module.checkpoint_parts(name)
        quantized = {place: Marlin24().decode(tensors, args, place=place) for place, tensors in parts.items()}
    elif module.format is not CompressionFormat.PACK_QUANTIZED:
        return None
    else:
        _check_shapes(name, module)
        packed, columns = module._parameters["weight_packed"], module._weight_shape[1]
        assert packed is not None
        layout = pack_layout(packed, args.num_bits, columns, version=version, place=name)
        unpacked = _has_unpacked_zero_points(module, args)
        if layout is PackLayout.DENSE and not unpacked:
            return None
        parts = module.checkpoint_parts(name)
        quantized = {
            place: PackQuantized().decode(tensors, args, place=place, layout=layout) for place, tensors in parts.items()
        }
    encoded = [PackQuantized().encode(weight, args, place=place) for place, weight in quantized.items()]
    module.replace_weight(module.join_parts(encoded), CompressionFormat.PACK_QUANTIZED)
    if marlin:
        module.scheme = _as_packed(scheme)
        return "marlin-24"
    return "word-aligned" if layout is PackLayout.WORD_ALIGNED else "unpacked zero-point"


def _check_shapes(name: str, module: CompressedModule) -> None:
    stored, expected = module._parameters["weight_shape"], list(module._weight_shape)
    assert stored is not None
    found = stored.tolist()
    if found == expected or (stored.ndim == 2 and all(one == expected for one in found)):
        return  # of one weight, or of each of the experts
    for place, tensors in module.checkpoint_parts(name).items():
        found = tensors["weight_shape"].tolist()
        if found != expected:
            message = f"says {found}, but the module's weight is {expected}"
            raise FormatError(problems=[Problem(f"{place}.weight_shape", message)])


def older_layout(module: CompressedModule) -> str | None:
    """The layout that :func:`modernize` would re-encode, as far as dtypes and shapes tell; None where it is run."""
    scheme = module.scheme
    if scheme is None or scheme.weights is None:
        return None
    if module.format is CompressionFormat.MARLIN_24:
        return "marlin-24"
    if module.format is not CompressionFormat.PACK_QUANTIZED:
        return None
    packed = module._parameters["weight_packed"]
    assert packed is not None
    layout = pack_layout(packed, scheme.weights.num_bits, module._weight_shape[1], version=None)
    if layout is PackLayout.WORD_ALIGNED:
        return "word-aligned"
    return "unpacked zero-point" if _has_unpacked_zero_points(module, scheme.weights) else None


def _has_unpacked_zero_points(module: CompressedModule, args: QuantizationArgs) -> bool:
    zero_point = module._parameters.get("weight_zero_point")
    return zero_point is not None and zero_point.dtype == torch.int8 and PackQuantized.packs_zero_points(args)


def without_marlin(config: QuantizationConfig) -> QuantizationConfig:
    """The config of the same model once no module is held as marlin-24."""
    if all(config.format_of(scheme) is not CompressionFormat.MARLIN_24 for scheme in config.config_groups.values()):
        return config
    groups = {
        name: _as_packed(scheme) if config.format_of(scheme) is CompressionFormat.MARLIN_24 else scheme
        for name, scheme in config.config_groups.items()
    }
    return config.replace(config_groups=groups)


def _as_packed(scheme: QuantizationScheme) -> QuantizationScheme:
    return scheme.model_copy(update={"format": CompressionFormat.PACK_QUANTIZED})
