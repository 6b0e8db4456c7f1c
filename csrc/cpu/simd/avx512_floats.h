// Floats of any type, a few or one at a time, with AVX-512. No memory beyond them is touched.
#pragma once

#include <immintrin.h>

#include "cpu/numbers.h"
#include "cpu/weight.h"

namespace compressed_format {
namespace {

// `count` floats from an index on, none or sixteen at most; the other lanes are zero.
inline __m512 load_floats(const void* source, Float type, int64_t index, int64_t count) {
  const int64_t present = count < 0 ? 0 : smaller(count, 16);
  const auto lanes = static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(present)));
  const char* const first = static_cast<const char*>(source) + index * float_bytes(type);
  if (type == Float::float32) return _mm512_maskz_loadu_ps(lanes, first);
  const __m256i halves = _mm256_maskz_loadu_epi16(lanes, first);
  if (type == Float::float16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline float load_float(const void* source, Float type, int64_t index) {
  return _mm512_cvtss_f32(load_floats(source, type, index, 1));
}

inline void store_float(void* target, Float type, int64_t index, float value) {
  char* const place = static_cast<char*>(target) + index * float_bytes(type);
  if (type == Float::float32) {
    __builtin_memcpy(place, &value, sizeof value);
    return;
  }
  uint16_t half;
  if (type == Float::float16) {
    half = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
  } else {
    const uint32_t bits = bits_of(value);
    half = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  __builtin_memcpy(place, &half, sizeof half);
}

}  // namespace
}  // namespace compressed_format
