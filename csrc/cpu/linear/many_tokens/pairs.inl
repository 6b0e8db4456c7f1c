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

// Weights of any kind, made bfloat16 as they are.
struct Pairs {
  static constexpr int64_t sum_steps = block_steps;  // what y is rounded to hides how sums are
  static constexpr bool scales_sums = false;

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

}  // namespace
}  // namespace compressed_format
