// The zero point of one group of a weight, of either layout.
#pragma once

#include "cpu/weight.h"

namespace compressed_format {
namespace {

// For signed codes. A packed one is stored 2^(bits - 1) higher, in the words of its column of scales, which lie a row of
// words apart; one of odd width may straddle two of them.
inline int zero_point_at(const Weight& weight, int64_t scale_row, int64_t group) {
  if (weight.zero_points == ZeroPoints::int8) {
    return static_cast<const int8_t*>(weight.zero_point)[scale_row * weight.scale_columns + group];
  }
  const int64_t bit = scale_row * weight.bits, row_bytes = 4 * weight.scale_columns;
  const char* const source = static_cast<const char*>(weight.zero_point) + bit / 32 * row_bytes + 4 * group;
  uint32_t low, high = 0;
  __builtin_memcpy(&low, source, sizeof low);
  if (bit % 32 + weight.bits > 32) __builtin_memcpy(&high, source + row_bytes, sizeof high);
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  return static_cast<int>(both >> bit % 32 & ((1u << weight.bits) - 1u)) - (1 << (weight.bits - 1));
}

}  // namespace
}  // namespace compressed_format
