// Quantizes weights of every type by every scheme, by every level and in several threads. All levels must make the
// same bytes; those of float32 weights with symmetric integers, and those of all kinds of quotients of bfloat16
// numbers, must also be what the definition says. Sanitizers see what a comparison cannot, and an emulator of an older
// processor stops at an instruction that it does not know.

#include "cpu/quantize/quantize.h"

#include <cmath>

#include "driver.h"

using namespace driver;

namespace {

struct Scheme {
  int bits;
  bool is_float;
  bool symmetric;
  bool has_scales;
  bool pack;
};

struct Result {
  Tensor codes, scales, zero_points;
  bool operator==(const Result& other) const {
    return codes == other.codes && scales == other.scales && zero_points == other.zero_points;
  }
};

Quantize describe(const Scheme& scheme, const Tensor& weight, Float type, int64_t rows, int64_t columns,
                  int64_t block_rows, int64_t block_columns) {
  Quantize problem;
  problem.weight = weight.data();
  problem.type = type;
  problem.row_bytes = columns * float_bytes(type);
  problem.rows = rows;
  problem.columns = columns;
  problem.bits = scheme.bits;
  problem.is_float = scheme.is_float;
  problem.symmetric = scheme.symmetric;
  problem.has_scales = scheme.has_scales;
  problem.block_rows = block_rows;
  problem.block_columns = block_columns;
  problem.scale_columns = (columns + block_columns - 1) / block_columns;
  problem.code_row_bytes = scheme.pack ? packed_words(columns, scheme.bits) * 4 : columns;
  return problem;
}

Result blank(const Quantize& problem, const Result* given) {
  const int64_t count = (problem.rows + problem.block_rows - 1) / problem.block_rows * problem.scale_columns;
  Result made{Tensor(problem.rows * problem.code_row_bytes), Tensor(count * float_bytes(problem.type)),
              Tensor(problem.symmetric ? 0 : count)};
  for (int64_t i = 0; given != nullptr && i < made.scales.size(); ++i) made.scales.data()[i] = given->scales.data()[i];
  for (int64_t i = 0; given != nullptr && i < made.zero_points.size(); ++i) {
    made.zero_points.data()[i] = given->zero_points.data()[i];
  }
  return made;
}

// By the passes one after the other, or, where rows have scales of their own, in one.
Result run(const QuantizeKernel& kernel, Quantize problem, PackRow* pack, bool by_rows, const Result* given) {
  Result made = blank(problem, given);
  problem.codes = made.codes.data();
  problem.scale = made.scales.data();
  problem.zero_point = problem.symmetric ? nullptr : reinterpret_cast<int8_t*>(made.zero_points.data());
  problem.pack = pack;
  if (by_rows) {
    in_threads(problem.rows, [&](int64_t first, int64_t last) { kernel.rows(problem, first, last); });
    return made;
  }
  std::vector<Extremes> extremes(static_cast<size_t>(problem.rows * problem.scale_columns));
  in_threads(problem.rows, [&](int64_t first, int64_t last) {
    kernel.extremes(problem, extremes.data(), first, last);
  });
  in_threads((problem.rows + problem.block_rows - 1) / problem.block_rows, [&](int64_t first, int64_t last) {
    kernel.scales(problem, extremes.data(), first, last);
  });
  in_threads(problem.rows, [&](int64_t first, int64_t last) { kernel.codes(problem, first, last); });
  return made;
}

bool follows_the_definition(const Quantize& problem, const Result& made) {
  const float half = static_cast<float>(1 << (problem.bits - 1));
  for (int64_t row = 0; row < problem.rows; ++row) {
    for (int64_t column = 0; column < problem.columns; ++column) {
      const int64_t top = row / problem.block_rows * problem.block_rows;
      const int64_t left = column / problem.block_columns * problem.block_columns;
      float largest = 0;
      for (int64_t i = top; i < problem.rows && i < top + problem.block_rows; ++i) {
        for (int64_t j = left; j < problem.columns && j < left + problem.block_columns; ++j) {
          largest = std::fmax(largest, std::fabs(get(problem.weight, Float::float32, i * problem.columns + j)));
        }
      }
      const int64_t index = row / problem.block_rows * problem.scale_columns + column / problem.block_columns;
      const float scale = get(made.scales.data(), Float::float32, index);
      const float expected = largest == 0 ? 0x1p-23f : largest / (half - 0.5f);
      const float ratio = get(problem.weight, Float::float32, row * problem.columns + column) / expected;
      const float code = std::nearbyint(std::fmin(std::fmax(ratio, -half), half - 1));
      const auto found = static_cast<int8_t>(made.codes.data()[row * problem.columns + column]);
      if (scale != expected || static_cast<float>(found) != code) {
        std::printf("wrong: row %d, column %d: %d by %g, not %g by %g\n", int(row), int(column), int(found),
                    double(scale), double(code), double(expected));
        return false;
      }
    }
  }
  return true;
}

bool right(Scheme scheme, Float type, int64_t rows, int64_t columns, int64_t block_rows, int64_t block_columns) {
  const Tensor weight = random_values(rows * columns, type);
  const Quantize problem = describe(scheme, weight, type, rows, columns, block_rows, block_columns);
  const auto kernels = levels(quantize_kernel);
  const auto packs = levels(pack_row);
  Result given{Tensor(), Tensor(), Tensor()};
  if (scheme.has_scales) {
    Quantize finding = problem;
    finding.has_scales = false;
    finding.code_row_bytes = columns;
    given = run(*kernels[0], finding, nullptr, false, nullptr);
  }
  const Result* const scales = scheme.has_scales ? &given : nullptr;
  const Result first = run(*kernels[0], problem, scheme.pack ? packs[0] : nullptr, false, scales);
  const bool plain = !scheme.is_float && scheme.symmetric && !scheme.has_scales && !scheme.pack;
  if (plain && type == Float::float32 && !follows_the_definition(problem, first)) return false;
  for (size_t level = 0; level < kernels.size(); ++level) {
    PackRow* const pack = scheme.pack ? packs[level] : nullptr;
    for (bool by_rows : {false, true}) {
      if (by_rows && block_rows != 1) continue;
      if (!(run(*kernels[level], problem, pack, by_rows, scales) == first)) {
        std::printf("level %d differs: %d bits, type %d, %d x %d, blocks of %d x %d, %s%s%s%s%s\n", int(level),
                    scheme.bits, int(type), int(rows), int(columns), int(block_rows), int(block_columns),
                    scheme.is_float ? "float " : "", scheme.symmetric ? "" : "asymmetric ",
                    scheme.has_scales ? "given scales " : "", scheme.pack ? "packed " : "", by_rows ? "at once" : "");
        return false;
      }
    }
  }
  return true;
}

float bfloat16_of(int exponent, int significand) {
  return float_of(static_cast<uint32_t>(exponent) << 23 | static_cast<uint32_t>(significand) << 16);
}

int to_float8(float value) {
  const float magnitude = std::fabs(value);
  const int sign = std::signbit(value) ? 0x80 : 0;
  if (magnitude < 0x1p-6f) return sign | static_cast<int>(std::nearbyint(magnitude * 512));
  int exponent;
  std::frexp(magnitude, &exponent);
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 4 - exponent)));
  return sign | (((exponent + 6) << 3) + steps - 8);
}

// Codes by bfloat16 scales of an exponent, of all significands, for all values that have codes of their own, and the
// least there are, whose quotients vanish: what kernels compute without dividing is what a division makes.
bool divides_exactly(int exponent, bool is_float) {
  const int from = exponent > 14 ? exponent - 14 : 0, to = exponent + 9 < 255 ? exponent + 9 : 255;
  std::vector<int> exponents{0, 1};
  for (int i = from; i < to; ++i) exponents.push_back(i);
  const int64_t rows = 128, columns = static_cast<int64_t>(exponents.size()) * 128;
  Tensor weight(rows * columns * 2);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t column = i % columns;
    const float value = bfloat16_of(exponents[static_cast<size_t>(column / 128)], static_cast<int>(column % 128));
    set(weight.data(), Float::bfloat16, i, i % 2 == 0 ? value : -value);
  }
  const Scheme scheme{8, is_float, true, true, false};
  const Quantize problem = describe(scheme, weight, Float::bfloat16, rows, columns, 1, columns);
  Result given{Tensor(), Tensor(rows * 2), Tensor()};
  for (int64_t row = 0; row < rows; ++row) {
    const int significand = exponent == 0 && row == 0 ? 1 : static_cast<int>(row);
    set(given.scales.data(), Float::bfloat16, row, bfloat16_of(exponent, significand));
  }
  for (const QuantizeKernel* const kernel : levels(quantize_kernel)) {
    const Result made = run(*kernel, problem, nullptr, true, &given);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const float value = get(weight.data(), Float::bfloat16, i);
      const float scale = get(given.scales.data(), Float::bfloat16, i / columns);
      const float ratio = as_bfloat16(value / scale) + 0.0f;
      const float least = is_float ? -448.0f : -128.0f, greatest = is_float ? 448.0f : 127.0f;
      const float clamped = ratio < least ? least : ratio > greatest ? greatest : ratio;
      const int expected = is_float ? to_float8(clamped) : static_cast<int>(std::nearbyint(clamped)) & 0xff;
      if (made.codes.data()[i] != expected) {
        std::printf("wrong: %a by %a is %d, not %d\n", double(value), double(scale), int(made.codes.data()[i]),
                    expected);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  for (int exponent : {0, 1, 2, 8, 120, 126, 127, 128, 134, 254}) {
    if (!divides_exactly(exponent, false) || !divides_exactly(exponent, true)) return 1;
  }
  for (Float type : {Float::bfloat16, Float::float16, Float::float32}) {
    for (int64_t columns : {1, 7, 64, 65, 200, 4200}) {
      for (int64_t group : {int64_t{32}, int64_t{48}, columns}) {
        for (int64_t block_rows : {1, 4}) {
          for (bool has_scales : {false, true}) {
            const int64_t rows = 1 + random_below(columns > 1000 ? 3 : 9);
            if (!right({8, true, true, has_scales, false}, type, rows, columns, block_rows, group)) return 1;
            for (bool symmetric : {false, true}) {
              for (bool pack : {false, true}) {
                const int bits = columns > 1000 ? 4 : 1 + static_cast<int>(random_below(8));
                const Scheme scheme{bits, false, symmetric, has_scales, pack};
                if (!right(scheme, type, rows, columns, block_rows, group)) return 1;
              }
            }
          }
        }
      }
    }
  }
  return 0;
}
