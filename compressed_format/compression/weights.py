"""One weight as the tensors of a checkpoint: pruned, quantized, encoded, as an assignment says."""

from __future__ import annotations

import torch

from compressed_format.config import Assignment, CompressionFormat
from compressed_format.formats import SPARSITY_FORMATS, format_named, prune_2_of_4
from compressed_format.formats.pack_quantized import PackQuantized
from compressed_format.quantization import QuantizedWeight, quantize

__all__ = ["compressed_tensors"]


def compressed_tensors(
    weight: torch.Tensor,
    assignment: Assignment,
    place: str,
    *,
    scales: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors, by suffix, that hold ``weight`` ``[O, I]`` of the module ``place``.

    ``scales`` are its scale and zero point, where these are known already. Raises :class:`QuantizationError` for a
    weight that cannot be quantized so, and :class:`FormatError` for one that its format cannot hold.
    """
    sparsity = assignment.sparsity
    args = None if assignment.scheme is None else assignment.scheme.weights
    if sparsity is CompressionFormat.SPARSE_24_BITMASK:
        weight = prune_2_of_4(weight, place=place)
    packs = assignment.format is CompressionFormat.PACK_QUANTIZED and sparsity is None
    if args is not None and packs and scales is None:
        packed = PackQuantized().encode_weight(weight, args)
        if packed is not None:
            return packed
    if args is None:
        quantized = QuantizedWeight(weight)
    else:
        scale, zero_point = scales or (None, None)
        quantized = quantize(weight, args, scale=scale, zero_point=zero_point, place=f"{place}.weight")
    tensors = format_named(assignment.format, place).encode(quantized, args, place=place)
    if sparsity is not None:
        values = tensors.pop("weight")
        tensors = {**SPARSITY_FORMATS[sparsity].encode(values, place=place), **tensors}
    return tensors
