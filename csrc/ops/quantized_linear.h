// Which kernel multiplies quantized activations.
#pragma once

#include "cpu/quantized_linear/quantized_linear.h"

namespace compressed_format {

// The kernel for a problem whose weight and activations are described; null where none takes it.
const QuantizedLinearKernel* select_quantized_linear(QuantizedLinear& problem);

}  // namespace compressed_format
