// compressed_format::quantize on the CPU.

#include "cpu/quantize/quantize.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/large_memory.h"
#include "cpu/scratch.h"
#include "ops/tensors.h"

namespace compressed_format {
namespace {

using Quantized = std::tuple<Tensor, Tensor, Tensor>;

// Below this much work, waking the other threads takes longer than what they would save.
constexpr int64_t values_per_thread = 32768;

Quantized reference(const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
                    int64_t bits, bool is_float, bool symmetric, int64_t block_rows, int64_t block_columns, bool pack) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 9> stack{from(weight),    from(scale),      from(zero_point),    from(bits), from(is_float),
                                    from(symmetric), from(block_rows), from(block_columns), from(pack)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("compressed_format::quantize_reference", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

bool fits(const std::optional<Tensor>& given, ScalarType type, const std::vector<int64_t>& sizes) {
  if (!given.has_value()) return true;
  const auto found = given->sizes();
  return given->is_cpu() && given->scalar_type() == type &&
         std::equal(found.begin(), found.end(), sizes.begin(), sizes.end());
}

void run(const QuantizeKernel& kernel, const Quantize& problem) {
  const int64_t rows_per_thread = std::max<int64_t>(values_per_thread / problem.columns, 1);
  if (problem.block_rows == 1) {
    torch::stable::parallel_for(0, problem.rows, rows_per_thread,
                                [&](int64_t first, int64_t last) { kernel.rows(problem, first, last); });
    return;
  }
  const auto count = static_cast<size_t>(problem.rows * problem.scale_columns);
  auto* const extremes = static_cast<Extremes*>(scratch(Scratch::for_all_threads, count * sizeof(Extremes)));
  torch::stable::parallel_for(0, problem.rows, rows_per_thread, [&](int64_t first, int64_t last) {
    kernel.extremes(problem, extremes, first, last);
  });
  kernel.scales(problem, extremes, 0, (problem.rows + problem.block_rows - 1) / problem.block_rows);
  torch::stable::parallel_for(0, problem.rows, rows_per_thread,
                              [&](int64_t first, int64_t last) { kernel.codes(problem, first, last); });
}

Quantized quantize(const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
                   int64_t bits, bool is_float, bool symmetric, int64_t block_rows, int64_t block_columns, bool pack) {
  const auto call_reference = [&] {
    return reference(weight, scale, zero_point, bits, is_float, symmetric, block_rows, block_columns, pack);
  };
  const std::optional<Float> type = float_of(weight.scalar_type());
  const int64_t dim = weight.dim();
  const bool sizes_fit = weight.is_cpu() && type.has_value() && dim >= 2 && weight.numel() > 0 && bits >= 1 &&
                         bits <= 8 && block_rows >= 1 && block_columns >= 1;
  // Zero points of float codes are floats, which no scheme in use has.
  if (!sizes_fit || (is_float && (!symmetric || pack || bits != 8))) return call_reference();
  const auto sizes = weight.sizes();
  const int64_t columns = sizes[dim - 1], matrix_rows = sizes[dim - 2];
  const int64_t rows = weight.numel() / columns;
  // Blocks must not reach over the end of a matrix of a stack.
  if (matrix_rows != rows && matrix_rows % block_rows != 0) return call_reference();

  Quantize problem;
  problem.type = *type;
  problem.rows = rows;
  problem.columns = columns;
  problem.bits = static_cast<int>(bits);
  problem.is_float = is_float;
  problem.symmetric = symmetric;
  problem.has_scales = scale.has_value();
  problem.block_rows = std::min(block_rows, rows);
  problem.block_columns = std::min(block_columns, columns);
  problem.scale_columns = (columns + problem.block_columns - 1) / problem.block_columns;

  std::vector<int64_t> scale_sizes(sizes.begin(), sizes.end());
  scale_sizes[dim - 2] = (matrix_rows + block_rows - 1) / block_rows;
  scale_sizes[dim - 1] = problem.scale_columns;
  const bool given_fit = fits(scale, weight.scalar_type(), scale_sizes) &&
                         fits(zero_point, ScalarType::Char, scale_sizes) &&
                         zero_point.has_value() == (scale.has_value() && !symmetric);
  if (!given_fit) return call_reference();

  // Rows of a matrix may lie apart, as those of a part of it do.
  const bool rows_apart = dim == 2 && (columns == 1 || weight.stride(1) == 1);
  const Tensor values = rows_apart ? weight : torch::stable::contiguous(weight);
  problem.weight = values.const_data_ptr();
  problem.row_bytes = (rows_apart ? weight.stride(0) : columns) * float_bytes(*type);

  Tensor scales = torch::stable::new_empty(values, scale_sizes, weight.scalar_type());
  const auto scale_bytes = static_cast<size_t>(scales.numel() * float_bytes(*type));
  problem.scale = scales.mutable_data_ptr();
  Tensor zero_points = torch::stable::new_empty(
      values, symmetric ? std::vector<int64_t>{0} : scale_sizes, ScalarType::Char);
  if (!symmetric) problem.zero_point = static_cast<int8_t*>(zero_points.mutable_data_ptr());
  if (scale.has_value()) {
    const Tensor given = torch::stable::contiguous(*scale);
    std::memcpy(problem.scale, given.const_data_ptr(), scale_bytes);
  }
  if (zero_point.has_value()) {
    const Tensor given = torch::stable::contiguous(*zero_point);
    std::memcpy(problem.zero_point, given.const_data_ptr(), static_cast<size_t>(given.numel()));
  }

  std::vector<int64_t> code_sizes(sizes.begin(), sizes.end());
  if (pack) {
    code_sizes.back() = packed_words(columns, problem.bits);
    problem.pack = pack_row.get();
  }
  problem.code_row_bytes = pack ? code_sizes.back() * 4 : columns;
  const ScalarType code_type = pack ? ScalarType::Int : is_float ? ScalarType::Float8_e4m3fn : ScalarType::Char;
  Tensor codes = torch::stable::new_empty(values, code_sizes, code_type);
  problem.codes = codes.mutable_data_ptr();
  expect_writes(problem.codes, static_cast<size_t>(rows * problem.code_row_bytes));
  run(*quantize_kernel.get(), problem);
  return {codes, scales, zero_points};
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) { library.impl("quantize", TORCH_BOX(&quantize)); }

}  // namespace
}  // namespace compressed_format
