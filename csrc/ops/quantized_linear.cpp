// compressed_format::quantized_linear on the CPU.

#include "ops/quantized_linear.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/scratch.h"
#include "ops/activations.h"

namespace compressed_format {

const QuantizedLinearKernel* select_quantized_linear(QuantizedLinear& problem) {
  if (!has_whole_rows(*problem.weight, *problem.activations)) {
    problem.span = span_of(*problem.weight, *problem.activations);
    if (problem.span == 0) return nullptr;
  }
  return quantized_linear_kernels.get();
}

namespace {

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

void run(const QuantizedLinearKernel& kernel, QuantizedLinear& problem) {
  const Activations& activations = *problem.activations;
  const size_t ranges_bytes = aligned(static_cast<size_t>(activations.tokens) * sizeof(Range));
  auto* const memory =
      static_cast<char*>(scratch(Scratch::for_all_threads, ranges_bytes + kernel.prepared_bytes(problem)));
  find_whole_range(*problem.quantize, activations, reinterpret_cast<Range*>(memory), problem.whole);
  void* const prepared = memory + ranges_bytes;
  const int64_t parts = kernel.parts(problem);
  if (parts == 1) {
    kernel.prepare(problem, prepared, 0, 1);
  } else {
    torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
      kernel.prepare(problem, prepared, first, last);
    });
  }
  torch::stable::parallel_for(
      0, kernel.tasks(problem), kernel.tasks_per_thread(problem),
      [&](int64_t first, int64_t last) { kernel.run(problem, prepared, first, last); });
}

Tensor quantized_linear(const Tensor& input, const std::optional<Tensor>& input_scale,
                        const std::optional<Tensor>& input_zero_point, int64_t input_bits, bool input_is_float,
                        bool input_symmetric, int64_t input_group_size, const Tensor& weight,
                        const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
                        const std::optional<Tensor>& g_idx, const std::optional<Tensor>& bitmask,
                        const std::optional<Tensor>& bias, int64_t bits, int64_t columns, int64_t block_rows,
                        int64_t block_columns) {
  // The ops that it consists of have kernels, or references, for what is not taken here.
  const auto two_steps = [&] {
    const auto rounded = call_op<Tensor>("compressed_format::fake_quantize", input, input_scale, input_zero_point,
                                         input_bits, input_is_float, input_symmetric, input_group_size);
    return call_op<Tensor>("compressed_format::linear", rounded, weight, scale, zero_point, g_idx, bitmask, bias, bits,
                           columns, block_rows, block_columns);
  };
  std::optional<Activations> activations = activations_of(
      {input, input_scale, input_zero_point, input_bits, input_is_float, input_symmetric, input_group_size});
  const std::optional<Weight> described =
      weight_of({weight, scale, zero_point, g_idx, bitmask, bits, columns, block_rows, block_columns});
  if (!activations.has_value() || !described.has_value()) return two_steps();
  QuantizedLinear problem;
  problem.weight = &*described;
  problem.activations = &*activations;
  problem.quantize = activation_kernels.get();
  const QuantizedLinearKernel* const kernel = select_quantized_linear(problem);
  if (kernel == nullptr) return two_steps();
  if (bias.has_value()) {
    const std::optional<Float> bias_type = float_of(bias->scalar_type());
    const bool fits = bias->is_cpu() && bias_type.has_value() && bias->dim() == 1 &&
                      bias->size(0) == described->rows && bias->is_contiguous();
    if (!fits) return two_steps();
    problem.bias = bias->const_data_ptr();
    problem.bias_type = *bias_type;
  }
  const Tensor values = input.is_contiguous() ? input : torch::stable::contiguous(input);
  activations->x = values.const_data_ptr();
  const auto sizes = input.sizes();
  std::vector<int64_t> output_sizes(sizes.begin(), sizes.end());
  output_sizes.back() = described->rows;
  Tensor output = torch::stable::new_empty(values, output_sizes, std::nullopt);
  if (described->rows == 0) return output;
  problem.y = output.mutable_data_ptr();
  run(*kernel, problem);
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) {
  library.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

}  // namespace
}  // namespace compressed_format
