// The kernel of instruction sets that take all problems token by token.

#include "cpu/quantized_linear/spans_by_token.inl"

namespace compressed_format {
namespace {

template <typename Kind>
constexpr QuantizedLinearKernel of_rows = {
    bytes_by_token<Kind>, parts_by_token, prepare_by_token<Kind>,
    tasks_by_token,       tasks_per_thread_by_token, run_by_token<Kind>,
};

template <typename Kind>
constexpr QuantizedLinearKernel of_spans = {
    bytes_of_spans<Kind>, parts_by_token, prepare_spans<Kind>,
    tasks_by_token,       tasks_per_thread_by_token, run_spans<Kind>,
};

inline const QuantizedLinearKernel& kernel_for(const QuantizedLinear& problem) {
  if (problem.activations->is_float) return problem.span == 0 ? of_rows<Float8> : of_spans<Float8>;
  return problem.span == 0 ? of_rows<Int8> : of_spans<Int8>;
}

}  // namespace
}  // namespace compressed_format

#include "cpu/quantized_linear/by_problem.inl"
