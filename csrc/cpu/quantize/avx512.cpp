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

}  // namespace
}  // namespace compressed_format

#include "cpu/quantize/quantize.inl"

namespace compressed_format {

extern const QuantizeKernel quantize_avx512;
const QuantizeKernel quantize_avx512 = {find_extremes, find_scales, make_codes, quantize_rows};

}  // namespace compressed_format
