// A compressed weight as a checkpoint's tensors describe it: what every kernel on weights is given.
#pragma once

#include <cstdint>

namespace compressed_format {

enum class Float { bfloat16, float16, float32 };

constexpr int64_t float_bytes(Float type) { return type == Float::float32 ? 4 : 2; }

// What the elements of `codes` are.
enum class Codes {
  packed,    // `bits` bits each in little-endian int32 words, dense layout (schema/README.md, "pack-quantized")
  int8,      // one byte each, two's complement
  float8,    // one byte each, E4M3 (fn)
  bfloat16,  // plain values
  float16,
  float32,
};

// What the elements of `zero_point` are.
enum class ZeroPoints {
  none,
  int8,    // laid out as the scales
  packed,  // `bits` bits each in words along the rows: [words of the scales' rows, columns of scales]
};

// A matrix [rows, columns]. No pointer is aligned to more than a byte. Rows are contiguous; all other tensors are
// contiguous as a whole.
struct Weight {
  const void* codes = nullptr;
  int64_t row_bytes = 0;  // from one row of codes to the next; of the kept ones only, where there is a bitmask
  Codes type = Codes::packed;
  int bits = 0;
  int64_t rows = 0;
  int64_t columns = 0;

  // One scale for each rectangle of block_rows x block_columns,
  // [ceil(rows / block_rows), ceil(columns / block_columns)]. A weight with a single scale has rectangles as large as
  // itself. Null for plain values.
  const void* scale = nullptr;
  Float scale_type = Float::bfloat16;
  int64_t block_rows = 1;
  int64_t block_columns = 1;
  int64_t scale_columns = 0;  // how many scales a row of scales has

  const void* zero_point = nullptr;
  ZeroPoints zero_points = ZeroPoints::none;

  // The group of each column [columns], instead of column / block_columns; null where columns are in order. Values lie
  // within the groups there are.
  const int32_t* g_idx = nullptr;

  // A bit for each place of a row, [rows, ceil(columns / 8)]; `codes` then holds only those that are set.
  const uint8_t* bitmask = nullptr;
  // Where each row starts in `codes`, counted in elements, [rows + 1]: the last one is the number of all. Null where
  // rows keep equally many (2:4), row_bytes apart.
  const int64_t* row_offsets = nullptr;
};

}  // namespace compressed_format
