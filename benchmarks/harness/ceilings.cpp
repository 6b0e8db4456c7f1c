// What a core can do at most: read memory, and multiply bfloat16 in registers. Compiled and called by ceilings.py.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

// Eight sums in flight, of vectors as long as a cache line: the additions never wait for each other.
constexpr size_t kLine = 64;
constexpr size_t kSums = 8;
// How far ahead to ask for lines: past what the hardware's own prefetching, which stops at pages, sees.
constexpr size_t kAhead = 4096;
using Line = uint64_t __attribute__((vector_size(kLine)));

}  // namespace

// The sum of whole blocks of eight lines; what is left of them is not read.
extern "C" uint64_t read_memory(const char* begin, size_t bytes) {
  Line sums[kSums] = {};
  for (const char* at = begin; at + kSums * kLine <= begin + bytes; at += kSums * kLine) {
    for (size_t number = 0; number < kSums; ++number) {
      Line line;
      std::memcpy(&line, at + number * kLine, kLine);
      __builtin_prefetch(at + kAhead + number * kLine);
      sums[number] += line;
    }
  }
  uint64_t total = 0;
  for (const Line& sum : sums) {
    for (size_t lane = 0; lane < kLine / sizeof(uint64_t); ++lane) total += sum[lane];
  }
  return total;
}

// Does `steps` times `kProducts` products of 32 pairs of bfloat16, each of which is added to a sum of its own, and returns
// the number of floating-point operations of that: 0 where there is no such instruction.
extern "C" double multiply_bfloat16(uint64_t steps, float* sink) {
#if defined(__AVX512BF16__)
  // Enough that none waits for the one before: with twelve, Zen 5 reaches 92 % of what it does with twenty-four.
  constexpr int kProducts = 24;
  const __m512bh factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f803f80));
  // Every loop over them is unrolled, or they would lie in memory.
  __m512 sums[kProducts];
#pragma GCC unroll 24
  for (int number = 0; number < kProducts; ++number) sums[number] = _mm512_setzero_ps();
  for (uint64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int number = 0; number < kProducts; ++number) {
      sums[number] = _mm512_dpbf16_ps(sums[number], factor, factor);
      asm volatile("" : "+v"(sums[number]));
    }
  }
#pragma GCC unroll 24
  for (int number = 1; number < kProducts; ++number) sums[0] = _mm512_add_ps(sums[0], sums[number]);
  *sink = _mm512_reduce_add_ps(sums[0]);
  return static_cast<double>(steps) * kProducts * 32 * 2;
#else
  *sink = static_cast<float>(steps);
  return 0;
#endif
}
