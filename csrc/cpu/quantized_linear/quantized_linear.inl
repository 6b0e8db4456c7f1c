// What the instruction sets have in common: the codes of x token by token, sums over whole rows of the weight for a
// few rows and tokens at a time, and what becomes of sums. Whoever includes this has included one of cpu/simd/*.h.
//
// A kind of codes, Int8 or Float8, is defined by the files that include this:
//   Sum                    int32_t or float
//   code_bytes             how many bytes a code of x has: int8, or bfloat16 for E4M3
//   offset                 what its products add to each code of the weight; taken off again at the end
//   dots<M>(...)           sums for four rows and M tokens
//   sum_of_row(...)        of signed bytes (integers only)

#include "cpu/numbers.h"
#include "cpu/quantized_linear/quantized_linear.h"

namespace compressed_format {
namespace {

constexpr int64_t tokens_at_once = 4;
constexpr int64_t rows_at_once = 4;
constexpr int64_t rows_of_task = 16;
constexpr int64_t most_rows = 64;  // that any task has

inline size_t size(int64_t value) { return static_cast<size_t>(value); }

// Vectors of any instruction set end within a multiple of 64 codes: tokens are padded to it with zeros.
inline int64_t padded(int64_t columns) { return ceil_div(columns, 64) * 64; }

inline float number(Float type, const void* source, int64_t index) {
  const auto* const at = static_cast<const char*>(source) + index * float_bytes(type);
  float value;
  switch (type) {
    case Float::bfloat16: store_float32(&value, load_bfloat16(at, 1), 1); break;
    case Float::float16: store_float32(&value, load_float16(at, 1), 1); break;
    default: store_float32(&value, load_float32(at, 1), 1);
  }
  return value;
}

inline const char* row_of(const Weight& weight, int64_t row) {
  return static_cast<const char*>(weight.codes) + row * weight.row_bytes;
}

// What the rows of a task bring to the end of the sums.
struct Rows {
  int64_t first;
  int64_t count;
  float scale[most_rows];
  float bias[most_rows];
  int32_t zero_point[most_rows];
  int32_t sum[most_rows];
};

inline bool has_zero_points(const Activations& activations) {
  if (activations.is_float) return false;
  return activations.scale == nullptr ? !activations.symmetric : activations.zero_point != nullptr;
}

template <typename Kind>
void describe(const QuantizedLinear& problem, int64_t first, int64_t count, Rows& rows) {
  const Weight& weight = *problem.weight;
  const bool sums = has_zero_points(*problem.activations);
  rows.first = first;
  rows.count = count;
  // Only whole vectors of results are made. With one token, little is done between one call of this and the next: a
  // division, or a row that nobody asks for, shows in the rate of reading.
  for (int64_t i = 0; i < ceil_div(count, rows_of_task) * rows_of_task; ++i) {
    const bool is_row = i < count;
    const int64_t row = first + i, block = weight.block_rows == 1 ? row : row / weight.block_rows;
    rows.scale[i] = is_row ? number(weight.scale_type, weight.scale, block) : 0.0f;
    rows.bias[i] = is_row && problem.bias != nullptr ? number(problem.bias_type, problem.bias, row) : 0.0f;
    const bool offset = is_row && weight.zero_points == ZeroPoints::int8;
    rows.zero_point[i] = offset ? static_cast<const int8_t*>(weight.zero_point)[block] : 0;
    rows.sum[i] = is_row && sums ? Kind::sum_of_row(row_of(weight, row), weight.columns) : 0;
  }
}

inline void store_numbers(Float type, void* y, int64_t index, const float* values, int64_t count) {
  char* const target = static_cast<char*>(y) + index * float_bytes(type);
  for (int64_t i = 0; i < count; i += lanes) {
    const int part = static_cast<int>(smaller(lanes, count - i));
    const F32 vector = load_float32(values + i, part);
    char* const at = target + i * float_bytes(type);
    switch (type) {
      case Float::bfloat16: part == lanes ? store_bfloat16(at, vector) : store_bfloat16(at, vector, part); break;
      case Float::float16: part == lanes ? store_float16(at, vector) : store_float16(at, vector, part); break;
      default: part == lanes ? store_float32(at, vector) : store_float32(at, vector, part);
    }
  }
}

// Sixteen sums of one token, for rows from `begin` on, into y.
template <typename Kind>
void finish(const QuantizedLinear& problem, const TokenScale& token_scale, const Rows& rows, int64_t begin,
            const typename Kind::Sum* sums, int64_t token) {
  const Weight& weight = *problem.weight;
  const TokenScale scale = token_scale;
  float values[rows_of_task];
  // Unsigned, as only the result has to fit: what is in between may pass over the end and come back.
  const auto codes = static_cast<uint32_t>(scale.sum);
  const auto zero_point = static_cast<uint32_t>(scale.zero_point);
  const uint32_t added = codes * static_cast<uint32_t>(Kind::offset);
  const uint32_t steps = codes - static_cast<uint32_t>(weight.columns) * zero_point;
  for (int64_t i = 0; i < rows_of_task; ++i) {
    float value;
    if constexpr (Kind::code_bytes == 2) {
      value = sums[i];
    } else {
      const uint32_t sum = static_cast<uint32_t>(sums[i]) - added -
                           zero_point * static_cast<uint32_t>(rows.sum[begin + i]) -
                           steps * static_cast<uint32_t>(rows.zero_point[begin + i]);
      value = static_cast<float>(static_cast<int32_t>(sum));
    }
    values[i] = value * scale.scale * rows.scale[begin + i] + rows.bias[begin + i];
  }
  store_numbers(problem.activations->x_type, problem.y, token * weight.rows + rows.first + begin, values,
                smaller(rows_of_task, rows.count - begin));
}

// The prepared x: what codes of tokens stand for, then the codes.
inline size_t scales_bytes(const QuantizedLinear& problem) {
  return size(ceil_div(problem.activations->tokens, 16) * 16) * sizeof(TokenScale);
}

template <typename Kind>
size_t bytes_by_token(const QuantizedLinear& problem) {
  const Activations& activations = *problem.activations;
  return scales_bytes(problem) + size(activations.tokens * padded(activations.columns) * Kind::code_bytes);
}

inline int64_t parts_by_token(const QuantizedLinear& problem) { return ceil_div(problem.activations->tokens, 16); }

template <typename Kind>
void prepare_by_token(const QuantizedLinear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  const Activations& activations = *problem.activations;
  const int64_t stride = padded(activations.columns);
  const int64_t first = first_part * 16, last = smaller(last_part * 16, activations.tokens);
  auto* const scales = static_cast<TokenScale*>(prepared) + first;
  char* const codes = static_cast<char*>(prepared) + scales_bytes(problem) + first * stride * Kind::code_bytes;
  problem.quantize->codes(activations, &problem.whole, codes, stride, scales, first, last);
  for (int64_t token = 0; token < last - first; ++token) {
    char* const end = codes + (token * stride + activations.columns) * Kind::code_bytes;
    __builtin_memset(end, 0, size((stride - activations.columns) * Kind::code_bytes));
  }
}

inline int64_t tasks_by_token(const QuantizedLinear& problem) { return ceil_div(problem.weight->rows, rows_of_task); }

// As many as read so much of the weight that the time of waking a thread does not show.
inline int64_t tasks_per_thread_by_token(const QuantizedLinear& problem) {
  constexpr int64_t bytes_per_thread = 65536;
  const int64_t task_bytes = rows_of_task * problem.weight->columns * problem.activations->tokens;
  return bytes_per_thread / (task_bytes + 1) + 1;
}

template <typename Kind>
void run_by_token(const QuantizedLinear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  using Sum = typename Kind::Sum;
  const Weight& weight = *problem.weight;
  const Activations& activations = *problem.activations;
  const int64_t stride = padded(activations.columns) * Kind::code_bytes;
  const auto* const scales = static_cast<const TokenScale*>(prepared);
  const char* const x = static_cast<const char*>(prepared) + scales_bytes(problem);
  for (int64_t task = first_task; task < last_task; ++task) {
    Rows rows;
    const int64_t first = task * rows_of_task;
    describe<Kind>(problem, first, smaller(rows_of_task, weight.rows - first), rows);
    for (int64_t token = 0; token < activations.tokens; token += tokens_at_once) {
      const int64_t count = smaller(tokens_at_once, activations.tokens - token);
      Sum sums[tokens_at_once][rows_of_task] = {};
      for (int64_t row = 0; row < rows.count; row += rows_at_once) {
        // Where there are fewer rows, the last is taken again, into sums that nobody reads.
        const char* at[rows_at_once];
        for (int64_t i = 0; i < rows_at_once; ++i) at[i] = row_of(weight, first + smaller(row + i, rows.count - 1));
        const char* const codes = x + token * stride;
        switch (count) {
          case 1: Kind::template dots<1>(at, weight.columns, codes, stride, &sums[0][row]); break;
          case 2: Kind::template dots<2>(at, weight.columns, codes, stride, &sums[0][row]); break;
          case 3: Kind::template dots<3>(at, weight.columns, codes, stride, &sums[0][row]); break;
          default: Kind::template dots<4>(at, weight.columns, codes, stride, &sums[0][row]);
        }
      }
      for (int64_t i = 0; i < count; ++i) finish<Kind>(problem, scales[token + i], rows, 0, sums[i], token + i);
    }
  }
}

// E4M3 as the half of a float that bfloat16 keeps; codes without their sign.
constexpr uint16_t float8_to_bfloat16(unsigned magnitude) {
  if (magnitude == 0x7f) return 0x7fc0;
  if (magnitude >= 8) return static_cast<uint16_t>((magnitude << 4) + (120 << 7));
  // Multiples of 2**-9: shift the mantissa until its first bit is the implied one.
  if (magnitude == 0) return 0;
  unsigned exponent = 121, mantissa = magnitude;
  while ((mantissa & 8) == 0) {
    mantissa <<= 1;
    --exponent;
  }
  return static_cast<uint16_t>(exponent << 7 | (mantissa & 7) << 4);
}

static_assert(float8_to_bfloat16(0x38) == 0x3f80 && float8_to_bfloat16(1) == 0x3b00 && float8_to_bfloat16(7) == 0x3c60);

struct Float8Table {
  uint16_t value[128];

  constexpr Float8Table() : value() {
    for (unsigned code = 0; code < 128; ++code) value[code] = float8_to_bfloat16(code);
  }
};

constexpr Float8Table float8_table;

}  // namespace
}  // namespace compressed_format
