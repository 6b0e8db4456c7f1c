// Which kernel multiplies.
#pragma once

#include "cpu/linear/linear.h"

namespace compressed_format {

// The kernel for a problem, of those that this machine runs; null where there is none.
const LinearKernel* select_linear(const Linear& problem);

}  // namespace compressed_format
