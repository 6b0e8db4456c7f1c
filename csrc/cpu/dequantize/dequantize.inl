// Dequantizing for one instruction set. The file that includes this one has included the vectors of cpu/simd, and
// defines, for these, what is declared first. Everything is in an anonymous namespace, and nothing of the standard
// library is called (CMakeLists.txt says why).

#include "cpu/numbers.h"

namespace compressed_format {
namespace {

// E4M3 to floats, exactly.
F32 load_float8(const unsigned char* codes);
F32 load_float8(const unsigned char* codes, int count);

// The first `count` codes of a bit string, of which no byte beyond the last that holds one is read.
void unpack(const unsigned char* bytes, int bits, int64_t count, int8_t* codes);

// Values of so many bytes each to where bits are set, zeros elsewhere; how many bits were set. No more than `available`
// values are read; those that are missing are zeros.
template <int bytes>
int64_t expand(const unsigned char* mask, int64_t count, const unsigned char* values, int64_t available,
               unsigned char* out);

// How many columns are worked on at once: their codes stay in the first level of the cache, and a row's length matters
// little. A multiple of 64, which is how many codes the widest loops take.
constexpr int64_t chunk_columns = 1024;

template <Float type>
inline F32 load_value(const void* source) {
  if constexpr (type == Float::bfloat16) return load_bfloat16(source);
  else if constexpr (type == Float::float16) return load_float16(source);
  else return load_float32(source);
}
template <Float type>
inline F32 load_value(const void* source, int count) {
  if constexpr (type == Float::bfloat16) return load_bfloat16(source, count);
  else if constexpr (type == Float::float16) return load_float16(source, count);
  else return load_float32(source, count);
}
template <Float type>
inline void store_value(void* target, F32 a) {
  if constexpr (type == Float::bfloat16) store_bfloat16(target, a);
  else if constexpr (type == Float::float16) store_float16(target, a);
  else store_float32(target, a);
}
template <Float type>
inline void store_value(void* target, F32 a, int count) {
  if constexpr (type == Float::bfloat16) store_bfloat16(target, a, count);
  else if constexpr (type == Float::float16) store_float16(target, a, count);
  else store_float32(target, a, count);
}

// A product, rounded as the definition does before it is stored: storing rounds it to `out_type`.
template <Float scale_type, Float out_type>
inline F32 rounded(F32 product) {
  if constexpr (scale_type == out_type) return product;
  else if constexpr (scale_type == Float::bfloat16) return as_bfloat16(product);
  else if constexpr (scale_type == Float::float16) return as_float16(product);
  else return product;
}

enum class Code { integer, float8 };

template <Code code>
inline F32 load_code(const unsigned char* codes) {
  if constexpr (code == Code::integer) return load_int8(codes);
  else return load_float8(codes);
}
template <Code code>
inline F32 load_code(const unsigned char* codes, int count) {
  if constexpr (code == Code::integer) return load_int8(codes, count);
  else return load_float8(codes, count);
}

// Codes that share a scale. Integers are exact in every type of scale, and so are their differences; a zero point of
// float8 codes is 0.
struct Scaling {
  float scale;
  float zero_point;
};

// As scale_codes, for as many codes as the instruction set has a better way for; how many. 8 bits stand for all bytes.
template <Code code, Float scale_type, Float out_type>
int64_t scale_most(const unsigned char* codes, int bits, int64_t count, Scaling scaling, char* out);

template <Code code, Float scale_type, Float out_type>
inline void scale_codes(const unsigned char* codes, int bits, int64_t count, Scaling scaling, char* out) {
  const F32 scale = broadcast(scaling.scale);
  const F32 zero_point = broadcast(scaling.zero_point);
  int64_t i = scale_most<code, scale_type, out_type>(codes, bits, count, scaling, out);
  for (; i + lanes <= count; i += lanes) {
    const F32 product = (load_code<code>(codes + i) - zero_point) * scale;
    store_value<out_type>(out + i * float_bytes(out_type), rounded<scale_type, out_type>(product));
  }
  if (i < count) {
    const int rest = static_cast<int>(count - i);
    const F32 product = (load_code<code>(codes + i, rest) - zero_point) * scale;
    store_value<out_type>(out + i * float_bytes(out_type), rounded<scale_type, out_type>(product), rest);
  }
}

// Scales come one at a time, where going through a vector would take longer than what is done with them.
template <Float type>
inline float scale_at(const Weight& weight, int64_t index) {
  const char* const source = static_cast<const char*>(weight.scale) + index * float_bytes(type);
  if constexpr (type == Float::float32) {
    float scale;
    __builtin_memcpy(&scale, source, sizeof scale);
    return scale;
  } else {
    uint16_t half;
    __builtin_memcpy(&half, source, sizeof half);
    if constexpr (type == Float::bfloat16) return float_of(static_cast<uint32_t>(half) << 16);
    // Exponent and mantissa where a float has them; the difference of the biases is a factor, exact for subnormals too.
    const float scaled = float_of((half & 0x7fffu) << 13) * 0x1p112f;
    const float magnitude = (half & 0x7c00u) == 0x7c00u ? float_of(0x7f800000u | (half & 0x3ffu) << 13) : scaled;
    return (half & 0x8000u) != 0 ? -magnitude : magnitude;
  }
}

inline float zero_point_at(const Weight& weight, int64_t row, int64_t group) {
  if (weight.zero_points == ZeroPoints::none) return 0.0f;
  if (weight.zero_points == ZeroPoints::int8) {
    return static_cast<float>(static_cast<const int8_t*>(weight.zero_point)[row * weight.scale_columns + group]);
  }
  // The words of one group's zero points lie a row of words apart; one of odd width may straddle two of them.
  const int64_t bit = row * weight.bits;
  const int shift = static_cast<int>(bit % 32);
  const int64_t stride = weight.scale_columns * 4;
  const char* const source = static_cast<const char*>(weight.zero_point) + bit / 32 * stride + group * 4;
  uint32_t low, high = 0;
  __builtin_memcpy(&low, source, sizeof low);
  if (shift + weight.bits > 32) __builtin_memcpy(&high, source + stride, sizeof high);
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  const auto stored = static_cast<int>(both >> shift & ((1u << weight.bits) - 1));
  return static_cast<float>(stored - (1 << (weight.bits - 1)));
}

template <Float scale_type>
inline Scaling scaling_at(const Weight& weight, int64_t row, int64_t group) {
  return {scale_at<scale_type>(weight, row * weight.scale_columns + group), zero_point_at(weight, row, group)};
}

// Codes [0, count) of columns [first, first + count), each of which has a group of its own.
template <Code code, Float scale_type, Float out_type>
void scale_codes_by_column(const Weight& weight, int64_t scale_row, const unsigned char* codes, int64_t first,
                           int64_t count, char* out) {
  for (int64_t i = 0; i < count; i += lanes) {
    const int part = static_cast<int>(smaller(lanes, count - i));
    float scales[lanes] = {}, zero_points[lanes] = {};
    for (int lane = 0; lane < part; ++lane) {
      int32_t group;
      __builtin_memcpy(&group, reinterpret_cast<const char*>(weight.g_idx) + (first + i + lane) * 4, sizeof group);
      const Scaling scaling = scaling_at<scale_type>(weight, scale_row, group);
      scales[lane] = scaling.scale;
      zero_points[lane] = scaling.zero_point;
    }
    const F32 difference = load_code<code>(codes + i, part) - load_float32(zero_points);
    const F32 product = difference * load_float32(scales);
    store_value<out_type>(out + i * float_bytes(out_type), rounded<scale_type, out_type>(product), part);
  }
}

// The codes of one row in chunks, from left to right, unpacked or expanded where they are not stored as they are used.
template <int bytes>
struct RowCodes {
  RowCodes(const Weight& of, int64_t row, int64_t first_column) : weight(of) {
    const auto* const codes = static_cast<const unsigned char*>(of.codes);
    stored = codes + row * of.row_bytes;
    if (of.bitmask == nullptr) return;
    mask = of.bitmask + row * ((of.columns + 7) / 8);
    available = of.columns / 2;
    if (of.row_offsets != nullptr) {
      stored = codes + of.row_offsets[row] * bytes;
      available = of.row_offsets[row + 1] - of.row_offsets[row];
    }
    for (int64_t i = 0; i < first_column / 8; ++i) taken += __builtin_popcount(mask[i]);
  }

  // Those of [left, right), from a multiple of 8 on at most as many as there is room for in `buffer`.
  const unsigned char* get(int64_t left, int64_t right, unsigned char* buffer) {
    const int64_t base = left / 8 * 8;
    if (mask != nullptr) {
      const int64_t rest = available > taken ? available - taken : 0;
      const int64_t skipped = taken < available ? taken : available;
      taken += expand<bytes>(mask + base / 8, right - base, stored + skipped * bytes, rest, buffer);
      return buffer + (left - base) * bytes;
    }
    if (weight.type != Codes::packed) return stored + left * bytes;
    unpack(stored + base / 8 * weight.bits, weight.bits, right - base, reinterpret_cast<int8_t*>(buffer));
    return buffer + (left - base);
  }

  const Weight& weight;
  const unsigned char* stored = nullptr;
  const unsigned char* mask = nullptr;
  int64_t available = 0;  // values of the row, where there is a mask
  int64_t taken = 0;      // by the columns before
};

struct Part {
  int64_t first_row;
  int64_t last_row;
  int64_t first_column;
  int64_t last_column;
  char* out;
  int64_t out_row_bytes;
};

template <Code code, Float scale_type, Float out_type>
void scaled_rows(const Weight& weight, const Part& part) {
  alignas(64) unsigned char buffer[chunk_columns];
  const int bits = weight.type == Codes::packed ? weight.bits : 8;
  for (int64_t row = part.first_row; row < part.last_row; ++row) {
    RowCodes<1> row_codes(weight, row, part.first_column);
    char* out = part.out + (row - part.first_row) * part.out_row_bytes;
    const int64_t scale_row = row / weight.block_rows;
    int64_t group = part.first_column / weight.block_columns;
    int64_t left_of_group = weight.block_columns - part.first_column % weight.block_columns;
    Scaling scaling{};
    bool known = false;  // the scaling of the group
    for (int64_t left = part.first_column; left < part.last_column;) {
      const int64_t right = smaller(part.last_column, left / 8 * 8 + chunk_columns);
      const unsigned char* codes = row_codes.get(left, right, buffer);
      if (weight.g_idx != nullptr) {
        scale_codes_by_column<code, scale_type, out_type>(weight, scale_row, codes, left, right - left, out);
        out += (right - left) * float_bytes(out_type);
        left = right;
        continue;
      }
      while (left < right) {
        const int64_t count = smaller(right - left, left_of_group);
        if (!known) scaling = scaling_at<scale_type>(weight, scale_row, group);
        known = count < left_of_group;
        scale_codes<code, scale_type, out_type>(codes, bits, count, scaling, out);
        codes += count;
        out += count * float_bytes(out_type);
        left += count;
        left_of_group -= count;
        if (left_of_group == 0) {
          ++group;
          left_of_group = weight.block_columns;
        }
      }
    }
  }
}

template <Float in_type, Float out_type>
void plain_rows(const Weight& weight, const Part& part) {
  constexpr int bytes = static_cast<int>(float_bytes(in_type));
  alignas(64) unsigned char buffer[chunk_columns * bytes];
  for (int64_t row = part.first_row; row < part.last_row; ++row) {
    RowCodes<bytes> row_codes(weight, row, part.first_column);
    char* out = part.out + (row - part.first_row) * part.out_row_bytes;
    for (int64_t left = part.first_column; left < part.last_column;) {
      const int64_t right = smaller(part.last_column, left / 8 * 8 + chunk_columns);
      const unsigned char* const values = row_codes.get(left, right, buffer);
      const int64_t count = right - left;
      if constexpr (in_type == out_type) {
        __builtin_memcpy(out, values, static_cast<uint64_t>(count * bytes));
      } else {
        int64_t i = 0;
        for (; i + lanes <= count; i += lanes) {
          store_value<out_type>(out + i * float_bytes(out_type), load_value<in_type>(values + i * bytes));
        }
        const int rest = static_cast<int>(count - i);
        if (rest > 0) {
          store_value<out_type>(out + i * float_bytes(out_type), load_value<in_type>(values + i * bytes, rest), rest);
        }
      }
      out += count * float_bytes(out_type);
      left = right;
    }
  }
}

template <Code code, Float scale_type>
inline void scaled_rows_to(Float out_type, const Weight& weight, const Part& part) {
  switch (out_type) {
    case Float::bfloat16: return scaled_rows<code, scale_type, Float::bfloat16>(weight, part);
    case Float::float16: return scaled_rows<code, scale_type, Float::float16>(weight, part);
    case Float::float32: return scaled_rows<code, scale_type, Float::float32>(weight, part);
  }
}

template <Code code>
inline void scaled_rows_of(Float out_type, const Weight& weight, const Part& part) {
  switch (weight.scale_type) {
    case Float::bfloat16: return scaled_rows_to<code, Float::bfloat16>(out_type, weight, part);
    case Float::float16: return scaled_rows_to<code, Float::float16>(out_type, weight, part);
    case Float::float32: return scaled_rows_to<code, Float::float32>(out_type, weight, part);
  }
}

template <Float in_type>
inline void plain_rows_to(Float out_type, const Weight& weight, const Part& part) {
  switch (out_type) {
    case Float::bfloat16: return plain_rows<in_type, Float::bfloat16>(weight, part);
    case Float::float16: return plain_rows<in_type, Float::float16>(weight, part);
    case Float::float32: return plain_rows<in_type, Float::float32>(weight, part);
  }
}

inline void dequantize_part(const Weight& weight, const Part& part, Float out_type) {
  if (part.first_row >= part.last_row || part.first_column >= part.last_column) return;
  switch (weight.type) {
    case Codes::packed: case Codes::int8: return scaled_rows_of<Code::integer>(out_type, weight, part);
    case Codes::float8: return scaled_rows_of<Code::float8>(out_type, weight, part);
    case Codes::bfloat16: return plain_rows_to<Float::bfloat16>(out_type, weight, part);
    case Codes::float16: return plain_rows_to<Float::float16>(out_type, weight, part);
    case Codes::float32: return plain_rows_to<Float::float32>(out_type, weight, part);
  }
}

template <int bytes>
inline void expanded_rows(const Weight& weight, int64_t first_row, int64_t last_row, void* out) {
  auto* const target = static_cast<unsigned char*>(out);
  for (int64_t row = first_row; row < last_row; ++row) {
    RowCodes<bytes> row_codes(weight, row, 0);
    row_codes.get(0, weight.columns, target + row * weight.columns * bytes);
  }
}

inline void expand_all(const Weight& weight, int value_bytes, int64_t first_row, int64_t last_row, void* out) {
  switch (value_bytes) {
    case 1: return expanded_rows<1>(weight, first_row, last_row, out);
    case 2: return expanded_rows<2>(weight, first_row, last_row, out);
    default: return expanded_rows<4>(weight, first_row, last_row, out);
  }
}

inline void unpack_all(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row, int8_t* codes) {
  const int64_t row_bytes = (size * bits + 31) / 32 * 4;
  const auto* const bytes = static_cast<const unsigned char*>(words);
  for (int64_t row = first_row; row < last_row; ++row) {
    unpack(bytes + row * row_bytes, bits, size, codes + row * size);
  }
}

// Without instructions for it: one value after the other.
template <int bytes>
inline int64_t expand_one_by_one(const unsigned char* mask, int64_t count, const unsigned char* values,
                                 int64_t available, unsigned char* out) {
  int64_t taken = 0;
  for (int64_t i = 0; i < count; ++i, out += bytes) {
    const bool set = mask[i / 8] >> (i % 8) & 1;
    if (set && taken < available) {
      __builtin_memcpy(out, values + taken * bytes, bytes);
    } else {
      __builtin_memset(out, 0, bytes);
    }
    taken += set;
  }
  return taken;
}

}  // namespace
}  // namespace compressed_format
