#include "cpu/simd/avx2.h"

#include "cpu/quantized_linear/quantized_linear.inl"

namespace compressed_format {

extern const QuantizedLinearKernel quantized_linear_avx2;

namespace {

inline int32_t sum_of_lanes(__m256i a) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}

// Sixteen codes, or the `count` that are left and zeros.
inline __m128i load_codes(const char* source, int64_t count) {
  if (count >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  return load_part<1>(source, static_cast<int>(count));
}

// Multiplying bytes saturates sums of two products; those of 16 bits do not.
struct Int8 {
  using Sum = int32_t;
  static constexpr int64_t code_bytes = 1;
  static constexpr int32_t offset = 0;

  template <int M>
  static void dots(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, Sum* sums) {
    // Two rows at a time: with four tokens, as many sums as there are registers beside their operands.
    for (int64_t row = 0; row < rows_at_once; row += 2) {
      __m256i total[2][M];
      for (auto& of_row : total) {
        for (__m256i& sum : of_row) sum = _mm256_setzero_si256();
      }
      for (int64_t i = 0; i < columns; i += 16) {
        __m256i codes[2];
        for (int r = 0; r < 2; ++r) {
          codes[r] = _mm256_cvtepi8_epi16(load_codes(rows[row + r] + i, columns - i));
        }
        for (int token = 0; token < M; ++token) {
          const char* const at = x + token * x_stride + i;
          const __m256i values = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
          for (int r = 0; r < 2; ++r) {
            total[r][token] = _mm256_add_epi32(total[r][token], _mm256_madd_epi16(codes[r], values));
          }
        }
      }
      for (int token = 0; token < M; ++token) {
        for (int r = 0; r < 2; ++r) sums[token * rows_of_task + row + r] = sum_of_lanes(total[r][token]);
      }
    }
  }

  static int32_t sum_of_row(const char* row, int64_t columns) {
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < columns; i += 16) {
      const __m256i codes = _mm256_cvtepi8_epi16(load_codes(row + i, columns - i));
      total = _mm256_add_epi32(total, _mm256_madd_epi16(codes, _mm256_set1_epi16(1)));
    }
    return sum_of_lanes(total);
  }
};

struct Float8 {
  using Sum = float;
  static constexpr int64_t code_bytes = 2;
  static constexpr int32_t offset = 0;

  // E4M3 in the place of a float's exponent and mantissa differs from it by a factor, subnormal ones included.
  static F32 widen(__m128i codes) {
    const __m256i bits = _mm256_cvtepu8_epi32(codes);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(127));
    const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(bits, magnitude), 24);
    const __m256 scaled = _mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20));
    const __m256 value = _mm256_mul_ps(scaled, _mm256_set1_ps(0x1p120f));
    const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(127));
    return {_mm256_or_ps(_mm256_or_ps(value, _mm256_castsi256_ps(nan)), _mm256_castsi256_ps(sign))};
  }

  template <int M>
  static void dots(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, Sum* sums) {
    for (int64_t row = 0; row < rows_at_once; row += 2) {
      F32 total[2][M];
      for (auto& of_row : total) {
        for (F32& sum : of_row) sum = zero();
      }
      for (int64_t i = 0; i < columns; i += lanes) {
        F32 values[2];
        for (int r = 0; r < 2; ++r) {
          const char* const at = rows[row + r] + i;
          const bool whole = columns - i >= lanes;
          values[r] = widen(whole ? _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))
                                  : load_part<1>(at, static_cast<int>(columns - i)));
        }
        for (int token = 0; token < M; ++token) {
          const F32 codes = load_bfloat16(x + token * x_stride + 2 * i);
          for (int r = 0; r < 2; ++r) total[r][token] = multiply_add(values[r], codes, total[r][token]);
        }
      }
      for (int token = 0; token < M; ++token) {
        for (int r = 0; r < 2; ++r) sums[token * rows_of_task + row + r] = sum(total[r][token]);
      }
    }
  }

  static int32_t sum_of_row(const char*, int64_t) { return 0; }
};

}  // namespace
}  // namespace compressed_format

#include "cpu/quantized_linear/by_token.inl"

namespace compressed_format {

const QuantizedLinearKernel quantized_linear_avx2 = by_problem;

}  // namespace compressed_format
