// The kernels of quantize.h on vectors of floats. Whoever includes this has included one of cpu/simd/*.h, and defined
//   `void store_float8(void* target, F32 values)`, the same with a count: values within -448 to 448 as the nearest
//   E4M3, ties to even;
//   `void store_nearest_int8(void* target, F32 values)`, the same with a count: values within -128 to 127 as the
//   nearest whole numbers, ties to even;
//   `F32 nearest_bfloat16(F32 values)`: as_bfloat16, of numbers and infinities only;
//   `int64_t most_codes<is_float, has_zero_point>(x, count, scale, zero_point, bits, target)`: codes of bfloat16
//   values, as many as fill whole vectors, by a scale that has a reciprocal; how many those are, or 0;
//   `uint16_t largest_half(const char* halves, int64_t count)`: the largest of 16-bit patterns without their signs.

#include "cpu/quantize/quantize.h"

namespace compressed_format {
namespace {

template <Float type>
F32 load(const void* source) {
  if constexpr (type == Float::bfloat16) {
    return load_bfloat16(source);
  } else if constexpr (type == Float::float16) {
    return load_float16(source);
  } else {
    return load_float32(source);
  }
}

template <Float type>
F32 load(const void* source, int count) {
  if constexpr (type == Float::bfloat16) {
    return load_bfloat16(source, count);
  } else if constexpr (type == Float::float16) {
    return load_float16(source, count);
  } else {
    return load_float32(source, count);
  }
}

template <Float type>
F32 rounded(F32 values) {
  if constexpr (type == Float::bfloat16) {
    return nearest_bfloat16(values);
  } else if constexpr (type == Float::float16) {
    return as_float16(values);
  } else {
    return values;
  }
}

inline float lane(F32 values) {
  float value;
  store_float32(&value, values, 1);
  return value;
}

// Single values go without vectors where they can: a masked store is slow, and so is a load of what one has written.
inline float nearest_bfloat16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

template <Float type>
float rounded(float value) {
  if constexpr (type == Float::bfloat16) {
    return nearest_bfloat16(value);
  } else if constexpr (type == Float::float16) {
    return lane(as_float16(broadcast(value)));
  } else {
    return value;
  }
}

template <Float type>
float load_one(const void* source) {
  float value;
  if constexpr (type == Float::bfloat16) {
    uint16_t half;
    __builtin_memcpy(&half, source, sizeof half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    __builtin_memcpy(&value, &bits, sizeof value);
  } else if constexpr (type == Float::float16) {
    value = lane(load_float16(source, 1));
  } else {
    __builtin_memcpy(&value, source, sizeof value);
  }
  return value;
}

// A value that is one of the type already.
template <Float type>
void store_one(void* target, float value) {
  if constexpr (type == Float::bfloat16) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const auto half = static_cast<uint16_t>(bits >> 16);
    __builtin_memcpy(target, &half, sizeof half);
  } else if constexpr (type == Float::float16) {
    store_float16(target, broadcast(value), 1);
  } else {
    __builtin_memcpy(target, &value, sizeof value);
  }
}

constexpr float epsilon(Float type) {
  return type == Float::bfloat16 ? 0x1p-7f : type == Float::float16 ? 0x1p-10f : 0x1p-23f;
}

constexpr int64_t bytes_of(Float type) { return type == Float::float32 ? 4 : 2; }

// Calls body(place, how many) for all columns from `begin` to `end`, a whole vector of them at a time but for the last.
template <typename Whole, typename Part>
inline void by_lanes(int64_t begin, int64_t end, Whole whole, Part part) {
  int64_t i = begin;
  for (; i + lanes <= end; i += lanes) whole(i);
  if (i < end) part(i, static_cast<int>(end - i));
}

// The largest magnitude is all that symmetric scales need.
template <Float type, bool magnitude>
Extremes extremes_of(const char* x, int64_t count) {
  if constexpr (magnitude && type != Float::float32) {
    // Patterns without signs are ordered as their values, then infinity, then what is not a number.
    const uint16_t bits = largest_half(x, count);
    return {0.0f, load_one<type>(&bits)};
  }
  // Each of the values times zero: no number as soon as one of them is not finite.
  F32 poison = zero(), least = zero(), greatest = zero();
  const auto take = [&](F32 values) {
    poison = multiply_add(values, zero(), poison);
    if constexpr (magnitude) {
      greatest = maximum(greatest, absolute(values));
    } else {
      least = minimum(least, values);
      greatest = maximum(greatest, values);
    }
  };
  by_lanes(
      0, count, [&](int64_t i) { take(load<type>(x + i * bytes_of(type))); },
      [&](int64_t i, int part) { take(load<type>(x + i * bytes_of(type), part)); });
  const float nothing = sum(poison);
  return {magnitude ? nothing : smallest(least) + nothing, largest(greatest) + nothing};
}

template <Float type>
void extremes_of_row(const Quantize& problem, int64_t row, Extremes* extremes) {
  const auto* const x = static_cast<const char*>(problem.weight) + row * problem.row_bytes;
  const bool magnitude = problem.symmetric;
  for (int64_t block = 0; block < problem.scale_columns; ++block) {
    const int64_t begin = block * problem.block_columns;
    const int64_t left = problem.columns - begin;
    const int64_t count = left < problem.block_columns ? left : problem.block_columns;
    const char* const part = x + begin * bytes_of(type);
    extremes[block] = magnitude ? extremes_of<type, true>(part, count) : extremes_of<type, false>(part, count);
  }
}

// scales.scale_of_range, in the type of the weight.
template <Float type>
void make_scale(const Quantize& problem, Extremes found, int64_t index) {
  void* const scale = static_cast<char*>(problem.scale) + index * bytes_of(type);
  const bool finite = found.greatest - found.greatest == 0.0f && found.least - found.least == 0.0f;
  if (!finite) return store_one<type>(scale, __builtin_nanf(""));
  if (problem.has_scales) return;
  const float half = static_cast<float>(1 << (problem.bits - 1));
  float step;
  if (problem.symmetric) {
    step = rounded<type>(found.greatest / (problem.is_float ? 448.0f : half - 0.5f));
  } else {
    step = rounded<type>(rounded<type>(found.greatest - found.least) / (2.0f * half - 1.0f));
    const float raw = rounded<type>(-half - rounded<type>(found.least / step));
    const float clamped = raw < -half ? -half : raw > half - 1.0f ? half - 1.0f : raw;
    constexpr float magic = 0x1.8p23f;  // after which there is no room for fractions
    // A step of zero for zeros: zero divided by zero is no number, and zero is then what files hold.
    problem.zero_point[index] =
        step == 0.0f && found.least == 0.0f ? 0 : static_cast<int8_t>((clamped + magic) - magic);
  }
  store_one<type>(scale, step == 0.0f ? epsilon(type) : step);
}

// Whether the product with the reciprocal of a scale, rounded to bfloat16, is the quotient rounded so. It is for all
// finite bfloat16 values and scales but those so small that the reciprocal overflows, as going through them all has
// shown: significands of eight bits have no quotient near enough to the middle between two bfloat16 numbers for an
// error of 2**-23 to matter. tests/native/quantize_driver.cpp goes through all significands where exponents differ.
inline bool has_reciprocal(float scale) { return scale >= 0x1p-127f || scale <= -0x1p-127f; }

template <Float type, bool is_float, bool has_zero_point, bool divides>
struct Codes8 {
  F32 scale;
  F32 reciprocal;
  F32 zero_point;
  F32 lowest;
  F32 highest;

  // Clamped, not yet rounded. The order of comparisons makes what is not a number the lowest code.
  F32 ratio(F32 values) const {
    F32 ratio = rounded<type>(divides ? values / scale : values * reciprocal);
    if constexpr (has_zero_point) ratio = rounded<type>(ratio + zero_point);
    if constexpr (is_float) ratio = ratio + zero();  // -0.0, of pruned weights, is the code 0
    return minimum(maximum(ratio, lowest), highest);
  }
  void store(void* target, F32 values) const {
    if constexpr (is_float) {
      store_float8(target, ratio(values));
    } else {
      store_nearest_int8(target, ratio(values));
    }
  }
  void store(void* target, F32 values, int count) const {
    if constexpr (is_float) {
      store_float8(target, ratio(values), count);
    } else {
      store_nearest_int8(target, ratio(values), count);
    }
  }
};

// Codes of `count` values that share a scale.
template <Float type, bool is_float, bool has_zero_point, bool divides>
void codes_of_block(const Quantize& problem, float scale, int zero_point, const char* x, int64_t count,
                    int8_t* target) {
  const auto half = static_cast<float>(1 << (problem.bits - 1));
  Codes8<type, is_float, has_zero_point, divides> codes;
  codes.scale = broadcast(scale);
  codes.reciprocal = broadcast(divides ? 0.0f : 1.0f / scale);
  codes.zero_point = broadcast(static_cast<float>(zero_point));
  codes.lowest = broadcast(is_float ? -448.0f : -half);
  codes.highest = broadcast(is_float ? 448.0f : half - 1.0f);
  int64_t done = 0;
  if constexpr (!divides) {
    done = most_codes<is_float, has_zero_point>(x, count, scale, zero_point, problem.bits, target);
  }
  by_lanes(
      done, count, [&](int64_t i) { codes.store(target + i, load<type>(x + i * bytes_of(type))); },
      [&](int64_t i, int part) { codes.store(target + i, load<type>(x + i * bytes_of(type), part), part); });
}

// Codes of columns [begin, end) of a row, a byte each.
template <Float type, bool is_float, bool has_zero_point>
void codes_of_columns(const Quantize& problem, int64_t row, int64_t begin, int64_t end, int8_t* target) {
  const auto* const x = static_cast<const char*>(problem.weight) + row * problem.row_bytes;
  const int64_t first_scale = row / problem.block_rows * problem.scale_columns;
  int64_t block = begin / problem.block_columns;
  for (int64_t from = begin; from < end; ++block) {
    const int64_t block_end = (block + 1) * problem.block_columns;
    const int64_t to = block_end < end ? block_end : end;
    const int64_t index = first_scale + block;
    const auto scale = load_one<type>(static_cast<const char*>(problem.scale) + index * bytes_of(type));
    const int zero_point = has_zero_point ? problem.zero_point[index] : 0;
    const char* const values = x + from * bytes_of(type);
    int8_t* const here = target + (from - begin);
    if (type == Float::bfloat16 && has_reciprocal(scale)) {
      codes_of_block<type, is_float, has_zero_point, false>(problem, scale, zero_point, values, to - from, here);
    } else {
      codes_of_block<type, is_float, has_zero_point, true>(problem, scale, zero_point, values, to - from, here);
    }
    from = to;
  }
}

// Codes to be packed wait here, in the nearest cache; a multiple of codes_per_cut.
constexpr int64_t waiting_codes = 4096;

template <Float type, bool is_float, bool has_zero_point>
void codes_of_row(const Quantize& problem, int64_t row) {
  auto* const target = static_cast<char*>(problem.codes) + row * problem.code_row_bytes;
  if (problem.pack == nullptr) {
    auto* const bytes = reinterpret_cast<int8_t*>(target);
    return codes_of_columns<type, is_float, has_zero_point>(problem, row, 0, problem.columns, bytes);
  }
  alignas(64) int8_t waiting[waiting_codes];
  for (int64_t begin = 0; begin < problem.columns; begin += waiting_codes) {
    const int64_t left = problem.columns - begin;
    const int64_t count = left < waiting_codes ? left : waiting_codes;
    codes_of_columns<type, is_float, has_zero_point>(problem, row, begin, begin + count, waiting);
    const int64_t written = begin / 8 * problem.bits;
    const int64_t bytes = count == left ? problem.code_row_bytes - written : waiting_codes / 8 * problem.bits;
    problem.pack(waiting, count, problem.bits, target + written, bytes);
  }
}

template <Float type>
void codes_of_row_as(const Quantize& problem, int64_t row) {
  if (problem.is_float) return codes_of_row<type, true, false>(problem, row);
  if (problem.symmetric) return codes_of_row<type, false, false>(problem, row);
  codes_of_row<type, false, true>(problem, row);
}

template <typename Call>
void with_type(const Quantize& problem, Call call) {
  switch (problem.type) {
    case Float::bfloat16: return call.template operator()<Float::bfloat16>();
    case Float::float16: return call.template operator()<Float::float16>();
    case Float::float32: return call.template operator()<Float::float32>();
  }
}

void find_extremes(const Quantize& problem, Extremes* extremes, int64_t first, int64_t last) {
  with_type(problem, [&]<Float type>() {
    for (int64_t row = first; row < last; ++row) {
      extremes_of_row<type>(problem, row, extremes + row * problem.scale_columns);
    }
  });
}

void find_scales(const Quantize& problem, const Extremes* extremes, int64_t first, int64_t last) {
  with_type(problem, [&]<Float type>() {
    for (int64_t index = first * problem.scale_columns; index < last * problem.scale_columns; ++index) {
      const int64_t top = index / problem.scale_columns * problem.block_rows;
      const int64_t bottom = top + problem.block_rows < problem.rows ? top + problem.block_rows : problem.rows;
      Extremes all = {0.0f, 0.0f};
      float poison = 0.0f;
      for (int64_t row = top; row < bottom; ++row) {
        const Extremes& part = extremes[row * problem.scale_columns + index % problem.scale_columns];
        poison += part.least * 0.0f + part.greatest * 0.0f;
        if (part.least < all.least) all.least = part.least;
        if (part.greatest > all.greatest) all.greatest = part.greatest;
      }
      make_scale<type>(problem, {all.least + poison, all.greatest + poison}, index);
    }
  });
}

void make_codes(const Quantize& problem, int64_t first, int64_t last) {
  with_type(problem, [&]<Float type>() {
    for (int64_t row = first; row < last; ++row) codes_of_row_as<type>(problem, row);
  });
}

// A row is read twice, the second time from the cache.
void quantize_rows(const Quantize& problem, int64_t first, int64_t last) {
  with_type(problem, [&]<Float type>() {
    for (int64_t row = first; row < last; ++row) {
      const auto* const x = static_cast<const char*>(problem.weight) + row * problem.row_bytes;
      for (int64_t block = 0; block < problem.scale_columns; ++block) {
        const int64_t begin = block * problem.block_columns;
        const int64_t left = problem.columns - begin;
        const int64_t count = left < problem.block_columns ? left : problem.block_columns;
        const char* const part = x + begin * bytes_of(type);
        const Extremes found =
            problem.symmetric ? extremes_of<type, true>(part, count) : extremes_of<type, false>(part, count);
        make_scale<type>(problem, found, row * problem.scale_columns + block);
      }
      codes_of_row_as<type>(problem, row);
    }
  });
}

}  // namespace
}  // namespace compressed_format
