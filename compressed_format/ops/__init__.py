"""The ops: one for each task, defined in plain torch, and run by native kernels where there are some."""

from __future__ import annotations

from compressed_format.ops.dequantize import dequantize
from compressed_format.ops.embedding import embedding
from compressed_format.ops.experts import expert_linear
from compressed_format.ops.extension import backend_info, load_libraries, native_library
from compressed_format.ops.fake_quantize import fake_quantize
from compressed_format.ops.linear import linear
from compressed_format.ops.pack import pack_codes
from compressed_format.ops.quantize import quantize
from compressed_format.ops.quantized_experts import expert_quantized_linear
from compressed_format.ops.quantized_linear import quantized_linear
from compressed_format.ops.sparse import (
    compress_2_of_4,
    compress_bitmask,
    count_bits,
    expand_bitmask,
    find_uneven_quad,
    prune_2_of_4,
)
from compressed_format.ops.unpack import unpack_codes

__all__ = [
    "backend_info",
    "compress_2_of_4",
    "compress_bitmask",
    "count_bits",
    "dequantize",
    "embedding",
    "expand_bitmask",
    "expert_linear",
    "expert_quantized_linear",
    "fake_quantize",
    "find_uneven_quad",
    "linear",
    "native_library",
    "pack_codes",
    "prune_2_of_4",
    "quantize",
    "quantized_linear",
    "unpack_codes",
]

# Only now: a library registers kernels for ops whose schemas the imports above have defined.
load_libraries()
