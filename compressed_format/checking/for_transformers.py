"""Whether plain transformers, with compressed-tensors and without this library, loads a checkpoint rightly."""

from __future__ import annotations

from compressed_format.checking import consumer_codes as codes
from compressed_format.checking.plan import Plan, Use
from compressed_format.config import (
    ActivationOrdering,
    CompressionFormat,
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
)

__all__ = ["check_transformers"]

_F, _S = CompressionFormat, QuantizationStrategy


def check_transformers(plan: Plan) -> None:
    """Say what transformers minds."""
    if plan.config.sparsity_config is not None:
        message = f"is passed over, and the sparse layers stay random; {codes.TRANSFORMERS_SPARSE.way_out}"
        plan.say(codes.TRANSFORMERS_SPARSE, "sparsity_config", message)
    for place, _ in plan.online_transforms:
        plan.say(codes.TRANSFORMERS_TRANSFORM, place, "is not restored, without an error; fuse it into the weights")
    for name in plan.word_aligned:
        message = f"is decoded to wrong values, without an error; {codes.TRANSFORMERS_WORD_ALIGNED.way_out}"
        plan.say(codes.TRANSFORMERS_WORD_ALIGNED, name, message)
    for use in plan.uses:
        if use.weights is not None:
            _check_use(plan, use, use.weights)
    schemes = {(use.weights, use.format) for use in plan.uses if not use.experts}
    if len(schemes) > 1:
        message = "has several schemes: dequantize=True fails, loading without it works"
        plan.say(codes.TRANSFORMERS_MIXED, "config_groups", message)


def _check_use(plan: Plan, use: Use, weights: QuantizationArgs) -> None:
    if weights.actorder is ActivationOrdering.GROUP:
        plan.say(
            codes.TRANSFORMERS_ACTORDER, use.place, f"actorder group is refused; {codes.TRANSFORMERS_ACTORDER.way_out}"
        )
    if use.format is _F.MARLIN_24:
        plan.say(codes.TRANSFORMERS_SPARSE, use.place, f"marlin-24 is refused; {codes.TRANSFORMERS_SPARSE.way_out}")
    if use.embeddings:
        plan.say(codes.TRANSFORMERS_EMBEDDING, use.place, f"{use}: {codes.TRANSFORMERS_EMBEDDING.way_out}")
    packed_by_rows = use.format is _F.PACK_QUANTIZED and weights.strategy in (_S.GROUP, _S.CHANNEL)
    if packed_by_rows and not weights.symmetric:
        how = "does not load" if use.experts else "loads with dequantize=True only"
        message = f"{use}: {how}, for a size mismatch of weight_zero_point; {codes.TRANSFORMERS_ASYMMETRIC.way_out}"
        plan.say(codes.TRANSFORMERS_ASYMMETRIC, use.place, message)
    if not use.experts:
        return
    problem = None
    if weights.type is QuantizationType.INT and use.format is _F.INT_QUANTIZED:
        problem = "int8 experts with quantized inputs fail to load"
    elif weights.strategy is _S.BLOCK:
        problem = "experts in blocks fail to load"
    elif use.format is _F.MXFP8_QUANTIZED:
        problem = "MXFP8 experts fail to load"
    elif use.format is _F.NVFP4_PACK_QUANTIZED:
        problem = "NVFP4 experts lose their global scale and are wrong, without an error"
    if problem is not None:
        message = f"{use}: {problem}; {codes.TRANSFORMERS_EXPERT_SCHEME.way_out}"
        plan.say(codes.TRANSFORMERS_EXPERT_SCHEME, use.place, message)
    elif use.inputs is not None:
        message = f"{use}: what goes into experts is not rounded; {codes.TRANSFORMERS_EXPERT_INPUTS.way_out}"
        plan.say(codes.TRANSFORMERS_EXPERT_INPUTS, use.place, message)
