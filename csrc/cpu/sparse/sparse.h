// Sparse weights: 2:4 pruning, and a bitmask with the values at its bits, as compressed_format/bitmask.py defines them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/weight.h"

namespace compressed_format {

// A matrix [rows, columns] of values or codes, of any type but packed ones. No pointer is aligned to more than a byte.
struct Sparse {
  const void* values = nullptr;
  int64_t row_bytes = 0;  // from one row to the next
  Codes type = Codes::bfloat16;
  int64_t rows = 0;
  int64_t columns = 0;
};

constexpr int64_t element_bytes(Codes type) {
  return type == Codes::float32 ? 4 : type == Codes::bfloat16 || type == Codes::float16 ? 2 : 1;
}

constexpr int64_t mask_bytes(int64_t columns) { return (columns + 7) / 8; }

// Each on rows [first, last) alone. What they write is contiguous, and given from its beginning. With `2_of_4` in the
// name, columns are a multiple of four.
struct SparseKernel {
  // The two larger magnitudes of each four columns, zero in the other places. Of floats only.
  void (*prune_2_of_4)(const Sparse& problem, void* pruned, int64_t first, int64_t last);
  // Two values of each four columns, and their bits: all that are not zero, as long as there are no more. Returns the
  // first column, counted from the beginning of the matrix, of the first four that have more, or -1.
  int64_t (*compress_2_of_4)(const Sparse& problem, void* compressed, uint8_t* bitmask, int64_t first, int64_t last);
  // The bits of values that are not zero, and how many a row has.
  void (*find_values)(const Sparse& problem, uint8_t* bitmask, int64_t* counts, int64_t first, int64_t last);
  // The values at the bits of a row, each row from the element on that `starts` has for it.
  void (*keep_values)(const Sparse& problem, const uint8_t* bitmask, const int64_t* starts, void* compressed,
                      int64_t first, int64_t last);
};

extern const ByIsa<const SparseKernel> sparse_kernel;

}  // namespace compressed_format
