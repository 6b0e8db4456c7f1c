// Multiplies by weights of several kinds with the kernel for many tokens, in several threads, and compares with a
// definition that goes value by value. Tensors start at odd addresses and end where their memory does.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/dequantize/dequantize.h"
#include "cpu/linear/linear.h"

using namespace compressed_format;

namespace {

std::mt19937 generator(1);

// Bytes at an odd address, with not one to spare behind them.
struct Tensor {
  explicit Tensor(int64_t size) : bytes(static_cast<size_t>(size) + 1) {
    for (auto& byte : bytes) byte = static_cast<unsigned char>(generator());
  }
  unsigned char* data() { return bytes.data() + 1; }
  std::vector<unsigned char> bytes;
};

float value_at(const unsigned char* source, int64_t index, Float type) {
  float value = 0;
  if (type == Float::float32) std::memcpy(&value, source + index * 4, 4);
  else std::memcpy(reinterpret_cast<unsigned char*>(&value) + 2, source + index * 2, 2);
  return value;
}

void set(unsigned char* target, int64_t index, Float type, float value) {
  if (type == Float::float32) std::memcpy(target + index * 4, &value, 4);
  else std::memcpy(target + index * 2, reinterpret_cast<unsigned char*>(&value) + 2, 2);
}

// `part` of `parts`, of so many.
int64_t share(int64_t all, int64_t part, int64_t parts) { return all * part / parts; }

template <typename Action>
void in_threads(int64_t all, Action action) {
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < 3; ++part) {
    threads.emplace_back([=] {
      if (share(all, part, 3) < share(all, part + 1, 3)) action(share(all, part, 3), share(all, part + 1, 3));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

bool right(Codes type, int bits, int64_t tokens, int64_t rows, int64_t columns, int64_t group, Float x_type) {
  const int64_t row_bytes = type == Codes::packed ? (columns * bits + 31) / 32 * 4 : columns;
  const int64_t groups = (columns + group - 1) / group, size = float_bytes(x_type);
  Tensor codes(rows * row_bytes), scales(rows * groups * 4), x(tokens * columns * size), bias(rows * 4);
  Tensor y(tokens * rows * size);
  const auto fraction = [] { return static_cast<float>(generator() % 2000) / 1000.0f - 1.0f; };
  for (int64_t i = 0; i < rows * groups; ++i) set(scales.data(), i, Float::float32, fraction());
  for (int64_t i = 0; i < tokens * columns; ++i) set(x.data(), i, x_type, fraction());
  for (int64_t i = 0; i < rows; ++i) set(bias.data(), i, Float::float32, fraction());
  if (type == Codes::float8) {  // no code for what is no number
    for (int64_t i = 0; i < rows * columns; ++i) codes.data()[i] &= 0xbf;
  }
  Weight weight;
  weight.codes = codes.data();
  weight.row_bytes = row_bytes;
  weight.type = type;
  weight.bits = bits;
  weight.rows = rows;
  weight.columns = columns;
  weight.scale = scales.data();
  weight.scale_type = Float::float32;
  weight.block_columns = group;
  weight.scale_columns = groups;
  Linear problem;
  problem.weight = &weight;
  problem.x = x.data();
  problem.x_type = x_type;
  problem.tokens = tokens;
  problem.x_row_bytes = columns * size;
  problem.bias = bias.data();
  problem.bias_type = Float::float32;
  problem.y = y.data();

  const LinearKernel& kernel = *many_tokens.get();
  if (!kernel.takes(problem)) return false;
  std::vector<unsigned char> memory(kernel.prepared_bytes(problem) + 64);
  unsigned char* prepared = memory.data();
  while (reinterpret_cast<uintptr_t>(prepared) % 64 != 0) ++prepared;
  in_threads(kernel.parts(problem),
             [&](int64_t first, int64_t last) { kernel.prepare(problem, prepared, first, last); });
  in_threads(kernel.tasks(problem), [&](int64_t first, int64_t last) { kernel.run(problem, prepared, first, last); });

  std::vector<float> dense(static_cast<size_t>(rows * columns));
  dequantize_rows(weight, 0, rows, 0, columns, dense.data(), columns * 4, Float::float32);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < rows; ++row) {
      double sum = value_at(bias.data(), row, Float::float32), size_of_sum = 1;
      for (int64_t column = 0; column < columns; ++column) {
        const double product = static_cast<double>(dense[static_cast<size_t>(row * columns + column)]) *
                               static_cast<double>(value_at(x.data(), token * columns + column, x_type));
        sum += product;
        size_of_sum += std::fabs(product);
      }
      // Of eight bits, rounding takes half the last one at most: of weights, and of y.
      const double bound = size_of_sum * (x_type == Float::float32 ? 1e-5 : 0x1p-7);
      const double found = static_cast<double>(value_at(y.data(), token * rows + row, x_type));
      if (!(std::fabs(found - sum) <= bound)) {
        std::printf("wrong: codes %d of %d bits, %d tokens, %d x %d, groups of %d, token %d, row %d: %g, not %g\n",
                    static_cast<int>(type), bits, int(tokens), int(rows), int(columns), int(group), int(token),
                    int(row), found, sum);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  struct Kind {
    Codes type;
    int bits;
  };
  for (const Kind kind : {Kind{Codes::packed, 4}, Kind{Codes::packed, 3}, Kind{Codes::packed, 8}, Kind{Codes::int8, 8},
                          Kind{Codes::float8, 8}}) {
    for (int64_t columns : {1, 31, 64, 129, 1100}) {
      for (int64_t group : {int64_t{32}, int64_t{64}, int64_t{128}, columns}) {
        for (int64_t tokens : {1, 16, 37}) {
          for (Float type : {Float::float32, Float::bfloat16}) {
            const auto rows = static_cast<int64_t>(1 + generator() % 60);
            if (!right(kind.type, kind.bits, tokens, rows, columns, group, type)) return 1;
          }
        }
      }
    }
  }
  return 0;
}
