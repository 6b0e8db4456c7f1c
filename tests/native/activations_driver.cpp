// Rounds activations of every kind, by every level and in several threads. All levels must make the same codes, scales
// and values; values after the round trip must be what codes and scales stand for. Sanitizers see what a comparison
// cannot, and an emulator of an older processor stops at an instruction that it does not know.

#include "cpu/activations/activations.h"

#include "driver.h"

using namespace driver;

namespace {

struct Rounded {
  Tensor values, codes;
  std::vector<TokenScale> scales;

  bool operator==(const Rounded& other) const {
    bool equal = values == other.values && codes == other.codes && scales.size() == other.scales.size();
    for (size_t i = 0; equal && i < scales.size(); ++i) {
      equal = bits_of(scales[i].scale) == bits_of(other.scales[i].scale) &&
              scales[i].zero_point == other.scales[i].zero_point && scales[i].sum == other.scales[i].sum;
    }
    return equal;
  }
};

Rounded run(const ActivationKernel& kernel, const Activations& problem) {
  std::vector<Range> ranges(static_cast<size_t>(problem.tokens));
  in_threads(problem.tokens, [&](int64_t first, int64_t last) {
    kernel.ranges(problem, ranges.data(), first, last);
  });
  const Range whole = merge(ranges.data(), problem.tokens);
  const int64_t row_bytes = problem.columns * float_bytes(problem.x_type);
  Rounded made{Tensor(problem.tokens * row_bytes), Tensor(), {}};
  in_threads(problem.tokens, [&](int64_t first, int64_t last) {
    kernel.fake_quantize(problem, &whole, made.values.data(), first, last);
  });
  if (problem.group_size != problem.columns) return made;
  const int64_t code_bytes = problem.is_float ? 2 : 1;
  made.codes = Tensor(problem.tokens * problem.columns * code_bytes);
  made.scales.resize(static_cast<size_t>(problem.tokens));
  in_threads(problem.tokens, [&](int64_t first, int64_t last) {
    kernel.codes(problem, &whole, made.codes.data() + first * problem.columns * code_bytes, problem.columns,
                 made.scales.data() + first, first, last);
  });
  return made;
}

// In float32, where a product is rounded once, with values of a few bits.
bool consistent(const Activations& problem, const Rounded& made) {
  if (problem.group_size != problem.columns || problem.x_type != Float::float32) return true;
  for (int64_t token = 0; token < problem.tokens; ++token) {
    const TokenScale& scale = made.scales[static_cast<size_t>(token)];
    int64_t sum = 0;
    for (int64_t column = 0; column < problem.columns; ++column) {
      const int64_t index = token * problem.columns + column;
      const float code = problem.is_float ? get(made.codes.data(), Float::bfloat16, index)
                                          : static_cast<float>(static_cast<int8_t>(made.codes.data()[index]));
      if (!problem.is_float) sum += static_cast<int64_t>(code);
      const float expected = (code - static_cast<float>(scale.zero_point)) * scale.scale;
      const float found = get(made.values.data(), Float::float32, index);
      if (found != expected) {
        std::printf("wrong: token %d, column %d: %g, not %g\n", int(token), int(column), double(found),
                    double(expected));
        return false;
      }
    }
    if (!problem.is_float && sum != scale.sum) return false;
  }
  return true;
}

bool right(Activations problem, bool given) {
  const Tensor x = random_values(problem.tokens * problem.columns, problem.x_type);
  problem.x = x.data();
  const int64_t groups = problem.columns / problem.group_size;
  Tensor scales(problem.tokens * groups * 4), zero_points(problem.tokens * groups);
  if (given) {
    problem.scale_type = Float::float32;
    for (int64_t i = 0; i < problem.tokens * groups; ++i) {
      set(scales.data(), Float::float32, i, static_cast<float>(1 + random_below(64)) / 1024);
      const int half = 1 << (problem.bits - 1);
      zero_points.data()[i] = static_cast<unsigned char>(random_below(2 * half) - half);
    }
    problem.scale = scales.data();
    if (!problem.symmetric) problem.zero_point = reinterpret_cast<const int8_t*>(zero_points.data());
    problem.scales_per_token = problem.whole_tensor ? 0 : groups;
  }
  const auto kernels = levels(activation_kernels);
  const Rounded first = run(*kernels[0], problem);
  if (!consistent(problem, first)) return false;
  for (const ActivationKernel* const kernel : kernels) {
    if (!(run(*kernel, problem) == first)) {
      std::printf("levels differ: %d bits, type %d, %d x %d, groups of %d\n", problem.bits, int(problem.x_type),
                  int(problem.tokens), int(problem.columns), int(problem.group_size));
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  for (Float type : {Float::bfloat16, Float::float16, Float::float32}) {
    for (int64_t columns : {1, 7, 64, 65, 200, 1100}) {
      for (int64_t groups : {1, columns % 5 == 0 ? 5 : 1}) {
        for (bool whole_tensor : {false, true}) {
          for (bool given : {false, true}) {
            Activations problem;
            problem.x_type = type;
            problem.tokens = 1 + random_below(9);
            problem.columns = columns;
            problem.group_size = columns / groups;
            problem.whole_tensor = whole_tensor && groups == 1;
            problem.bits = 8;
            problem.is_float = true;
            if (!right(problem, given)) return 1;
            problem.is_float = false;
            problem.bits = 2 + static_cast<int>(random_below(7));
            for (bool symmetric : {false, true}) {
              problem.symmetric = symmetric;
              if (!right(problem, given)) return 1;
            }
          }
        }
      }
    }
  }
  return 0;
}
