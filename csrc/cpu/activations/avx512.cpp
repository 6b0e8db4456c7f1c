#include "cpu/simd/avx512.h"

namespace compressed_format {
namespace {

inline F32 as_float8(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  // From 2**-6 on, the smallest normal one, three bits of mantissa stay.
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 20), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7ffff)), odd);
  const __m512 normal = _mm512_castsi512_ps(_mm512_and_si512(half, _mm512_set1_epi32(~0xfffff)));
  // Below, all steps are 2**-9, which is what the last bit of a float from 2**14 on counts.
  const __m512 steps = _mm512_set1_ps(0x1p14f);
  const __m512 magnitude = _mm512_abs_ps(a.v);
  const __m512 counted = _mm512_sub_ps(_mm512_add_ps(magnitude, steps), steps);
  const __m512 small = _mm512_or_ps(counted, _mm512_and_ps(a.v, _mm512_set1_ps(-0.0f)));
  const __mmask16 is_small = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0x1p-6f), _CMP_LT_OQ);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return {_mm512_mask_mov_ps(_mm512_mask_mov_ps(normal, is_small, small), is_nan, a.v)};
}

}  // namespace
}  // namespace compressed_format

#include "cpu/activations/activations.inl"

namespace compressed_format {

extern const ActivationKernel activations_avx512;
const ActivationKernel activations_avx512 = {find_ranges, fake_quantize, make_codes};

}  // namespace compressed_format
