// compressed_format::dequantize, embedding and unpack_codes on the CPU.

#include "cpu/dequantize/dequantize.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu/large_memory.h"
#include "cpu/scratch.h"
#include "ops/bitmask.h"
#include "ops/tensors.h"

namespace compressed_format {
namespace {

// Below this much work, waking the other threads takes longer than what they would save.
constexpr int64_t values_per_thread = 65536;

int64_t rows_per_thread(int64_t columns) {
  return std::max<int64_t>(values_per_thread / std::max<int64_t>(columns, 1), 1);
}

// Whether every row of a 2:4 weight keeps half of its places, so that its values are where kernels look for them. The
// reference puts values of other masks in one after the other, through all rows, or refuses them.
bool keeps_half(const Weight& weight) {
  const int64_t mask_bytes = (weight.columns + 7) / 8;
  for (int64_t row = 0; row < weight.rows; ++row) {
    if (count_bits(weight.bitmask + row * mask_bytes, weight.columns) != weight.columns / 2) return false;
  }
  return true;
}

// Plain values of which rows keep any number, one after the other; where they begin is in this thread's memory for all.
std::optional<Weight> sparse_values(const WeightArguments& arguments) {
  const Tensor& values = arguments.weight;
  const Tensor& bitmask = *arguments.bitmask;
  const std::optional<Float> type = float_of(values.scalar_type());
  const int64_t columns = arguments.columns;
  const bool fits = values.is_cpu() && type.has_value() && values.dim() == 1 && values.is_contiguous() &&
                    bitmask.is_cpu() && bitmask.scalar_type() == ScalarType::Byte && bitmask.dim() == 2 &&
                    bitmask.is_contiguous() && columns >= 0 && bitmask.size(1) == columns / 8 + (columns % 8 != 0) &&
                    !arguments.scale.has_value() && !arguments.zero_point.has_value() && !arguments.g_idx.has_value();
  if (!fits) return std::nullopt;
  Weight weight;
  weight.codes = values.const_data_ptr();
  weight.type = *type == Float::bfloat16 ? Codes::bfloat16 : *type == Float::float16 ? Codes::float16 : Codes::float32;
  weight.rows = bitmask.size(0);
  weight.columns = columns;
  weight.bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr());
  auto* const offsets = static_cast<int64_t*>(
      scratch(Scratch::for_all_threads, static_cast<size_t>(weight.rows + 1) * sizeof(int64_t)));
  offsets[0] = 0;
  for (int64_t row = 0; row < weight.rows; ++row) {
    offsets[row + 1] = offsets[row] + count_bits(weight.bitmask + row * bitmask.size(1), columns);
  }
  if (offsets[weight.rows] != values.numel()) return std::nullopt;
  weight.row_offsets = offsets;
  return weight;
}

// The weight, where kernels make it dense as the reference does.
std::optional<Weight> taken(const WeightArguments& arguments) {
  if (arguments.bitmask.has_value() && arguments.weight.dim() == 1) return sparse_values(arguments);
  std::optional<Weight> weight = weight_of(arguments);
  if (!weight.has_value() || !can_dequantize(*weight)) return std::nullopt;
  if (weight->bitmask != nullptr && !keeps_half(*weight)) return std::nullopt;
  return weight;
}

Tensor dequantize(const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& zero_point,
                  const std::optional<Tensor>& g_idx, const std::optional<Tensor>& bitmask, int64_t bits,
                  int64_t columns, int64_t block_rows, int64_t block_columns, std::optional<ScalarType> dtype) {
  const ScalarType out_dtype = dtype.value_or(scale.has_value() ? scale->scalar_type() : weight.scalar_type());
  const std::optional<Float> out_type = float_of(out_dtype);
  const std::optional<Weight> found =
      taken({weight, scale, zero_point, g_idx, bitmask, bits, columns, block_rows, block_columns});
  if (!found.has_value() || !out_type.has_value()) {
    return call_op<Tensor>("compressed_format::dequantize_reference", weight, scale, zero_point, g_idx, bitmask, bits,
                           columns, block_rows, block_columns, dtype);
  }
  Tensor dense = torch::stable::new_empty(weight, {found->rows, columns}, out_dtype);
  char* const out = static_cast<char*>(dense.mutable_data_ptr());
  const int64_t row_bytes = columns * float_bytes(*out_type);
  expect_writes(out, static_cast<size_t>(found->rows * row_bytes));
  torch::stable::parallel_for(0, found->rows, rows_per_thread(columns), [&](int64_t first, int64_t last) {
    dequantize_rows(*found, first, last, 0, columns, out + first * row_bytes, row_bytes, *out_type);
  });
  return dense;
}

// Index i of int32 or int64 ones.
int64_t index_at(const void* indices, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

Tensor embedding(const Tensor& indices, const Tensor& weight, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& zero_point, const std::optional<Tensor>& g_idx,
                 const std::optional<Tensor>& bitmask, int64_t bits, int64_t columns, int64_t block_rows,
                 int64_t block_columns) {
  const ScalarType out_dtype = scale.has_value() ? scale->scalar_type() : weight.scalar_type();
  const std::optional<Float> out_type = float_of(out_dtype);
  const bool wide = indices.scalar_type() == ScalarType::Long;
  const bool are_indices = indices.is_cpu() && (wide || indices.scalar_type() == ScalarType::Int);
  // Of a sparse table, rows are found by what the mask has before them, all of which would have to be checked.
  std::optional<Weight> found;
  if (!bitmask.has_value()) {
    found = taken({weight, scale, zero_point, g_idx, bitmask, bits, columns, block_rows, block_columns});
  }
  const auto reference = [&] {
    return call_op<Tensor>("compressed_format::embedding_reference", indices, weight, scale, zero_point, g_idx, bitmask,
                           bits, columns, block_rows, block_columns);
  };
  if (!found.has_value() || !out_type.has_value() || !are_indices) return reference();
  const Tensor rows = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  const void* const places = rows.const_data_ptr();
  const int64_t count = rows.numel();
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = index_at(places, wide, i);
    if (row < 0 || row >= found->rows) return reference();  // which says what is wrong
  }
  const auto sizes = indices.sizes();
  std::vector<int64_t> out_sizes(sizes.begin(), sizes.end());
  out_sizes.push_back(columns);
  Tensor dense = torch::stable::new_empty(weight, out_sizes, out_dtype);
  char* const out = static_cast<char*>(dense.mutable_data_ptr());
  const int64_t row_bytes = columns * float_bytes(*out_type);
  torch::stable::parallel_for(0, count, rows_per_thread(columns), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = index_at(places, wide, i);
      dequantize_rows(*found, row, row + 1, 0, columns, out + i * row_bytes, row_bytes, *out_type);
    }
  });
  return dense;
}

Tensor unpack_codes(const Tensor& packed, int64_t bits, int64_t size, bool word_aligned) {
  const int64_t dim = packed.dim();
  bool fits = packed.is_cpu() && packed.scalar_type() == ScalarType::Int && dim > 0 && bits >= 1 && bits <= 8 &&
              size >= 0 && size <= (INT64_MAX - 31) / 8;
  if (fits) {
    const int64_t words = word_aligned ? (size + 32 / bits - 1) / (32 / bits) : (size * bits + 31) / 32;
    fits = packed.size(dim - 1) == words;
  }
  if (!fits) return call_op<Tensor>("compressed_format::unpack_codes_reference", packed, bits, size, word_aligned);
  const Tensor words = packed.is_contiguous() ? packed : torch::stable::contiguous(packed);
  const auto sizes = packed.sizes();
  std::vector<int64_t> out_sizes(sizes.begin(), sizes.end());
  out_sizes.back() = size;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < dim; ++i) rows *= sizes[i];
  Tensor codes = torch::stable::new_empty(words, out_sizes, ScalarType::Char);
  const void* const source = words.const_data_ptr();
  auto* const target = static_cast<int8_t*>(codes.mutable_data_ptr());
  const auto unpack = word_aligned ? unpack_word_aligned_rows : unpack_rows;
  torch::stable::parallel_for(0, rows, rows_per_thread(size), [=](int64_t first, int64_t last) {
    unpack(source, static_cast<int>(bits), size, first, last, target);
  });
  return codes;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) {
  library.impl("dequantize", TORCH_BOX(&dequantize));
  library.impl("embedding", TORCH_BOX(&embedding));
  library.impl("unpack_codes", TORCH_BOX(&unpack_codes));
}

}  // namespace
}  // namespace compressed_format
