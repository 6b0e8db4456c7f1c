// Products whose scales change along the columns, or whose codes are packed: sums of spans of columns, within which no
// scale changes, are exact for integers; scaled, they are added up in float32. Whoever includes this has included
// quantized_linear.inl.
//
// With zero points that is
//   sum of (x - x_zero) * (w - w_zero) = sum of x * w - x_zero * sum of w - w_zero * sum of (x - x_zero)

namespace compressed_format {
namespace {

inline int64_t spans_of(const QuantizedLinear& problem) { return ceil_div(problem.weight->columns, problem.span); }

inline int64_t columns_of_span(const QuantizedLinear& problem, int64_t span) {
  return smaller(problem.span, problem.weight->columns - span * problem.span);
}

inline int64_t groups_of(const Activations& activations) { return activations.columns / activations.group_size; }

// Whether each code of the weight adds to the result by itself.
inline bool needs_sums_of_codes(const QuantizedLinear& problem) { return has_zero_points(*problem.activations); }

// Calls give(index, value) for the scale columns of a row, in vectors of which only the first values are there.
template <typename Give>
void for_each_scale(const Weight& weight, int64_t row, Give give) {
  const int64_t begin = row / weight.block_rows * weight.scale_columns;
  const auto* const scales = static_cast<const char*>(weight.scale) + begin * float_bytes(weight.scale_type);
  for (int64_t i = 0; i < weight.scale_columns; i += lanes) {
    const int part = static_cast<int>(smaller(lanes, weight.scale_columns - i));
    const char* const at = scales + i * float_bytes(weight.scale_type);
    F32 values;
    switch (weight.scale_type) {
      case Float::bfloat16: values = load_bfloat16(at, part); break;
      case Float::float16: values = load_float16(at, part); break;
      default: values = load_float32(at, part);
    }
    float numbers[lanes];
    store_float32(numbers, values);
    for (int lane = 0; lane < part; ++lane) give(i + lane, numbers[lane]);
  }
}

// Calls give(index, value) for the zero points of a row, of which there are some.
template <typename Give>
void for_each_zero_point(const Weight& weight, int64_t row, Give give) {
  const int64_t scale_row = row / weight.block_rows, count = weight.scale_columns;
  if (weight.zero_points == ZeroPoints::int8) {
    const auto* const given = static_cast<const int8_t*>(weight.zero_point) + scale_row * count;
    for (int64_t i = 0; i < count; ++i) give(i, static_cast<int32_t>(given[i]));
    return;
  }
  const int64_t bit = scale_row * weight.bits;
  const auto* const words = static_cast<const char*>(weight.zero_point) + bit / 32 * count * 4;
  const bool crosses = bit % 32 + weight.bits > 32;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t low, high = 0;
    __builtin_memcpy(&low, words + i * 4, sizeof low);
    if (crosses) __builtin_memcpy(&high, words + (count + i) * 4, sizeof high);
    const uint64_t window = static_cast<uint64_t>(high) << 32 | low;
    const auto code = static_cast<int32_t>(window >> bit % 32 & ((1u << weight.bits) - 1u));
    give(i, code - (1 << (weight.bits - 1)));
  }
}

// Scales and zero points of a row for each span; `offset` is what kernels add to the codes of the weight.
inline void take_row(const QuantizedLinear& problem, int64_t row, int32_t offset, float* scale, int32_t* zero_point) {
  const Weight& weight = *problem.weight;
  const int64_t spans = spans_of(problem);
  const int64_t repeated = weight.scale_columns == 1 ? spans : weight.block_columns / problem.span;
  if (repeated == 1) {
    for_each_scale(weight, row, [&](int64_t i, float value) { scale[i] = value; });
  } else {
    for_each_scale(weight, row, [&](int64_t i, float value) {
      for (int64_t s = i * repeated; s < smaller((i + 1) * repeated, spans); ++s) scale[s] = value;
    });
  }
  if (weight.zero_points == ZeroPoints::none) {
    for (int64_t s = 0; s < spans; ++s) zero_point[s] = offset;
  } else {
    for_each_zero_point(weight, row, [&](int64_t i, int32_t value) {
      for (int64_t s = i * repeated; s < smaller((i + 1) * repeated, spans); ++s) zero_point[s] = value + offset;
    });
  }
}

// Sums of a task's rows of one token, scaled already, into y.
inline void finish_spans(const QuantizedLinear& problem, int64_t first_row, int64_t count, const float* sums,
                         int64_t token) {
  float values[rows_of_task];
  for (int64_t i = 0; i < count; ++i) {
    const float bias = problem.bias == nullptr ? 0.0f : number(problem.bias_type, problem.bias, first_row + i);
    values[i] = sums[i] + bias;
  }
  store_numbers(problem.activations->x_type, problem.y, token * problem.weight->rows + first_row, values, count);
}

// What the codes of tokens in a span stand for, of the group that it lies in.
inline const TokenScale& scale_of_span(const QuantizedLinear& problem, const TokenScale* of_token, int64_t span) {
  return of_token[span * problem.span / problem.activations->group_size];
}

}  // namespace
}  // namespace compressed_format
