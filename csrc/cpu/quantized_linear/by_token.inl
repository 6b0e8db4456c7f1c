// The kernel of instruction sets that take all problems token by token.

namespace compressed_format {
namespace {

constexpr QuantizedLinearKernel by_token = {
    [](const QuantizedLinear& problem) {
      return problem.activations->is_float ? bytes_by_token<Float8>(problem) : bytes_by_token<Int8>(problem);
    },
    parts_by_token,
    [](const QuantizedLinear& problem, void* prepared, int64_t first, int64_t last) {
      const bool is_float = problem.activations->is_float;
      (is_float ? prepare_by_token<Float8> : prepare_by_token<Int8>)(problem, prepared, first, last);
    },
    tasks_by_token,
    tasks_per_thread_by_token,
    [](const QuantizedLinear& problem, const void* prepared, int64_t first, int64_t last) {
      const bool is_float = problem.activations->is_float;
      (is_float ? run_by_token<Float8> : run_by_token<Int8>)(problem, prepared, first, last);
    },
};

}  // namespace
}  // namespace compressed_format
