// How the drivers of products run a kernel, in threads and without, and judge what it made.
#pragma once

#include <cmath>
#include <cstdlib>
#include <functional>

#include "random_weight.h"

namespace driver {

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};

// y of one kernel: prepared and computed in parts by several threads, in another order than those of one; what is in it
// before must not matter.
template <typename Kernel, typename Problem>
Tensor product(const Kernel& kernel, Problem problem, int64_t bytes, bool threads) {
  Tensor y(bytes);
  problem.y = y.data();
  const size_t size = (kernel.prepared_bytes(problem) + 63) / 64 * 64;
  const std::unique_ptr<void, Freed> prepared(std::aligned_alloc(64, size + 64));
  const int64_t parts = kernel.parts(problem), tasks = kernel.tasks(problem);
  if (threads) {
    in_threads(parts, [&](int64_t first, int64_t last) { kernel.prepare(problem, prepared.get(), first, last); });
    in_threads(tasks, [&](int64_t first, int64_t last) { kernel.run(problem, prepared.get(), first, last); });
  } else {
    kernel.prepare(problem, prepared.get(), 0, parts);
    kernel.run(problem, prepared.get(), 0, tasks);
  }
  return y;
}

// A product in float64, and the sum of the magnitudes that it is made of.
struct Exact {
  double value;
  double magnitude;
};

inline double rounding(Float type) {
  return type == Float::bfloat16 ? 0x1p-8 : type == Float::float16 ? 0x1p-11 : 0x1p-23;
}

// Whether every element of y lies within a part of its summands' magnitudes of the exact one, besides one rounding to
// its own type.
inline bool close(const Tensor& y, Float type, int64_t tokens, int64_t rows, double part,
                  const std::function<Exact(int64_t, int64_t)>& exact) {
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < rows; ++row) {
      const Exact expected = exact(token, row);
      const auto found = static_cast<double>(get(y.data(), type, token * rows + row));
      const double bound = part * expected.magnitude + rounding(type) * std::fabs(expected.value) + 1e-7;
      if (!(std::fabs(found - expected.value) <= bound)) {
        std::printf("wrong: token %d, row %d: %g, not %g within %g\n", int(token), int(row), found, expected.value,
                    bound);
        return false;
      }
    }
  }
  return true;
}

}  // namespace driver
