"""The schemes that have a name of their own."""

from __future__ import annotations

from typing import Any

from frozendict import frozendict

from compressed_format.config.args import QuantizationArgs
from compressed_format.config.report import nearest
from compressed_format.config.scheme import QuantizationScheme
from compressed_format.config.words import QuantizationStrategy, QuantizationType

__all__ = ["PRESETS", "find_preset", "nearest_preset"]

_S = QuantizationStrategy


def _int(num_bits: int, strategy: QuantizationStrategy, **fields: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=num_bits, type=QuantizationType.INT, strategy=strategy, **fields)


def _float(num_bits: int, strategy: QuantizationStrategy, **fields: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=num_bits, type=QuantizationType.FLOAT, strategy=strategy, **fields)


def _scheme(weights: QuantizationArgs | None, inputs: QuantizationArgs | None = None) -> QuantizationScheme:
    return QuantizationScheme(targets=("Linear",), weights=weights, input_activations=inputs)


def _grouped_int(num_bits: int) -> QuantizationArgs:
    return _int(num_bits, _S.GROUP, group_size=128)


def _tables() -> dict[str, QuantizationScheme]:
    int4_token = _int(4, _S.TOKEN, dynamic=True)
    int8_token = _int(8, _S.TOKEN, dynamic=True)
    float8_token = _float(8, _S.TOKEN, dynamic=True)
    float8_group = _float(8, _S.GROUP, group_size=128, dynamic=True)
    nvfp4 = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    mx = {"group_size": 32, "scale_dtype": "torch.uint8"}
    nvfp4_weights = _float(4, _S.TENSOR_GROUP, **nvfp4)
    mx_weights = {bits: _float(bits, _S.GROUP, **mx) for bits in (4, 6, 8)}
    mx_inputs = {bits: _float(bits, _S.GROUP, dynamic=True, **mx) for bits in (4, 8)}
    w8a8 = _scheme(_int(8, _S.CHANNEL), int8_token)
    return {
        "UNQUANTIZED": _scheme(None),
        "W8A8": w8a8,
        "INT8": w8a8,
        **{f"W{bits}A16": _scheme(_grouped_int(bits)) for bits in range(2, 9)},
        "W4A16_ASYM": _scheme(_int(4, _S.GROUP, group_size=128, symmetric=False)),
        **{f"W{bits}A8": _scheme(_grouped_int(bits), int8_token) for bits in range(2, 8)},
        **{f"W{bits}A4": _scheme(_grouped_int(bits), int4_token) for bits in range(2, 5)},
        "W4AFP8": _scheme(_grouped_int(4), float8_token),
        "FP8": _scheme(_float(8, _S.TENSOR), _float(8, _S.TENSOR)),
        "FP8_DYNAMIC": _scheme(_float(8, _S.CHANNEL), float8_token),
        "FP8_BLOCK": _scheme(_float(8, _S.BLOCK, block_structure=(128, 128)), float8_group),
        "NVFP4A16": _scheme(nvfp4_weights),
        "NVFP4": _scheme(nvfp4_weights, _float(4, _S.TENSOR_GROUP, dynamic="local", **nvfp4)),
        "MXFP4A16": _scheme(mx_weights[4]),
        "MXFP4": _scheme(mx_weights[4], mx_inputs[4]),
        "MXFP4XFP8": _scheme(mx_weights[4], float8_group),
        "MXFP6A16": _scheme(mx_weights[6]),
        "MXFP6A8": _scheme(mx_weights[6], mx_inputs[8]),
        "MXFP8A16": _scheme(mx_weights[8]),
        "MXFP8": _scheme(mx_weights[8], mx_inputs[8]),
    }


PRESETS: frozendict[str, QuantizationScheme] = frozendict(_tables())
"""Schemes by name, each for the target ``Linear``. They have no ``format``, so that one given beside them decides;
without one, :func:`~compressed_format.config.formats.infer_format` says ``pack-quantized`` for W4A8, W4AFP8 and all
others with narrow int weights and quantized inputs."""


def find_preset(name: object) -> QuantizationScheme | None:
    """The preset of a name in any case, or ``None``."""
    return PRESETS.get(name.upper()) if isinstance(name, str) else None


def nearest_preset(name: str) -> str | None:
    """The preset whose name was probably meant."""
    return nearest(name, PRESETS)
