// A compressed weight of random codes, and what it stands for by a definition that goes bit by bit.
#pragma once

#include "driver.h"

namespace driver {

inline int64_t words(int64_t size, int bits) { return (size * bits + 31) / 32; }

// Bits [place, place + bits) of a row of little-endian words.
inline int code_at(const unsigned char* row, int bits, int64_t index) {
  int code = 0;
  for (int bit = 0; bit < bits; ++bit) {
    const int64_t place = index * bits + bit;
    code |= (row[place / 8] >> (place % 8) & 1) << bit;
  }
  return code - (1 << (bits - 1));
}

struct Kind {
  Codes type = Codes::packed;
  int bits = 8;
  int64_t block_rows = 1;
  int64_t block_columns = 32;
  Float scale_type = Float::float32;
  ZeroPoints zero_points = ZeroPoints::none;
  bool ordered = true;  // without g_idx
  int kept = 0;         // 2: 2:4; 1: as many as there are; 0: all
};

class RandomWeight {
 public:
  RandomWeight(const Kind& kind, int64_t rows, int64_t columns) {
    description.type = kind.type;
    description.bits = kind.bits;
    description.rows = rows;
    description.columns = columns;
    if (kind.kept != 0) choose_places(kind.kept);
    make_codes(kind);
    if (kind.type <= Codes::float8) make_scales(kind);
  }

  const Weight& weight() const { return description; }

  float scale(int64_t row, int64_t column) const {
    return description.scale == nullptr ? 1.0f : get(scales.data(), description.scale_type, block(row, column));
  }

  // Code less zero point; the plain value; zero where none is kept.
  float number(int64_t row, int64_t column) const {
    const int64_t index = place(row, column);
    if (index < 0) return 0;
    switch (description.type) {
      case Codes::packed: {
        const auto* const line = codes.data() + row * description.row_bytes;
        return static_cast<float>(code_at(line, description.bits, column) - zero_point(row, column));
      }
      case Codes::int8: return static_cast<float>(static_cast<int8_t>(codes.data()[index]) - zero_point(row, column));
      case Codes::float8: return from_float8(codes.data()[index]);
      case Codes::bfloat16: return get(codes.data(), Float::bfloat16, index);
      case Codes::float16: return get(codes.data(), Float::float16, index);
      default: return get(codes.data(), Float::float32, index);
    }
  }

  double value(int64_t row, int64_t column) const {
    return static_cast<double>(number(row, column)) * static_cast<double>(scale(row, column));
  }

 private:
  int64_t block(int64_t row, int64_t column) const {
    const int64_t group = description.g_idx == nullptr ? column / description.block_columns : group_of[column];
    return row / description.block_rows * description.scale_columns + group;
  }

  int zero_point(int64_t row, int64_t column) const {
    const int64_t index = block(row, column);
    if (description.zero_points == ZeroPoints::int8) return static_cast<int8_t>(zeros.data()[index]);
    if (description.zero_points == ZeroPoints::none) return 0;
    // Packed along the rows: the words of a group lie a row of words apart.
    int code = 0;
    for (int bit = 0; bit < description.bits; ++bit) {
      const int64_t at = row / description.block_rows * description.bits + bit;
      const int64_t group = index % description.scale_columns;
      const auto* const word = zeros.data() + (at / 32 * description.scale_columns + group) * 4;
      code |= (word[at % 32 / 8] >> (at % 8) & 1) << bit;
    }
    return code - (1 << (description.bits - 1));
  }

  // The number of an element among those that are stored; -1 where it is not.
  int64_t place(int64_t row, int64_t column) const {
    if (description.bitmask == nullptr) return row * description.columns + column;
    const int64_t row_bits = (description.columns + 7) / 8;
    if (!(mask.data()[row * row_bits + column / 8] >> (column % 8) & 1)) return -1;
    int64_t before = starts[static_cast<size_t>(row)];
    for (int64_t i = 0; i < column; ++i) before += mask.data()[row * row_bits + i / 8] >> (i % 8) & 1;
    return before;
  }

  void choose_places(int kept) {
    const int64_t rows = description.rows, columns = description.columns, row_bits = (columns + 7) / 8;
    mask = Tensor(rows * row_bits);
    mask.clear();
    starts.assign(1, 0);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t count = starts.back();
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t quad = column / 4 * 4;
        const bool here = kept == 1 ? random_below(3) == 0 : column == quad + row % 4 || column == quad + (row + 1) % 4;
        if (!here) continue;
        mask.data()[row * row_bits + column / 8] |= static_cast<unsigned char>(1 << (column % 8));
        ++count;
      }
      starts.push_back(count);
    }
    description.bitmask = mask.data();
    if (kept == 1) description.row_offsets = starts.data();
  }

  void make_codes(const Kind& kind) {
    const int64_t rows = description.rows, columns = description.columns;
    const int64_t count = kind.kept == 0 ? rows * columns : starts.back();
    const int64_t in_row = kind.kept == 2 ? columns / 2 : columns;
    if (kind.type == Codes::packed) {
      description.row_bytes = words(columns, kind.bits) * 4;
      codes = Tensor(rows * description.row_bytes);
    } else if (kind.type == Codes::int8 || kind.type == Codes::float8) {
      description.row_bytes = in_row;
      codes = Tensor(count);
      for (int64_t i = 0; i < count && kind.type == Codes::float8; ++i) {
        if ((codes.data()[i] & 0x7f) == 0x7f) codes.data()[i] = 1;  // what is not a number
      }
    } else {
      const Float type = kind.type == Codes::bfloat16  ? Float::bfloat16
                         : kind.type == Codes::float16 ? Float::float16
                                                       : Float::float32;
      description.row_bytes = in_row * float_bytes(type);
      codes = random_values(count, type);
    }
    description.codes = codes.data();
  }

  void make_scales(const Kind& kind) {
    const int64_t rows = description.rows, columns = description.columns;
    description.block_rows = kind.block_rows;
    description.block_columns = kind.block_columns;
    description.scale_columns = (columns + kind.block_columns - 1) / kind.block_columns;
    const int64_t scale_rows = (rows + kind.block_rows - 1) / kind.block_rows;
    const int64_t count = scale_rows * description.scale_columns;
    description.scale_type = kind.scale_type;
    scales = Tensor(count * float_bytes(kind.scale_type));
    for (int64_t i = 0; i < count; ++i) {
      set(scales.data(), kind.scale_type, i, static_cast<float>(64 + random_below(192)) / 512);
    }
    description.scale = scales.data();
    description.zero_points = kind.zero_points;
    if (kind.zero_points == ZeroPoints::int8) {
      zeros = Tensor(count);
      const int half = 1 << (kind.bits - 1);
      for (int64_t i = 0; i < count; ++i) {
        zeros.data()[i] = static_cast<unsigned char>(random_below(2 * half) - half);
      }
    } else if (kind.zero_points == ZeroPoints::packed) {
      zeros = Tensor(words(scale_rows, kind.bits) * description.scale_columns * 4);
    }
    if (kind.zero_points != ZeroPoints::none) description.zero_point = zeros.data();
    if (kind.ordered) return;
    for (int64_t i = 0; i < columns; ++i) {
      group_of.push_back(static_cast<int32_t>(random_below(description.scale_columns)));
    }
    description.g_idx = group_of.data();
  }

  Weight description;
  Tensor codes, scales, zeros, mask;
  std::vector<int64_t> starts;
  std::vector<int32_t> group_of;
};

}  // namespace driver
