// y = x @ dense(weight).T + bias, where x is rounded to codes first, and the codes are multiplied with those of the
// weight: integers exactly, E4M3 in float32. Scales come in at the end, of rows or of spans.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/activations/activations.h"
#include "cpu/isa.h"
#include "cpu/weight.h"

namespace compressed_format {

struct QuantizedLinear {
  const Weight* weight = nullptr;
  const Activations* activations = nullptr;
  const ActivationKernel* quantize = nullptr;
  Range whole{};  // of the whole tensor, where its scale is found from that
  // How many columns are summed up before scales come in; 0 where that is done once for each row, as it has one scale.
  int64_t span = 0;

  const void* bias = nullptr;  // [rows] or null
  Float bias_type = Float::bfloat16;

  void* y = nullptr;  // [tokens, rows], contiguous, of the type of the activations
};

// Whether there is one scale a row of the weight and one a token, and codes of a byte: products of whole rows.
bool has_whole_rows(const Weight& weight, const Activations& activations);

// The most bytes that codes of x have in a span: what a block of rows is decoded into has to stay in the cache.
constexpr int64_t most_span_bytes = 2048;

// Into how many columns at a time other problems are split, so that no scale changes within; 0 where kernels do not
// take them. Spans other than the last are multiples of 8 columns: packed codes of any width begin at a byte there.
int64_t span_of(const Weight& weight, const Activations& activations);

// How a kernel runs: it prepares x for all threads, in parts that may be made at the same time; then it computes y, in
// tasks that may run at the same time. What a task computes does not depend on who runs it, or with which others.
struct QuantizedLinearKernel {
  // How much memory, at a multiple of 64, the prepared x takes; and in how many parts it can be made.
  size_t (*prepared_bytes)(const QuantizedLinear& problem);
  int64_t (*parts)(const QuantizedLinear& problem);
  void (*prepare)(const QuantizedLinear& problem, void* prepared, int64_t first_part, int64_t last_part);

  // In how many tasks y can be computed, and how many of them are worth a thread of their own.
  int64_t (*tasks)(const QuantizedLinear& problem);
  int64_t (*tasks_per_thread)(const QuantizedLinear& problem);
  void (*run)(const QuantizedLinear& problem, const void* prepared, int64_t first_task, int64_t last_task);
};

extern const ByIsa<const QuantizedLinearKernel> quantized_linear_kernels;

}  // namespace compressed_format
