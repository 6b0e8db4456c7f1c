// compressed_format::expert_linear on the CPU.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/expert_jobs.h"
#include "ops/linear.h"

namespace compressed_format {

template <>
struct RowsOf<Linear> {
  static constexpr bool may_be_apart = true;
  static void set(Linear& problem, const char* x, int64_t stride_bytes) {
    problem.x = x;
    problem.x_row_bytes = stride_bytes;
  }
};

namespace {

using LinearJob = ExpertJob<Linear, LinearKernel>;

Tensor expert_linear(const Tensor& input, const Tensor& experts, const Tensor& weight,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
                     const std::optional<Tensor>& g_idx, const std::optional<Tensor>& bitmask, int64_t bits,
                     int64_t columns, int64_t block_rows, int64_t block_columns) {
  const auto reference = [&] {
    return call_op<Tensor>("compressed_format::expert_linear_reference", input, experts, weight, scale, zero_point,
                           g_idx, bitmask, bits, columns, block_rows, block_columns);
  };
  // Kept from call to call, so that their memory is.
  thread_local Routes routes;
  thread_local std::vector<LinearJob> jobs;
  const std::optional<Float> type = float_of(input.scalar_type());
  if (!input.is_cpu() || !type.has_value() || input.dim() != 2 || input.size(1) != columns) return reference();
  const std::optional<ExpertWeights> weights =
      expert_weights_of({weight, scale, zero_point, g_idx, bitmask, bits, columns, block_rows, block_columns});
  const int64_t tokens = input.size(0);
  if (!weights.has_value() || !find_routes(experts, tokens, weights->count, routes)) return reference();
  const bool has_rows = input.stride(1) == 1 || columns <= 1;
  const Tensor values = has_rows ? input : torch::stable::contiguous(input);
  Tensor output = torch::stable::new_empty(values, {tokens, routes.slots, weights->first.rows}, std::nullopt);
  if (output.numel() == 0) return output;

  ExpertRows rows;
  rows.x = static_cast<const char*>(values.const_data_ptr());
  rows.x_bytes = columns * float_bytes(*type);
  rows.x_stride_bytes = values.stride(0) * float_bytes(*type);
  rows.y = static_cast<char*>(output.mutable_data_ptr());
  rows.y_bytes = weights->first.rows * float_bytes(*type);
  const bool planned = plan_jobs(*weights, routes, rows, jobs, [&](LinearJob& job, int64_t) {
    job.problem.weight = &job.weight;
    job.problem.x_type = *type;
    job.problem.tokens = job.tokens;
    job.problem.x_row_bytes = rows.x_bytes;
    job.kernel = select_linear(job.problem);
    return job.kernel != nullptr;
  });
  if (!planned) return reference();
  run_jobs(jobs, rows, routes.slots);
  zero_rows_of_nobody(routes, weights->count, rows);
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) { library.impl("expert_linear", TORCH_BOX(&expert_linear)); }

}  // namespace
}  // namespace compressed_format
