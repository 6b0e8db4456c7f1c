// compressed_format::fake_quantize on the CPU.

#include <torch/csrc/stable/library.h>

#include "cpu/scratch.h"
#include "ops/activations.h"

namespace compressed_format {
namespace {

// Below this many values, waking another thread takes longer than what it would save.
constexpr int64_t values_per_thread = 32768;

Tensor fake_quantize(const Tensor& input, const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
                     int64_t bits, bool is_float, bool symmetric, int64_t group_size) {
  const ActivationKernel* const kernel = activation_kernels.get();
  std::optional<Activations> problem =
      activations_of({input, scale, zero_point, bits, is_float, symmetric, group_size});
  if (kernel == nullptr || !problem.has_value()) {
    return call_op<Tensor>("compressed_format::fake_quantize_reference", input, scale, zero_point, bits, is_float,
                           symmetric, group_size);
  }
  const Tensor values = input.is_contiguous() ? input : torch::stable::contiguous(input);
  problem->x = values.const_data_ptr();
  Tensor output = torch::stable::empty_like(values);
  void* const y = output.mutable_data_ptr();
  const auto tokens = static_cast<size_t>(problem->tokens);
  auto* const ranges = static_cast<Range*>(scratch(Scratch::for_all_threads, tokens * sizeof(Range)));
  Range whole{};
  find_whole_range(*kernel, *problem, ranges, whole);
  torch::stable::parallel_for(
      0, problem->tokens, values_per_thread / problem->columns + 1,
      [&](int64_t first, int64_t last) { kernel->fake_quantize(*problem, &whole, y, first, last); });
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) {
  library.impl("fake_quantize", TORCH_BOX(&fake_quantize));
}

}  // namespace
}  // namespace compressed_format
