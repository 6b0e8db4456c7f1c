#include "cpu/simd/avx2.h"

namespace compressed_format {
namespace {

inline F32 as_float8(F32 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  // From 2**-6 on, the smallest normal one, three bits of mantissa stay.
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 20), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7ffff)), odd);
  const __m256 normal = _mm256_castsi256_ps(_mm256_and_si256(half, _mm256_set1_epi32(~0xfffff)));
  // Below, all steps are 2**-9, which is what the last bit of a float from 2**14 on counts.
  const __m256 sign = _mm256_set1_ps(-0.0f), steps = _mm256_set1_ps(0x1p14f);
  const __m256 magnitude = _mm256_andnot_ps(sign, a.v);
  const __m256 counted = _mm256_sub_ps(_mm256_add_ps(magnitude, steps), steps);
  const __m256 small = _mm256_or_ps(counted, _mm256_and_ps(sign, a.v));
  const __m256 is_small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(0x1p-6f), _CMP_LT_OQ);
  const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
  return {_mm256_blendv_ps(_mm256_blendv_ps(normal, small, is_small), a.v, is_nan)};
}

}  // namespace
}  // namespace compressed_format

#include "cpu/activations/activations.inl"

namespace compressed_format {

extern const ActivationKernel activations_avx2;
const ActivationKernel activations_avx2 = {find_ranges, fake_quantize, make_codes};

}  // namespace compressed_format
