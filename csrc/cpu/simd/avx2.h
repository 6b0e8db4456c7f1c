// Vectors of eight floats in the registers of AVX2; see simd/portable.h for what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace compressed_format {
namespace {

constexpr int lanes = 8;

struct F32 {
  __m256 v;
};

inline F32 zero() { return {_mm256_setzero_ps()}; }
inline F32 broadcast(float value) { return {_mm256_set1_ps(value)}; }

// There are masks for parts of four bytes only, so that shorter elements go through memory of their own.
inline __m256i first(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
template <int bytes>
inline __m128i load_part(const void* source, int count) {
  alignas(16) unsigned char part[16] = {};
  __builtin_memcpy(part, source, static_cast<unsigned>(count * bytes));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(part));
}
template <int bytes>
inline void store_part(void* target, __m128i values, int count) {
  alignas(16) unsigned char part[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(part), values);
  __builtin_memcpy(target, part, static_cast<unsigned>(count * bytes));
}

inline F32 load_float32(const void* source) { return {_mm256_loadu_ps(static_cast<const float*>(source))}; }
inline F32 load_float32(const void* source, int count) {
  return {_mm256_maskload_ps(static_cast<const float*>(source), first(count))};
}
inline F32 widen_bfloat16(__m128i halves) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
}
inline F32 load_bfloat16(const void* source) {
  return widen_bfloat16(_mm_loadu_si128(static_cast<const __m128i*>(source)));
}
inline F32 load_bfloat16(const void* source, int count) { return widen_bfloat16(load_part<2>(source, count)); }
inline F32 load_float16(const void* source) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(source)))};
}
inline F32 load_float16(const void* source, int count) { return {_mm256_cvtph_ps(load_part<2>(source, count))}; }
inline F32 widen_int8(__m128i codes) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))}; }
inline F32 load_int8(const void* source) { return widen_int8(_mm_loadl_epi64(static_cast<const __m128i*>(source))); }
inline F32 load_int8(const void* source, int count) { return widen_int8(load_part<1>(source, count)); }

inline __m128i narrow_to_bfloat16(F32 a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i halves = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
inline __m128i narrow_to_int8(F32 a) {
  const __m256i codes = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  return _mm_packs_epi16(words, words);
}

inline void store_float32(void* target, F32 a) { _mm256_storeu_ps(static_cast<float*>(target), a.v); }
inline void store_float32(void* target, F32 a, int count) {
  _mm256_maskstore_ps(static_cast<float*>(target), first(count), a.v);
}
inline void store_bfloat16(void* target, F32 a) {
  _mm_storeu_si128(static_cast<__m128i*>(target), narrow_to_bfloat16(a));
}
inline void store_bfloat16(void* target, F32 a, int count) { store_part<2>(target, narrow_to_bfloat16(a), count); }
inline void store_float16(void* target, F32 a) {
  _mm_storeu_si128(static_cast<__m128i*>(target), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_float16(void* target, F32 a, int count) {
  store_part<2>(target, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT), count);
}
inline void store_int8(void* target, F32 a) { _mm_storel_epi64(static_cast<__m128i*>(target), narrow_to_int8(a)); }
inline void store_int8(void* target, F32 a, int count) { store_part<1>(target, narrow_to_int8(a), count); }

inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 minimum(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 maximum(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 absolute(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32 multiply_add(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 round_to_even(F32 a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F32 as_bfloat16(F32 a) { return widen_bfloat16(narrow_to_bfloat16(a)); }
inline F32 as_float16(F32 a) { return {_mm256_cvtph_ps(_mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT))}; }

inline float sum(F32 a) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float smallest(F32 a) {
  __m128 half = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_min_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_min_ss(half, _mm_movehdup_ps(half)));
}
inline float largest(F32 a) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

}  // namespace
}  // namespace compressed_format
