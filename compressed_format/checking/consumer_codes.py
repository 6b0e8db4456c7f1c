"""The codes of what single consumers mind. Each constant is one row of the table in ``docs/findings.md``.

CF4: vLLM; CF5: SGLang; CF6: transformers with compressed-tensors; CF7: llama.cpp's converter. An error means that the
checkpoint does not load there, or that its outputs are wrong without a word.
"""

from __future__ import annotations

from compressed_format.checking.findings import Code, Severity

__all__ = ["ALL", "LLAMA_CPP", "SGLANG", "TRANSFORMERS", "VLLM"]

_ERROR, _WARNING = Severity.ERROR, Severity.WARNING

VLLM = "vLLM 0.33"
SGLANG = "SGLang 0.5.23"
TRANSFORMERS = "transformers 5.23 with compressed-tensors 0.20"
LLAMA_CPP = "llama.cpp's convert_hf_to_gguf"

_PACK = 'Use the format "pack-quantized".'
_DENSE_TARGET = "Decompress, and compress again in a format without sparsity."
_ROTATE = "Fuse the rotations into the weights, or serve it with software that applies them."
_STATIC = 'Compress again without it, or with actorder "static".'
_ALIKE = "Give all of them the same scheme."
_ONE_BY_ONE = "Load and save the checkpoint with this library, which writes experts one by one."

# vLLM

# fmt: off

VLLM_SPARSE = Code(
    "CF401", "sparse formats are gone", _ERROR,
    "sparse-bitmask, sparse-24-bitmask and marlin-24 raise.",
    _DENSE_TARGET, VLLM,
)
VLLM_ACTORDER = Code(
    "CF402", "activation order", _ERROR,
    "Columns that were reordered (weight_g_idx) are refused.",
    _STATIC, VLLM,
)
VLLM_SCHEME = Code(
    "CF403", "no scheme for these weights and activations", _ERROR,
    "The combination of weights, activations and format is none that its loader knows.",
    "The message says which ones are known for the format.", VLLM,
)
VLLM_WEIGHT_ONLY = Code(
    "CF404", "integer weights without activations", _ERROR,
    "int-quantized and naive-quantized integer weights need quantized inputs there.",
    _PACK, VLLM,
)
VLLM_KERNEL = Code(
    "CF405", "few kernels", _WARNING,
    "It loads, but only on some devices, or by a kernel that is not the fast one.",
    "Prefer 4 or 8 bits in groups of 32, 64 or 128, and sizes that are multiples of 128.", VLLM,
)
VLLM_SIZES = Code(
    "CF406", "sizes that no kernel takes", _ERROR,
    "Rows or columns of a layer do not fit the blocks or groups of its scheme.",
    "Ignore the layer, or choose another group or block size.", VLLM,
)
VLLM_PARALLEL = Code(
    "CF407", "cannot be split over GPUs", _WARNING,
    "Tensor parallelism over 2, 4 or 8 GPUs would cut a group, a block or a word.",
    "Choose a smaller group size, or serve it on fewer GPUs.", VLLM,
)
VLLM_FUSED = Code(
    "CF408", "fused layers differ", _ERROR,
    "Layers that are fused when they are loaded (q, k and v; gate and up) have different schemes.",
    _ALIKE, VLLM,
)
VLLM_PRECEDENCE = Code(
    "CF409", "another scheme than everywhere else", _ERROR,
    "The first target that matches wins there, classes match in part, and ignore entries match names only; the layer "
    "gets another scheme than the one it was stored with.",
    "Make targets and ignore unambiguous: full names, or patterns that do not overlap.", VLLM,
)
VLLM_EMBEDDING = Code(
    "CF410", "quantized embedding", _ERROR,
    "Embeddings may be integers of 2 to 8 bits by group or channel, symmetric and packed, and nothing else.",
    "Ignore the embedding.", VLLM,
)
VLLM_CACHE = Code(
    "CF411", "scheme of the KV cache", _ERROR,
    "kv_cache_scheme must be float8, symmetric, by tensor or attn_head.",
    "Use float8, or leave it out.", VLLM,
)
VLLM_TRANSFORM = Code(
    "CF412", "rotations while the model runs", _ERROR,
    "Only rotations at the input or output of a Linear without a bias are applied.",
    _ROTATE, VLLM,
)
VLLM_TRANSFORM_LIMITS = Code(
    "CF413", "rotations have limits", _WARNING,
    "Layers with rotations must have no bias, q, k and v the same one, and the model must run on one GPU.",
    _ROTATE, VLLM,
)
VLLM_STACKED = Code(
    "CF414", "experts in one tensor", _ERROR,
    "Experts that are stored in one compressed tensor load as garbage, without an error.",
    _ONE_BY_ONE, VLLM,
)
VLLM_EXPERTS = Code(
    "CF415", "experts that differ", _ERROR,
    "All projections of all experts of a layer must have the same scheme.",
    _ALIKE, VLLM,
)
VLLM_EXPERT_SCHEME = Code(
    "CF416", "no scheme for experts", _ERROR,
    "The scheme is known for ordinary layers, and not for experts, or not for experts of these sizes.",
    "Ignore the experts, or give them another scheme.", VLLM,
)
VLLM_OLD_CACHE = Code(
    "CF417", "cache scales under their old name", _ERROR,
    "output_scale of k_proj and v_proj is no longer mapped to the cache, and has no place.",
    "Rename them to k_scale and v_scale of the attention module.", VLLM,
)
VLLM_ATTENTION = Code(
    "CF418", "group of attention modules", _WARNING,
    "A group whose only target ends in Attention is dropped; the cache is quantized by kv_cache_scheme alone.",
    "Add kv_cache_scheme.", VLLM,
)
VLLM_WORD_ALIGNED = Code(
    "CF419", "word-aligned layout", _ERROR,
    "Codes of 3, 5, 6 and 7 bits are read in the dense layout only; where the sizes coincide, wrong without an error.",
    "Load and save the checkpoint with this library, which writes the dense layout.", VLLM,
)

# SGLang

SGLANG_SPARSE = Code(
    "CF501", "sparse formats are gone", _ERROR,
    "sparse-bitmask, sparse-24-bitmask and marlin-24 raise.",
    _DENSE_TARGET, SGLANG,
)
SGLANG_UNNAMED = Code(
    "CF502", "layer without a target", _ERROR,
    "A Linear that is neither a target nor ignored raises.",
    "Add the layer's name to ignore.", SGLANG,
)
SGLANG_HEAD = Code(
    "CF503", "head quantized by its class", _ERROR,
    "lm_head is quantized only where a target names it.",
    "Add a target with its name, or ignore it.", SGLANG,
)
SGLANG_SCHEME = Code(
    "CF504", "no scheme for these weights and activations", _ERROR,
    "The combination of weights, activations and format is none that its loader knows.",
    "The message says which ones are known for the format.", SGLANG,
)
SGLANG_EXPERT_SCHEME = Code(
    "CF505", "no scheme for experts", _ERROR,
    "The scheme is known for ordinary layers, and not for experts.",
    "Ignore the experts, or give them another scheme.", SGLANG,
)
SGLANG_SIZES = Code(
    "CF506", "sizes that no kernel takes", _ERROR,
    "Rows or columns of a layer do not fit the groups or words of its scheme.",
    "Ignore the layer.", SGLANG,
)
SGLANG_FUSED = Code(
    "CF507", "fused layers differ", _ERROR,
    "Layers that are fused when they are loaded (q, k and v; gate and up) have different schemes.",
    _ALIKE, SGLANG,
)
SGLANG_EXPERT_NAMES = Code(
    "CF508", "experts are asked for by other names", _ERROR,
    "The scheme of experts is looked up as gate_proj, up_proj and down_proj, whatever they are called; targets for "
    "w1, w2 and w3 do not match.",
    'Use the target "Linear", or patterns that match both names.', SGLANG,
)
SGLANG_TRANSFORM = Code(
    "CF509", "rotations are skipped", _ERROR,
    "transform_config is not read, so that rotations at run time are left out without an error.",
    _ROTATE, SGLANG,
)
SGLANG_CACHE = Code(
    "CF510", "scheme of the KV cache is ignored", _WARNING,
    "Only static float8 by tensor is used.",
    "Use float8 by tensor, or expect a cache that is not quantized.", SGLANG,
)
SGLANG_STACKED = Code(
    "CF511", "experts in one tensor", _ERROR,
    "Tensors that hold all experts are dropped without an error.",
    _ONE_BY_ONE, SGLANG,
)
SGLANG_EMBEDDING = Code(
    "CF512", "quantized embedding", _ERROR,
    "A quantized embedding loads without an error and gives the same vector for every token.",
    "Ignore the embedding.", SGLANG,
)
SGLANG_DEVICES = Code(
    "CF513", "needs certain devices", _WARNING,
    "It loads on some devices only.",
    "The message names them.", SGLANG,
)

# transformers

TRANSFORMERS_ASYMMETRIC = Code(
    "CF601", "packed zero points", _ERROR,
    "Asymmetric pack-quantized weights by group or channel fail with a size mismatch of weight_zero_point; ordinary "
    "layers load with dequantize=True, experts do not load at all.",
    "Compress symmetrically, or load the checkpoint with this library.", TRANSFORMERS,
)
TRANSFORMERS_ACTORDER = Code(
    "CF602", "activation order", _ERROR,
    "actorder group is refused.",
    _STATIC, TRANSFORMERS,
)
TRANSFORMERS_EMBEDDING = Code(
    "CF603", "quantized embedding", _ERROR,
    "Checkpoints with a quantized embedding fail to load, or give other outputs.",
    "Ignore the embedding, or load the checkpoint with this library.", TRANSFORMERS,
)
TRANSFORMERS_EXPERT_SCHEME = Code(
    "CF604", "experts fail", _ERROR,
    "Experts are decompressed while they are loaded, which fails for int8 with quantized inputs, float8 blocks and "
    "MXFP8, and is wrong without an error for NVFP4.",
    "Ignore the experts, give them another scheme, or load the checkpoint with this library.", TRANSFORMERS,
)
TRANSFORMERS_EXPERT_INPUTS = Code(
    "CF605", "inputs of experts are not quantized", _WARNING,
    "Experts are decompressed while they are loaded, and what goes into them is not rounded: outputs differ from those "
    "of servers.",
    "Expect it, or load the checkpoint with this library.", TRANSFORMERS,
)
TRANSFORMERS_SPARSE = Code(
    "CF606", "sparse formats are gone", _ERROR,
    "sparsity_config is passed over without a word, and the sparse layers stay random; marlin-24 is refused.",
    "Decompress first, or load the checkpoint with this library.", TRANSFORMERS,
)
TRANSFORMERS_TRANSFORM = Code(
    "CF607", "rotations are not applied", _ERROR,
    "Rotations at run time are not restored: the model loads, runs, and is wrong.",
    _ROTATE, TRANSFORMERS,
)
TRANSFORMERS_MIXED = Code(
    "CF608", "mixed schemes and dequantize=True", _WARNING,
    "dequantize=True takes one scheme for all layers and fails. Without it, the checkpoint loads.",
    "Load it without dequantize=True.", TRANSFORMERS,
)
TRANSFORMERS_WORD_ALIGNED = Code(
    "CF609", "word-aligned layout", _ERROR,
    "Codes of 3, 5, 6 and 7 bits in the layout of releases before 0.18 are decoded to wrong values, without an error.",
    "Load and save the checkpoint with this library, which writes the dense layout.", TRANSFORMERS,
)

# llama.cpp

LLAMA_CPP_GROUPS = Code(
    "CF701", "more than one group", _ERROR,
    "Only one group of modules is converted, but for several of NVFP4.",
    "Use one scheme for all layers.", LLAMA_CPP,
)
LLAMA_CPP_STRATEGY = Code(
    "CF702", "strategy is not converted", _ERROR,
    "Weights of a byte are converted by channel or block only, packed ones by group only.",
    "Compress again with such a strategy.", LLAMA_CPP,
)
LLAMA_CPP_BITS = Code(
    "CF703", "width is not converted", _ERROR,
    "Packed weights are converted at 2, 4 and 8 bits. Those of 3, 5, 6 and 7 are read in the layout of releases before "
    "0.18, and wrong without an error.",
    "Use 2, 4 or 8 bits.", LLAMA_CPP,
)
LLAMA_CPP_FORMAT = Code(
    "CF704", "format is not converted", _ERROR,
    "MXFP4, MXFP6, MXFP8, sparse formats and integers of fewer than 8 bits in bytes are not converted.",
    'Use "pack-quantized" in groups, or float8 by channel.', LLAMA_CPP,
)
LLAMA_CPP_ACTORDER = Code(
    "CF705", "activation order", _ERROR,
    "weight_g_idx is not taken into account.",
    _STATIC, LLAMA_CPP,
)
LLAMA_CPP_SCALES = Code(
    "CF706", "static scales are in the way", _WARNING,
    "Scales of activations and of the KV cache may end in a tensor that cannot be mapped.",
    "Convert the dense model, or remove these tensors from a copy.", LLAMA_CPP,
)
LLAMA_CPP_TRANSFORM = Code(
    "CF707", "rotations are skipped", _ERROR,
    "Rotations at run time are left out without an error.",
    _ROTATE, LLAMA_CPP,
)
# fmt: on

ALL: tuple[Code, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Code))
"""The rows in their order."""
