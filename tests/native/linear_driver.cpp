// Multiplies with weights of every kind, by every kernel that takes them, at every level, and in several threads.
// Results must lie near those in float64, and not depend on threads. Sanitizers see what a comparison cannot, and an
// emulator of an older processor stops at an instruction that it does not know.

#include "cpu/linear/linear.h"

#include "products.h"

using namespace driver;

namespace {

bool right(const Kind& kind, Float type, int64_t tokens, int64_t rows, int64_t columns) {
  const RandomWeight made(kind, rows, columns);
  const Tensor x = random_values(tokens * columns, type), bias = random_values(rows, type);
  Linear problem;
  problem.weight = &made.weight();
  problem.x = x.data();
  problem.x_type = type;
  problem.tokens = tokens;
  problem.x_row_bytes = columns * float_bytes(type);
  const bool has_bias = random_below(2) == 0;
  if (has_bias) problem.bias = bias.data();
  problem.bias_type = type;
  std::vector<double> values(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows * columns; ++i) values[static_cast<size_t>(i)] = made.value(i / columns, i % columns);
  const auto exact = [&](int64_t token, int64_t row) {
    Exact sum{0, 0};
    for (int64_t column = 0; column < columns; ++column) {
      const double term = static_cast<double>(get(x.data(), type, token * columns + column)) *
                          values[static_cast<size_t>(row * columns + column)];
      sum.value += term;
      sum.magnitude += std::fabs(term);
    }
    if (has_bias) sum.value += static_cast<double>(get(bias.data(), type, row));
    return sum;
  };
  const int64_t bytes = tokens * rows * float_bytes(type);
  struct Named {
    const char* name;
    const ByIsa<const LinearKernel>& levels;
  };
  const Named all[] = {{"split_tokens", split_tokens},
                       {"split_panels", split_panels},
                       {"few_tokens", few_tokens},
                       {"plain_values", plain_values},
                       {"indexed_groups", indexed_groups},
                       {"many_tokens", many_tokens}};
  for (const Named& kernels : all) {
    for (const LinearKernel* const kernel : levels(kernels.levels)) {
      if (!kernel->takes(problem)) continue;
      const Tensor y = product(*kernel, problem, bytes, true);
      const bool same = product(*kernel, problem, bytes, false) == y;
      // Weights may be rounded to the type of their scales, and both sides to bfloat16, before they are multiplied.
      if (!same || !close(y, type, tokens, rows, 0x1p-7, exact)) {
        std::printf("%s, %s: codes %d, %d bits, %d tokens of type %d, %d x %d, blocks of %d x %d\n",
                    same ? "wrong" : "other with threads", kernels.name, int(kind.type), kind.bits, int(tokens),
                    int(type), int(rows), int(columns), int(kind.block_rows), int(kind.block_columns));
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  const int64_t counts[] = {1, 2, 3, 5, 8, 13, 17, 33, 130};
  int64_t number = 0;
  const auto tokens = [&] { return counts[number++ % 9]; };
  for (Float type : {Float::bfloat16, Float::float32}) {
    for (int64_t columns : {1, 31, 64, 192, 257, 520}) {
      for (int64_t group : {int64_t{32}, int64_t{64}, columns}) {
        const int64_t rows = 1 + random_below(80);
        for (int bits = 1; bits <= 8; ++bits) {
          const auto zero_points = static_cast<ZeroPoints>(random_below(3));
          const Float scale_type = random_below(2) == 0 ? Float::bfloat16 : Float::float32;
          const Kind kind{Codes::packed, bits, 1, group, scale_type, zero_points, random_below(6) != 0};
          if (!right(kind, type, tokens(), rows, columns)) return 1;
        }
        for (int64_t block_rows : {int64_t{1}, int64_t{4}, rows}) {
          for (Codes codes : {Codes::int8, Codes::float8}) {
            const bool asymmetric = codes == Codes::int8 && block_rows == 1;
            const Kind kind{codes, 8, block_rows, group, Float::float32,
                            asymmetric ? ZeroPoints::int8 : ZeroPoints::none};
            if (!right(kind, type, tokens(), rows, columns)) return 1;
          }
        }
      }
      for (Codes codes : {Codes::bfloat16, Codes::float32, Codes::int8}) {
        for (int kept : {0, 1, columns % 4 == 0 ? 2 : 1}) {
          const Kind kind{codes, 8, 1, columns, Float::bfloat16, ZeroPoints::none, true, kept};
          if (!right(kind, type, tokens(), 1 + random_below(80), columns)) return 1;
        }
      }
    }
  }
  return 0;
}
