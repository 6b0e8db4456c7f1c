#include <immintrin.h>

#include <cstdint>

namespace compressed_format {
namespace {

inline uint64_t join(uint64_t bytes, int bits) { return _pext_u64(bytes, 0x0101010101010101u * ((1u << bits) - 1)); }

int64_t pack_fours(const int8_t* codes, int64_t count, unsigned char* packed) {
  int64_t done = 0;
  for (; done + 64 <= count; done += 64) {
    const __m512i bytes = _mm512_loadu_si512(codes + done);
    const __m512i offset = _mm512_and_si512(_mm512_xor_si512(bytes, _mm512_set1_epi8(8)), _mm512_set1_epi8(15));
    // The second of two codes counts sixteen times.
    const __m512i pairs = _mm512_maddubs_epi16(offset, _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + done / 2), _mm512_cvtepi16_epi8(pairs));
  }
  return done;
}

}  // namespace
}  // namespace compressed_format

#include "cpu/pack/pack.inl"

namespace compressed_format {

extern PackRow pack_row_avx512;
void pack_row_avx512(const int8_t* codes, int64_t count, int bits, void* packed, int64_t bytes) {
  pack_row_here(codes, count, bits, packed, bytes);
}

}  // namespace compressed_format
