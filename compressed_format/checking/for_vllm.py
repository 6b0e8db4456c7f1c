"""Whether vLLM loads a checkpoint, and how it will run there."""

from __future__ import annotations

from compressed_format.checking import consumer_codes as codes
from compressed_format.checking.byte_schemes import (
    float8_experts_problem,
    float8_problem,
    int8_problem,
    is_dynamic_token,
)
from compressed_format.checking.plan import Layer, Plan, Use, likeness
from compressed_format.config import (
    ActivationOrdering,
    CompressionFormat,
    QuantizationArgs,
    QuantizationStrategy,
    QuantizationType,
    TransformLocation,
)
from compressed_format.config.matching import TargetTable
from compressed_format.config.siblings import FUSED, Outcome, check_siblings

__all__ = ["check_vllm", "sibling_problems"]

_F, _S = CompressionFormat, QuantizationStrategy
_BYTES = (_F.INT_QUANTIZED, _F.NAIVE_QUANTIZED, _F.FLOAT_QUANTIZED)
_FAST_GROUPS = (32, 64, 128)
_TILE = 128
_EXPERT_TILE = 256


def check_vllm(plan: Plan) -> None:
    """Say what vLLM minds."""
    _check_whole(plan)
    for use in plan.uses:
        if use.weights is None:
            continue
        if use.weights.actorder is ActivationOrdering.GROUP:
            plan.say(codes.VLLM_ACTORDER, use.place, f"actorder group is refused; {codes.VLLM_ACTORDER.way_out}")
        if use.embeddings:
            _check_embedding(plan, use, use.weights)
        elif use.format is _F.MARLIN_24:
            plan.say(codes.VLLM_SPARSE, use.place, f"marlin-24 is gone; {codes.VLLM_SPARSE.way_out}")
        elif use.weights.type is QuantizationType.INT and use.format is _F.PACK_QUANTIZED:
            _check_packed(plan, use, use.weights)
        elif use.format in _BYTES:
            _check_bytes(plan, use, use.weights)
        else:
            _check_microscaled(plan, use, use.weights)
        for layer in use.layers:
            _check_sizes(plan, use, use.weights, layer)
    for place, message in sibling_problems(plan):
        plan.say(codes.VLLM_FUSED, place, message)
    _check_experts_alike(plan)
    _check_precedence(plan)


def _check_whole(plan: Plan) -> None:
    if plan.config.sparsity_config is not None:
        plan.say(codes.VLLM_SPARSE, "sparsity_config", f"raises, unless it is {{}}; {codes.VLLM_SPARSE.way_out}")
    for place, location in plan.online_transforms:
        if location in (TransformLocation.INPUT, TransformLocation.OUTPUT):
            plan.say(
                codes.VLLM_TRANSFORM_LIMITS, place,
                "is applied while the model runs: on one GPU only, to layers without a bias",
            )  # fmt: skip
        else:
            plan.say(codes.VLLM_TRANSFORM, place, f'the location "{location}" is not applied; fuse the rotation')
    cache = plan.config.kv_cache_scheme
    if cache is not None:
        fits = cache.type is QuantizationType.FLOAT and cache.num_bits == 8 and cache.symmetric
        if not fits or cache.strategy not in (_S.TENSOR, _S.ATTN_HEAD):
            plan.say(codes.VLLM_CACHE, "kv_cache_scheme", "must be float8, symmetric, by tensor or attn_head")
    for group, scheme in plan.config.config_groups.items():
        if len(scheme.targets) == 1 and scheme.targets[0].endswith("Attention"):
            message = f"its only target is {scheme.targets[0]}, and such groups are dropped; add kv_cache_scheme"
            plan.say(codes.VLLM_ATTENTION, f"config_groups.{group}", message)
    for name in plan.stacked:
        plan.say(codes.VLLM_STACKED, name, f"holds all experts of a layer; {codes.VLLM_STACKED.way_out}")
    for name in plan.tensors:
        if name.endswith(("k_proj.output_scale", "v_proj.output_scale")) and plan.config.kv_cache_scheme is not None:
            plan.say(codes.VLLM_OLD_CACHE, name, codes.VLLM_OLD_CACHE.way_out)
    for name in plan.word_aligned:
        plan.say(codes.VLLM_WORD_ALIGNED, name, f"is word-aligned; {codes.VLLM_WORD_ALIGNED.way_out}")


def _check_embedding(plan: Plan, use: Use, weights: QuantizationArgs) -> None:
    packed = use.format is _F.PACK_QUANTIZED and 2 <= weights.num_bits <= 8 and weights.symmetric
    if not packed or use.inputs is not None or weights.strategy not in (_S.GROUP, _S.CHANNEL):
        message = f"{use}: embeddings must be symmetric integers of 2 to 8 bits by group or channel in pack-quantized"
        plan.say(codes.VLLM_EMBEDDING, use.place, f"{message}, without quantized inputs; or ignore the embedding")


def _check_packed(plan: Plan, use: Use, weights: QuantizationArgs) -> None:
    problem = None
    if weights.strategy not in (_S.GROUP, _S.CHANNEL):
        problem = "packed integers must be by group or channel"
    elif weights.num_bits == 1:
        problem = "packed integers must have 2 to 8 bits"
    elif not weights.symmetric and weights.num_bits not in (4, 8):
        problem = "asymmetric packed integers must have 4 or 8 bits"
    elif use.inputs is not None:
        problem = _check_packed_inputs(plan, use, weights, use.inputs)
    if problem is not None:
        plan.say(codes.VLLM_SCHEME, use.place, f"{use}: {problem}")
        return
    if weights.num_bits not in (4, 8):
        plan.say(codes.VLLM_KERNEL, use.place, f"{use}: {weights.num_bits} bits run in one kernel (Humming), on NVIDIA")
    if use.group_size is not None and use.group_size not in _FAST_GROUPS:
        plan.say(
            codes.VLLM_KERNEL, use.place,
            f"{use}: the fast kernels take groups of 32, 64 or 128, not of {use.group_size}",
        )  # fmt: skip


def _check_packed_inputs(plan: Plan, use: Use, weights: QuantizationArgs, inputs: QuantizationArgs) -> str | None:
    """What of packed weights with quantized inputs is not served, or None."""
    if inputs.type is QuantizationType.FLOAT:
        fits = weights.num_bits == 4 and weights.symmetric and use.group_size == _TILE
        if not fits or not is_dynamic_token(inputs) or inputs.num_bits != 8:
            return "with float8 inputs, packed weights must be int4, symmetric, by groups of 128, the inputs by token"
        plan.say(codes.VLLM_KERNEL, use.place, f"{use}: runs on GPUs of compute capability 9.0 only, in bfloat16")
        return None
    if not inputs.dynamic and use.scheme.output_activations is not None and weights.num_bits in (2, 4, 8):
        return None  # static int8 in and out
    by_token = inputs.dynamic is True and inputs.strategy in (_S.TOKEN, _S.GROUP)
    if not (inputs.num_bits == 8 and inputs.symmetric and by_token):
        return "inputs of packed weights must be int8, symmetric, dynamic by token or group"
    plan.say(codes.VLLM_KERNEL, use.place, f"{use}: the inputs stay as they are, in the kernels that are chosen first")
    return None


def _check_bytes(plan: Plan, use: Use, weights: QuantizationArgs) -> None:
    if weights.type is QuantizationType.INT:
        if use.inputs is None:
            message = f"{use}: integer weights alone must be packed; {codes.VLLM_WEIGHT_ONLY.way_out}"
            plan.say(codes.VLLM_WEIGHT_ONLY, use.place, message)
            return
        problem = int8_problem(weights, use.inputs)
        if problem is None and use.experts:
            by_token = weights.strategy is _S.CHANNEL and is_dynamic_token(use.inputs)
            if not by_token:
                message = f"{use}: int8 experts must be by channel, with dynamic tokens"
                plan.say(codes.VLLM_EXPERT_SCHEME, use.place, message)
    else:
        problem = float8_problem(weights, use.inputs)
        if problem is None and use.experts:
            of_experts = float8_experts_problem(weights, use.inputs)
            if of_experts is not None:
                plan.say(codes.VLLM_EXPERT_SCHEME, use.place, f"{use}: {of_experts}")
        if problem is None and weights.block_structure not in (None, (_TILE, _TILE)):
            plan.say(codes.VLLM_KERNEL, use.place, f"{use}: the fast kernels take blocks of 128 x 128")
    if problem is not None:
        plan.say(codes.VLLM_SCHEME, use.place, f"{use}: {problem}")


def _check_microscaled(plan: Plan, use: Use, weights: QuantizationArgs) -> None:
    if use.format is _F.MXFP6_PACK_QUANTIZED:
        plan.say(codes.VLLM_SCHEME, use.place, f"{use}: MXFP6 is not loaded from such checkpoints")
    elif use.format is _F.MXFP8_QUANTIZED and weights.scale_dtype != "torch.uint8":
        message = f"{use}: MXFP8 is recognised by the scale_dtype torch.uint8 only"
        plan.say(codes.VLLM_SCHEME, f"{use.place}.weights", message)


def _check_sizes(plan: Plan, use: Use, weights: QuantizationArgs, layer: Layer) -> None:
    if layer.shape is None or len(layer.shape) != 2:
        return
    rows, columns = layer.shape
    size = use.group_size
    if size is not None:
        if columns % size:
            message = f"{columns} columns are no multiple of the group size {size}"
            plan.say(codes.VLLM_SIZES, layer.name, f"{message}; {codes.VLLM_SIZES.way_out}")
        elif layer.is_split_by_inputs:
            gpus = _gpus_that_cut(columns, size)
            if gpus is not None:
                message = f"{columns} columns over {gpus} GPUs cut a group of {size}"
                plan.say(codes.VLLM_PARALLEL, layer.name, f"{message}; {codes.VLLM_PARALLEL.way_out}")
    if use.format is _F.PACK_QUANTIZED and not weights.symmetric and rows % max(32 // weights.num_bits, 1):
        message = f"{rows} rows do not fill whole words of {32 // weights.num_bits} zero points"
        code = codes.VLLM_EXPERT_SCHEME if use.experts else codes.VLLM_PARALLEL
        plan.say(code, layer.name, f"{message}; {code.way_out}")
    inputs = use.inputs
    if use.format is _F.PACK_QUANTIZED and inputs is not None and inputs.type is QuantizationType.FLOAT:
        tile = _EXPERT_TILE if use.experts else _TILE
        if rows % tile or columns % tile:
            message = f"int4 with float8 inputs needs multiples of {tile}, not [{rows}, {columns}]"
            plan.say(codes.VLLM_SIZES, layer.name, f"{message}; {codes.VLLM_SIZES.way_out}")
    if weights.strategy is _S.BLOCK and weights.block_structure is not None:
        height, width = weights.block_structure
        # Of layers that are fused, all but the last must end where a block does.
        if rows % height and any(layer.leaf in family[:-1] for family in FUSED):
            message = f"is fused with the layer behind it, and its {rows} rows end within a block of {height}"
            plan.say(codes.VLLM_SIZES, layer.name, f"{message}; {codes.VLLM_SIZES.way_out}")
        for count, step, what, is_split in (
            (columns, width, "columns", layer.is_split_by_inputs),
            (rows, height, "rows", layer.is_split_by_outputs),
        ):
            gpus = _gpus_that_cut(count, step) if is_split else None
            if gpus is not None:
                message = f"{count} {what} over {gpus} GPUs cut a block of {step}"
                plan.say(codes.VLLM_PARALLEL, layer.name, f"{message}; quantize by channel, or serve it on fewer GPUs")


def _gpus_that_cut(count: int, step: int) -> int | None:
    """The fewest GPUs, of which each would have a part of ``count`` that does not consist of whole ``step``."""
    return next((gpus for gpus in (2, 4, 8) if count % (step * gpus)), None)


def sibling_problems(plan: Plan) -> list[tuple[str, str]]:
    """Place and message for layers that are fused and differ."""
    outcomes = {}
    for layer in plan.layers:
        found = likeness(layer)
        group = layer.assignment.group if layer.assignment is not None else None
        label = f"gets {group or 'only sparsity'}" if found is not None else "stays dense"
        outcomes[layer.name] = Outcome(found, label)
    return [
        (problem.place, problem.message) for problem in check_siblings([x.as_module for x in plan.layers], outcomes)
    ]


def _check_experts_alike(plan: Plan) -> None:
    stacks: dict[str, set[object]] = {}
    for layer in plan.layers:
        if layer.stack is not None:
            stacks.setdefault(layer.stack, set()).add(likeness(layer))
    for stack, found in stacks.items():
        if len(found) > 1:
            plan.say(
                codes.VLLM_EXPERTS,
                stack,
                f"its experts have {len(found)} different schemes; {codes.VLLM_EXPERTS.way_out}",
            )


def _check_precedence(plan: Plan) -> None:
    groups: dict[str, str] = {}
    for group, scheme in plan.config.config_groups.items():
        groups.update(dict.fromkeys(scheme.targets, group))
    targets, ignore = TargetTable(groups), TargetTable(plan.config.ignore)
    for layer in plan.layers:
        module = layer.as_module
        if layer.ignored and not ignore.matches_name(module):
            if targets.first(module) is not None:
                message = "is ignored by its class, and only names are compared there; ignore it by name"
                plan.say(codes.VLLM_PRECEDENCE, layer.name, message)
            continue
        first = targets.first(module)
        if layer.assignment is None or layer.assignment.group is None or first is None:
            continue
        ours, theirs = layer.assignment.scheme, plan.config.config_groups[groups[first]]
        if ours is not None and _different(ours, theirs):
            message = f'gets {groups[first]} there, by "{first}", and {layer.assignment.group} by every other reader'
            plan.say(codes.VLLM_PRECEDENCE, layer.name, f"{message}; make the targets unambiguous")


def _different(one: object, other: object) -> bool:
    fields = ("weights", "input_activations", "output_activations", "format")
    return any(getattr(one, field) != getattr(other, field) for field in fields)
