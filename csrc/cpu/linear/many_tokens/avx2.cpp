// The product for many tokens on AVX2 with FMA.
#include "cpu/simd/avx2.h"

#include "cpu/dequantize/dequantize.h"
#include "cpu/linear/many_tokens/many_tokens.h"
#include "cpu/scratch.h"

namespace compressed_format {
namespace {

// The sums of two panels take twelve of sixteen registers.
constexpr int strip_rows = 6;
constexpr int64_t block_rows = 48;

}  // namespace
}  // namespace compressed_format

#include "cpu/linear/many_tokens/many_tokens.inl"

namespace compressed_format {
namespace {

void transpose(F32 (&rows)[lanes]) {
  __m256 pairs[lanes], fours[lanes];
  for (int i = 0; i < lanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < lanes; i += 4) {
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = _mm256_shuffle_ps(pairs[i + half], pairs[i + 2 + half], _MM_SHUFFLE(1, 0, 1, 0));
      fours[i + 2 * half + 1] = _mm256_shuffle_ps(pairs[i + half], pairs[i + 2 + half], _MM_SHUFFLE(3, 2, 3, 2));
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20);
    rows[i + 4].v = _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31);
  }
}

using Product = InVectors<Floats>;

}  // namespace

const LinearKernel many_tokens_avx2{takes, prepared_bytes<Product>, parts, prepare<Product>,
                                    tasks, tasks_per_thread,        run<Product>};

}  // namespace compressed_format
