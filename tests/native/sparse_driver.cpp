// Prunes weights of every type, and stores them with a bitmask, by every level and in several threads, and compares
// with definitions that go value by value. Sanitizers see what a comparison cannot, and an emulator of an older
// processor stops at an instruction that it does not know.

#include "cpu/sparse/sparse.h"

#include "driver.h"

using namespace driver;

namespace {

struct Matrix {
  Codes type;
  int64_t rows;
  int64_t columns;
  int64_t gap;  // bytes between rows
  Tensor bytes;

  Sparse description() const { return {bytes.data(), row_bytes(), type, rows, columns}; }
  int64_t row_bytes() const { return columns * element_bytes(type) + gap; }
  const unsigned char* at(int64_t row, int64_t column) const {
    return bytes.data() + row * row_bytes() + column * element_bytes(type);
  }
  uint32_t magnitude(int64_t row, int64_t column) const {
    uint32_t bits = 0;
    std::memcpy(&bits, at(row, column), static_cast<size_t>(element_bytes(type)));
    switch (type) {
      case Codes::float8: return bits & 0x7f;
      case Codes::int8: return bits;
      case Codes::float32: return bits & 0x7fffffff;
      default: return bits & 0x7fff;
    }
  }
};

// Of few different values, many of them zero, so that there are equal ones.
Matrix random_matrix(Codes type, int64_t rows, int64_t columns, int64_t zeros) {
  Matrix made{type, rows, columns, random_below(2) * 5, Tensor()};
  made.bytes = Tensor(rows * made.row_bytes());
  const int64_t bytes = element_bytes(type);
  for (int64_t i = 0; i < rows * columns; ++i) {
    unsigned char* const at = made.bytes.data() + i / columns * made.row_bytes() + i % columns * bytes;
    for (int64_t byte = 0; byte < bytes; ++byte) at[byte] = 0;
    if (random_below(8) >= zeros) at[bytes - 1] = static_cast<unsigned char>(0x3c + random_below(3));
    if (type != Codes::int8 && random_below(2) == 0) at[bytes - 1] ^= 0x80;
  }
  return made;
}

bool prunes_right(const Matrix& weight) {
  const int64_t bytes = element_bytes(weight.type), row_bytes = weight.columns * bytes;
  for (const SparseKernel* const kernel : levels(sparse_kernel)) {
    Tensor pruned(weight.rows * row_bytes);
    in_threads(weight.rows, [&](int64_t first, int64_t last) {
      kernel->prune_2_of_4(weight.description(), pruned.data(), first, last);
    });
    for (int64_t row = 0; row < weight.rows; ++row) {
      for (int64_t column = 0; column < weight.columns; ++column) {
        int larger = 0;
        for (int64_t other = column / 4 * 4; other < column / 4 * 4 + 4; ++other) {
          const uint32_t here = weight.magnitude(row, column), there = weight.magnitude(row, other);
          larger += there > here || (there == here && other < column);
        }
        const unsigned char zero[4] = {};
        const unsigned char* const expected = larger < 2 ? weight.at(row, column) : zero;
        const unsigned char* const found = pruned.data() + row * row_bytes + column * bytes;
        if (std::memcmp(found, expected, static_cast<size_t>(bytes)) != 0) {
          std::printf("pruned wrong: type %d, row %d, column %d\n", int(weight.type), int(row), int(column));
          return false;
        }
      }
    }
  }
  return true;
}

bool compresses_right(const Matrix& weight) {
  const int64_t bytes = element_bytes(weight.type), mask_row = mask_bytes(weight.columns);
  for (const SparseKernel* const kernel : levels(sparse_kernel)) {
    Tensor bitmask(weight.rows * mask_row);
    std::vector<int64_t> starts(static_cast<size_t>(weight.rows));
    in_threads(weight.rows, [&](int64_t first, int64_t last) {
      kernel->find_values(weight.description(), bitmask.data(), starts.data(), first, last);
    });
    int64_t count = 0;
    for (int64_t& start : starts) {
      const int64_t in_row = start;
      start = count;
      count += in_row;
    }
    Tensor compressed(count * bytes);
    in_threads(weight.rows, [&](int64_t first, int64_t last) {
      kernel->keep_values(weight.description(), bitmask.data(), starts.data(), compressed.data(), first, last);
    });
    int64_t place = 0;
    for (int64_t row = 0; row < weight.rows; ++row) {
      bool right = starts[static_cast<size_t>(row)] == place;
      for (int64_t column = 0; column < mask_row * 8; ++column) {
        const bool expected = column < weight.columns && weight.magnitude(row, column) != 0;
        right = right && expected == (bitmask.data()[row * mask_row + column / 8] >> (column % 8) & 1);
        if (!right || !expected) continue;
        right = std::memcmp(compressed.data() + place * bytes, weight.at(row, column), static_cast<size_t>(bytes)) == 0;
        ++place;
      }
      if (!right) {
        std::printf("compressed wrong: type %d, row %d of %d x %d\n", int(weight.type), int(row), int(weight.rows),
                    int(weight.columns));
        return false;
      }
    }
  }
  return true;
}

// Two bits of each four, those of values among them, and the values at these bits.
bool halves_right(const Matrix& weight) {
  const int64_t bytes = element_bytes(weight.type), mask_row = mask_bytes(weight.columns), kept = weight.columns / 2;
  int64_t crowded = -1;
  for (int64_t quad = 0; quad < weight.rows * weight.columns / 4 && crowded < 0; ++quad) {
    int values = 0;
    for (int64_t i = 0; i < 4; ++i) {
      values += weight.magnitude(quad * 4 / weight.columns, quad * 4 % weight.columns + i) != 0;
    }
    if (values > 2) crowded = quad * 4;
  }
  Tensor first_bitmask, first_compressed;
  for (const SparseKernel* const kernel : levels(sparse_kernel)) {
    Tensor bitmask(weight.rows * mask_row), compressed(weight.rows * kept * bytes);
    std::vector<int64_t> found(static_cast<size_t>(weight.rows));
    in_threads(weight.rows, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        found[static_cast<size_t>(row)] =
            kernel->compress_2_of_4(weight.description(), compressed.data(), bitmask.data(), row, row + 1);
      }
    });
    bool right = true;
    int64_t first_found = -1;
    for (int64_t row = weight.rows - 1; row >= 0; --row) {
      if (found[static_cast<size_t>(row)] >= 0) first_found = found[static_cast<size_t>(row)];
    }
    right = first_found == crowded;
    for (int64_t row = 0; row < weight.rows && right; ++row) {
      int64_t place = row * kept;
      for (int64_t column = 0; column < mask_row * 8 && right; ++column) {
        const bool bit = bitmask.data()[row * mask_row + column / 8] >> (column % 8) & 1;
        if (column >= weight.columns) {
          right = !bit;
        } else if (bit) {
          right = std::memcmp(compressed.data() + place * bytes, weight.at(row, column),
                              static_cast<size_t>(bytes)) == 0;
          ++place;
        } else {
          right = crowded >= 0 || weight.magnitude(row, column) == 0;
        }
        if (column % 4 == 3 && column < weight.columns) right = right && place == row * kept + column / 4 * 2 + 2;
      }
    }
    if (first_bitmask.size() == 0) {
      first_bitmask = std::move(bitmask);
      first_compressed = std::move(compressed);
    } else {
      right = right && bitmask == first_bitmask && compressed == first_compressed;
    }
    if (!right) {
      std::printf("halved wrong: type %d, %d x %d\n", int(weight.type), int(weight.rows), int(weight.columns));
      return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  for (Codes type : {Codes::bfloat16, Codes::float16, Codes::float32, Codes::int8, Codes::float8}) {
    for (int64_t columns : {1, 4, 7, 8, 12, 28, 32, 36, 63, 64, 68, 129, 200, 1100}) {
      for (int64_t zeros : {0, 4, 7, 8}) {
        const Matrix weight = random_matrix(type, 1 + random_below(9), columns, zeros);
        if (!compresses_right(weight)) return 1;
        if (columns % 4 != 0) continue;
        if (!halves_right(weight)) return 1;
        const bool prunable = type != Codes::int8 && type != Codes::float8;
        if (prunable && !prunes_right(weight)) return 1;
      }
    }
  }
  return 0;
}
