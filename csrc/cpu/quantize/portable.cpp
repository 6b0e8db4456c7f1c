#include "cpu/simd/portable.h"

namespace compressed_format {
namespace {

inline uint8_t to_float8(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 24 & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude >= 0x3c800000u) {  // 2**-6, the smallest normal one: three bits of mantissa stay
    return static_cast<uint8_t>(sign | (((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3)));
  }
  // Below, all steps are 2**-9, which is what the last bit of a float from 2**14 on counts.
  return static_cast<uint8_t>(sign | (bits_of(float_of(magnitude) + 0x1p14f) - bits_of(0x1p14f)));
}

inline void store_float8(void* target, F32 values, int count = lanes) {
  for (int i = 0; i < count; ++i) static_cast<uint8_t*>(target)[i] = to_float8(values.v[i]);
}

inline void store_nearest_int8(void* target, F32 values, int count = lanes) {
  store_int8(target, round_to_even(values), count);
}

inline F32 nearest_bfloat16(F32 values) { return as_bfloat16(values); }

inline uint16_t largest_half(const char* halves, int64_t count) {
  int largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t bits;
    std::memcpy(&bits, halves + 2 * i, sizeof bits);
    const int magnitude = bits & 0x7fff;
    largest = magnitude > largest ? magnitude : largest;
  }
  return static_cast<uint16_t>(largest);
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

extern const QuantizeKernel quantize_portable;
const QuantizeKernel quantize_portable = {find_extremes, find_scales, make_codes, quantize_rows};

}  // namespace compressed_format
