// y = x @ dense(weight).T + bias, straight from a compressed weight.
//
// Several kernels share the work. Those for few tokens are bound by reading the weight and multiply it as it comes:
// split_tokens integer codes, by activations split into bytes; split_panels the same for a handful of tokens; few_tokens
// codes of other kinds or for other activations, decoded in registers; plain_values what is not coded; indexed_groups
// codes whose columns name their groups. That for many tokens decodes tiles into the cache and multiplies from there.
// Each takes what it can and says so; what none takes is left to the reference.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/weight.h"

namespace compressed_format {

struct Linear {
  const Weight* weight = nullptr;  // [rows, columns]

  const void* x = nullptr;  // [tokens, columns], a row x_row_bytes from the next
  Float x_type = Float::bfloat16;
  int64_t tokens = 0;
  int64_t x_row_bytes = 0;

  const void* bias = nullptr;  // [rows] or null
  Float bias_type = Float::bfloat16;

  void* y = nullptr;  // [tokens, rows], contiguous, of x_type
};

// How a kernel runs: it prepares x for all threads, in parts that may be made at the same time; then it computes y, in
// tasks that may run at the same time. What a task computes does not depend on who runs it, or with which others.
struct LinearKernel {
  // Whether it takes the problem.
  bool (*takes)(const Linear& problem);

  // How much memory, at a multiple of 64, the prepared x takes; and in how many parts it can be made.
  size_t (*prepared_bytes)(const Linear& problem);
  int64_t (*parts)(const Linear& problem);
  void (*prepare)(const Linear& problem, void* prepared, int64_t first_part, int64_t last_part);

  // In how many tasks y can be computed, and how many of them are worth a thread of their own.
  int64_t (*tasks)(const Linear& problem);
  int64_t (*tasks_per_thread)(const Linear& problem);
  void (*run)(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task);
};

extern const ByIsa<const LinearKernel> split_tokens;
extern const ByIsa<const LinearKernel> split_panels;
extern const ByIsa<const LinearKernel> plain_values;
extern const ByIsa<const LinearKernel> few_tokens;
extern const ByIsa<const LinearKernel> indexed_groups;
extern const ByIsa<const LinearKernel> many_tokens;

}  // namespace compressed_format
