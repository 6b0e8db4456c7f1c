#include "cpu/simd/portable.h"

#include "cpu/quantized_linear/quantized_linear.inl"

namespace compressed_format {

extern const QuantizedLinearKernel quantized_linear_portable;

namespace {

struct Int8 {
  using Sum = int32_t;
  static constexpr int64_t code_bytes = 1;
  static constexpr int32_t offset = 0;

  template <int M>
  static void dots(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, Sum* sums) {
    for (int token = 0; token < M; ++token) {
      const auto* const codes = reinterpret_cast<const int8_t*>(x + token * x_stride);
      for (int64_t row = 0; row < rows_at_once; ++row) {
        const auto* const given = reinterpret_cast<const int8_t*>(rows[row]);
        int32_t sum = 0;
        for (int64_t i = 0; i < columns; ++i) sum += codes[i] * given[i];
        sums[token * rows_of_task + row] = sum;
      }
    }
  }

  static int32_t sum_of_row(const char* row, int64_t columns) {
    int32_t sum = 0;
    for (int64_t i = 0; i < columns; ++i) sum += static_cast<int8_t>(row[i]);
    return sum;
  }
};

struct Float8 {
  using Sum = float;
  static constexpr int64_t code_bytes = 2;
  static constexpr int32_t offset = 0;

  template <int M>
  static void dots(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, Sum* sums) {
    for (int64_t row = 0; row < rows_at_once; ++row) {
      F32 total[M];
      for (F32& sum : total) sum = zero();
      for (int64_t i = 0; i < columns; i += lanes) {
        const int64_t count = smaller(lanes, columns - i);
        const F32 values = each([&](int lane) {
          if (lane >= count) return 0.0f;
          const auto code = static_cast<unsigned char>(rows[row][i + lane]);
          const float value = bfloat16_to_float(float8_table.value[code & 127]);
          return code < 128 ? value : -value;
        });
        for (int token = 0; token < M; ++token) {
          total[token] = multiply_add(values, load_bfloat16(x + token * x_stride + 2 * i), total[token]);
        }
      }
      for (int token = 0; token < M; ++token) sums[token * rows_of_task + row] = sum(total[token]);
    }
  }

  static int32_t sum_of_row(const char*, int64_t) { return 0; }
};

}  // namespace
}  // namespace compressed_format

#include "cpu/quantized_linear/by_token.inl"

namespace compressed_format {

const QuantizedLinearKernel quantized_linear_portable = by_problem;

}  // namespace compressed_format
