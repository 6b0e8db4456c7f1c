#include "cpu/simd/avx512.h"

namespace compressed_format {
namespace {

inline __m128i narrow_to_float8(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  // From 2**-6 on, the smallest normal one, three bits of mantissa stay.
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7ffff)), odd);
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(half, 20), _mm512_set1_epi32(120 << 3));
  // Below, all steps are 2**-9, which is what the last bit of a float from 2**14 on counts.
  const __m512 steps = _mm512_set1_ps(0x1p14f);
  const __m512i counted = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), steps));
  const __m512i small = _mm512_sub_epi32(counted, _mm512_castps_si512(steps));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x3c800000));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  return _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_mask_mov_epi32(normal, is_small, small), sign));
}

inline void store_float8(void* target, F32 values) {
  _mm_storeu_si128(static_cast<__m128i*>(target), narrow_to_float8(values));
}
inline void store_float8(void* target, F32 values, int count) {
  _mm_mask_storeu_epi8(target, first(count), narrow_to_float8(values));
}

// Conversions round so by themselves.
inline void store_nearest_int8(void* target, F32 values) { store_int8(target, values); }
inline void store_nearest_int8(void* target, F32 values, int count) { store_int8(target, values, count); }

inline F32 nearest_bfloat16(F32 values) {
  const __m512i bits = _mm512_castps_si512(values.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return {_mm512_castsi512_ps(_mm512_and_si512(half, _mm512_set1_epi32(~0xffff)))};
}

inline uint16_t largest_of(__m128i magnitudes) {
  // There is an instruction for the smallest of eight only.
  const __m128i inverted = _mm_xor_si128(magnitudes, _mm_set1_epi16(-1));
  return static_cast<uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(inverted), 0));
}

inline uint16_t largest_half(const char* halves, int64_t count) {
  const __m512i no_sign = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(halves + 2 * i), no_sign));
  }
  if (i < count) {
    const __mmask32 left = _bzhi_u32(~0u, static_cast<unsigned>(count - i));
    const __m512i bits = _mm512_maskz_loadu_epi16(left, halves + 2 * i);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(bits, no_sign));
  }
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
  return largest_of(_mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

}  // namespace
}  // namespace compressed_format

#include "cpu/quantize/quantize.inl"

namespace compressed_format {

extern const QuantizeKernel quantize_avx512;
const QuantizeKernel quantize_avx512 = {find_extremes, find_scales, make_codes, quantize_rows};

}  // namespace compressed_format
