// The product for many tokens on AVX-512: of bfloat16 in pairs, of all else in floats.
#include "cpu/simd/avx512.h"

#include "cpu/dequantize/dequantize.h"
#include "cpu/linear/many_tokens/many_tokens.h"
#include "cpu/scratch.h"

namespace compressed_format {
namespace {

// The sums of two panels take 24 of 32 registers.
constexpr int strip_rows = 12;
constexpr int64_t block_rows = 48;

}  // namespace
}  // namespace compressed_format

#include "cpu/linear/many_tokens/many_tokens.inl"
#include "cpu/linear/many_tokens/pairs.inl"
#include "cpu/linear/many_tokens/coded_pairs.inl"
#include "cpu/linear/many_tokens/indexed_pairs.inl"

namespace compressed_format {
namespace {

// What `action` makes of the product that a problem is computed by.
template <typename Action>
inline auto with_product(const Linear& problem, Action action) {
  if (problem.x_type != Float::bfloat16) return action(InVectors<Floats>{});
  return with_pairs<InVectors>(*problem.weight, action);
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
