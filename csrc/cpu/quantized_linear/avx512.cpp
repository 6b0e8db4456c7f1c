// Codes multiplied with 512-bit vectors: of whole rows, or of spans where scales change within.

#include "cpu/simd/avx512.h"

#include "cpu/quantized_linear/quantized_linear.inl"
#include "cpu/quantized_linear/whole_rows_avx512.inl"
#include "cpu/quantized_linear/spans_avx512.inl"

namespace compressed_format {
namespace {

const QuantizedLinearKernel& kernel_for(const QuantizedLinear& problem) {
  const bool is_float = problem.activations->is_float;
  if (problem.span == 0) return is_float ? kernel_of<Float8> : kernel_of<Int8>;
  if (is_float) return of_spans<Float8Codes>;
  return problem.weight->type == Codes::packed ? of_spans<PackedCodes> : of_spans<Int8Codes>;
}

}  // namespace
}  // namespace compressed_format

#include "cpu/quantized_linear/by_problem.inl"

namespace compressed_format {

extern const QuantizedLinearKernel quantized_linear_avx512;
const QuantizedLinearKernel quantized_linear_avx512 = by_problem;

}  // namespace compressed_format
