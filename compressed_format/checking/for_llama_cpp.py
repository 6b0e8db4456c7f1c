"""Whether llama.cpp's converter reads a checkpoint rightly."""

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

__all__ = ["check_llama_cpp"]

_F, _S = CompressionFormat, QuantizationStrategy
_BYTES = (_F.INT_QUANTIZED, _F.FLOAT_QUANTIZED, _F.NAIVE_QUANTIZED)


def check_llama_cpp(plan: Plan) -> None:
    """Say what the converter minds."""
    if plan.config.sparsity_config is not None:
        message = f"sparse formats are not converted; {codes.LLAMA_CPP_FORMAT.way_out}"
        plan.say(codes.LLAMA_CPP_FORMAT, "sparsity_config", message)
    for place, _ in plan.online_transforms:
        plan.say(codes.LLAMA_CPP_TRANSFORM, place, "is left out without an error; fuse the rotation into the weights")
    if plan.config.kv_cache_scheme is not None:
        message = f"k_scale and v_scale may not be mapped; {codes.LLAMA_CPP_SCALES.way_out}"
        plan.say(codes.LLAMA_CPP_SCALES, "kv_cache_scheme", message)
    groups = {use.group: use.format for use in plan.uses}
    if len(groups) > 1 and set(groups.values()) != {_F.NVFP4_PACK_QUANTIZED}:
        message = f"has {len(groups)} groups, and one is converted; {codes.LLAMA_CPP_GROUPS.way_out}"
        plan.say(codes.LLAMA_CPP_GROUPS, "config_groups", message)
    seen = set()
    for use in plan.uses:
        if use.weights is not None and use.group not in seen:
            seen.add(use.group)
            _check_use(plan, use, use.weights)


def _check_use(plan: Plan, use: Use, weights: QuantizationArgs) -> None:
    if weights.actorder is ActivationOrdering.GROUP:
        plan.say(
            codes.LLAMA_CPP_ACTORDER,
            use.place,
            f"{use}: weight_g_idx is not taken into account; {codes.LLAMA_CPP_ACTORDER.way_out}",
        )
    static = [
        name
        for name, args in (("input", use.inputs), ("output", use.scheme.output_activations))
        if args is not None and args.dynamic is False
    ]
    if static:
        message = f"{use}: {' and '.join(f'{name}_scale' for name in static)} may not be mapped"
        plan.say(codes.LLAMA_CPP_SCALES, use.place, message)
    if use.format is _F.PACK_QUANTIZED:
        if weights.num_bits not in (2, 4, 8):
            message = f"{use}: {weights.num_bits} bits are not converted rightly; {codes.LLAMA_CPP_BITS.way_out}"
            plan.say(codes.LLAMA_CPP_BITS, use.place, message)
        if weights.strategy is not _S.GROUP:
            message = f"{use}: packed weights are converted by group only; set group_size"
            plan.say(codes.LLAMA_CPP_STRATEGY, use.place, message)
    elif use.format in _BYTES:
        if weights.type is QuantizationType.INT and weights.num_bits < 8:
            message = f"{use}: int{weights.num_bits} in bytes is not converted; {codes.LLAMA_CPP_FORMAT.way_out}"
            plan.say(codes.LLAMA_CPP_FORMAT, use.place, message)
        elif weights.strategy not in (_S.CHANNEL, _S.BLOCK):
            message = f"{use}: weights of a byte are converted by channel or block only"
            plan.say(codes.LLAMA_CPP_STRATEGY, use.place, message)
    elif use.format is not _F.NVFP4_PACK_QUANTIZED:
        message = f"{use}: {use.format.value} is not converted; {codes.LLAMA_CPP_FORMAT.way_out}"
        plan.say(codes.LLAMA_CPP_FORMAT, use.place, message)
