// What the ops on stacked experts share: which tokens go to whom, and an expert's part of the stack.
#pragma once

#include <optional>
#include <vector>

#include "ops/tensors.h"

namespace compressed_format {

// The elements of `experts` [tokens, slots], numbered row by row, sorted by expert. An output has a row for each, its
// place; the token of a place is place / slots.
struct Routes {
  int64_t slots = 0;
  std::vector<int64_t> begins;  // of each expert's places, of those of nobody, and the end
  std::vector<int64_t> places;  // rising for each expert

  int64_t begin_of(int64_t expert) const { return begins[static_cast<size_t>(expert)]; }
  int64_t end_of(int64_t expert) const { return begins[static_cast<size_t>(expert) + 1]; }
};

// Whether `experts` is as the schema has it, a row for each token, and names no other experts than there are; one more
// stands for none.
bool find_routes(const Tensor& experts, int64_t tokens, int64_t count, Routes& routes);

// The weights of all experts: that of the first, and how far, in bytes, each tensor of an expert is from that of the
// one before.
struct ExpertWeights {
  Weight first;
  int64_t count = 0;
  int64_t codes_stride = 0;
  int64_t scale_stride = 0;
  int64_t zero_point_stride = 0;
  int64_t g_idx_stride = 0;
  int64_t bitmask_stride = 0;

  // Nothing where its g_idx names groups that there are not.
  std::optional<Weight> of(int64_t expert) const;
};

// Nothing where `weight_of` has nothing for a matrix of the stack.
std::optional<ExpertWeights> expert_weights_of(const WeightArguments& stacked);

}  // namespace compressed_format
