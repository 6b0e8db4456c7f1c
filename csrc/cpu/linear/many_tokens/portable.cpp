// The product for many tokens without instructions of any one processor.
#include "cpu/dequantize/dequantize.h"
#include "cpu/linear/many_tokens/many_tokens.h"
#include "cpu/scratch.h"
#include "cpu/simd/portable.h"

namespace compressed_format {
namespace {

// The sums of two panels take twelve of the sixteen registers of four floats that any x86-64 has.
constexpr int strip_rows = 3;
constexpr int64_t block_rows = 48;

}  // namespace
}  // namespace compressed_format

#include "cpu/linear/many_tokens/many_tokens.inl"

namespace compressed_format {
namespace {

void transpose(F32 (&rows)[lanes]) {
  for (int row = 0; row < lanes; ++row) {
    for (int column = 0; column < row; ++column) {
      const float below = rows[row].v[column];
      rows[row].v[column] = rows[column].v[row];
      rows[column].v[row] = below;
    }
  }
}

using Product = InVectors<Floats>;

}  // namespace

const LinearKernel many_tokens_portable{takes, prepared_bytes<Product>, parts, prepare<Product>,
                                    tasks, tasks_per_thread,        run<Product>};

}  // namespace compressed_format
