#include "cpu/simd/portable.h"

namespace compressed_format {
namespace {

inline float to_float8(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return value;  // not a number
  if (magnitude >= 0x3c800000u) {             // 2**-6, the smallest normal one: three bits of mantissa stay
    return float_of((bits + 0x7ffffu + (bits >> 20 & 1u)) & 0xfff00000u);
  }
  // Below, all steps are 2**-9, which is what the last bit of a float from 2**14 on counts.
  return float_of(bits_of((float_of(magnitude) + 0x1p14f) - 0x1p14f) | sign);
}

inline F32 as_float8(F32 a) { return each([&](int i) { return to_float8(a.v[i]); }); }

}  // namespace
}  // namespace compressed_format

#include "cpu/activations/activations.inl"

namespace compressed_format {

extern const ActivationKernel activations_portable;
const ActivationKernel activations_portable = {find_ranges, fake_quantize, make_codes};

}  // namespace compressed_format
