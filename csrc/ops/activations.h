// Activations and their scales for the kernels.
#pragma once

#include <optional>

#include "cpu/activations/activations.h"
#include "ops/tensors.h"

namespace compressed_format {

// The arguments of every op that rounds activations, in their order.
struct ActivationArguments {
  const Tensor& input;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& zero_point;
  int64_t bits;
  bool is_float;
  bool symmetric;
  int64_t group_size;
};

// What kernels are to round, without the values themselves: `x` is null yet, as `input` may have to be made contiguous
// first. Nothing where the arguments are not what the schema's checks let pass, or where kernels do not take them:
// other devices or dtypes, E4M3 codes with zero points, no values at all.
std::optional<Activations> activations_of(const ActivationArguments& arguments);

// The range of all values where a kernel wants it, found by all threads; `ranges` has room for one a token.
void find_whole_range(const ActivationKernel& kernel, const Activations& problem, Range* ranges, Range& whole);

}  // namespace compressed_format
