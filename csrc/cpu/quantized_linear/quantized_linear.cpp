#include "cpu/quantized_linear/quantized_linear.h"

namespace compressed_format {

extern const QuantizedLinearKernel quantized_linear_portable;
#if COMPRESSED_FORMAT_X86
extern const QuantizedLinearKernel quantized_linear_avx2;
extern const QuantizedLinearKernel quantized_linear_avx512;
#endif

const ByIsa<const QuantizedLinearKernel> quantized_linear_kernels = [] {
  ByIsa<const QuantizedLinearKernel> kernels;
  kernels.portable = &quantized_linear_portable;
#if COMPRESSED_FORMAT_X86
  kernels.avx2 = &quantized_linear_avx2;
  kernels.avx512 = &quantized_linear_avx512;
#endif
  return kernels;
}();

bool takes(const Weight& weight, const Activations& activations) {
  const bool plain = weight.g_idx == nullptr && weight.bitmask == nullptr && weight.scale != nullptr;
  const bool one_scale_each = weight.scale_columns == 1 && activations.group_size == activations.columns;
  if (!plain || !one_scale_each || weight.columns != activations.columns) return false;
  if (activations.is_float) return weight.type == Codes::float8 && weight.zero_points == ZeroPoints::none;
  if (weight.type != Codes::int8 || weight.zero_points == ZeroPoints::packed) return false;
  // Sums of products must fit into 32 bits: a code less its zero point is at most 255, where there is one, else 128.
  const bool asymmetric = weight.zero_points != ZeroPoints::none;
  return weight.columns <= (asymmetric ? 32768 : 65536);
}

}  // namespace compressed_format
