// Taking tensors apart for the kernels, through the stable C++ interface alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>

#include "cpu/weight.h"

namespace compressed_format {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls `compressed_format::<name>`: the way to a reference where no kernel takes the problem.
template <typename Result, typename... Arguments>
Result call_op(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(Arguments)> stack{torch::stable::detail::from(arguments)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Result>(stack[0]);
}

// The floats that kernels know; nothing for any other dtype.
std::optional<Float> float_of(ScalarType type);

// The arguments of every op on a compressed weight, in their order, as the schemas in compressed_format/ops have them.
struct WeightArguments {
  const Tensor& weight;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& zero_point;
  const std::optional<Tensor>& g_idx;
  const std::optional<Tensor>& bitmask;
  int64_t bits;
  int64_t columns;
  int64_t block_rows;
  int64_t block_columns;
};

// The weight as kernels want it; nothing where the arguments are not what the schemas' checks let pass, or where no
// kernel could do anything with them: other devices, dtypes, strides, stacks of matrices. It points into the tensors,
// and is valid as long as they are. Values are not looked at, but for those of g_idx, which memory is read by.
std::optional<Weight> weight_of(const WeightArguments& arguments);

// Whether each of so many columns is in one of the groups that there are.
bool groups_lie_within(const int32_t* g_idx, int64_t columns, int64_t groups);

}  // namespace compressed_format
