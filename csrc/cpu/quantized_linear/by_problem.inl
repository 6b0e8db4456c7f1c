// The kernel that is whichever `kernel_for` finds for a problem.

namespace compressed_format {
namespace {

constexpr QuantizedLinearKernel by_problem = {
    [](const QuantizedLinear& problem) { return kernel_for(problem).prepared_bytes(problem); },
    [](const QuantizedLinear& problem) { return kernel_for(problem).parts(problem); },
    [](const QuantizedLinear& problem, void* prepared, int64_t first, int64_t last) {
      kernel_for(problem).prepare(problem, prepared, first, last);
    },
    [](const QuantizedLinear& problem) { return kernel_for(problem).tasks(problem); },
    [](const QuantizedLinear& problem) { return kernel_for(problem).tasks_per_thread(problem); },
    [](const QuantizedLinear& problem, const void* prepared, int64_t first, int64_t last) {
      kernel_for(problem).run(problem, prepared, first, last);
    },
};

}  // namespace
}  // namespace compressed_format
