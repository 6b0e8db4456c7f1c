#include "ops/bitmask.h"

#include <bit>
#include <cstring>

namespace compressed_format {

int64_t count_bits(const uint8_t* mask, int64_t columns) {
  int64_t bits = 0;
  int64_t i = 0;
  for (; i + 8 <= columns / 8; i += 8) {
    uint64_t word;
    std::memcpy(&word, mask + i, sizeof word);
    bits += std::popcount(word);
  }
  for (; i < columns / 8; ++i) bits += std::popcount(mask[i]);
  if (columns % 8 != 0) bits += std::popcount(static_cast<unsigned>(mask[i]) & ((1u << columns % 8) - 1));
  return bits;
}

int64_t find_uneven_quad(const uint8_t* mask, int64_t columns) {
  constexpr uint64_t ones = 0x1111111111111111;
  const auto is_even = [](uint64_t word) {
    // Pairs of bits are counted, then fours: each must come to two.
    const uint64_t pairs = (word & 0x5555555555555555) + (word >> 1 & 0x5555555555555555);
    return (pairs & 0x3333333333333333) + (pairs >> 2 & 0x3333333333333333) == 2 * ones;
  };
  int64_t i = 0;
  for (; i + 8 <= columns / 8; i += 8) {
    uint64_t word;
    std::memcpy(&word, mask + i, sizeof word);
    if (!is_even(word)) break;
  }
  for (int64_t quad = 2 * i; quad < columns / 4; ++quad) {
    if (std::popcount(static_cast<unsigned>(mask[quad / 2] >> 4 * (quad % 2)) & 15u) != 2) return quad;
  }
  return -1;
}

}  // namespace compressed_format
