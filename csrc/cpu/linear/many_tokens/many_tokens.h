// The kernel for many tokens, of each instruction set.
#pragma once

#include "cpu/linear/linear.h"

namespace compressed_format {

extern const LinearKernel many_tokens_portable, many_tokens_avx2, many_tokens_avx512, many_tokens_amx;

}  // namespace compressed_format
