#include "ops/tensors.h"

namespace compressed_format {

bool groups_lie_within(const int32_t* g_idx, int64_t columns, int64_t groups) {
  bool within = true;
  for (int64_t column = 0; column < columns; ++column) {
    within = within && g_idx[column] >= 0 && g_idx[column] < groups;
  }
  return within;
}

namespace {

// As bitpack.packed_words.
int64_t packed_words(int64_t size, int64_t bits) { return (size * bits + 31) / 32; }

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

std::optional<Codes> codes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Int: return Codes::packed;
    case ScalarType::Char: return Codes::int8;
    case ScalarType::Float8_e4m3fn: return Codes::float8;
    case ScalarType::BFloat16: return Codes::bfloat16;
    case ScalarType::Half: return Codes::float16;
    case ScalarType::Float: return Codes::float32;
    default: return std::nullopt;
  }
}

int64_t code_bytes(Codes type) {
  switch (type) {
    case Codes::packed: case Codes::float32: return 4;
    case Codes::bfloat16: case Codes::float16: return 2;
    default: return 1;
  }
}

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns && tensor.is_contiguous();
}

// Scale and zero points into `weight`; whether kernels can read them.
bool take_scales(const WeightArguments& arguments, Weight& weight) {
  if (!arguments.scale.has_value()) {
    const bool plain = weight.type == Codes::bfloat16 || weight.type == Codes::float16 || weight.type == Codes::float32;
    return plain && !arguments.zero_point.has_value() && !arguments.g_idx.has_value();
  }
  const Tensor& scale = *arguments.scale;
  const std::optional<Float> scale_type = float_of(scale.scalar_type());
  if (!scale.is_cpu() || !scale_type.has_value() || !scale.is_contiguous()) return false;
  const bool single = scale.dim() == 1 && scale.size(0) == 1;
  weight.block_rows = single ? weight.rows : arguments.block_rows;
  weight.block_columns = single ? weight.columns : arguments.block_columns;
  const int64_t scale_rows = single ? 1 : ceil_div(weight.rows, weight.block_rows);
  weight.scale_columns = single ? 1 : ceil_div(weight.columns, weight.block_columns);
  if (!single && !is_matrix(scale, scale_rows, weight.scale_columns)) return false;
  weight.scale = scale.const_data_ptr();
  weight.scale_type = *scale_type;

  if (arguments.zero_point.has_value()) {
    const Tensor& zero_point = *arguments.zero_point;
    if (!zero_point.is_cpu() || !zero_point.is_contiguous()) return false;
    if (zero_point.scalar_type() == ScalarType::Char) {
      weight.zero_points = ZeroPoints::int8;
      const bool alone = single && zero_point.dim() == 1 && zero_point.size(0) == 1;
      if (!alone && !is_matrix(zero_point, scale_rows, weight.scale_columns)) return false;
    } else if (zero_point.scalar_type() == ScalarType::Int && !single) {
      weight.zero_points = ZeroPoints::packed;
      if (!is_matrix(zero_point, packed_words(scale_rows, arguments.bits), weight.scale_columns)) return false;
    } else {
      return false;
    }
    weight.zero_point = zero_point.const_data_ptr();
  }
  if (arguments.g_idx.has_value()) {
    const Tensor& g_idx = *arguments.g_idx;
    const bool fits = g_idx.is_cpu() && g_idx.scalar_type() == ScalarType::Int && g_idx.dim() == 1 &&
                      g_idx.size(0) == weight.columns && g_idx.is_contiguous();
    if (!fits) return false;
    weight.g_idx = static_cast<const int32_t*>(g_idx.const_data_ptr());
    if (!groups_lie_within(weight.g_idx, weight.columns, weight.scale_columns)) return false;
  }
  return true;
}

}  // namespace

std::optional<Float> float_of(ScalarType type) {
  switch (type) {
    case ScalarType::BFloat16: return Float::bfloat16;
    case ScalarType::Half: return Float::float16;
    case ScalarType::Float: return Float::float32;
    default: return std::nullopt;
  }
}

std::optional<Weight> weight_of(const WeightArguments& arguments) {
  const Tensor& codes = arguments.weight;
  const std::optional<Codes> type = codes_of(codes.scalar_type());
  const bool sizes = arguments.bits >= 1 && arguments.bits <= 8 && arguments.columns >= 0 &&
                     arguments.block_rows >= 1 && arguments.block_columns >= 1;
  if (!codes.is_cpu() || !type.has_value() || !sizes) return std::nullopt;
  Weight weight;
  weight.type = *type;
  weight.bits = static_cast<int>(arguments.bits);
  weight.columns = arguments.columns;
  weight.codes = codes.const_data_ptr();
  if (arguments.bitmask.has_value()) {
    const Tensor& bitmask = *arguments.bitmask;
    // Kept values of each row in a row of their own: 2:4. Of others, nobody knows yet where a row begins.
    const bool fits = bitmask.is_cpu() && bitmask.scalar_type() == ScalarType::Byte && bitmask.dim() == 2 &&
                      bitmask.is_contiguous() && bitmask.size(1) == ceil_div(weight.columns, 8) &&
                      weight.type != Codes::packed && weight.columns % 4 == 0;
    if (!fits || !is_matrix(codes, bitmask.size(0), weight.columns / 2)) return std::nullopt;
    weight.rows = bitmask.size(0);
    weight.bitmask = static_cast<const uint8_t*>(bitmask.const_data_ptr());
    weight.row_bytes = weight.columns / 2 * code_bytes(weight.type);
  } else {
    const int64_t stored =
        weight.type == Codes::packed ? packed_words(weight.columns, weight.bits) : weight.columns;
    if (codes.dim() != 2 || codes.size(1) != stored) return std::nullopt;
    // A part of a weight's rows or columns, as tensor-parallel ranks hold it, may keep the stride of the whole.
    if (stored > 1 && codes.stride(1) != 1) return std::nullopt;
    weight.rows = codes.size(0);
    weight.row_bytes = codes.stride(0) * code_bytes(weight.type);
  }
  if (!take_scales(arguments, weight)) return std::nullopt;
  return weight;
}

}  // namespace compressed_format
