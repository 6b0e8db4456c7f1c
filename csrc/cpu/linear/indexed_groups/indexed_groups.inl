// Weights whose columns say which group they lie in (g_idx), decoded with AVX-512: the scales of a row's groups are a
// table, which a permutation of words looks up for 32 columns at once. Where there are too many groups for that, or
// scales are wider than words, the table lies in memory, and is gathered from.

#include <immintrin.h>

#include "cpu/numbers.h"
#include "cpu/simd/avx512_floats.h"
#include "cpu/weight.h"

namespace compressed_format {
namespace {

constexpr int64_t indexed_columns = 64;    // what is decoded at once
constexpr int64_t groups_of_words = 128;   // in two pairs of registers
constexpr int64_t groups_of_memory = 1024;

inline bool is_indexed(const Weight& weight) {
  const bool integers = weight.type == Codes::packed || weight.type == Codes::int8;
  return integers && weight.g_idx != nullptr && weight.bitmask == nullptr && weight.scale != nullptr &&
         weight.block_rows == 1 && weight.scale_columns <= groups_of_memory;
}

inline bool looks_up_words(const Weight& weight) {
  return weight.scale_type != Float::float32 && weight.scale_columns <= groups_of_words;
}

// The groups of `count` columns from a first one on, as words; of those that are missing up to whole chunks, the first.
inline void write_groups(const Weight& weight, int64_t first, int64_t count, uint16_t* groups) {
  const auto* const source = reinterpret_cast<const char*>(weight.g_idx) + 4 * first;
  for (int64_t i = 0; i < ceil_div(count, indexed_columns) * indexed_columns; i += 16) {
    const int64_t left = count - i < 0 ? 0 : smaller(count - i, 16);
    const auto present = static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(left)));
    const __m512i found = _mm512_maskz_loadu_epi32(present, left == 0 ? source : source + 4 * i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(groups + i), _mm512_cvtepi32_epi16(found));
  }
}

inline __mmask64 lowest(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : _bzhi_u64(~uint64_t{0}, count < 0 ? 0u : static_cast<unsigned>(count));
}

// The zero points of sixteen groups of a row, or of those that there are.
inline __m512i zero_points_of(const Weight& weight, int64_t row, int64_t group) {
  const auto present = static_cast<__mmask16>(lowest(weight.scale_columns - group));
  if (weight.zero_points == ZeroPoints::int8) {
    const auto* const source = static_cast<const char*>(weight.zero_point) + row * weight.scale_columns + group;
    return _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(present, source));
  }
  const int64_t bit = row * weight.bits, row_bytes = 4 * weight.scale_columns;
  const char* const source = static_cast<const char*>(weight.zero_point) + bit / 32 * row_bytes + 4 * group;
  const int shift = static_cast<int>(bit % 32);
  __m512i stored = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(present, source), _mm_cvtsi32_si128(shift));
  if (shift + weight.bits > 32) {  // the rest is in the next word
    const __m512i next = _mm512_maskz_loadu_epi32(present, source + row_bytes);
    stored = _mm512_or_si512(stored, _mm512_sll_epi32(next, _mm_cvtsi32_si128(32 - shift)));
  }
  stored = _mm512_and_si512(stored, _mm512_set1_epi32((1 << weight.bits) - 1));
  return _mm512_sub_epi32(stored, _mm512_set1_epi32(1 << (weight.bits - 1)));
}

struct InWords {
  __m512i words[4];

  __attribute__((always_inline)) __m512i find(__m512i groups, bool many) const {
    const __m512i found = _mm512_permutex2var_epi16(words[0], groups, words[1]);
    if (!many) return found;
    const __m512i others = _mm512_permutex2var_epi16(words[2], groups, words[3]);
    return _mm512_mask_mov_epi16(found, _mm512_test_epi16_mask(groups, _mm512_set1_epi16(64)), others);
  }
};

// Scales and zero points of a row's groups. `type` is that of words, or float32 where they lie in memory.
template <Float type>
struct RowOfGroups {
  explicit RowOfGroups(const Weight& of) : weight(of) {}

  void load(int64_t row) {
    const int64_t groups = weight.scale_columns;
    const char* const source =
        static_cast<const char*>(weight.scale) + row * groups * float_bytes(weight.scale_type);
    const bool asymmetric = weight.zero_points != ZeroPoints::none;
    if constexpr (type != Float::float32) {
      for (int i = 0; i < 4; ++i) {
        const auto present = static_cast<__mmask32>(lowest(groups - 32 * i));
        scales.words[i] =
            present == 0 ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(present, source + 64 * i);
        if (!asymmetric || present == 0) continue;
        __m256i halves[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int half = 0; half < 2 && 32 * i + 16 * half < groups; ++half) {
          halves[half] = _mm512_cvtepi32_epi16(zero_points_of(weight, row, 32 * i + 16 * half));
        }
        zeros.words[i] = _mm512_inserti64x4(_mm512_castsi256_si512(halves[0]), halves[1], 1);
      }
    } else {
      for (int64_t group = 0; group < groups; group += 16) {
        _mm512_store_ps(scale_table + group, load_floats(weight.scale, weight.scale_type, row * groups + group,
                                                         groups - group));
        if (!asymmetric) continue;
        _mm512_store_ps(zero_table + group, _mm512_cvtepi32_ps(zero_points_of(weight, row, group)));
      }
    }
  }

  // (code - zero point) * scale of 64 columns, not rounded.
  __attribute__((always_inline)) inline void multiply(__m512i codes, const uint16_t* groups,
                                                      __m512 (&values)[4]) const {
    const bool asymmetric = weight.zero_points != ZeroPoints::none, many = weight.scale_columns > 64;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) values[i] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarter(codes, i)));
    if constexpr (type != Float::float32) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m512i of = _mm512_loadu_si512(groups + 32 * half);
        const __m512i found = scales.find(of, many);
        const __m512i zero = asymmetric ? zeros.find(of, many) : _mm512_setzero_si512();
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          __m512& value = values[2 * half + i];
          if (asymmetric) value = _mm512_sub_ps(value, _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(words(zero, i))));
          const __m256i part = words(found, i);
          value = _mm512_mul_ps(value, type == Float::float16
                                           ? _mm512_cvtph_ps(part)
                                           : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(part), 16)));
        }
      }
    } else {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512i of =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(groups + 16 * i)));
        if (asymmetric) values[i] = _mm512_sub_ps(values[i], _mm512_i32gather_ps(of, zero_table, 4));
        values[i] = _mm512_mul_ps(values[i], _mm512_i32gather_ps(of, scale_table, 4));
      }
    }
  }

 private:
  static __m128i quarter(__m512i bytes, int i) {
    switch (i) {
      case 0: return _mm512_castsi512_si128(bytes);
      case 1: return _mm512_extracti32x4_epi32(bytes, 1);
      case 2: return _mm512_extracti32x4_epi32(bytes, 2);
      default: return _mm512_extracti32x4_epi32(bytes, 3);
    }
  }
  static __m256i words(__m512i all, int half) {
    return half == 0 ? _mm512_castsi512_si256(all) : _mm512_extracti64x4_epi64(all, 1);
  }

  const Weight& weight;
  InWords scales = {}, zeros = {};
  alignas(64) float scale_table[type == Float::float32 ? groups_of_memory : 1];
  alignas(64) float zero_table[type == Float::float32 ? groups_of_memory : 1];
};

// Codes of 64 columns as bytes; those beyond the row are of no meaning.
class CodeBytes {
 public:
  explicit CodeBytes(const Weight& weight) : packed(weight.type == Codes::packed), bits(packed ? weight.bits : 8) {
    stored_bytes = packed ? ceil_div(weight.columns * bits, 8) : weight.columns;
    alignas(64) uint8_t places[64], distances[64];
    for (int i = 0; i < 64; ++i) {
      places[i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
      distances[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    place = _mm512_load_si512(places);
    distance = _mm512_load_si512(distances);
    mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    half = _mm512_set1_epi8(static_cast<char>(packed ? 1 << (bits - 1) : 0));
  }

  __attribute__((always_inline)) __m512i load(const char* row, int64_t column) const {
    const int64_t offset = column / 8 * bits;
    __m512i codes = _mm512_maskz_loadu_epi8(lowest(smaller(8 * bits, stored_bytes - offset)), row + offset);
    if (!packed) return codes;
    if (bits < 8) codes = _mm512_multishift_epi64_epi8(distance, _mm512_permutexvar_epi8(place, codes));
    return _mm512_sub_epi8(_mm512_and_si512(codes, mask), half);
  }

 private:
  bool packed;
  int bits;
  int64_t stored_bytes;
  __m512i place, distance, mask, half;
};

// What `action` makes of the table that a weight's groups are looked up in, whose type it is given.
template <Float type>
struct TableOf {
  using Rows = RowOfGroups<type>;
};
template <typename Action>
inline auto with_table(const Weight& weight, Action action) {
  if (!looks_up_words(weight)) return action(TableOf<Float::float32>{});
  if (weight.scale_type == Float::float16) return action(TableOf<Float::float16>{});
  return action(TableOf<Float::bfloat16>{});
}

}  // namespace
}  // namespace compressed_format
