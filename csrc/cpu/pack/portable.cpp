#include <cstdint>

namespace compressed_format {
namespace {

// Neighbours close up, then pairs of them, then the two halves.
inline uint64_t join(uint64_t bytes, int bits) {
  bytes &= 0x0101010101010101u * ((1u << bits) - 1);
  bytes = (bytes & 0x00ff00ff00ff00ffu) | (bytes & 0xff00ff00ff00ff00u) >> (8 - bits);
  bytes = (bytes & 0x0000ffff0000ffffu) | (bytes & 0xffff0000ffff0000u) >> (16 - 2 * bits);
  return (bytes & 0x00000000ffffffffu) | (bytes & 0xffffffff00000000u) >> (32 - 4 * bits);
}

// The loop is as plain as it is because compilers turn it into vector instructions as it stands; `__restrict` tells
// them that writing a byte changes no code.
int64_t pack_fours(const int8_t* __restrict codes, int64_t count, unsigned char* __restrict packed) {
  for (int64_t i = 0; i < count / 2; ++i) {
    const unsigned low = static_cast<unsigned char>(codes[2 * i]) ^ 8u;
    const unsigned high = static_cast<unsigned char>(codes[2 * i + 1]) ^ 8u;
    packed[i] = static_cast<unsigned char>((low & 15u) | high << 4);
  }
  return count / 2 * 2;
}

}  // namespace
}  // namespace compressed_format

#include "cpu/pack/pack.inl"

namespace compressed_format {

extern PackRow pack_row_portable;
void pack_row_portable(const int8_t* codes, int64_t count, int bits, void* packed, int64_t bytes) {
  pack_row_here(codes, count, bits, packed, bytes);
}

}  // namespace compressed_format
