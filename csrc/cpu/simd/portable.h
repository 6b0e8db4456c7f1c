// Vectors of floats without instructions of any one processor: what compilers make of plain loops over eight lanes.
// simd/avx2.h and simd/avx512.h define the same names for theirs. A kernel includes exactly one of the three.
//
// Everything that rounds does so once, to nearest, ties to even, as IEEE 754 says; nothing is flushed to zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/numbers.h"

namespace compressed_format {
namespace {

constexpr int lanes = 8;

struct F32 {
  float v[lanes];
};

template <typename Operation>
inline F32 each(Operation operation) {
  F32 result;
  for (int i = 0; i < lanes; ++i) result.v[i] = operation(i);
  return result;
}

inline float bfloat16_to_float(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // not a number
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exponent and mantissa where a float has them; the difference of the biases is a factor, exact for subnormals too.
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below the smallest normal number: adding a power of two leaves the right bits
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline uint16_t load_half(const void* source, int index) {
  uint16_t half;
  std::memcpy(&half, static_cast<const char*>(source) + 2 * index, sizeof half);
  return half;
}

inline F32 zero() { return each([](int) { return 0.0f; }); }
inline F32 broadcast(float value) { return each([=](int) { return value; }); }

// Pointers may have any alignment. With a count, that many lanes are read or written and memory beyond them is not
// touched; lanes that are not read are zero.
inline F32 load_float32(const void* source, int count = lanes) {
  F32 result = zero();
  std::memcpy(result.v, source, sizeof(float) * static_cast<unsigned>(count));
  return result;
}
inline F32 load_bfloat16(const void* source, int count = lanes) {
  return each([=](int i) { return i < count ? bfloat16_to_float(load_half(source, i)) : 0.0f; });
}
inline F32 load_float16(const void* source, int count = lanes) {
  return each([=](int i) { return i < count ? float16_to_float(load_half(source, i)) : 0.0f; });
}
inline F32 load_int8(const void* source, int count = lanes) {
  const auto* const codes = static_cast<const int8_t*>(source);
  return each([=](int i) { return i < count ? static_cast<float>(codes[i]) : 0.0f; });
}

inline void store_float32(void* target, F32 a, int count = lanes) {
  std::memcpy(target, a.v, sizeof(float) * static_cast<unsigned>(count));
}
inline void store_bfloat16(void* target, F32 a, int count = lanes) {
  for (int i = 0; i < count; ++i) {
    const uint16_t half = float_to_bfloat16(a.v[i]);
    std::memcpy(static_cast<char*>(target) + 2 * i, &half, sizeof half);
  }
}
inline void store_float16(void* target, F32 a, int count = lanes) {
  for (int i = 0; i < count; ++i) {
    const uint16_t half = float_to_float16(a.v[i]);
    std::memcpy(static_cast<char*>(target) + 2 * i, &half, sizeof half);
  }
}
// Whole numbers within -128 to 127.
inline void store_int8(void* target, F32 a, int count = lanes) {
  for (int i = 0; i < count; ++i) static_cast<int8_t*>(target)[i] = static_cast<int8_t>(a.v[i]);
}

inline F32 operator+(F32 a, F32 b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline F32 operator-(F32 a, F32 b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline F32 operator*(F32 a, F32 b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline F32 operator/(F32 a, F32 b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
// The second where one of them is not a number, as the processors' own instructions do.
inline F32 minimum(F32 a, F32 b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F32 maximum(F32 a, F32 b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F32 absolute(F32 a) { return each([&](int i) { return float_of(bits_of(a.v[i]) & 0x7fffffffu); }); }
// a * b + c, rounded once where the processor can (here it is rounded twice): for sums, never for codes or scales.
inline F32 multiply_add(F32 a, F32 b, F32 c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
// To a whole number, ties to even, with the sign of what is rounded to zero. Magnitudes of 2**22 and more do not occur.
inline F32 round_to_even(F32 a) {
  constexpr float magic = 0x1.8p23f;
  return each([&](int i) {
    return float_of(bits_of((a.v[i] + magic) - magic) | (bits_of(a.v[i]) & 0x80000000u));
  });
}
// To the nearest bfloat16 or float16, and back.
inline F32 as_bfloat16(F32 a) { return each([&](int i) { return bfloat16_to_float(float_to_bfloat16(a.v[i])); }); }
inline F32 as_float16(F32 a) { return each([&](int i) { return float16_to_float(float_to_float16(a.v[i])); }); }

inline float sum(F32 a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline float smallest(F32 a) {
  float found = a.v[0];
  for (int i = 1; i < lanes; ++i) found = a.v[i] < found ? a.v[i] : found;
  return found;
}
inline float largest(F32 a) {
  float found = a.v[0];
  for (int i = 1; i < lanes; ++i) found = a.v[i] > found ? a.v[i] : found;
  return found;
}

}  // namespace
}  // namespace compressed_format
