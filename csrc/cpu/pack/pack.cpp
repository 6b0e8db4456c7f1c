#include "cpu/pack/pack.h"

#include <algorithm>
#include <bit>

namespace compressed_format {
namespace {

// Codes are written byte by byte, the first code of a byte into its low half. That makes the little-endian words of
// the layout on a little-endian machine only.
static_assert(std::endian::native == std::endian::little, "a big-endian machine has to run the reference");

// Offset binary is `code + 8`; modulo 16 that flips bit 3 and leaves the others.
constexpr unsigned char low_half(signed char code) { return (static_cast<unsigned char>(code) ^ 8u) & 15u; }

static_assert(low_half(-8) == 0 && low_half(-1) == 7 && low_half(0) == 8 && low_half(7) == 15);

// Two codes a byte. The loop is as plain as it is because compilers turn it into vector instructions as it stands;
// `__restrict` tells them that writing a byte changes no code.
void pack_pairs(const int8_t* __restrict codes, unsigned char* __restrict bytes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    bytes[i] = static_cast<unsigned char>(low_half(codes[2 * i]) | low_half(codes[2 * i + 1]) << 4);
  }
}

// The last word of a row whose length is no multiple of eight: `size` codes, then zero bits.
void pack_tail(const int8_t* codes, unsigned char* bytes, int64_t size) {
  std::fill_n(bytes, 4, static_cast<unsigned char>(0));
  for (int64_t i = 0; i < size; ++i) {
    bytes[i / 2] = static_cast<unsigned char>(bytes[i / 2] | low_half(codes[i]) << (i % 2 * 4));
  }
}

}  // namespace

PackKernel select_pack_kernel(int64_t bits) { return bits == 4 ? PackKernel::four_bits : PackKernel::none; }

void pack_four_bits(const int8_t* codes, int64_t size, void* words, int64_t first, int64_t last) {
  auto* const bytes = static_cast<unsigned char*>(words);
  if (size % 8 == 0) {  // rows leave no gaps: the matrix is one row
    pack_pairs(codes + first * 8, bytes + first * 4, (last - first) * 4);
    return;
  }
  const int64_t row_words = four_bit_words(size);
  for (int64_t word = first; word < last;) {
    const int64_t row = word / row_words;
    const int64_t begin = word - row * row_words;
    const int64_t end = std::min(row_words, begin + (last - word));
    const int64_t whole = std::min(end, row_words - 1);
    const int8_t* const row_codes = codes + row * size;
    pack_pairs(row_codes + begin * 8, bytes + word * 4, (whole - begin) * 4);
    if (end == row_words) {
      pack_tail(row_codes + whole * 8, bytes + (word + whole - begin) * 4, size - whole * 8);
    }
    word += end - begin;
  }
}

}  // namespace compressed_format
