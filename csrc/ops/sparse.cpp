// compressed_format::prune_2_of_4, compress_2_of_4, compress_bitmask, and the way back, on the CPU.

#include "cpu/sparse/sparse.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/dequantize/dequantize.h"
#include "cpu/large_memory.h"
#include "ops/bitmask.h"
#include "ops/tensors.h"

namespace compressed_format {
namespace {

using Three = std::tuple<Tensor, Tensor, Tensor>;

// Below this much work, waking the other threads takes longer than what they would save.
constexpr int64_t values_per_thread = 65536;

Three reference(const char* name, const Tensor& weight) {
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{torch::stable::detail::from(weight)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2])};
}

std::optional<Codes> type_of(ScalarType type) {
  switch (type) {
    case ScalarType::Char: return Codes::int8;
    case ScalarType::Float8_e4m3fn: return Codes::float8;
    case ScalarType::BFloat16: return Codes::bfloat16;
    case ScalarType::Half: return Codes::float16;
    case ScalarType::Float: return Codes::float32;
    default: return std::nullopt;
  }
}

// Nothing where no kernel takes it. `values` is what the description points into.
std::optional<Sparse> describe(const Tensor& weight, Tensor& values) {
  const std::optional<Codes> type = type_of(weight.scalar_type());
  if (!weight.is_cpu() || !type.has_value() || weight.dim() != 2 || weight.numel() == 0) return std::nullopt;
  Sparse problem;
  problem.type = *type;
  problem.rows = weight.size(0);
  problem.columns = weight.size(1);
  // Rows may lie apart, as those of a part of a matrix do.
  const bool rows_apart = problem.columns == 1 || weight.stride(1) == 1;
  values = rows_apart ? weight : torch::stable::contiguous(weight);
  problem.values = values.const_data_ptr();
  problem.row_bytes = (rows_apart ? weight.stride(0) : problem.columns) * element_bytes(*type);
  return problem;
}

template <typename Body>
void by_rows(const Sparse& problem, const Body& body) {
  const int64_t rows_per_thread = std::max<int64_t>(values_per_thread / problem.columns, 1);
  torch::stable::parallel_for(0, problem.rows, rows_per_thread, body);
}

Tensor new_values(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type, int64_t bytes) {
  Tensor made = torch::stable::new_empty(like, sizes, type);
  expect_writes(made.mutable_data_ptr(), static_cast<size_t>(made.numel() * bytes));
  return made;
}

// The first place of all, whichever thread finds one first.
class FirstPlace {
 public:
  void found(int64_t place) {
    int64_t known = first_.load();
    while (place < known && !first_.compare_exchange_weak(known, place)) {
    }
  }

  // A scalar: the place, or -1 where none was found.
  Tensor tensor(const Tensor& like) const {
    Tensor place = torch::stable::new_empty(like, {}, ScalarType::Long);
    *static_cast<int64_t*>(place.mutable_data_ptr()) = first_ == none ? -1 : first_.load();
    return place;
  }

 private:
  static constexpr int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_{none};
};

Tensor prune_2_of_4(const Tensor& weight) {
  Tensor values = weight;
  const std::optional<Sparse> problem = describe(weight, values);
  const bool taken = problem.has_value() && problem->columns % 4 == 0 && float_of(weight.scalar_type()).has_value();
  if (!taken) return call_op<Tensor>("compressed_format::prune_2_of_4_reference", weight);
  const int64_t bytes = element_bytes(problem->type);
  Tensor pruned = new_values(values, {problem->rows, problem->columns}, weight.scalar_type(), bytes);
  void* const target = pruned.mutable_data_ptr();
  const SparseKernel& kernel = *sparse_kernel.get();
  by_rows(*problem, [&](int64_t first, int64_t last) { kernel.prune_2_of_4(*problem, target, first, last); });
  return pruned;
}

Three compress_2_of_4(const Tensor& weight) {
  Tensor values = weight;
  const std::optional<Sparse> problem = describe(weight, values);
  if (!problem.has_value() || problem->columns % 4 != 0) {
    return reference("compressed_format::compress_2_of_4_reference", weight);
  }
  const int64_t rows = problem->rows, bytes = element_bytes(problem->type);
  Tensor compressed = new_values(values, {rows, problem->columns / 2}, weight.scalar_type(), bytes);
  Tensor bitmask = new_values(values, {rows, mask_bytes(problem->columns)}, ScalarType::Byte, 1);
  void* const target = compressed.mutable_data_ptr();
  auto* const bits = static_cast<uint8_t*>(bitmask.mutable_data_ptr());
  const SparseKernel& kernel = *sparse_kernel.get();
  FirstPlace crowded;
  by_rows(*problem, [&](int64_t first, int64_t last) {
    const int64_t place = kernel.compress_2_of_4(*problem, target, bits, first, last);
    if (place >= 0) crowded.found(place);
  });
  return {compressed, bitmask, crowded.tensor(values)};
}

Three compress_bitmask(const Tensor& weight) {
  Tensor values = weight;
  const std::optional<Sparse> problem = describe(weight, values);
  if (!problem.has_value()) return reference("compressed_format::compress_bitmask_reference", weight);
  const int64_t rows = problem->rows;
  Tensor bitmask = new_values(values, {rows, mask_bytes(problem->columns)}, ScalarType::Byte, 1);
  Tensor row_offsets = torch::stable::new_empty(values, {rows}, ScalarType::Long);
  auto* const bits = static_cast<uint8_t*>(bitmask.mutable_data_ptr());
  auto* const starts = static_cast<int64_t*>(row_offsets.mutable_data_ptr());
  const SparseKernel& kernel = *sparse_kernel.get();
  by_rows(*problem, [&](int64_t first, int64_t last) { kernel.find_values(*problem, bits, starts, first, last); });
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t in_row = starts[row];
    starts[row] = count;
    count += in_row;
  }
  Tensor compressed = new_values(values, {count}, weight.scalar_type(), element_bytes(problem->type));
  void* const target = compressed.mutable_data_ptr();
  by_rows(*problem, [&](int64_t first, int64_t last) {
    kernel.keep_values(*problem, bits, starts, target, first, last);
  });
  return {compressed, bitmask, row_offsets};
}

// A bitmask as the ops on one take it.
struct Bits {
  const uint8_t* data;
  int64_t rows, columns, row_bytes;
};

std::optional<Bits> bits_of(const Tensor& bitmask, int64_t columns) {
  const bool fits = bitmask.is_cpu() && bitmask.scalar_type() == ScalarType::Byte && bitmask.dim() == 2 &&
                    bitmask.is_contiguous() && columns >= 0 && bitmask.size(1) == mask_bytes(columns);
  if (!fits) return std::nullopt;
  return Bits{static_cast<const uint8_t*>(bitmask.const_data_ptr()), bitmask.size(0), columns, bitmask.size(1)};
}

template <typename Body>
void by_rows(const Bits& bits, const Body& body) {
  const int64_t rows_per_thread = std::max<int64_t>(16 * values_per_thread / std::max<int64_t>(bits.columns, 1), 1);
  torch::stable::parallel_for(0, bits.rows, rows_per_thread, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) body(row, bits.data + row * bits.row_bytes);
  });
}

Tensor count_bits_of_rows(const Tensor& bitmask, int64_t columns) {
  const std::optional<Bits> bits = bits_of(bitmask, columns);
  if (!bits.has_value()) return call_op<Tensor>("compressed_format::count_bits_reference", bitmask, columns);
  Tensor counts = torch::stable::new_empty(bitmask, {bits->rows}, ScalarType::Long);
  auto* const target = static_cast<int64_t*>(counts.mutable_data_ptr());
  by_rows(*bits, [&](int64_t row, const uint8_t* mask) { target[row] = count_bits(mask, columns); });
  return counts;
}

Tensor first_uneven_quad(const Tensor& bitmask, int64_t columns) {
  const std::optional<Bits> bits = bits_of(bitmask, columns);
  if (!bits.has_value() || columns % 4 != 0) {
    return call_op<Tensor>("compressed_format::find_uneven_quad_reference", bitmask, columns);
  }
  FirstPlace uneven;
  by_rows(*bits, [&](int64_t row, const uint8_t* mask) {
    const int64_t quad = find_uneven_quad(mask, columns);
    if (quad >= 0) uneven.found(row * (columns / 4) + quad);
  });
  return uneven.tensor(bitmask);
}

Tensor expand_bitmask(const Tensor& values, const Tensor& bitmask, int64_t columns) {
  const auto reference = [&] {
    return call_op<Tensor>("compressed_format::expand_bitmask_reference", values, bitmask, columns);
  };
  const std::optional<Bits> bits = bits_of(bitmask, columns);
  const std::optional<Codes> type = type_of(values.scalar_type());
  if (!bits.has_value() || !type.has_value() || !values.is_cpu() || !values.is_contiguous()) return reference();
  std::vector<int64_t> row_offsets(static_cast<size_t>(bits->rows) + 1);
  by_rows(*bits, [&](int64_t row, const uint8_t* mask) {
    row_offsets[static_cast<size_t>(row) + 1] = count_bits(mask, columns);
  });
  for (size_t row = 0; row + 1 < row_offsets.size(); ++row) row_offsets[row + 1] += row_offsets[row];
  if (row_offsets.back() != values.numel()) return reference();
  Weight weight;
  weight.codes = values.const_data_ptr();
  weight.type = *type;
  weight.rows = bits->rows;
  weight.columns = columns;
  weight.bitmask = bits->data;
  weight.row_offsets = row_offsets.data();
  const int64_t bytes = element_bytes(*type);
  Tensor expanded = new_values(values, {bits->rows, columns}, values.scalar_type(), bytes);
  void* const target = expanded.mutable_data_ptr();
  const int64_t rows_per_thread = std::max<int64_t>(values_per_thread / std::max<int64_t>(columns, 1), 1);
  torch::stable::parallel_for(0, bits->rows, rows_per_thread, [&](int64_t first, int64_t last) {
    expand_rows(weight, static_cast<int>(bytes), first, last, target);
  });
  return expanded;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) {
  library.impl("count_bits", TORCH_BOX(&count_bits_of_rows));
  library.impl("expand_bitmask", TORCH_BOX(&expand_bitmask));
  library.impl("find_uneven_quad", TORCH_BOX(&first_uneven_quad));
  library.impl("prune_2_of_4", TORCH_BOX(&prune_2_of_4));
  library.impl("compress_2_of_4", TORCH_BOX(&compress_2_of_4));
  library.impl("compress_bitmask", TORCH_BOX(&compress_bitmask));
}

}  // namespace
}  // namespace compressed_format
