// y = x @ dense(weight).T + bias, straight from a compressed weight.
//
// Two kernels share the work: that for few tokens is bound by reading the weight, decodes it in registers and
// multiplies at once; that for many tokens decodes tiles into the cache and multiplies from there. Each takes what it
// can and says so; what neither takes is left to the reference.
#pragma once

#include <cstdint>

#include "cpu/weight.h"

namespace compressed_format {

struct Linear {
  const Weight* weight = nullptr;  // [rows, columns]

  const void* x = nullptr;  // [tokens, columns], a row x_row_bytes from the next
  Float x_type = Float::bfloat16;
  int64_t tokens = 0;
  int64_t x_row_bytes = 0;

  const void* bias = nullptr;  // [rows] or null
  Float bias_type = Float::bfloat16;

  void* y = nullptr;  // [tokens, rows], contiguous, of x_type
};

}  // namespace compressed_format
