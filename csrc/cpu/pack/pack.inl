// The kernel of pack.h. Whoever includes this has defined
//   `uint64_t join(uint64_t bytes, int bits)`: the low `bits` of each of eight bytes, one after the other;
//   `int64_t pack_fours(const int8_t* codes, int64_t count, unsigned char* packed)`: codes of four bits, as many as
//   fill whole vectors, and how many those are.

#include "cpu/pack/pack.h"

namespace compressed_format {
namespace {

inline uint64_t load_codes(const int8_t* codes) {
  uint64_t bytes;
  __builtin_memcpy(&bytes, codes, sizeof bytes);
  return bytes;
}

// Eight codes fill `bits` bytes. Offset binary is `code + half`; modulo the width that flips the highest bit, and
// leaves the others.
template <int bits>
void pack_codes_of(const int8_t* codes, int64_t count, unsigned char* packed, int64_t bytes) {
  constexpr uint64_t half = 0x0101010101010101u << (bits - 1);
  int64_t done = 0, written = 0;
  if constexpr (bits == 4) {
    done = pack_fours(codes, count, packed);
    written = done / 2;
  }
  // Eight bytes at a time as long as the row has room: those too many are zero, and the next ones go over them.
  for (; done + 8 <= count && written + 8 <= bytes; done += 8, written += bits) {
    const uint64_t joined = join(load_codes(codes + done) ^ half, bits);
    __builtin_memcpy(packed + written, &joined, sizeof joined);
  }
  for (; done < count; done += 8) {
    const int64_t left = count - done < 8 ? count - done : 8;
    uint64_t part = 0;
    __builtin_memcpy(&part, codes + done, static_cast<unsigned>(left));
    part ^= left == 8 ? half : half & ((uint64_t{1} << (8 * left)) - 1);
    const uint64_t joined = join(part, bits);
    const int64_t room = bytes - written < bits ? bytes - written : bits;
    __builtin_memcpy(packed + written, &joined, static_cast<unsigned>(room));
    written += room;
  }
  for (; written < bytes; ++written) packed[written] = 0;
}

void pack_row_here(const int8_t* codes, int64_t count, int bits, void* target, int64_t bytes) {
  auto* const packed = static_cast<unsigned char*>(target);
  switch (bits) {
    case 1: return pack_codes_of<1>(codes, count, packed, bytes);
    case 2: return pack_codes_of<2>(codes, count, packed, bytes);
    case 3: return pack_codes_of<3>(codes, count, packed, bytes);
    case 4: return pack_codes_of<4>(codes, count, packed, bytes);
    case 5: return pack_codes_of<5>(codes, count, packed, bytes);
    case 6: return pack_codes_of<6>(codes, count, packed, bytes);
    case 7: return pack_codes_of<7>(codes, count, packed, bytes);
    default: return pack_codes_of<8>(codes, count, packed, bytes);
  }
}

}  // namespace
}  // namespace compressed_format
