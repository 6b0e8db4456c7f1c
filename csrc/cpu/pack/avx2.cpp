#include <immintrin.h>

#include <cstdint>

namespace compressed_format {
namespace {

inline uint64_t join(uint64_t bytes, int bits) { return _pext_u64(bytes, 0x0101010101010101u * ((1u << bits) - 1)); }

int64_t pack_fours(const int8_t* codes, int64_t count, unsigned char* packed) {
  int64_t done = 0;
  for (; done + 32 <= count; done += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + done));
    const __m256i offset = _mm256_and_si256(_mm256_xor_si256(bytes, _mm256_set1_epi8(8)), _mm256_set1_epi8(15));
    // The second of two codes counts sixteen times.
    const __m256i pairs = _mm256_maddubs_epi16(offset, _mm256_set1_epi16(0x1001));
    const __m128i joined = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + done / 2), joined);
  }
  return done;
}

}  // namespace
}  // namespace compressed_format

#include "cpu/pack/pack.inl"

namespace compressed_format {

extern PackRow pack_row_avx2;
void pack_row_avx2(const int8_t* codes, int64_t count, int bits, void* packed, int64_t bytes) {
  pack_row_here(codes, count, bits, packed, bytes);
}

}  // namespace compressed_format
