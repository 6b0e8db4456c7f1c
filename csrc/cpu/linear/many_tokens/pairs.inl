// Products of bfloat16 in pairs, on AVX-512: two neighbours of k a step.

namespace compressed_format {
namespace {

constexpr int64_t pair_columns = 2;

void transpose(F32 (&rows)[lanes]) {
  __m512 pairs[lanes], fours[lanes];
#pragma GCC unroll 8
  for (int i = 0; i < lanes; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  // fours[i + c] holds, in its quarter q, column 4 q + c of rows i to i + 3.
#pragma GCC unroll 4
  for (int i = 0; i < lanes; i += 4) {
    fours[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
    fours[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
    fours[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
    fours[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low_even = _mm512_shuffle_f32x4(fours[c], fours[c + 4], _MM_SHUFFLE(2, 0, 2, 0));
    const __m512 low_odd = _mm512_shuffle_f32x4(fours[c], fours[c + 4], _MM_SHUFFLE(3, 1, 3, 1));
    const __m512 high_even = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], _MM_SHUFFLE(2, 0, 2, 0));
    const __m512 high_odd = _mm512_shuffle_f32x4(fours[c + 8], fours[c + 12], _MM_SHUFFLE(3, 1, 3, 1));
    rows[c].v = _mm512_shuffle_f32x4(low_even, high_even, _MM_SHUFFLE(2, 0, 2, 0));
    rows[c + 4].v = _mm512_shuffle_f32x4(low_odd, high_odd, _MM_SHUFFLE(2, 0, 2, 0));
    rows[c + 8].v = _mm512_shuffle_f32x4(low_even, high_even, _MM_SHUFFLE(3, 1, 3, 1));
    rows[c + 12].v = _mm512_shuffle_f32x4(low_odd, high_odd, _MM_SHUFFLE(3, 1, 3, 1));
  }
}

inline F32 broadcast_pair(const char* weights) {
  int32_t pair;
  __builtin_memcpy(&pair, weights, sizeof pair);
  return {_mm512_castsi512_ps(_mm512_set1_epi32(pair))};
}

inline F32 multiply_pairs(F32 weights, F32 x, F32 sum) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(weights.v), reinterpret_cast<__m512bh>(x.v))};
}

// Those of `count` columns that a vector has room for, as a mask.
inline __mmask32 first_columns(int64_t count) {
  if (count >= 32) return 0xffffffffu;
  return count <= 0 ? 0u : _bzhi_u32(0xffffffffu, static_cast<unsigned>(count));
}

// 32 columns from `left` on of each of a panel's tokens, zeros where there are none.
inline void load_square(const Linear& problem, int64_t first_token, int tokens, int64_t left, F32 (&square)[lanes]) {
  const __mmask32 columns = first_columns(problem.weight->columns - left);
  for (int token = 0; token < lanes; ++token) {
    const char* const source = token_of(problem, first_token + token) + left * 2;
    const __mmask32 read = token < tokens ? columns : 0u;
    square[token].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(read, source));
  }
}

inline F32 broadcast_value(Float type, const char* source) {
  if (type == Float::float32) {
    float value;
    __builtin_memcpy(&value, source, sizeof value);
    return broadcast(value);
  }
  int16_t half;
  __builtin_memcpy(&half, source, sizeof half);
  const __m256i halves = _mm256_set1_epi16(half);
  return type == Float::bfloat16 ? widen_bfloat16(halves) : F32{_mm512_cvtph_ps(halves)};
}

// Weights of any kind, made bfloat16 as they are.
struct Pairs : InVectors<Pairs> {
  static constexpr int64_t sum_steps = block_steps;  // what y is rounded to hides how sums are

  static int64_t steps(const Linear& problem) { return ceil_div(problem.weight->columns, pair_columns); }
  static int64_t panel_steps(const Linear& problem) { return ceil_div(steps(problem), lanes) * lanes; }
  static F32 broadcast_step(const char* weights) { return broadcast_pair(weights); }
  static F32 multiply(F32 weights, F32 x, F32 sum) { return multiply_pairs(weights, x, sum); }

  static void pack(const Linear& problem, int64_t first_token, int tokens, char* panel) {
    const int64_t all = panel_steps(problem);
    for (int64_t step = 0; step < all; step += lanes, panel += lanes * panel_step_bytes) {
      F32 square[lanes];
      load_square(problem, first_token, tokens, step * pair_columns, square);
      transpose(square);
      for (int i = 0; i < lanes; ++i) store_float32(panel + i * panel_step_bytes, square[i]);
    }
  }

  static void decode(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_step, int64_t last_step,
                     char* tile) {
    const int64_t left = first_step * pair_columns;
    const int64_t right = smaller(weight.columns, last_step * pair_columns);
    dequantize_rows(weight, first_row, last_row, left, right, tile, tile_row_bytes, Float::bfloat16);
    if (right == last_step * pair_columns) return;
    for (int64_t row = 0; row < last_row - first_row; ++row) {  // the pair that an odd column leaves half empty
      __builtin_memset(tile + row * tile_row_bytes + (right - left) * 2, 0, 2);
    }
  }
};

// Weights of four bits whose groups are regular. A group's sixteen values are scaled and rounded once, into a table that
// each code then indexes: 32 of them with one instruction, which looks at the lowest bits of 16. Of 128 columns, it
// finds every fourth first, then the one after each of these, and so on; and x is packed in the same order, so that
// nobody has to undo it.
struct NibblePairs : InVectors<NibblePairs> {
  static constexpr int64_t sum_steps = block_steps;
  static constexpr int64_t chunk_columns = 128;
  static constexpr int64_t chunk_steps = chunk_columns / pair_columns;
  static constexpr int64_t chunk_bytes = chunk_columns / 2;

  static bool takes(const Weight& weight) {
    const int64_t columns = weight.block_columns;
    const bool regular = columns % chunk_columns == 0 || columns == 64 || columns == 32 || columns >= weight.columns;
    return weight.type == Codes::packed && weight.bits == 4 && weight.g_idx == nullptr && weight.bitmask == nullptr &&
           weight.scale != nullptr && regular;
  }

  static int64_t steps(const Linear& problem) {
    return ceil_div(problem.weight->columns, chunk_columns) * chunk_steps;
  }
  static int64_t panel_steps(const Linear& problem) { return steps(problem); }
  static F32 broadcast_step(const char* weights) { return broadcast_pair(weights); }
  static F32 multiply(F32 weights, F32 x, F32 sum) { return multiply_pairs(weights, x, sum); }

  static void pack(const Linear& problem, int64_t first_token, int tokens, char* panel) {
    // Of 32 columns: 0, 4, 8 to 28, then 1, 5, 9 to 29 and so on. Their quarters go to the quarters of the chunk.
    alignas(64) uint16_t order[32];
    for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i % 8 * 4 + i / 8);
    const __m512i by_fours = _mm512_load_si512(order);
    const int64_t columns = steps(problem) * pair_columns;
    for (int64_t left = 0; left < columns; left += 32) {
      F32 square[lanes];
      load_square(problem, first_token, tokens, left, square);
      for (F32& token : square) {
        token.v = _mm512_castsi512_ps(_mm512_permutexvar_epi16(by_fours, _mm512_castps_si512(token.v)));
      }
      transpose(square);
      const int64_t first_step = left / chunk_columns * chunk_steps + left % chunk_columns / 8;
      for (int i = 0; i < lanes; ++i) {
        store_float32(panel + (first_step + i / 4 * lanes + i % 4) * panel_step_bytes, square[i]);
      }
    }
  }

  // What the codes of a group stand for.
  static __m256i values_of(const Weight& weight, int64_t scale_row, int64_t group) {
    const int64_t index = scale_row * weight.scale_columns + group;
    const char* const source = static_cast<const char*>(weight.scale) + index * float_bytes(weight.scale_type);
    const F32 scale = broadcast_value(weight.scale_type, source);
    int zero_point = 0;
    if (weight.zero_points == ZeroPoints::int8) {
      zero_point = static_cast<const int8_t*>(weight.zero_point)[index];
    } else if (weight.zero_points == ZeroPoints::packed) {
      // A word of one group holds eight rows.
      const int64_t word = scale_row / 8 * weight.scale_columns + group;
      uint32_t stored;
      __builtin_memcpy(&stored, static_cast<const char*>(weight.zero_point) + word * 4, sizeof stored);
      zero_point = static_cast<int>(stored >> scale_row % 8 * 4 & 15u) - 8;
    }
    const __m512i codes = _mm512_setr_epi32(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const F32 differences{_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(zero_point)))};
    const F32 products = differences * scale;
    return narrow_to_bfloat16(weight.scale_type == Float::float16 ? as_float16(products) : products);
  }

  // How many groups a chunk has: 1, 2 or 4.
  template <int groups>
  static void decode_rows(const Weight& weight, int64_t first_row, int64_t last_row, int64_t left, int64_t right,
                          char* tile) {
    alignas(64) uint16_t tables[32];
    for (int i = 0; i < 32; ++i) tables[i] = static_cast<uint16_t>(i * groups / 32 * 16);
    const __m512i table_of_lane = _mm512_load_si512(tables);
    const __m512i nibble = _mm512_set1_epi16(15);
    for (int64_t row = first_row; row < last_row; ++row, tile += tile_row_bytes) {
      const auto* const codes = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
      const int64_t scale_row = row / weight.block_rows;
      char* out = tile;
      for (int64_t column = left; column < right; column += chunk_columns, out += 2 * chunk_columns) {
        const int64_t count = weight.columns - column;
        const int64_t group = column / weight.block_columns;
        const __m512i table =
            groups == 1 ? _mm512_broadcast_i64x4(values_of(weight, scale_row, group)) : both(weight, scale_row, group);
        const __m512i table_2 = groups == 4 ? both(weight, scale_row, group + 2) : table;
        const __mmask64 bytes = count >= chunk_columns ? ~0ull : _bzhi_u64(~0ull, static_cast<unsigned>((count + 1) / 2));
        const __m512i words = _mm512_maskz_loadu_epi8(bytes, codes + column / 2);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __m512i index = _mm512_srli_epi16(words, static_cast<unsigned>(4 * i));
          // A single table is there twice, so that the bit above a code does not matter.
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

  // The values of a group and of the next; of the last one again where there is none.
  static __m512i both(const Weight& weight, int64_t scale_row, int64_t group) {
    const int64_t last = weight.scale_columns - 1;
    const __m256i low = values_of(weight, scale_row, smaller(group, last));
    const __m256i high = values_of(weight, scale_row, smaller(group + 1, last));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
};

}  // namespace
}  // namespace compressed_format
