#include "ops/expert_weights.h"

#include <torch/csrc/stable/ops.h>

namespace compressed_format {
namespace {

// The tensor of the first expert; nothing where there are not `count` of them.
std::optional<Tensor> first_of(const std::optional<Tensor>& stacked, int64_t count, bool& fits) {
  if (!stacked.has_value()) return std::nullopt;
  if (stacked->dim() < 1 || stacked->size(0) != count) {
    fits = false;
    return std::nullopt;
  }
  return torch::stable::select(*stacked, 0, 0);
}

int64_t stride_of(const std::optional<Tensor>& stacked) {
  return stacked.has_value() ? stacked->stride(0) * static_cast<int64_t>(stacked->element_size()) : 0;
}

template <typename Value>
void advance(const Value*& pointer, int64_t bytes) {
  if (pointer == nullptr) return;
  const void* const moved = reinterpret_cast<const char*>(pointer) + bytes;
  pointer = static_cast<const Value*>(moved);
}

}  // namespace

bool find_routes(const Tensor& experts, int64_t tokens, int64_t count, Routes& routes) {
  const bool fits = experts.is_cpu() && experts.scalar_type() == ScalarType::Long && experts.dim() == 2 &&
                    experts.size(0) == tokens;
  if (!fits) return false;
  const auto* const values = static_cast<const int64_t*>(experts.const_data_ptr());
  const int64_t token_stride = experts.stride(0), slot_stride = experts.stride(1);
  const int64_t slots = experts.size(1);
  routes.slots = slots;
  // Counts are two elements further on; summed up, element e + 1 is where the places of expert e begin. It moves to
  // their end while they are dealt out, which is where those of expert e + 1 begin, and so belongs where it is.
  routes.begins.assign(static_cast<size_t>(count) + 3, 0);
  routes.places.resize(static_cast<size_t>(tokens * slots));
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t expert = values[token * token_stride + slot * slot_stride];
      if (expert < 0 || expert > count) return false;
      ++routes.begins[static_cast<size_t>(expert) + 2];
    }
  }
  for (size_t i = 2; i < routes.begins.size(); ++i) routes.begins[i] += routes.begins[i - 1];
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t expert = values[token * token_stride + slot * slot_stride];
      const int64_t rank = routes.begins[static_cast<size_t>(expert) + 1]++;
      routes.places[static_cast<size_t>(rank)] = token * slots + slot;
    }
  }
  routes.begins.pop_back();
  return true;
}

std::optional<Weight> ExpertWeights::of(int64_t expert) const {
  Weight weight = first;
  advance(weight.codes, expert * codes_stride);
  advance(weight.scale, expert * scale_stride);
  advance(weight.zero_point, expert * zero_point_stride);
  advance(weight.g_idx, expert * g_idx_stride);
  advance(weight.bitmask, expert * bitmask_stride);
  const bool reordered = weight.g_idx != nullptr && expert > 0;
  if (reordered && !groups_lie_within(weight.g_idx, weight.columns, weight.scale_columns)) return std::nullopt;
  return weight;
}

std::optional<ExpertWeights> expert_weights_of(const WeightArguments& stacked) {
  if (stacked.weight.dim() < 1 || stacked.weight.size(0) < 1) return std::nullopt;
  ExpertWeights weights;
  weights.count = stacked.weight.size(0);
  bool fits = true;
  const Tensor codes = torch::stable::select(stacked.weight, 0, 0);
  const std::optional<Tensor> scale = first_of(stacked.scale, weights.count, fits);
  const std::optional<Tensor> zero_point = first_of(stacked.zero_point, weights.count, fits);
  const std::optional<Tensor> g_idx = first_of(stacked.g_idx, weights.count, fits);
  const std::optional<Tensor> bitmask = first_of(stacked.bitmask, weights.count, fits);
  if (!fits) return std::nullopt;
  const std::optional<Weight> first = weight_of({codes, scale, zero_point, g_idx, bitmask, stacked.bits,
                                                 stacked.columns, stacked.block_rows, stacked.block_columns});
  // Where rows have a beginning each of their own, it was found for the first expert only.
  if (!first.has_value() || first->row_offsets != nullptr) return std::nullopt;
  weights.first = *first;
  weights.codes_stride = stride_of(stacked.weight);
  weights.scale_stride = stride_of(stacked.scale);
  weights.zero_point_stride = stride_of(stacked.zero_point);
  weights.g_idx_stride = stride_of(stacked.g_idx);
  weights.bitmask_stride = stride_of(stacked.bitmask);
  return weights;
}

}  // namespace compressed_format
