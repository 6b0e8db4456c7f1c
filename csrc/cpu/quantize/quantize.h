// Scales, zero points and codes of a weight: what compressed_format/quantization.py and scales.py define, bit for bit.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/pack/pack.h"
#include "cpu/weight.h"

namespace compressed_format {

// A matrix [rows, columns] of floats that becomes codes. No pointer is aligned to more than a byte.
struct Quantize {
  const void* weight = nullptr;
  Float type = Float::bfloat16;
  int64_t row_bytes = 0;  // from one row of the weight to the next
  int64_t rows = 0;
  int64_t columns = 0;

  int bits = 0;
  bool is_float = false;   // codes are E4M3, and symmetric
  bool symmetric = true;
  bool has_scales = false; // scale and zero point are given; otherwise they are to be found

  // One scale, of the weight's type, for each rectangle of block_rows x block_columns, and one zero point (null where
  // symmetric), [ceil(rows / block_rows), scale_columns].
  int64_t block_rows = 1;
  int64_t block_columns = 1;
  int64_t scale_columns = 0;
  void* scale = nullptr;
  int8_t* zero_point = nullptr;

  // A byte each; or, with `pack`, packed by it into code_row_bytes bytes a row.
  void* codes = nullptr;
  int64_t code_row_bytes = 0;
  PackRow* pack = nullptr;
};

// The smallest and the largest value of a part of a row, both no number where one of them is not finite. Zero counts
// among the values.
struct Extremes {
  float least;
  float greatest;
};

// A scale is not a number where one of the values that it is for is not finite, given or found; codes are then any.
struct QuantizeKernel {
  // Of rows [first, last), for each of scale_columns parts: extremes [rows, scale_columns].
  void (*extremes)(const Quantize& problem, Extremes* extremes, int64_t first, int64_t last);
  // Scales and zero points of rows [first, last) of scales.
  void (*scales)(const Quantize& problem, const Extremes* extremes, int64_t first, int64_t last);
  // Codes of rows [first, last) by the scales that are there.
  void (*codes)(const Quantize& problem, int64_t first, int64_t last);
  // All of it for rows [first, last), one after the other, each of which has scales of its own: block_rows is 1.
  void (*rows)(const Quantize& problem, int64_t first, int64_t last);
};

extern const ByIsa<const QuantizeKernel> quantize_kernel;

}  // namespace compressed_format
