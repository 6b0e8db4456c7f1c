// What the library holds, for backend_info(): the level of instructions that it runs, then one kernel a line, the op's
// name before the colon. The ops themselves are registered by the other files of this folder, which are the only ones
// that know torch; schemas, fakes, checks and autograd formulas are in compressed_format/ops.

#include "cpu/isa.h"

#if defined(_WIN32)
#define COMPRESSED_FORMAT_EXPORT extern "C" __declspec(dllexport)
#else
#define COMPRESSED_FORMAT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

COMPRESSED_FORMAT_EXPORT const char* compressed_format_isa() {
  return compressed_format::isa_name(compressed_format::isa());
}

COMPRESSED_FORMAT_EXPORT const char* compressed_format_kernels() {
  return "dequantize: codes of 1 to 8 bits, int8, float8_e4m3fn, plain, 2:4 and sparse values\n"
         "embedding: codes of 1 to 8 bits, int8, float8_e4m3fn, plain values\n"
         "expert_linear: what linear takes, for the experts that tokens are routed to\n"
         "expert_quantized_linear: what quantized_linear takes, for the experts that tokens are routed to\n"
         "fake_quantize: integers of 1 to 8 bits and float8_e4m3fn, by tensor, token and group\n"
         "compress_2_of_4: int8, float8_e4m3fn and plain values\n"
         "compress_bitmask: int8, float8_e4m3fn and plain values\n"
         "count_bits: bitmasks of contiguous rows\n"
         "expand_bitmask: int8, float8_e4m3fn and plain values\n"
         "find_uneven_quad: bitmasks of contiguous rows\n"
         "linear: few tokens and many, codes of 1 to 8 bits, int8, float8_e4m3fn, plain and 2:4 values\n"
         "pack_codes: int8 codes of 1 to 8 bits\n"
         "prune_2_of_4: plain values\n"
         "quantize: integers of 1 to 8 bits, packed too, and float8_e4m3fn, by tensor, channel, group and block\n"
         "quantized_linear: integers of 1 to 8 bits and float8_e4m3fn, by tensor, token and group\n"
         "unpack_codes: 1 to 8 bits, dense and word-aligned";
}
