// Pairs whose weights are decoded from codes in an order of their own, which is faster; x is packed in the same order,
// so that nobody has to undo it.

#include "cpu/simd/avx512_floats.h"
#include "cpu/zero_point.h"

namespace compressed_format {
namespace {

// Packs x for decoders whose order repeats after chunks of columns. Of 32 columns, `order` says which come first, and
// step_of(left, pair) where each pair goes that these make.
template <typename StepOf>
inline void pack_in_order(const Linear& problem, int64_t first_token, int tokens, char* panel, int64_t columns,
                          __m512i order, StepOf step_of) {
  for (int64_t left = 0; left < columns; left += 2 * lanes) {
    F32 square[lanes];
    load_square(problem, first_token, tokens, left, square);
    for (F32& token : square) {
      token.v = _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(token.v)));
    }
    transpose(square);
    for (int pair = 0; pair < lanes; ++pair) {
      store_float32(panel + step_of(left, pair) * panel_step_bytes, square[pair]);
    }
  }
}

// Which of 32 columns come first: every `stride`-th, then the one after each of these, and so on.
inline __m512i every(int stride) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) {
    const int places = 32 / stride;
    order[i] = static_cast<uint16_t>(i % places * stride + i / places);
  }
  return _mm512_load_si512(order);
}

// What codes of up to five bits stand for, as dequantizing rounds it. A group's values are made once, into a table that
// finds 32 of them with one instruction. The processor's own conversion to bfloat16 takes subnormal numbers for zeros;
// so does its multiplication.
class Values {
 public:
  explicit Values(const Weight& of) : weight(of) {
    alignas(64) float codes[32];
    for (int i = 0; i < 32; ++i) {
      codes[i] = static_cast<float>((i & ((1 << of.bits) - 1)) - (1 << (of.bits - 1)));
    }
    low = load_float32(codes);
    high = load_float32(codes + lanes);
  }

  // Those of 4 bits, in the order of their codes.
  __attribute__((always_inline)) __m256i sixteen(int64_t scale_row, int64_t group) const {
    const __m256bh halves = _mm512_cvtneps_pbh(product(low, scale_row, group).v);
    __m256i words;
    __builtin_memcpy(&words, &halves, sizeof words);
    return words;
  }

  // Those of up to 5 bits, of which the index may have more that do not matter.
  __attribute__((always_inline)) __m512i thirty_two(int64_t scale_row, int64_t group) const {
    const F32 first = product(low, scale_row, group), second = product(high, scale_row, group);
    const __m512bh halves = _mm512_cvtne2ps_pbh(second.v, first.v);
    __m512i words;
    __builtin_memcpy(&words, &halves, sizeof words);
    return words;
  }

 private:
  F32 product(F32 codes, int64_t scale_row, int64_t group) const {
    if (weight.zero_points != ZeroPoints::none) {
      codes = codes - broadcast(static_cast<float>(zero_point_at(weight, scale_row, group)));
    }
    const float scale = load_float(weight.scale, weight.scale_type, scale_row * weight.scale_columns + group);
    const F32 exact = codes * broadcast(scale);
    return weight.scale_type == Float::float16 ? as_float16(exact) : exact;
  }

  const Weight& weight;
  F32 low, high;
};

inline bool is_regular(const Weight& weight) {
  return weight.g_idx == nullptr && weight.bitmask == nullptr && weight.scale != nullptr;
}

inline int64_t scale_row_of(const Weight& weight, int64_t row) {
  return weight.block_rows == 1 ? row : row / weight.block_rows;  // a division would be a part of what a row takes
}

inline __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count));
}

// The group that a column lies in, of columns visited chunk by chunk.
struct GroupOfColumn {
  GroupOfColumn(const Weight& weight, int64_t column)
      : columns(weight.block_columns), group(column / columns), end((group + 1) * columns) {}
  // Whether `column` begins a group, which then is the one that it lies in.
  bool advance(int64_t column) {
    if (column < end) return false;
    ++group;
    end += columns;
    return true;
  }
  int64_t columns, group, end;
};

// Weights of four bits. The index of the instruction is the lowest bits of each 16: of 128 columns, it finds every
// fourth first, then the one after each of these, and so on.
struct NibblePairs {
  static constexpr int64_t sum_steps = block_steps;
  static constexpr bool scales_sums = false;
  static constexpr int64_t chunk_columns = 128;
  static constexpr int64_t chunk_steps = chunk_columns / pair_columns;

  static bool takes(const Weight& weight) {
    const int64_t columns = weight.block_columns;
    const bool whole = columns % chunk_columns == 0 || columns == 64 || columns == 32 || columns >= weight.columns;
    return weight.type == Codes::packed && weight.bits == 4 && is_regular(weight) && whole;
  }

  static int64_t steps(const Linear& problem) {
    return ceil_div(problem.weight->columns, chunk_columns) * chunk_steps;
  }
  static int64_t panel_steps(const Linear& problem) { return steps(problem); }
  static F32 broadcast_step(const char* weights) { return broadcast_pair(weights); }
  static F32 multiply(F32 weights, F32 x, F32 sum) { return multiply_pairs(weights, x, sum); }

  static void pack(const Linear& problem, int64_t first_token, int tokens, char* panel) {
    pack_in_order(problem, first_token, tokens, panel, steps(problem) * pair_columns, every(4),
                  [](int64_t left, int pair) {
                    // A quarter of 32 columns goes to the quarter of the chunk.
                    return left / chunk_columns * chunk_steps + left % chunk_columns / 8 + pair / 4 * 16 + pair % 4;
                  });
  }

  // How many groups a chunk has: 1, 2 or 4.
  template <int groups>
  static void decode_rows(const Weight& weight, int64_t first_row, int64_t last_row, int64_t left, int64_t right,
                          char* tile) {
    alignas(64) uint16_t tables[32];
    for (int i = 0; i < 32; ++i) tables[i] = static_cast<uint16_t>(i * groups / 32 * 16);
    const __m512i table_of_lane = _mm512_load_si512(tables);
    const __m512i nibble = _mm512_set1_epi16(15);
    const Values values_of(weight);
    const GroupOfColumn first_group(weight, left);
    // A chunk's groups; beyond the last one that there is, the last one again.
    const auto both = [&](int64_t scale_row, int64_t group) __attribute__((always_inline)) {
      const int64_t last = weight.scale_columns - 1;
      const __m256i low = values_of.sixteen(scale_row, smaller(group, last));
      return _mm512_inserti64x4(_mm512_castsi256_si512(low), values_of.sixteen(scale_row, smaller(group + 1, last)), 1);
    };
    for (int64_t row = first_row; row < last_row; ++row, tile += tile_row_bytes) {
      const auto* const codes = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
      const int64_t scale_row = scale_row_of(weight, row);
      GroupOfColumn group = first_group;
      // A single table is there twice, so that the bit above a code does not matter.
      __m512i table = _mm512_broadcast_i64x4(values_of.sixteen(scale_row, group.group));
      __m512i table_2 = table;
      char* out = tile;
      for (int64_t column = left; column < right; column += chunk_columns, out += 2 * chunk_columns) {
        if constexpr (groups == 1) {
          if (group.advance(column)) table = _mm512_broadcast_i64x4(values_of.sixteen(scale_row, group.group));
        } else {
          const int64_t first = column / (chunk_columns / groups);
          table = both(scale_row, first);
          if constexpr (groups == 4) table_2 = both(scale_row, first + 2);
        }
        const int64_t count = weight.columns - column;
        const __m512i words = _mm512_maskz_loadu_epi8(first_bytes((count + 1) / 2), codes + column / 2);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __m512i index = _mm512_srli_epi16(words, static_cast<unsigned>(4 * i));
          if constexpr (groups > 1) index = _mm512_or_si512(_mm512_and_si512(index, nibble), table_of_lane);
          __m512i values;
          if constexpr (groups == 4) values = _mm512_permutex2var_epi16(table, index, table_2);
          else values = _mm512_permutexvar_epi16(index, table);
          // Beyond the last column lie zeros, not what a code of 0 would stand for: it might be infinite.
          if (count < chunk_columns) values = _mm512_maskz_mov_epi16(first_columns((count - i + 3) / 4), values);
          _mm512_storeu_si512(out + 64 * i, values);
        }
      }
    }
  }

  static void decode(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_step, int64_t last_step,
                     char* tile) {
    const int64_t left = first_step * pair_columns, right = last_step * pair_columns;
    if (weight.block_columns == 64 && weight.columns > 64) {
      decode_rows<2>(weight, first_row, last_row, left, right, tile);
    } else if (weight.block_columns == 32 && weight.columns > 32) {
      decode_rows<4>(weight, first_row, last_row, left, right, tile);
    } else {
      decode_rows<1>(weight, first_row, last_row, left, right, tile);
    }
  }
};

// Weights of 1, 2, 3 or 5 bits. Eight codes fill as many bytes as they have bits: these go into 64 bits of a register,
// out of which one instruction takes eight bytes that begin at any bit. The index is the lowest bits of each 16: of 64
// columns, it finds the even ones first.
struct WindowPairs {
  static constexpr int64_t sum_steps = block_steps;
  static constexpr bool scales_sums = false;
  static constexpr int64_t chunk_columns = 64;
  static constexpr int64_t chunk_steps = chunk_columns / pair_columns;

  static bool takes(const Weight& weight) {
    const bool whole = weight.block_columns % chunk_columns == 0 || weight.block_columns >= weight.columns;
    return weight.type == Codes::packed && weight.bits <= 5 && is_regular(weight) && whole;
  }

  static int64_t steps(const Linear& problem) {
    return ceil_div(problem.weight->columns, chunk_columns) * chunk_steps;
  }
  static int64_t panel_steps(const Linear& problem) { return steps(problem); }
  static F32 broadcast_step(const char* weights) { return broadcast_pair(weights); }
  static F32 multiply(F32 weights, F32 x, F32 sum) { return multiply_pairs(weights, x, sum); }

  static void pack(const Linear& problem, int64_t first_token, int tokens, char* panel) {
    pack_in_order(problem, first_token, tokens, panel, steps(problem) * pair_columns, every(2),
                  [](int64_t left, int pair) {
                    // A half of 32 columns goes to the half of the chunk.
                    return left / chunk_columns * chunk_steps + left % chunk_columns / 4 + pair / 8 * 16 + pair % 8;
                  });
  }

  static void decode(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_step, int64_t last_step,
                     char* tile) {
    const int64_t left = first_step * pair_columns, right = last_step * pair_columns;
    alignas(64) uint8_t places[64], shifts[64];
    for (int i = 0; i < 64; ++i) {
      places[i] = static_cast<uint8_t>(i / 8 * weight.bits + i % 8);
      shifts[i] = static_cast<uint8_t>(i % 8 * weight.bits);
    }
    const __m512i place = _mm512_load_si512(places), shift = _mm512_load_si512(shifts);
    const int64_t chunk_bytes = 8 * weight.bits, stored_bytes = ceil_div(weight.columns * weight.bits, 8);
    const Values values_of(weight);
    const GroupOfColumn first_group(weight, left);
    for (int64_t row = first_row; row < last_row; ++row, tile += tile_row_bytes) {
      const auto* const codes = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
      const int64_t scale_row = scale_row_of(weight, row);
      GroupOfColumn group = first_group;
      __m512i table = values_of.thirty_two(scale_row, group.group);
      char* out = tile;
      for (int64_t column = left; column < right; column += chunk_columns, out += 2 * chunk_columns) {
        if (group.advance(column)) table = values_of.thirty_two(scale_row, group.group);
        const int64_t offset = column / 8 * weight.bits;
        const __mmask64 present = first_bytes(smaller(chunk_bytes, stored_bytes - offset));
        const __m512i stored = _mm512_maskz_loadu_epi8(present, codes + offset);
        const __m512i index = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(place, stored));
        __m512i even = _mm512_permutexvar_epi16(index, table);
        __m512i odd = _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), table);
        const int64_t count = weight.columns - column;
        if (count < chunk_columns) {  // as for four bits
          even = _mm512_maskz_mov_epi16(first_columns((count + 1) / 2), even);
          odd = _mm512_maskz_mov_epi16(first_columns(count / 2), odd);
        }
        _mm512_storeu_si512(out, even);
        _mm512_storeu_si512(out + 64, odd);
      }
    }
  }
};

// Codes of one byte with a scale for each row. They are exact in bfloat16, so that sums are scaled instead, which errs
// less. Tables give the two bytes of each value; interleaving them goes by quarters of a register, so that of 16
// columns the first eight come first.
struct BytePairs {
  static constexpr int64_t sum_steps = block_steps;
  static constexpr bool scales_sums = true;
  static constexpr int64_t chunk_columns = 64;
  static constexpr int64_t chunk_steps = chunk_columns / pair_columns;

  static bool takes(const Weight& weight) {
    const bool packed = weight.type == Codes::packed && weight.bits == 8;
    const bool bytes = weight.type == Codes::int8 || weight.type == Codes::float8 || packed;
    return bytes && is_regular(weight) && weight.zero_points == ZeroPoints::none && weight.scale_columns == 1;
  }

  static int64_t steps(const Linear& problem) {
    return ceil_div(problem.weight->columns, chunk_columns) * chunk_steps;
  }
  static int64_t panel_steps(const Linear& problem) { return steps(problem); }
  static F32 broadcast_step(const char* weights) { return broadcast_pair(weights); }
  static F32 multiply(F32 weights, F32 x, F32 sum) { return multiply_pairs(weights, x, sum); }

  static void pack(const Linear& problem, int64_t first_token, int tokens, char* panel) {
    pack_in_order(problem, first_token, tokens, panel, steps(problem) * pair_columns, every(1),
                  [](int64_t left, int pair) {
                    const int64_t of_chunk = left % chunk_columns / pair_columns + pair;
                    return left / chunk_columns * chunk_steps + of_chunk / 4 % 2 * 16 + of_chunk / 8 * 4 + of_chunk % 4;
                  });
  }

  // The bits of a code's value.
  static uint32_t bits_of(const Weight& weight, int code) {
    float value;
    if (weight.type == Codes::packed) {
      value = static_cast<float>(code - 128);
    } else if (weight.type == Codes::int8) {
      value = static_cast<float>(static_cast<int8_t>(code));
    } else {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      const int whole = exponent == 0 ? mantissa : (8 + mantissa) << (exponent - 1);  // in units of 2**-9
      value = exponent == 15 && mantissa == 7 ? __builtin_nanf("") : static_cast<float>(whole) * 0x1p-9f;
      if (code & 128) value = -value;
    }
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
  }

  template <bool integers>
  static void decode_rows(const Weight& weight, int64_t first_row, int64_t last_row, int64_t left, int64_t right,
                          char* tile) {
    alignas(64) uint8_t low_bytes[256], high_bytes[256];
    for (int code = 0; code < 256; ++code) {
      const uint32_t bits = bits_of(weight, code);
      low_bytes[code] = static_cast<uint8_t>(bits >> 16);
      high_bytes[code] = static_cast<uint8_t>(bits >> 24);
    }
    __m512i low[4], high[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      low[i] = _mm512_load_si512(low_bytes + 64 * i);
      high[i] = _mm512_load_si512(high_bytes + 64 * i);
    }
    for (int64_t row = first_row; row < last_row; ++row, tile += tile_row_bytes) {
      const auto* const codes = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
      char* out = tile;
      for (int64_t column = left; column < right; column += chunk_columns, out += 2 * chunk_columns) {
        const __m512i stored = _mm512_maskz_loadu_epi8(first_bytes(weight.columns - column), codes + column);
        __m512i lower = _mm512_permutex2var_epi8(low[0], stored, low[1]);
        __m512i upper = _mm512_permutex2var_epi8(high[0], stored, high[1]);
        if constexpr (integers) {
          const __mmask64 second = _mm512_movepi8_mask(stored);
          lower = _mm512_mask_mov_epi8(lower, second, _mm512_permutex2var_epi8(low[2], stored, low[3]));
          upper = _mm512_mask_mov_epi8(upper, second, _mm512_permutex2var_epi8(high[2], stored, high[3]));
        } else {
          constexpr int with_sign = 0xf8;  // upper | (stored & 0x80)
          upper = _mm512_ternarylogic_epi32(upper, stored, _mm512_set1_epi8(-128), with_sign);
        }
        _mm512_storeu_si512(out, _mm512_unpacklo_epi8(lower, upper));
        _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi8(lower, upper));
      }
    }
  }

  static void decode(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_step, int64_t last_step,
                     char* tile) {
    const int64_t left = first_step * pair_columns, right = last_step * pair_columns;
    if (weight.type != Codes::float8) {
      decode_rows<true>(weight, first_row, last_row, left, right, tile);
    } else {
      decode_rows<false>(weight, first_row, last_row, left, right, tile);
    }
  }
};

}  // namespace
}  // namespace compressed_format
