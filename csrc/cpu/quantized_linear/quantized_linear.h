// y = x @ dense(weight).T + bias, where x is rounded to codes first, and the codes are multiplied with those of the
// weight: integers exactly, E4M3 in float32. Scales come in at the end.
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

  const void* bias = nullptr;  // [rows] or null
  Float bias_type = Float::bfloat16;

  void* y = nullptr;  // [tokens, rows], contiguous, of the type of the activations
};

// Whether kernels take it: one scale a row of the weight, one a token, and codes that can be multiplied.
bool takes(const Weight& weight, const Activations& activations);

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
