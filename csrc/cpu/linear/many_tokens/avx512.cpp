// The product for many tokens on AVX-512: of bfloat16 in pairs, of all else in floats.
#include "cpu/simd/avx512.h"

#include "cpu/dequantize/dequantize.h"
#include "cpu/linear/many_tokens/many_tokens.h"
#include "cpu/scratch.h"

namespace compressed_format {
namespace {

// The sums of two panels take 24 of 32 registers.
constexpr int strip_rows = 12;

}  // namespace
}  // namespace compressed_format

#include "cpu/linear/many_tokens/many_tokens.inl"
#include "cpu/linear/many_tokens/pairs.inl"

namespace compressed_format {
namespace {

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

// What `action` makes of the product that a problem is computed by.
template <typename Action>
inline auto with_product(const Linear& problem, Action action) {
  if (problem.x_type != Float::bfloat16) return action(Floats{});
  if (NibblePairs::takes(*problem.weight)) return action(NibblePairs{});
  return action(Pairs{});
}

size_t prepared_bytes_of(const Linear& problem) {
  return with_product(problem, [&](auto product) { return prepared_bytes<decltype(product)>(problem); });
}
void prepare_any(const Linear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  with_product(problem, [&](auto product) {
    prepare<decltype(product)>(problem, prepared, first_part, last_part);
  });
}
void run_any(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  with_product(problem, [&](auto product) { run<decltype(product)>(problem, prepared, first_task, last_task); });
}

}  // namespace

const LinearKernel many_tokens_avx512{takes, prepared_bytes_of, parts, prepare_any, tasks, tasks_per_thread, run_any};

}  // namespace compressed_format
