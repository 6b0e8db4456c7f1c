// Packs rows of codes of every width, by every level and in several threads, and compares with a definition that goes
// bit by bit. Sanitizers see what a comparison cannot, and an emulator of an older processor stops at an instruction
// that it does not know.

#include "cpu/pack/pack.h"

#include "driver.h"

using namespace driver;

namespace {

Tensor defined(const Tensor& codes, int bits, int64_t rows, int64_t size, int64_t row_bytes) {
  Tensor packed(rows * row_bytes);
  packed.clear();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t bit = 0; bit < size * bits; ++bit) {
      const int code = codes.data()[row * size + bit / bits] + (1 << (bits - 1));
      auto& byte = packed.data()[row * row_bytes + bit / 8];
      byte = static_cast<unsigned char>(byte | (code >> (bit % bits) & 1) << (bit % 8));
    }
  }
  return packed;
}

bool packs_right(int bits, int64_t rows, int64_t size) {
  const Tensor codes(rows * size);  // bits beyond the width are dropped, so that any byte is a code
  const int64_t row_bytes = packed_words(size, bits) * 4;
  const Tensor expected = defined(codes, bits, rows, size, row_bytes);
  for (PackRow* const pack : levels(pack_row)) {
    Tensor packed(rows * row_bytes);
    in_threads(rows, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const auto* const from = reinterpret_cast<const int8_t*>(codes.data()) + row * size;
        // Rows may be cut, as those are that wait in the cache.
        const int64_t cut = size / codes_per_cut / 2 * codes_per_cut, written = cut / 8 * bits;
        unsigned char* const to = packed.data() + row * row_bytes;
        if (cut > 0) pack(from, cut, bits, to, written);
        pack(from + cut, size - cut, bits, to + written, row_bytes - written);
      }
    });
    if (!(packed == expected)) {
      std::printf("wrong: %d rows of %d codes of %d bits\n", int(rows), int(size), bits);
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t size = 1; size <= 140; ++size) {
      if (!packs_right(bits, 1 + size % 5, size)) return 1;
    }
    for (int64_t size : {1000, 4097}) {
      if (!packs_right(bits, 7, size)) return 1;
    }
  }
  return 0;
}
