#include "cpu/dequantize/dequantize.h"

#include <algorithm>
#include <cstring>

namespace compressed_format {
namespace {

constexpr ByIsa<DequantizeRows> dequantize_by_isa COMPRESSED_FORMAT_BY_ISA(dequantize_rows);
constexpr ByIsa<ExpandRows> expand_by_isa COMPRESSED_FORMAT_BY_ISA(expand_rows);
constexpr ByIsa<UnpackRows> unpack_by_isa COMPRESSED_FORMAT_BY_ISA(unpack_rows);

}  // namespace

bool can_dequantize(const Weight& weight) {
  const bool single = weight.block_rows >= weight.rows && weight.scale_columns == 1;
  if (weight.g_idx != nullptr && weight.block_rows != 1 && !single) return false;
  switch (weight.type) {
    case Codes::packed: case Codes::int8: return weight.scale != nullptr;
    case Codes::float8: return weight.scale != nullptr && weight.zero_points == ZeroPoints::none;
    default: return weight.scale == nullptr;
  }
}

void dequantize_rows(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_column,
                     int64_t last_column, void* out, int64_t out_row_bytes, Float out_type) {
  dequantize_by_isa.get()(weight, first_row, last_row, first_column, last_column, out, out_row_bytes, out_type);
}

void expand_rows(const Weight& weight, int value_bytes, int64_t first_row, int64_t last_row, void* out) {
  expand_by_isa.get()(weight, value_bytes, first_row, last_row, out);
}

void unpack_rows(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row, int8_t* codes) {
  unpack_by_isa.get()(words, bits, size, first_row, last_row, codes);
}

// Old files only, so that what a compiler makes of this loop is enough.
void unpack_word_aligned_rows(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row,
                              int8_t* codes) {
  const int64_t per_word = 32 / bits;
  const int64_t row_words = (size + per_word - 1) / per_word;
  const uint32_t mask = (1u << bits) - 1;
  const int half = 1 << (bits - 1);
  for (int64_t row = first_row; row < last_row; ++row) {
    const char* const source = static_cast<const char*>(words) + row * row_words * 4;
    int8_t* const target = codes + row * size;
    for (int64_t index = 0; index < row_words; ++index) {
      uint32_t word;
      std::memcpy(&word, source + index * 4, sizeof word);
      const int64_t first = index * per_word;
      const int64_t count = std::min(per_word, size - first);
      for (int64_t i = 0; i < count; ++i) {
        target[first + i] = static_cast<int8_t>(static_cast<int>(word >> (i * bits) & mask) - half);
      }
    }
  }
}

}  // namespace compressed_format
