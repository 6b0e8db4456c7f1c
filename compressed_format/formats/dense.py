"""``dense``: the weight itself, for modules that are only sparse, or not compressed at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressed_format.config import CompressionFormat, QuantizationArgs
from compressed_format.formats.base import FLOAT_DTYPES, Format, TensorSpec, check_tensors
from compressed_format.quantization import QuantizedWeight

__all__ = ["Dense"]


class Dense(Format):
    """``weight`` ``[..., O, I]`` in a float dtype."""

    name = CompressionFormat.DENSE

    def tensor_specs(self, shape: tuple[int, ...], args: QuantizationArgs | None) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(FLOAT_DTYPES, tuple(shape))}

    def encode(
        self, quantized: QuantizedWeight, args: QuantizationArgs | None, *, place: str = ""
    ) -> dict[str, torch.Tensor]:
        return {"weight": quantized.codes}

    def decode(
        self, tensors: Mapping[str, torch.Tensor], args: QuantizationArgs | None, *, place: str = ""
    ) -> QuantizedWeight:
        shape: tuple[int | None, ...] = (None, None)
        if "weight" in tensors and tensors["weight"].ndim > 2:
            shape = tuple(tensors["weight"].shape)
        check_tensors(tensors, {"weight": TensorSpec(FLOAT_DTYPES, shape)}, place)
        return QuantizedWeight(tensors["weight"])
