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

}  // namespace
}  // namespace compressed_format

#include "cpu/quantize/quantize.inl"

namespace compressed_format {

extern const QuantizeKernel quantize_avx2;
const QuantizeKernel quantize_avx2 = {find_extremes, find_scales, make_codes, quantize_rows};

}  // namespace compressed_format
