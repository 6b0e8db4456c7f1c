// Rounds activations and multiplies codes, by every level and in several threads. Results must lie near those that
// codes give in float64, and not depend on threads. Sanitizers see what a comparison cannot, and an emulator of an
// older processor stops at an instruction that it does not know.

#include "cpu/quantized_linear/quantized_linear.h"

#include "products.h"

using namespace driver;

namespace {

bool right(const Kind& kind, Activations activations, bool given, int64_t rows) {
  const int64_t tokens = activations.tokens, columns = activations.columns;
  const Float type = activations.x_type;
  const RandomWeight made(kind, rows, columns);
  const Tensor x = random_values(tokens * columns, type), bias = random_values(rows, type);
  activations.x = x.data();
  activations.group_size = columns;
  Tensor scale = random_values(1, Float::float32), zero_point(1);
  if (given) {
    set(scale.data(), Float::float32, 0, 0.015625f);
    activations.scale = scale.data();
    activations.scale_type = Float::float32;
    if (!activations.symmetric) activations.zero_point = reinterpret_cast<const int8_t*>(zero_point.data());
  }

  QuantizedLinear problem;
  problem.weight = &made.weight();
  problem.activations = &activations;
  const bool has_bias = random_below(2) == 0;
  if (has_bias) problem.bias = bias.data();
  problem.bias_type = type;
  const ActivationKernel& definition = *levels(activation_kernels)[0];
  std::vector<Range> ranges(static_cast<size_t>(tokens));
  definition.ranges(activations, ranges.data(), 0, tokens);
  problem.whole = merge(ranges.data(), tokens);
  std::vector<TokenScale> scales(static_cast<size_t>(tokens));
  Tensor codes(tokens * columns * 2);
  definition.codes(activations, &problem.whole, codes.data(), columns, scales.data(), 0, tokens);

  std::vector<double> values(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows * columns; ++i) values[static_cast<size_t>(i)] = made.value(i / columns, i % columns);
  const auto exact = [&](int64_t token, int64_t row) {
    Exact sum{0, 0};
    const TokenScale& of_token = scales[static_cast<size_t>(token)];
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t index = token * columns + column;
      const float code = activations.is_float ? get(codes.data(), Float::bfloat16, index)
                                              : static_cast<float>(static_cast<int8_t>(codes.data()[index]));
      const double value = static_cast<double>(code - static_cast<float>(of_token.zero_point)) *
                           static_cast<double>(of_token.scale);
      const double term = value * values[static_cast<size_t>(row * columns + column)];
      sum.value += term;
      sum.magnitude += std::fabs(term);
    }
    if (has_bias) sum.value += static_cast<double>(get(bias.data(), type, row));
    return sum;
  };
  const auto kernels = levels(quantized_linear_kernels);
  const auto rounding_kernels = levels(activation_kernels);
  const int64_t bytes = tokens * rows * float_bytes(type);
  for (size_t level = 0; level < kernels.size(); ++level) {
    problem.quantize = rounding_kernels[level < rounding_kernels.size() ? level : rounding_kernels.size() - 1];
    const Tensor y = product(*kernels[level], problem, bytes, true);
    const bool same = product(*kernels[level], problem, bytes, false) == y;
    // Products of codes and sums of integers are exact; sums of floats are not.
    if (!same || !close(y, type, tokens, rows, activations.is_float ? 0x1p-16 : 0x1p-20, exact)) {
      std::printf("%s, level %d: codes %d, %d tokens of type %d, %d x %d, %s%s%s\n",
                  same ? "wrong" : "other with threads", int(level), int(kind.type), int(tokens), int(type), int(rows),
                  int(columns), activations.symmetric ? "" : "asymmetric ", given ? "static " : "",
                  activations.whole_tensor ? "one scale" : "");
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  const int64_t counts[] = {1, 2, 4, 5, 9, 16, 33, 65, 130};
  int64_t number = 0;
  for (Float type : {Float::bfloat16, Float::float16, Float::float32}) {
    for (int64_t columns : {1, 31, 64, 65, 192, 520, 1040}) {
      for (bool given : {false, true}) {
        for (bool whole_tensor : {false, true}) {
          Activations activations;
          activations.x_type = type;
          activations.columns = columns;
          activations.whole_tensor = whole_tensor;
          const int64_t rows = 1 + random_below(80);
          for (int64_t block_rows : {int64_t{1}, rows}) {
            activations.tokens = counts[number++ % 9];
            activations.is_float = true;
            activations.symmetric = true;
            const Float scale_type = random_below(2) == 0 ? Float::bfloat16 : Float::float32;
            if (!right({Codes::float8, 8, block_rows, columns, scale_type}, activations, given, rows)) return 1;
            activations.is_float = false;
            for (bool symmetric : {false, true}) {
              activations.symmetric = symmetric;
              const ZeroPoints zero_points = random_below(2) == 0 ? ZeroPoints::int8 : ZeroPoints::none;
              const Kind kind{Codes::int8, 8, block_rows, columns, scale_type, zero_points};
              if (!right(kind, activations, given, rows)) return 1;
            }
          }
        }
      }
    }
  }
  return 0;
}
