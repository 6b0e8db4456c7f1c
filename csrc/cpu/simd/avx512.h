// Vectors of sixteen floats in the registers of AVX-512; see simd/portable.h for what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace compressed_format {
namespace {

constexpr int lanes = 16;

struct F32 {
  __m512 v;
};

inline __mmask16 first(int count) { return static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(count))); }

inline F32 zero() { return {_mm512_setzero_ps()}; }
inline F32 broadcast(float value) { return {_mm512_set1_ps(value)}; }

inline F32 load_float32(const void* source) { return {_mm512_loadu_ps(source)}; }
inline F32 load_float32(const void* source, int count) { return {_mm512_maskz_loadu_ps(first(count), source)}; }
inline F32 widen_bfloat16(__m256i halves) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline F32 load_bfloat16(const void* source) {
  return widen_bfloat16(_mm256_loadu_si256(static_cast<const __m256i*>(source)));
}
inline F32 load_bfloat16(const void* source, int count) {
  return widen_bfloat16(_mm256_maskz_loadu_epi16(first(count), source));
}
inline F32 load_float16(const void* source) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(source)))};
}
inline F32 load_float16(const void* source, int count) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), source))};
}
inline F32 load_int8(const void* source) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(source))))};
}
inline F32 load_int8(const void* source, int count) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(count), source)))};
}

// The processor's own conversion takes subnormal numbers for zeros.
inline __m256i narrow_to_bfloat16(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

inline void store_float32(void* target, F32 a) { _mm512_storeu_ps(target, a.v); }
inline void store_float32(void* target, F32 a, int count) { _mm512_mask_storeu_ps(target, first(count), a.v); }
inline void store_bfloat16(void* target, F32 a) {
  _mm256_storeu_si256(static_cast<__m256i*>(target), narrow_to_bfloat16(a));
}
inline void store_bfloat16(void* target, F32 a, int count) {
  _mm256_mask_storeu_epi16(target, first(count), narrow_to_bfloat16(a));
}
inline void store_float16(void* target, F32 a) {
  _mm256_storeu_si256(static_cast<__m256i*>(target), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_float16(void* target, F32 a, int count) {
  _mm256_mask_storeu_epi16(target, first(count), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_int8(void* target, F32 a) {
  _mm_storeu_si128(static_cast<__m128i*>(target), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline void store_int8(void* target, F32 a, int count) {
  _mm_mask_storeu_epi8(target, first(count), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}

inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 minimum(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 maximum(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 absolute(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 round_to_even(F32 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F32 as_bfloat16(F32 a) { return widen_bfloat16(narrow_to_bfloat16(a)); }
inline F32 as_float16(F32 a) { return {_mm512_cvtph_ps(_mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))}; }

inline float sum(F32 a) { return _mm512_reduce_add_ps(a.v); }
inline float smallest(F32 a) { return _mm512_reduce_min_ps(a.v); }
inline float largest(F32 a) { return _mm512_reduce_max_ps(a.v); }

}  // namespace
}  // namespace compressed_format
