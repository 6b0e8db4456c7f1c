// compressed_format::expert_quantized_linear on the CPU.

#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "ops/activations.h"
#include "ops/expert_jobs.h"
#include "ops/quantized_linear.h"

namespace compressed_format {
namespace {

// A problem with activations of its own: the tokens of one expert, and its scales where they are static.
struct ExpertProblem : QuantizedLinear {
  Activations own;
};

}  // namespace

template <>
struct RowsOf<ExpertProblem> {
  static constexpr bool may_be_apart = false;
  static void set(ExpertProblem& problem, const char* x, int64_t) { problem.own.x = x; }
};

namespace {

using QuantizedJob = ExpertJob<ExpertProblem, QuantizedLinearKernel>;

// The arguments of the op that say how activations are rounded, stacked where they are static.
struct Rounding {
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& zero_point;
  int64_t bits;
  bool is_float;
  bool symmetric;
  int64_t group_size;
};

std::optional<Tensor> part_of(const std::optional<Tensor>& stacked, int64_t expert) {
  return stacked.has_value() ? std::optional<Tensor>(torch::stable::select(*stacked, 0, expert)) : std::nullopt;
}

// Whether a tensor of activations has a row for each expert.
bool is_stacked(const std::optional<Tensor>& tensor, int64_t count) {
  return !tensor.has_value() || (tensor->dim() == 2 && tensor->size(0) == count);
}

// How the activations of the first expert are rounded; nothing where kernels do not do that from expert to expert.
std::optional<Activations> first_activations(const Tensor& input, const Rounding& rounding) {
  std::optional<Activations> found =
      activations_of({input, part_of(rounding.scale, 0), part_of(rounding.zero_point, 0), rounding.bits,
                      rounding.is_float, rounding.symmetric, rounding.group_size});
  // The range of all tokens of an expert is looked for where experts come one by one.
  if (found.has_value() && found->whole_tensor) return std::nullopt;
  return found;
}

// By the kernels for many experts; whether they take all of them.
bool run_together(const Tensor& input, const Rounding& rounding, const ExpertWeights& weights, const Routes& routes,
                  const ExpertRows& rows) {
  thread_local std::vector<QuantizedJob> jobs;  // kept from call to call, so that its memory is
  const std::optional<Activations> first = first_activations(input, rounding);
  if (!first.has_value()) return false;
  int64_t scale_stride = 0, zero_point_stride = 0;
  if (first->scale != nullptr) scale_stride = rounding.scale->stride(0) * float_bytes(first->scale_type);
  if (first->zero_point != nullptr) zero_point_stride = rounding.zero_point->stride(0);
  const bool planned = plan_jobs(weights, routes, rows, jobs, [&](QuantizedJob& job, int64_t expert) {
    Activations& own = job.problem.own;
    own = *first;
    own.tokens = job.tokens;
    if (own.scale != nullptr) own.scale = static_cast<const char*>(own.scale) + expert * scale_stride;
    if (own.zero_point != nullptr) own.zero_point += expert * zero_point_stride;
    job.problem.weight = &job.weight;
    job.problem.activations = &own;
    job.problem.quantize = activation_kernels.get();
    job.kernel = select_quantized_linear(job.problem);
    return job.kernel != nullptr;
  });
  if (planned) run_jobs(jobs, rows, routes.slots);
  return planned;
}

// By the op for one expert after the other, which has kernels or references for whatever there is.
void run_one_by_one(const Tensor& input, const Rounding& rounding, const WeightArguments& stacked, int64_t count,
                    const Routes& routes, const ExpertRows& rows) {
  for (int64_t expert = 0; expert < count; ++expert) {
    const int64_t begin = routes.begin_of(expert), tokens = routes.end_of(expert) - begin;
    if (tokens == 0) continue;
    const int64_t* const places = &routes.places[static_cast<size_t>(begin)];
    Tensor own = torch::stable::new_empty(input, {tokens, stacked.columns}, std::nullopt);
    auto* const gathered = static_cast<char*>(own.mutable_data_ptr());
    for (int64_t i = 0; i < tokens; ++i) {
      std::memcpy(gathered + i * rows.x_bytes, rows.x + places[i] / routes.slots * rows.x_stride_bytes,
                  static_cast<size_t>(rows.x_bytes));
    }
    const Tensor codes = torch::stable::select(stacked.weight, 0, expert);
    const auto found = call_op<Tensor>(
        "compressed_format::quantized_linear", own, part_of(rounding.scale, expert),
        part_of(rounding.zero_point, expert), rounding.bits, rounding.is_float, rounding.symmetric,
        rounding.group_size, codes, part_of(stacked.scale, expert), part_of(stacked.zero_point, expert),
        part_of(stacked.g_idx, expert), part_of(stacked.bitmask, expert), std::optional<Tensor>(), stacked.bits,
        stacked.columns, stacked.block_rows, stacked.block_columns);
    const Tensor computed = torch::stable::contiguous(found);
    const auto* const source = static_cast<const char*>(computed.const_data_ptr());
    for (int64_t i = 0; i < tokens; ++i) {
      std::memcpy(rows.y + places[i] * rows.y_bytes, source + i * rows.y_bytes, static_cast<size_t>(rows.y_bytes));
    }
  }
}

// Whether there is something stacked for each of `count` experts, or nothing.
bool has_first_dimension(const std::optional<Tensor>& tensor, int64_t count) {
  return !tensor.has_value() || (tensor->dim() > 0 && tensor->size(0) == count);
}

Tensor expert_quantized_linear(const Tensor& input, const std::optional<Tensor>& input_scale,
                               const std::optional<Tensor>& input_zero_point, int64_t input_bits, bool input_is_float,
                               bool input_symmetric, int64_t input_group_size, const Tensor& experts,
                               const Tensor& weight, const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& zero_point, const std::optional<Tensor>& g_idx,
                               const std::optional<Tensor>& bitmask, int64_t bits, int64_t columns, int64_t block_rows,
                               int64_t block_columns) {
  thread_local Routes routes;  // kept from call to call, so that its memory is
  const auto reference = [&] {
    return call_op<Tensor>("compressed_format::expert_quantized_linear_reference", input, input_scale,
                           input_zero_point, input_bits, input_is_float, input_symmetric, input_group_size, experts,
                           weight, scale, zero_point, g_idx, bitmask, bits, columns, block_rows, block_columns);
  };
  const Rounding rounding{input_scale, input_zero_point, input_bits, input_is_float, input_symmetric, input_group_size};
  const WeightArguments stacked{weight, scale, zero_point, g_idx, bitmask, bits, columns, block_rows, block_columns};
  const Tensor& of_rows = bitmask.has_value() ? *bitmask : weight;
  const ScalarType type = input.scalar_type();
  const bool is_float = float_of(type).has_value() || type == ScalarType::Double;
  if (!input.is_cpu() || !is_float || input.dim() != 2 || input.size(1) != columns || weight.dim() < 1 ||
      of_rows.dim() != 3) {
    return reference();
  }
  const int64_t tokens = input.size(0), count = weight.size(0), out_rows = of_rows.size(1);
  const bool fits = count > 0 && is_stacked(input_scale, count) && is_stacked(input_zero_point, count) &&
                    has_first_dimension(scale, count) && has_first_dimension(zero_point, count) &&
                    has_first_dimension(g_idx, count) && has_first_dimension(bitmask, count);
  if (!fits || !find_routes(experts, tokens, count, routes)) return reference();
  const Tensor values = input.stride(1) == 1 || columns <= 1 ? input : torch::stable::contiguous(input);
  Tensor output = torch::stable::new_empty(values, {tokens, routes.slots, out_rows}, std::nullopt);
  // With nobody to compute for, nobody else would find out what is wrong with the arguments.
  if (output.numel() == 0) return reference();

  const auto value_bytes = static_cast<int64_t>(values.element_size());
  ExpertRows rows;
  rows.x = static_cast<const char*>(values.const_data_ptr());
  rows.x_bytes = columns * value_bytes;
  rows.x_stride_bytes = values.stride(0) * value_bytes;
  rows.y = static_cast<char*>(output.mutable_data_ptr());
  rows.y_bytes = out_rows * value_bytes;
  const std::optional<ExpertWeights> weights = expert_weights_of(stacked);
  if (!weights.has_value() || !run_together(values, rounding, *weights, routes, rows)) {
    // As above: all tokens are routed to nobody.
    if (routes.begin_of(count) == 0) return reference();
    run_one_by_one(values, rounding, stacked, count, routes, rows);
  }
  zero_rows_of_nobody(routes, count, rows);
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) {
  library.impl("expert_quantized_linear", TORCH_BOX(&expert_quantized_linear));
}

}  // namespace
}  // namespace compressed_format
