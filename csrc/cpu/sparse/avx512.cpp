#include <immintrin.h>

#include <cstdint>

namespace compressed_format {
namespace {

inline int64_t count_bits(uint64_t bits) { return _mm_popcnt_u64(bits); }

inline uint64_t first_lanes(int count) { return _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count)); }

template <int bytes>
struct Block;

// Values are brought together in a register: a store that does it is slow.
template <>
struct Block<1> {
  static constexpr int64_t lanes = 64;
  __m512i v;

  static Block load(const void* source) { return {_mm512_loadu_si512(source)}; }
  static Block load(const void* source, int count) { return {_mm512_maskz_loadu_epi8(first_lanes(count), source)}; }
  void store(void* target, int count) const { _mm512_mask_storeu_epi8(target, first_lanes(count), v); }
  uint64_t nonzero(uint32_t sign) const {
    return _mm512_test_epi8_mask(v, _mm512_set1_epi8(static_cast<char>(~sign)));
  }
  Block keep(uint64_t bits) const { return {_mm512_maskz_compress_epi8(bits, v)}; }
};

template <>
struct Block<2> {
  static constexpr int64_t lanes = 32;
  __m512i v;

  static Block load(const void* source) { return {_mm512_loadu_si512(source)}; }
  static Block load(const void* source, int count) {
    return {_mm512_maskz_loadu_epi16(static_cast<__mmask32>(first_lanes(count)), source)};
  }
  void store(void* target) const { _mm512_storeu_si512(target, v); }
  void store(void* target, int count) const {
    _mm512_mask_storeu_epi16(target, static_cast<__mmask32>(first_lanes(count)), v);
  }
  uint64_t nonzero(uint32_t sign) const {
    return _mm512_test_epi16_mask(v, _mm512_set1_epi16(static_cast<int16_t>(~sign)));
  }
  // Whatever is not a number is larger than all others, and equal among itself.
  __m512i magnitude(uint32_t sign, uint32_t infinity) const {
    const __m512i all = _mm512_and_si512(v, _mm512_set1_epi16(static_cast<int16_t>(~sign)));
    return _mm512_min_epu16(all, _mm512_set1_epi16(static_cast<int16_t>(infinity + 1)));
  }
  uint64_t next_is_larger(uint32_t sign, uint32_t infinity) const {
    const __m512i mine = magnitude(sign, infinity), next = _mm512_ror_epi64(mine, 16);
    return _mm512_mask_cmpgt_epu16_mask(0x77777777u, next, mine) |
           _mm512_mask_cmpge_epu16_mask(0x88888888u, next, mine);
  }
  uint64_t next_but_one_is_larger(uint32_t sign, uint32_t infinity) const {
    const __m512i mine = magnitude(sign, infinity);
    return _mm512_cmpgt_epu16_mask(_mm512_ror_epi64(mine, 32), mine);
  }
  Block keep(uint64_t bits) const { return {_mm512_maskz_compress_epi16(static_cast<__mmask32>(bits), v)}; }
  Block zero_unless(uint64_t bits) const { return {_mm512_maskz_mov_epi16(static_cast<__mmask32>(bits), v)}; }
};

template <>
struct Block<4> {
  static constexpr int64_t lanes = 16;
  __m512i v;

  static Block load(const void* source) { return {_mm512_loadu_si512(source)}; }
  static Block load(const void* source, int count) {
    return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>(first_lanes(count)), source)};
  }
  void store(void* target) const { _mm512_storeu_si512(target, v); }
  void store(void* target, int count) const {
    _mm512_mask_storeu_epi32(target, static_cast<__mmask16>(first_lanes(count)), v);
  }
  uint64_t nonzero(uint32_t sign) const {
    return _mm512_test_epi32_mask(v, _mm512_set1_epi32(static_cast<int>(~sign)));
  }
  __m512i magnitude(uint32_t sign, uint32_t infinity) const {
    const __m512i all = _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(~sign)));
    return _mm512_min_epu32(all, _mm512_set1_epi32(static_cast<int>(infinity + 1)));
  }
  uint64_t next_is_larger(uint32_t sign, uint32_t infinity) const {
    const __m512i mine = magnitude(sign, infinity), next = _mm512_shuffle_epi32(mine, _MM_PERM_ADCB);
    return static_cast<uint64_t>(_mm512_mask_cmpgt_epu32_mask(0x7777u, next, mine)) |
           _mm512_mask_cmpge_epu32_mask(0x8888u, next, mine);
  }
  uint64_t next_but_one_is_larger(uint32_t sign, uint32_t infinity) const {
    const __m512i mine = magnitude(sign, infinity);
    return _mm512_cmpgt_epu32_mask(_mm512_shuffle_epi32(mine, _MM_PERM_BADC), mine);
  }
  Block keep(uint64_t bits) const { return {_mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), v)}; }
  Block zero_unless(uint64_t bits) const { return {_mm512_maskz_mov_epi32(static_cast<__mmask16>(bits), v)}; }
};

}  // namespace
}  // namespace compressed_format

#include "cpu/sparse/sparse.inl"

namespace compressed_format {

extern const SparseKernel sparse_avx512;
const SparseKernel sparse_avx512 = {prune_2_of_4, compress_2_of_4, find_values, keep_values};

}  // namespace compressed_format
