#include "cpu/quantized_linear/quantized_linear.h"

namespace compressed_format {

extern const QuantizedLinearKernel quantized_linear_portable;
#if COMPRESSED_FORMAT_X86
extern const QuantizedLinearKernel quantized_linear_avx2;
extern const QuantizedLinearKernel quantized_linear_avx512;
extern const QuantizedLinearKernel quantized_linear_amx;
#endif

const ByIsa<const QuantizedLinearKernel> quantized_linear_kernels = [] {
  ByIsa<const QuantizedLinearKernel> kernels;
  kernels.portable = &quantized_linear_portable;
#if COMPRESSED_FORMAT_X86
  kernels.avx2 = &quantized_linear_avx2;
  kernels.avx512 = &quantized_linear_avx512;
  kernels.amx = &quantized_linear_amx;
#endif
  return kernels;
}();

bool has_whole_rows(const Weight& weight, const Activations& activations) {
  const bool plain = weight.g_idx == nullptr && weight.bitmask == nullptr && weight.scale != nullptr;
  const bool one_scale_each = weight.scale_columns == 1 && activations.group_size == activations.columns;
  if (!plain || !one_scale_each || weight.columns != activations.columns) return false;
  if (activations.is_float) return weight.type == Codes::float8 && weight.zero_points == ZeroPoints::none;
  if (weight.type != Codes::int8 || weight.zero_points == ZeroPoints::packed) return false;
  // Sums of products must fit into 32 bits: a code less its zero point is at most 255, where there is one, else 128.
  const bool asymmetric = weight.zero_points != ZeroPoints::none;
  return weight.columns <= (asymmetric ? 32768 : 65536);
}

int64_t span_of(const Weight& weight, const Activations& activations) {
  const bool plain = weight.g_idx == nullptr && weight.bitmask == nullptr && weight.scale != nullptr;
  const bool multiplied = activations.is_float
                              ? weight.type == Codes::float8 && weight.zero_points == ZeroPoints::none
                              : weight.type == Codes::packed || weight.type == Codes::int8;
  const int64_t columns = weight.columns;
  if (!plain || !multiplied || columns != activations.columns) return 0;
  const int64_t most = most_span_bytes / (activations.is_float ? 2 : 1);
  const int64_t of_weight = weight.block_columns < columns ? weight.block_columns : columns;
  const int64_t of_x = activations.group_size;
  int64_t span = of_weight < of_x ? of_weight : of_x;
  if (span == columns) return span < most ? span : most;
  if ((of_weight < columns && of_weight % span != 0) || (of_x < columns && of_x % span != 0)) return 0;
  // A part of a span is one, too.
  while (span > most && span % 2 == 0) span /= 2;
  return span <= most && span % 8 == 0 ? span : 0;
}

}  // namespace compressed_format
