// compressed_format::linear on the CPU.

#include "ops/linear.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/scratch.h"
#include "ops/tensors.h"

namespace compressed_format {

const LinearKernel* select_linear(const Linear& problem) {
  for (const ByIsa<const LinearKernel>* kernel :
       {&split_tokens, &split_panels, &few_tokens, &plain_values, &indexed_groups, &many_tokens}) {
    const LinearKernel* const found = kernel->get();
    if (found != nullptr && found->takes(problem)) return found;
  }
  return nullptr;
}

namespace {

void run(const LinearKernel& kernel, const Linear& problem) {
  void* const prepared = scratch(Scratch::for_all_threads, kernel.prepared_bytes(problem));
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

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& scale,
              const std::optional<Tensor>& zero_point, const std::optional<Tensor>& g_idx,
              const std::optional<Tensor>& bitmask, const std::optional<Tensor>& bias, int64_t bits, int64_t columns,
              int64_t block_rows, int64_t block_columns) {
  const auto reference = [&] {
    return call_op<Tensor>("compressed_format::linear_reference", input, weight, scale, zero_point, g_idx, bitmask,
                           bias, bits, columns, block_rows, block_columns);
  };
  const std::optional<Weight> described =
      weight_of({weight, scale, zero_point, g_idx, bitmask, bits, columns, block_rows, block_columns});
  const std::optional<Float> type = float_of(input.scalar_type());
  const int64_t dim = input.dim();
  if (!described.has_value() || !type.has_value() || !input.is_cpu() || dim < 1 || input.size(dim - 1) != columns) {
    return reference();
  }
  Linear problem;
  problem.weight = &*described;
  problem.x_type = *type;
  if (bias.has_value()) {
    const std::optional<Float> bias_type = float_of(bias->scalar_type());
    const bool fits = bias->is_cpu() && bias_type.has_value() && bias->dim() == 1 &&
                      bias->size(0) == described->rows && bias->is_contiguous();
    if (!fits) return reference();
    problem.bias = bias->const_data_ptr();
    problem.bias_type = *bias_type;
  }
  const Tensor rows = input.is_contiguous() ? input : torch::stable::contiguous(input);
  problem.x = rows.const_data_ptr();
  problem.x_row_bytes = columns * float_bytes(*type);
  const auto sizes = input.sizes();
  std::vector<int64_t> output_sizes(sizes.begin(), sizes.end());
  output_sizes.back() = described->rows;
  problem.tokens = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) problem.tokens *= sizes[i];

  const LinearKernel* const kernel = select_linear(problem);
  if (kernel == nullptr) return reference();
  Tensor output = torch::stable::new_empty(rows, output_sizes, std::nullopt);
  if (problem.tokens == 0 || described->rows == 0) return output;
  problem.y = output.mutable_data_ptr();
  run(*kernel, problem);
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) { library.impl("linear", TORCH_BOX(&linear)); }

}  // namespace
}  // namespace compressed_format
