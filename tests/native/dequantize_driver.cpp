// Makes weights of every kind dense, in parts of rows by several threads, and compares with a definition that goes bit
// by bit. Tensors start at odd addresses and end where their memory does: sanitizers see what a comparison cannot, and
// an emulator of an older processor stops at an instruction that it does not know.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "cpu/dequantize/dequantize.h"

using namespace compressed_format;

namespace {

std::mt19937 generator(1);

int random_below(int bound) { return static_cast<int>(generator() % static_cast<unsigned>(bound)); }

// Bytes at an odd address, with not one to spare behind them.
struct Tensor {
  explicit Tensor(size_t size) : bytes(size + 1) {
    for (auto& byte : bytes) byte = static_cast<unsigned char>(generator());
  }
  unsigned char* data() { return bytes.data() + 1; }
  std::vector<unsigned char> bytes;
};

int64_t words(int64_t size, int bits) { return (size * bits + 31) / 32; }

int code_at(const unsigned char* row, int bits, int64_t index) {
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    const int64_t place = index * bits + bit;
    code |= (row[place / 8] >> (place % 8) & 1) << bit;
  }
  return code - (1 << (bits - 1));
}

float as_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

bool right(int bits, int64_t rows, int64_t columns, int64_t group, bool asymmetric, Float out_type) {
  const int64_t row_bytes = words(columns, bits) * 4, groups = (columns + group - 1) / group;
  Tensor codes(static_cast<size_t>(rows * row_bytes)), scales(static_cast<size_t>(rows * groups * 4));
  Tensor zero_points(static_cast<size_t>(words(rows, bits) * groups * 4));
  for (int64_t i = 0; i < rows * groups; ++i) {
    const float scale = 0.25f + static_cast<float>(random_below(1000)) / 997.0f;
    std::memcpy(scales.data() + i * 4, &scale, 4);
  }
  Weight weight;
  weight.codes = codes.data();
  weight.row_bytes = row_bytes;
  weight.bits = bits;
  weight.rows = rows;
  weight.columns = columns;
  weight.scale = scales.data();
  weight.scale_type = Float::float32;
  weight.block_columns = group;
  weight.scale_columns = groups;
  if (asymmetric) {
    weight.zero_point = zero_points.data();
    weight.zero_points = ZeroPoints::packed;
  }
  const int64_t first = random_below(static_cast<int>(columns)), size = float_bytes(out_type);
  const int64_t out_row_bytes = (columns - first) * size;
  Tensor out(static_cast<size_t>(rows * out_row_bytes));
  std::vector<std::thread> threads;
  for (int64_t part = 0; part < 3; ++part) {
    const int64_t begin = rows * part / 3, end = rows * (part + 1) / 3;
    threads.emplace_back([&, begin, end] {
      dequantize_rows(weight, begin, end, first, columns, out.data() + begin * out_row_bytes, out_row_bytes, out_type);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = first; column < columns; ++column) {
      float scale, found = 0;
      std::memcpy(&scale, scales.data() + (row * groups + column / group) * 4, 4);
      // Packed along the rows: the words of a group lie a row of words apart.
      int zero_point = 0;
      for (int bit = 0; asymmetric && bit < bits; ++bit) {
        const int64_t place = row * bits + bit;
        const unsigned char* const word = zero_points.data() + (place / 32 * groups + column / group) * 4;
        zero_point |= (word[place % 32 / 8] >> (place % 8) & 1) << bit;
      }
      if (asymmetric) zero_point -= 1 << (bits - 1);
      const int code = code_at(codes.data() + row * row_bytes, bits, column);
      const float dense = static_cast<float>(code - zero_point) * scale;
      const unsigned char* const at = out.data() + row * out_row_bytes + (column - first) * size;
      if (out_type == Float::float32) {
        std::memcpy(&found, at, 4);
      } else {
        std::memcpy(reinterpret_cast<unsigned char*>(&found) + 2, at, 2);
      }
      if (found != (out_type == Float::float32 ? dense : as_bfloat16(dense))) {
        std::printf("wrong: %d bits, %d x %d, groups of %d, row %d, column %d: %g, not %g\n", bits, int(rows),
                    int(columns), int(group), int(row), int(column), double(found), double(dense));
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  for (int bits = 1; bits <= 8; ++bits) {
    for (int64_t columns : {1, 7, 64, 65, 200, 1100}) {
      for (int64_t group : {int64_t{32}, int64_t{48}, columns}) {
        for (bool asymmetric : {false, true}) {
          for (Float type : {Float::float32, Float::bfloat16}) {
            if (!right(bits, 1 + random_below(9), columns, group, asymmetric, type)) return 1;
          }
        }
      }
    }
  }
  return 0;
}
