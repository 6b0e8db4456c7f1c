// Packs rows of every short length, shared out at every place, into buffers with not a byte to spare, and compares with
// a definition that goes bit by bit. Meant to be built with sanitizers: those see what a comparison cannot.

#include <cstdio>
#include <memory>
#include <vector>

#include "cpu/pack/pack.h"

using compressed_format::four_bit_words;
using compressed_format::pack_four_bits;

namespace {

std::vector<unsigned char> defined_bytes(const int8_t* codes, int64_t rows, int64_t size) {
  const int64_t row_bytes = four_bit_words(size) * 4;
  std::vector<unsigned char> bytes(static_cast<size_t>(rows * row_bytes), 0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t bit = 0; bit < size * 4; ++bit) {
      const int code = codes[row * size + bit / 4] + 8;
      auto& byte = bytes[static_cast<size_t>(row * row_bytes + bit / 8)];
      byte = static_cast<unsigned char>(byte | (code >> (bit % 4) & 1) << (bit % 8));
    }
  }
  return bytes;
}

bool packs_right(int64_t rows, int64_t size, int64_t step) {
  // An array of its own for each, so that reading or writing one byte too far is seen; codes start at an odd address.
  const std::unique_ptr<int8_t[]> codes(new int8_t[static_cast<size_t>(rows * size + 1)]);
  int8_t* const first_code = codes.get() + 1;
  for (int64_t i = 0; i < rows * size; ++i) {
    first_code[i] = static_cast<int8_t>((i * 7 + i / 16) % 16 - 8);
  }
  const auto expected = defined_bytes(first_code, rows, size);
  std::vector<unsigned char> bytes(expected.size(), 0xAA);
  const int64_t words = rows * four_bit_words(size);
  for (int64_t first = 0; first < words; first += step) {
    pack_four_bits(first_code, size, bytes.data(), first, first + step < words ? first + step : words);
  }
  return bytes == expected;
}

}  // namespace

int main() {
  for (int64_t rows = 0; rows <= 4; ++rows) {
    for (int64_t size = 0; size <= 100; ++size) {
      for (int64_t step = 1; step <= 30; ++step) {
        if (!packs_right(rows, size, step)) {
          std::printf("wrong: %d rows of %d codes, %d words at a time\n", int(rows), int(size), int(step));
          return 1;
        }
      }
    }
  }
  return 0;
}
