"""Whether SGLang loads a checkpoint, and how it will run there."""

from __future__ import annotations

from compressed_format.checking import consumer_codes as codes
from compressed_format.checking.byte_schemes import float8_experts_problem, float8_problem, int8_problem
from compressed_format.checking.for_vllm import sibling_problems
from compressed_format.checking.plan import Layer, Plan, Use
from compressed_format.config import CompressionFormat, QuantizationArgs, QuantizationStrategy, QuantizationType
from compressed_format.config.matching import TargetTable
from compressed_format.config.modules import NamedModule
from compressed_format.config.patterns import is_pattern

__all__ = ["check_sglang"]

_F, _S = CompressionFormat, QuantizationStrategy
_GROUPS = (32, 64, 128)
_EXPERT_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def check_sglang(plan: Plan) -> None:
    """Say what SGLang minds."""
    config = plan.config
    if config.sparsity_config is not None:
        plan.say(codes.SGLANG_SPARSE, "sparsity_config", f"raises; {codes.SGLANG_SPARSE.way_out}")
    for place, _ in plan.online_transforms:
        plan.say(codes.SGLANG_TRANSFORM, place, "is skipped without an error; fuse the rotation into the weights")
    cache = config.kv_cache_scheme
    if cache is not None:
        fits = cache.type is QuantizationType.FLOAT and cache.num_bits == 8 and cache.strategy is _S.TENSOR
        if not fits or cache.dynamic:
            plan.say(codes.SGLANG_CACHE, "kv_cache_scheme", f"is ignored; {codes.SGLANG_CACHE.way_out}")
    for name in plan.stacked:
        plan.say(codes.SGLANG_STACKED, name, f"holds all experts of a layer; {codes.SGLANG_STACKED.way_out}")
    for use in plan.uses:
        if use.weights is not None:
            _check_use(plan, use, use.weights)
    for place, message in sibling_problems(plan):
        plan.say(codes.SGLANG_FUSED, place, message)
    _check_names(plan)


def _check_use(plan: Plan, use: Use, weights: QuantizationArgs) -> None:
    if use.embeddings:
        plan.say(codes.SGLANG_EMBEDDING, use.place, f"{use}: {codes.SGLANG_EMBEDDING.way_out}")
        return
    if use.format is _F.MARLIN_24:
        plan.say(codes.SGLANG_SPARSE, use.place, f"marlin-24 is gone; {codes.SGLANG_SPARSE.way_out}")
        return
    problem = of_experts = None
    if weights.type is QuantizationType.INT and use.format is _F.PACK_QUANTIZED:
        problem = _packed_problem(plan, use, weights)
        for layer in use.layers if problem is None else ():
            _check_sizes(plan, use, weights, layer)
    elif weights.type is QuantizationType.INT:
        problem = (
            'integer weights alone must be packed; use the format "pack-quantized"'
            if use.inputs is None
            else int8_problem(weights, use.inputs)
        )
        of_experts = "int8 experts run on Ascend NPUs only"
    elif use.format in (_F.FLOAT_QUANTIZED, _F.NAIVE_QUANTIZED):
        problem = float8_problem(weights, use.inputs)
        of_experts = float8_experts_problem(weights, use.inputs)
    elif use.format is _F.MXFP4_PACK_QUANTIZED:
        problem = None if use.experts else "MXFP4 is known for experts only"
    elif use.format is not _F.NVFP4_PACK_QUANTIZED:
        problem = f"{use.format.value} is not known"
    if problem is not None:
        plan.say(codes.SGLANG_SCHEME, use.place, f"{use}: {problem}")
    elif of_experts is not None and use.experts:
        plan.say(codes.SGLANG_EXPERT_SCHEME, use.place, f"{use}: {of_experts}")


def _packed_problem(plan: Plan, use: Use, weights: QuantizationArgs) -> str | None:
    if weights.num_bits not in (4, 8):
        return f"packed integers must have 4 or 8 bits, not {weights.num_bits}"
    if weights.strategy not in (_S.GROUP, _S.CHANNEL):
        return "packed integers must be by group or channel"
    if use.group_size is not None and use.group_size not in _GROUPS:
        return f"groups must have 32, 64 or 128 columns, not {use.group_size}"
    if use.inputs is None:
        return None
    if not use.experts:
        return "packed weights with quantized inputs are known for experts only"
    if not weights.symmetric:
        return "packed experts with quantized inputs must be symmetric"
    plan.say(codes.SGLANG_DEVICES, use.place, f"{use}: runs on some GPUs only, float8 inputs on compute capability 9.0")
    return None


def _check_sizes(plan: Plan, use: Use, weights: QuantizationArgs, layer: Layer) -> None:
    if layer.shape is None or len(layer.shape) != 2:
        return
    columns = layer.shape[1]
    for step, what in ((use.group_size, "the group size"), (32 // weights.num_bits, "the codes in a word,")):
        if step and columns % step:
            message = f"{columns} columns are no multiple of {what} {step}"
            plan.say(codes.SGLANG_SIZES, layer.name, f"{message}; {codes.SGLANG_SIZES.way_out}")


def _check_names(plan: Plan) -> None:
    # Plain entries of ignore also match the last parts of a name there.
    suffixes = tuple(f".{entry}" for entry in plan.config.ignore if not is_pattern(entry))
    targets = TargetTable(target for scheme in plan.config.config_groups.values() for target in scheme.targets)
    for layer in plan.layers:
        is_head = layer.leaf == "lm_head"
        if layer.assignment is None:
            if "Linear" in layer.classes and not layer.ignored and not is_head and not layer.name.endswith(suffixes):
                message = f"is neither a target nor ignored; {codes.SGLANG_UNNAMED.way_out}"
                plan.say(codes.SGLANG_UNNAMED, layer.name, message)
            continue
        if is_head and not targets.matches_name(layer.as_module):
            plan.say(codes.SGLANG_HEAD, layer.name, f"is quantized by its class; {codes.SGLANG_HEAD.way_out}")
        if layer.stack is not None and layer.leaf in _EXPERT_NAMES:
            asked = f"{layer.name.rpartition('.')[0]}.{_EXPERT_NAMES[layer.leaf]}"
            if targets.winner(NamedModule(asked, layer.classes)) is None:
                message = f"is looked up as {_EXPERT_NAMES[layer.leaf]}, which no target matches"
                plan.say(codes.SGLANG_EXPERT_NAMES, layer.name, f"{message}; {codes.SGLANG_EXPERT_NAMES.way_out}")
