// Rounding of activations to codes, by static scales or by those of the values: what compressed_format/activations.py
// defines, with every rounding that it has.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/weight.h"

namespace compressed_format {

struct Activations {
  const void* x = nullptr;  // [tokens, columns], contiguous, of any alignment
  Float x_type = Float::bfloat16;
  int64_t tokens = 0;
  int64_t columns = 0;
  int64_t group_size = 0;  // how many columns share a scale; all of them, unless it is by group

  // Static scales, [columns / group_size], and zero points beside them; those of a token are scales_per_token after
  // those of the one before, which is 0 where all tokens have the same. Null where they are found from the values.
  const void* scale = nullptr;
  Float scale_type = Float::bfloat16;
  const int8_t* zero_point = nullptr;  // null where the static codes are symmetric
  int64_t scales_per_token = 0;

  bool whole_tensor = false;  // without static scales: one for all tokens, from the range that the caller gives
  bool symmetric = true;      // without static scales: whether there is no zero point
  int bits = 8;
  bool is_float = false;  // E4M3 codes; they have no zero points here
};

// From the least to the greatest value; both are not a number where some value is not finite.
struct Range {
  float least;
  float greatest;
};

// What the codes of a group of a token stand for: (code - zero_point) * scale. A scale that is not a number says that
// some value was none.
struct TokenScale {
  float scale;
  int32_t zero_point;
  int32_t sum;  // of the codes, where they are integers
};

// Each on tokens [first, last), which may be split in any way. `whole` is the range of the whole tensor; it is read
// only where the problem says so.
struct ActivationKernel {
  void (*ranges)(const Activations& problem, Range* ranges, int64_t first, int64_t last);
  // Values after a round trip, of the type of x, [tokens, columns].
  void (*fake_quantize)(const Activations& problem, const Range* whole, void* y, int64_t first, int64_t last);
  // Codes, as int8 (integers) or bfloat16 (E4M3): token `first` to the beginning of `codes`, the next one `stride`
  // elements after it. What is behind the columns of a token stays as it is. Of each token a scale for each group.
  void (*codes)(const Activations& problem, const Range* whole, void* codes, int64_t stride, TokenScale* scales,
                int64_t first, int64_t last);
};

extern const ByIsa<const ActivationKernel> activation_kernels;

// The least range that includes the others.
Range merge(const Range* ranges, int64_t count);

}  // namespace compressed_format
