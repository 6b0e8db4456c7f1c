// Integer codes as bytes, and 16-bit floats as pairs of bytes, for processors that multiply bytes: what the kernels that
// do so share.
//
// Of x, each block of columns gets a scale of its own, a power of two, and becomes integers of 15 bits and a sign. They
// are exact for bfloat16 within a factor of 64 of the block's largest, and finer than float16 needs. An integer is
// split into two signed bytes, 256 * high + low, which two products of bytes multiply by the codes; sums within a block
// are exact. So the error lies far below that of weights rounded to 16 bits. What is not finite makes a sum NaN.
//
// Codes are taken as they are stored, without sign. What that adds to a sum is the same for all rows but for scale and
// zero point: it is taken off by the sum of x over each group.

#include <immintrin.h>

#include "cpu/linear/linear.h"
#include "cpu/simd/avx512_floats.h"
#include "cpu/zero_point.h"

namespace compressed_format {
namespace {

// How codes become vectors of bytes. Blocks are 128 columns, two vectors; or 64, one, where groups are that small and
// the two vectors would lie in different ones.
enum class Kind { nibbles, pairs, ones, windows, bytes, small_windows, small_bytes };

constexpr int vectors_of(Kind kind) { return kind == Kind::small_windows || kind == Kind::small_bytes ? 1 : 2; }
constexpr bool are_windows(Kind kind) { return kind == Kind::windows || kind == Kind::small_windows; }
constexpr bool are_bytes(Kind kind) { return kind == Kind::bytes || kind == Kind::small_bytes; }

inline int bits_of_codes(const Weight& weight) { return weight.type == Codes::packed ? weight.bits : 8; }

// What is added to values to store them without sign.
inline int offset_of(const Weight& weight) { return 1 << (bits_of_codes(weight) - 1); }

// The column, within its block, of a byte of a vector.
inline int column_of(Kind kind, int vector, int byte) {
  switch (kind) {
    case Kind::nibbles: return 2 * byte + vector;
    case Kind::pairs: return 4 * (byte % 32) + 2 * (byte / 32) + vector;
    case Kind::ones: return 8 * (byte % 16) + 2 * (byte / 16) + vector;
    default: return 64 * vector + byte;
  }
}

// What a block of a token becomes: integers of 15 bits and a sign, times a scale, as two bytes each.
struct Split {
  alignas(64) uint8_t high[128];
  alignas(64) uint8_t low[128];
  alignas(64) int32_t sums[8];  // of 16 integers each
  float scale;
};

// Splits `columns` values, 64 or 128, of which `left` are there; the others are zeros.
inline void split(const void* x, Float type, int64_t first, int64_t left, int64_t columns, Split& target) {
  __m512 values[8];
  __m512 largest = _mm512_setzero_ps();
  const int64_t vectors = columns / 16;
  for (int64_t i = 0; i < vectors; ++i) {
    values[i] = left <= 16 * i ? _mm512_setzero_ps() : load_floats(x, type, first + 16 * i, left - 16 * i);
    // As integers, so that one that is not a number is larger than all.
    largest = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(largest),
                                                   _mm512_castps_si512(_mm512_abs_ps(values[i]))));
  }
  const uint32_t magnitude = _mm512_reduce_max_epu32(_mm512_castps_si512(largest));
  // The largest becomes 2**14 to 2**15; half of that where rounding could make its high byte overflow. Numbers so
  // small that the scale would be subnormal lose bits.
  uint32_t exponent = (magnitude >> 23) + ((magnitude & 0x7fffffu) >= 0x7f0000u ? 1 : 0);
  if (exponent < 15) exponent = 15;
  const bool finite = magnitude < 0x7f800000u;
  target.scale = finite ? float_of((exponent - 14) << 23) : __builtin_nanf("");
  const __m512 factor = _mm512_set1_ps(finite ? float_of((268 - exponent) << 23) : 0.0f);
  for (int64_t i = 0; i < vectors; ++i) {
    const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], factor));
    const __m512i rounded = _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
    _mm_store_si128(reinterpret_cast<__m128i*>(target.low + 16 * i), _mm512_cvtepi32_epi8(integers));
    _mm_store_si128(reinterpret_cast<__m128i*>(target.high + 16 * i), _mm512_cvtepi32_epi8(rounded));
    target.sums[i] = _mm512_reduce_add_epi32(integers);
  }
}

inline __mmask64 first_bytes(int64_t count) {
  return count <= 0 ? 0 : _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count));
}

// Bytes of a block's codes, as vectors. `left` bytes of the row are there; the others are not read.
template <Kind kind>
struct Decoder {
  __m512i permutation, shifts, mask;
  __mmask64 stored;
  int64_t vector_bytes;

  explicit Decoder(const Weight& weight) {
    const int bits = bits_of_codes(weight);
    alignas(64) int8_t index[64];
    alignas(64) int8_t shift[64];
    for (int i = 0; i < 64; ++i) {
      index[i] = static_cast<int8_t>((i / 8 * bits + i % 8) % 64);  // eight codes to each eight bytes
      shift[i] = static_cast<int8_t>(i % 8 * bits);
    }
    permutation = _mm512_load_si512(index);
    shifts = _mm512_load_si512(shift);
    mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    if (kind == Kind::pairs) shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    if (kind == Kind::ones) {
      for (int i = 0; i < 64; ++i) shift[i] = static_cast<int8_t>(i % 2 == 0 ? i / 16 * 2 : 0);
      shifts = _mm512_load_si512(shift);
    }
    // Signed bytes differ from those without sign by the highest bit.
    if (are_bytes(kind)) mask = _mm512_set1_epi8(weight.type == Codes::int8 ? -128 : 0);
    vector_bytes = 8 * bits;
    stored = ~uint64_t{0} >> (64 - (are_windows(kind) || are_bytes(kind) ? 8 : 16) * bits);
  }

  template <bool whole>
  __attribute__((always_inline)) void operator()(const char* source, int64_t left, __m512i (&codes)[2]) const {
    if constexpr (are_windows(kind) || are_bytes(kind)) {
      for (int vector = 0; vector < vectors_of(kind); ++vector) {
        const char* const place = source + vector * vector_bytes;
        const __mmask64 present = whole ? stored : first_bytes(left - vector * vector_bytes) & stored;
        codes[vector] = whole && are_bytes(kind) ? _mm512_loadu_si512(place) : _mm512_maskz_loadu_epi8(present, place);
        if constexpr (are_windows(kind)) {
          const __m512i windows = _mm512_permutexvar_epi8(permutation, codes[vector]);
          codes[vector] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, windows), mask);
        } else {
          codes[vector] = _mm512_xor_si512(codes[vector], mask);
        }
      }
      return;
    }
    const __mmask64 present = whole ? stored : first_bytes(left);
    constexpr unsigned bits = kind == Kind::nibbles ? 4 : kind == Kind::pairs ? 2 : 1;
    if constexpr (kind == Kind::nibbles) {
      codes[0] = whole ? _mm512_loadu_si512(source) : _mm512_maskz_loadu_epi8(present, source);
    } else if constexpr (kind == Kind::pairs) {
      codes[0] = _mm512_broadcast_i64x4(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(present), source));
      codes[0] = _mm512_srlv_epi16(codes[0], shifts);
    } else {
      codes[0] = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(static_cast<__mmask16>(present), source));
      codes[0] = _mm512_srlv_epi16(codes[0], shifts);
    }
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(codes[0], bits), mask);
    codes[0] = _mm512_and_si512(codes[0], mask);
  }
};

// The scales of 16 segments from one on, for a row; zero beyond the last.
inline __m512 scales_at(const Weight& weight, int64_t segment_columns, int64_t scale_row, int64_t segment) {
  if (weight.scale_columns == 1) return _mm512_set1_ps(load_float(weight.scale, weight.scale_type, scale_row));
  const int64_t first = scale_row * weight.scale_columns;
  if (segment_columns == weight.block_columns) {
    const int64_t left = weight.scale_columns - segment;
    return left <= 0 ? _mm512_setzero_ps() : load_floats(weight.scale, weight.scale_type, first + segment, left);
  }
  // Each group has several segments: its scale is repeated. A half is added before a division by multiplication, which
  // is then far from rounding to the wrong side.
  const int64_t times = weight.block_columns / segment_columns;
  const int64_t group = segment / times;
  if (group >= weight.scale_columns) return _mm512_setzero_ps();
  const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 places = _mm512_add_ps(lanes, _mm512_set1_ps(static_cast<float>(segment - group * times) + 0.5f));
  const __m512i groups = _mm512_cvttps_epi32(_mm512_mul_ps(places, _mm512_set1_ps(1.0f / static_cast<float>(times))));
  const __m512 scales =
      load_floats(weight.scale, weight.scale_type, first + group, weight.scale_columns - group);
  return _mm512_permutexvar_ps(groups, scales);
}

// What is added to the values of 16 segments: the offset of codes, and the group's zero point. It is looked up for the
// first `count` of them.
inline __m512 offsets_at(const Weight& weight, int64_t segment_columns, int64_t scale_row, int64_t segment,
                         int64_t count) {
  if (weight.zero_points == ZeroPoints::none) return _mm512_set1_ps(static_cast<float>(offset_of(weight)));
  alignas(64) int32_t found[16] = {};
  for (int64_t i = 0; i < smaller(16, count); ++i) {
    const int64_t group = weight.scale_columns == 1 ? 0 : (segment + i) * segment_columns / weight.block_columns;
    found[i] = group < weight.scale_columns ? zero_point_at(weight, scale_row, group) : 0;
  }
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(found), _mm512_set1_epi32(offset_of(weight))));
}

}  // namespace
}  // namespace compressed_format
