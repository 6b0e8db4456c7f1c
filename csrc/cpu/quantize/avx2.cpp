#include "cpu/simd/avx2.h"

namespace compressed_format {
namespace {

inline __m128i narrow_to_float8(F32 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  // From 2**-6 on, the smallest normal one, three bits of mantissa stay.
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(0x7ffff)), odd);
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(half, 20), _mm256_set1_epi32(120 << 3));
  // Below, all steps are 2**-9, which is what the last bit of a float from 2**14 on counts.
  const __m256 steps = _mm256_set1_ps(0x1p14f);
  const __m256i counted = _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), steps));
  const __m256i small = _mm256_sub_epi32(counted, _mm256_castps_si256(steps));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), magnitude);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
  const __m256i codes = _mm256_or_si256(_mm256_blendv_epi8(normal, small, is_small), sign);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  return _mm_packus_epi16(words, words);
}

inline void store_float8(void* target, F32 values) {
  _mm_storel_epi64(static_cast<__m128i*>(target), narrow_to_float8(values));
}
inline void store_float8(void* target, F32 values, int count) {
  store_part<1>(target, narrow_to_float8(values), count);
}

// Conversions round so by themselves.
inline void store_nearest_int8(void* target, F32 values) { store_int8(target, values); }
inline void store_nearest_int8(void* target, F32 values, int count) { store_int8(target, values, count); }

inline F32 nearest_bfloat16(F32 values) {
  const __m256i bits = _mm256_castps_si256(values.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  return {_mm256_castsi256_ps(_mm256_and_si256(half, _mm256_set1_epi32(~0xffff)))};
}

inline uint16_t largest_of(__m128i magnitudes) {
  // There is an instruction for the smallest of eight only.
  const __m128i inverted = _mm_xor_si128(magnitudes, _mm_set1_epi16(-1));
  return static_cast<uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(inverted), 0));
}

inline uint16_t largest_half(const char* halves, int64_t count) {
  const __m256i no_sign = _mm256_set1_epi16(0x7fff);
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + 2 * i));
    largest = _mm256_max_epu16(largest, _mm256_and_si256(bits, no_sign));
  }
  for (; i < count; i += 8) {
    const __m128i bits = load_part<2>(halves + 2 * i, count - i < 8 ? static_cast<int>(count - i) : 8);
    largest = _mm256_max_epu16(largest, _mm256_and_si256(_mm256_zextsi128_si256(bits), no_sign));
  }
  return largest_of(_mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1)));
}

// There is nothing faster than what quantize.inl has.
template <bool is_float, bool has_zero_point>
int64_t most_codes(const char*, int64_t, float, int, int, int8_t*) {
  return 0;
}

}  // namespace
}  // namespace compressed_format

#include "cpu/quantize/quantize.inl"

namespace compressed_format {

extern const QuantizeKernel quantize_avx2;
const QuantizeKernel quantize_avx2 = {find_extremes, find_scales, make_codes, quantize_rows};

}  // namespace compressed_format
