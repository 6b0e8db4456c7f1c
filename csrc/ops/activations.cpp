#include "ops/activations.h"

namespace compressed_format {
namespace {

// Below this many values, waking another thread takes longer than what it would save.
constexpr int64_t values_per_thread = 32768;

// Whether `tensor` is [groups], or one such row for each token.
bool is_for_tokens(const Tensor& tensor, const Tensor& input, int64_t groups) {
  const int64_t dim = input.dim();
  if (tensor.dim() != dim || tensor.size(dim - 1) != groups) return false;
  for (int64_t i = 0; i + 1 < dim; ++i) {
    if (tensor.size(i) != input.size(i)) return false;
  }
  return true;
}

}  // namespace

std::optional<Activations> activations_of(const ActivationArguments& arguments) {
  const Tensor& input = arguments.input;
  const std::optional<Float> type = float_of(input.scalar_type());
  const int64_t dim = input.dim();
  const int64_t bits = arguments.bits;
  if (!input.is_cpu() || !type.has_value() || dim < 1 || input.numel() == 0) return std::nullopt;
  if (bits < 1 || bits > 8 || (arguments.is_float && bits != 8) || arguments.group_size < -1) return std::nullopt;
  Activations problem;
  problem.x_type = *type;
  problem.columns = input.size(dim - 1);
  problem.tokens = input.numel() / problem.columns;
  problem.group_size = arguments.group_size > 0 ? arguments.group_size : problem.columns;
  problem.bits = static_cast<int>(bits);
  problem.is_float = arguments.is_float;
  problem.symmetric = arguments.symmetric;
  if (problem.columns % problem.group_size != 0) return std::nullopt;
  if (!arguments.scale.has_value()) {
    if (problem.is_float && !problem.symmetric) return std::nullopt;
    problem.whole_tensor = arguments.group_size == 0;
    return problem;
  }
  const Tensor& scale = *arguments.scale;
  const std::optional<Float> scale_type = float_of(scale.scalar_type());
  const int64_t groups = problem.columns / problem.group_size;
  const bool by_token = is_for_tokens(scale, input, groups);
  const bool shared = arguments.group_size != -1 && scale.dim() == 1 && scale.size(0) == groups;
  if (!scale.is_cpu() || !scale.is_contiguous() || !scale_type.has_value() || !(by_token || shared)) {
    return std::nullopt;
  }
  problem.scale = scale.const_data_ptr();
  problem.scale_type = *scale_type;
  problem.scales_per_token = shared ? 0 : groups;
  if (arguments.zero_point.has_value()) {
    const Tensor& zero_point = *arguments.zero_point;
    const bool fits = zero_point.is_cpu() && zero_point.scalar_type() == ScalarType::Char &&
                      zero_point.is_contiguous() && !problem.is_float && zero_point.dim() == scale.dim() &&
                      zero_point.numel() == scale.numel() &&
                      (shared || is_for_tokens(zero_point, input, groups));
    if (!fits) return std::nullopt;
    problem.zero_point = static_cast<const int8_t*>(zero_point.const_data_ptr());
  } else if (!problem.symmetric) {
    return std::nullopt;
  }
  return problem;
}

void find_whole_range(const ActivationKernel& kernel, const Activations& problem, Range* ranges, Range& whole) {
  if (problem.scale != nullptr || !problem.whole_tensor) return;
  torch::stable::parallel_for(0, problem.tokens, values_per_thread / problem.columns + 1,
                              [&](int64_t first, int64_t last) { kernel.ranges(problem, ranges, first, last); });
  whole = merge(ranges, problem.tokens);
}

}  // namespace compressed_format
