"""``int-quantized``, ``float-quantized`` and ``naive-quantized``: one int8 or float8_e4m3fn byte for each weight.

The three names stand for the same tensors; which one a file carries says what its activations are (integers, floats,
or not quantized at all).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressed_format.blocks import scale_shape
from compressed_format.config import CompressionFormat, QuantizationArgs
from compressed_format.errors import FormatError, Problem
from compressed_format.formats.base import (
    FLOAT_DTYPES,
    Format,
    TensorSpec,
    check_codes,
    check_scales,
    check_tensors,
    check_zero_point,
    decode_g_idx,
    g_idx_spec,
    require_args,
)
from compressed_format.quantization import QuantizedWeight
from compressed_format.scales import code_dtype, zero_point_dtype

__all__ = ["NaiveQuantized"]


class NaiveQuantized(Format):
    """``weight`` (codes), ``weight_scale``, ``weight_zero_point`` if asymmetric, ``weight_g_idx`` if reordered."""

    def __init__(self, name: CompressionFormat) -> None:
        self.name = name

    def tensor_specs(self, shape: tuple[int, ...], args: QuantizationArgs | None) -> dict[str, TensorSpec]:
        args = require_args(args, self.name)
        scales = scale_shape(args, shape)
        specs = {
            "weight": TensorSpec((code_dtype(args),), tuple(shape)),
            "weight_scale": TensorSpec(FLOAT_DTYPES, scales),
        }
        if not args.symmetric:
            specs["weight_zero_point"] = TensorSpec((zero_point_dtype(args),), scales)
        return specs | g_idx_spec(shape, args)

    def encode(
        self, quantized: QuantizedWeight, args: QuantizationArgs | None, *, place: str = ""
    ) -> dict[str, torch.Tensor]:
        args = require_args(args, self.name)
        check_zero_point(quantized, args, place)
        tensors = {"weight": quantized.codes}
        if quantized.scale is not None:
            tensors["weight_scale"] = quantized.scale
        if quantized.zero_point is not None:
            tensors["weight_zero_point"] = quantized.zero_point
        if quantized.g_idx is not None:
            tensors["weight_g_idx"] = quantized.g_idx
        self.decode(tensors, args, place=place)
        return tensors

    def decode(
        self, tensors: Mapping[str, torch.Tensor], args: QuantizationArgs | None, *, place: str = ""
    ) -> QuantizedWeight:
        args = require_args(args, self.name)
        if "weight" not in tensors:
            raise FormatError(problems=[Problem(f"{place}.weight", f"is missing; found {', '.join(sorted(tensors))}")])
        if tensors["weight"].ndim < 2:
            message = f"has shape {list(tensors['weight'].shape)}, expected a matrix or a stack of them"
            raise FormatError(problems=[Problem(f"{place}.weight", message)])
        columns = tensors["weight"].shape[-1]
        specs = self.tensor_specs(tuple(tensors["weight"].shape), args)
        check_tensors(tensors, specs, place, optional=("weight_g_idx",))
        check_codes(tensors["weight"], args, f"{place}.weight")
        check_scales(tensors["weight_scale"], f"{place}.weight_scale")
        return QuantizedWeight(
            tensors["weight"],
            tensors["weight_scale"],
            None if args.symmetric else tensors["weight_zero_point"],
            g_idx=decode_g_idx(tensors.get("weight_g_idx"), columns, tensors["weight_scale"].shape[-1], place),
        )
