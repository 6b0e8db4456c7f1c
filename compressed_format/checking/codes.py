"""The codes of what is wrong with a config or a checkpoint itself, whoever reads it.

Each constant is one row of the table in ``docs/findings.md``. CF0: files; CF1: the config, and which modules it means;
CF2: tensors against the config, as headers tell; CF3: values.
"""

from __future__ import annotations

from compressed_format.checking.findings import Code, Severity

__all__ = ["ALL"]

_ERROR, _WARNING, _NOTE = Severity.ERROR, Severity.WARNING, Severity.NOTE

# Files

# fmt: off

UNREADABLE = Code(
    "CF001", "nothing to read", _ERROR,
    "There is no such file or folder, it cannot be opened, or it holds no safetensors files and no config.",
    "Check the path and its permissions; convert pickles to safetensors first.",
)
HEADER = Code(
    "CF002", "header breaks the specification", _ERROR,
    "A safetensors file is cut off, or its header contradicts itself, the file, or the specification.",
    "Download or save the file again; nothing of it can be trusted.",
)
INDEX = Code(
    "CF003", "index cannot be used", _ERROR,
    "The index is no valid JSON, or names files outside of the folder, missing files, or files of another kind.",
    "Write the index again from the headers of the shards.",
)
INDEX_CONTENT = Code(
    "CF004", "index and shards disagree", _ERROR,
    "A tensor is in a shard and not in the index, or in another shard than the index says, or missing.",
    "Write the index again from the headers of the shards; fetch shards that are missing.",
)
TOTAL_SIZE = Code(
    "CF005", "total_size is wrong", _WARNING,
    "The index names another sum of bytes than the tensors have; device maps are planned with it.",
    "Set metadata.total_size of the index to the sum that the message names.",
)
STRAY_FILE = Code(
    "CF006", "weights that nothing refers to", _WARNING,
    "There are safetensors files beside the weights that no index names; programs that load all files of a folder "
    "(*.safetensors) take them in.",
    "Remove them, or name them in the index.",
)
PICKLES = Code(
    "CF007", "pickles beside the weights", _NOTE,
    "There are files of a kind that usually holds pickles. This library never opens them; a program that does runs "
    "whatever code they hold.",
    "Remove them before the checkpoint is published.",
)
CODE_IN_FOLDER = Code(
    "CF008", "the checkpoint brings code", _NOTE,
    "config.json (auto_map) asks for Python code out of the folder, or there is some. It was not run.",
    "Read it before anything loads the model with trust_remote_code=True.",
)
TENSOR_UNREADABLE = Code(
    "CF009", "tensor cannot be read", _ERROR,
    "The file changed, shrank or failed while its tensors were read.",
    "Check the disk, and check again while nothing writes to the file.",
)

# The config, and which modules it means

CONFIG = Code(
    "CF101", "mistake in the config", _ERROR,
    "The config is no valid JSON, or says something that cannot mean anything.",
    "The message names the place, what is allowed, and the way out.",
)
CONFIG_DOUBT = Code(
    "CF102", "doubtful entry in the config", _WARNING,
    "An entry that a strict reader would refuse; the tensors can be decoded all the same.",
    "Correct the entry, so that no reader stumbles over it.",
)
NO_CONFIG = Code(
    "CF103", "compressed without a config", _ERROR,
    "There are tensors of compressed modules, and no config that says how to decode them.",
    "Put the quantization_config that they were written with into config.json.",
)
NOT_COMPRESSED = Code(
    "CF104", "not compressed", _NOTE,
    "The checkpoint has no quantization_config, and no tensor of a compressed module.",
    "Nothing: only its files were checked.",
)
STATUS = Code(
    "CF105", "quantization_status is not compressed", _ERROR,
    "transformers replaces the weights of such a checkpoint by random ones, and says no more than that keys are "
    "missing.",
    'Set quantization_status to "compressed".',
)
VERSION = Code(
    "CF106", "unknown vintage", _WARNING,
    "The version of the format is newer than what is known here, or no version at all: the layout of 3, 5, 6 and 7 "
    "bits depends on it, and newer releases may have changed others.",
    "Set version to the release whose layout the tensors have; 0.20.0 for what this library writes.",
)
NO_VERSION = Code(
    "CF107", "no version", _NOTE,
    "The config names no release. The layout of 3, 5, 6 and 7 bits depends on it.",
    "Set version to the release whose layout the tensors have.",
)
CONFIG_PLACE = Code(
    "CF108", "config in an unusual place", _WARNING,
    "quantization_config stands in text_config or under the name compression_config, where not every reader looks.",
    "Move it to quantization_config at the top of config.json.",
)
ONLINE_TRANSFORM = Code(
    "CF109", "rotations while the model runs", _ERROR,
    "transform_config asks for rotations at run time. Readers that do not apply them compute wrong values without an "
    "error; this library refuses the model.",
    "Serve it with software that applies them, or fuse the rotations into the weights.",
)
FUSED_TRANSFORM = Code(
    "CF110", "rotations in the weights", _NOTE,
    "transform_config says that rotations are part of the stored weights; they need nothing when the model is loaded.",
    "Nothing. After decompress, remove transform_config, if the weights are to be rotated again.",
)
TARGETS = Code(
    "CF111", "targets cannot be matched", _ERROR,
    "A target names a module that cannot be compressed, or a pattern takes too long.",
    "Narrow the target; write patterns without nested repetitions.",
)
TARGET_UNMATCHED = Code(
    "CF112", "target matches nothing", _WARNING,
    "No module of the checkpoint has this name or class, or matches this pattern.",
    "Correct or remove the target; targets speak of the names in the checkpoint.",
)
IGNORE_UNMATCHED = Code(
    "CF113", "ignore entry matches nothing", _WARNING,
    "No module of the checkpoint is meant by this entry, so that the one it was written for may not be ignored.",
    "Correct or remove the entry: the full name of a module in the checkpoint, or a pattern behind re:.",
)
IGNORED_COMPRESSED = Code(
    "CF114", "ignored, and compressed", _ERROR,
    "ignore says that the module is dense, and it has tensors of a compressed one: readers look for a weight that is "
    "not there, and find tensors that they have no place for.",
    "Remove the entry from ignore, or narrow it.",
)
DENSE_TARGETED = Code(
    "CF115", "dense, and not ignored", _ERROR,
    "The config says that the module is compressed, and its weight is dense. transformers computes NaN with it, "
    "without an error; servers fail to load it.",
    "Add the module's name to ignore.",
)
DENSE_UNNAMED = Code(
    "CF116", "dense, and not named", _WARNING,
    "The module has a dense matrix, and is neither a target nor ignored. Some servers insist on one of both.",
    "Add the module's name to ignore.",
)
RESOLUTION = Code(
    "CF117", "readers disagree about a module", _WARNING,
    "Readers match targets by different rules, or fuse modules, and would treat these differently from each other.",
    "The message names the modules and the entries; make the targets unambiguous.",
)

# Tensors against the config

MISSING = Code(
    "CF201", "tensor is missing", _ERROR,
    "The scheme of the module has a tensor that no file holds.",
    "Save the module again, or correct its scheme.",
)
DTYPE = Code(
    "CF202", "wrong dtype", _ERROR,
    "A tensor has another dtype than its format demands.",
    "Save the module again, or correct its scheme.",
)
SHAPE = Code(
    "CF203", "wrong shape", _ERROR,
    "A tensor has another shape than follows from the module's weight and scheme.",
    "Save the module again, or correct group_size, strategy or num_bits of its scheme.",
)
EXTRA = Code(
    "CF204", "tensor that its scheme has not", _ERROR,
    "The module has a tensor that its scheme has no place for, such as the zero point of a symmetric one. vLLM does "
    "not load such a checkpoint.",
    "Remove the tensor, or correct the scheme.",
)
UNCLAIMED = Code(
    "CF205", "compressed, and in no group", _ERROR,
    "The module has tensors of a compressed one, and no target of the config means it.",
    "Add a target for it; targets speak of the names in the checkpoint.",
)
G_IDX = Code(
    "CF206", "reordered columns", _WARNING,
    "weight_g_idx assigns columns to groups (GPTQ's activation order). This library decodes it; releases of "
    "compressed-tensors from 0.19 on and vLLM do not.",
    "Serve it with this library, or compress the model again without activation order.",
)
WORD_ALIGNED = Code(
    "CF207", "word-aligned layout", _WARNING,
    "Codes of 3, 5, 6 or 7 bits in the layout of releases before 0.18. Newer releases decode it to wrong values "
    "without an error; this library reads it.",
    "Load and save it once with this library, which writes the dense layout.",
)
DENSE_ODD_BITS = Code(
    "CF208", "dense layout of an odd width", _NOTE,
    "Codes of 3, 5, 6 or 7 bits in the layout of releases from 0.18 on. Older releases decode it to wrong values.",
    "Nothing, where readers are up to date.",
)
UNPACKED_ZERO_POINT = Code(
    "CF209", "zero points not packed", _WARNING,
    "Zero points of pack-quantized stand in int8, as releases up to 0.9.3 wrote them. Current readers refuse it; "
    "this library reads it.",
    "Load and save it once with this library.",
)
NOT_DECODED = Code(
    "CF210", "format that is not decoded here", _NOTE,
    "The format is known by name (NVFP4, MX) and cannot be decoded by this library, so that its tensors were not "
    "checked.",
    "Nothing, if what serves it knows the format.",
)
MXFP4_FAULT = Code(
    "CF211", "MXFP4 scales of 0.13.0", _WARNING,
    "Release 0.13.0 wrote MXFP4 scales that are four times too small.",
    "Compress the model again with another release.",
)
LEGACY_FORMAT = Code(
    "CF212", "format of the past", _NOTE,
    "sparse-bitmask, sparse-24-bitmask and marlin-24 are read by this library and by compressed-tensors up to 0.14; no "
    "current server loads them.",
    "Decompress the checkpoint and compress it in a current format, if it is to be served.",
)
CACHE_SCALES = Code(
    "CF213", "scales of the KV cache do not fit kv_cache_scheme", _WARNING,
    "kv_cache_scheme asks for k_scale and v_scale that are not there, or they are there without it, or under their "
    "name of 2024.",
    "Calibrate the cache again, or remove kv_cache_scheme.",
)
STACKED_EXPERTS = Code(
    "CF214", "experts in one tensor", _WARNING,
    "All experts of a layer share one compressed tensor. Servers want one tensor for each expert and projection, and "
    "some load these as garbage.",
    "Load and save it once with this library, which writes experts one by one.",
)
TIED_WEIGHTS = Code(
    "CF215", "tied weights that differ", _ERROR,
    "config.json says that embedding and head are one weight, and two different ones are stored: which one counts "
    "depends on the reader.",
    "Set tie_word_embeddings to false, or remove the head's tensors.",
)
TIED_TWICE = Code(
    "CF216", "tied weights stored twice", _NOTE,
    "Embedding and head are one weight and both stored.",
    "Remove the head's tensors, which only take room.",
)
NO_HEAD = Code(
    "CF217", "no output head", _ERROR,
    "config.json says that the head has a weight of its own (tie_word_embeddings is false), and none is stored: "
    "readers leave it random.",
    "Add the head's tensors, or set tie_word_embeddings to true if the embedding is its weight.",
)
UNSUPPORTED = Code(
    "CF218", "scheme that cannot be run here", _WARNING,
    "The module is well formed, and this library cannot run its scheme.",
    "Serve it with software that can; the message names what is missing here.",
)

# Values

SCALE = Code(
    "CF301", "scale is not finite and positive", _ERROR,
    "A scale is NaN, infinite, zero or negative: the weights under it are lost.",
    "Compress the module again from its dense weight.",
)
ACTIVATION_SCALE = Code(
    "CF302", "activation or cache scale is not finite and positive", _ERROR,
    "A static scale is NaN, infinite, zero or negative: whatever passes it becomes NaN or zero.",
    "Calibrate again.",
)
CODES_RANGE = Code(
    "CF303", "code out of range", _ERROR,
    "An integer code does not fit num_bits, or a float8 code is NaN.",
    "Correct num_bits, or compress the module again.",
)
ZERO_POINT = Code(
    "CF304", "zero point out of range", _ERROR,
    "A zero point is no code of num_bits.",
    "Correct num_bits, or compress the module again.",
)
PADDING = Code(
    "CF305", "padding is not zero", _WARNING,
    "Bits of a packed row behind its last code are set. Readers ignore them, but no writer of this format sets them.",
    "Check weight_shape and num_bits; else load and save the checkpoint once.",
)
TWO_FOUR = Code(
    "CF306", "not 2:4", _ERROR,
    "A group of four columns has not exactly two places for values.",
    "Compress the module again.",
)
BITMASK = Code(
    "CF307", "bitmask contradicts the values", _ERROR,
    "The set bits of the bitmask are not as many as there are values, or row_offsets does not follow from them, or "
    "bits behind the last column are set.",
    "Compress the module again.",
)
STORED_SHAPE = Code(
    "CF308", "stored shape contradicts the tensors", _ERROR,
    "weight_shape, or shape of a sparse weight, names sizes that the other tensors cannot have.",
    "Correct it, or compress the module again.",
)
G_IDX_RANGE = Code(
    "CF309", "g_idx out of range", _ERROR,
    "weight_g_idx names groups that there are not, or is set for a part of the columns only.",
    "Compress the module again.",
)
MARLIN = Code(
    "CF310", "marlin-24 cannot be decoded", _ERROR,
    "The metadata or the tiles of marlin-24 contradict themselves.",
    "Compress the module again, in a current format.",
)
# fmt: on

ALL: tuple[Code, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Code))
"""The rows in their order."""
