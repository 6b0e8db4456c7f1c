// The kernels of activations.h on vectors of floats. Whoever includes this has included one of cpu/simd/*.h, and
// defined `F32 as_float8(F32)`: values within -448 to 448 to the nearest E4M3, ties to even, and back.

#include "cpu/activations/activations.h"

namespace compressed_format {
namespace {

template <Float type>
F32 load(const void* source, int count) {
  if constexpr (type == Float::bfloat16) {
    return count == lanes ? load_bfloat16(source) : load_bfloat16(source, count);
  } else if constexpr (type == Float::float16) {
    return count == lanes ? load_float16(source) : load_float16(source, count);
  } else {
    return count == lanes ? load_float32(source) : load_float32(source, count);
  }
}

template <Float type>
void store(void* target, F32 values, int count) {
  if constexpr (type == Float::bfloat16) {
    count == lanes ? store_bfloat16(target, values) : store_bfloat16(target, values, count);
  } else if constexpr (type == Float::float16) {
    count == lanes ? store_float16(target, values) : store_float16(target, values, count);
  } else {
    count == lanes ? store_float32(target, values) : store_float32(target, values, count);
  }
}

template <Float type>
F32 rounded(F32 values) {
  if constexpr (type == Float::bfloat16) {
    return as_bfloat16(values);
  } else if constexpr (type == Float::float16) {
    return as_float16(values);
  } else {
    return values;
  }
}

// The type that torch computes in where two meet.
constexpr Float promoted(Float a, Float b) { return a == b ? a : Float::float32; }

constexpr float epsilon(Float type) {
  return type == Float::bfloat16 ? 0x1p-7f : type == Float::float16 ? 0x1p-10f : 0x1p-23f;
}

inline float lane(F32 values) {
  float value;
  store_float32(&value, values, 1);
  return value;
}

inline int steps(int64_t left) { return left < lanes ? static_cast<int>(left) : lanes; }

struct Step {
  float scale;
  float zero_point;
  bool has_zero_point;
};

struct Codes8 {
  F32 lowest;
  F32 highest;
  bool is_float;

  explicit Codes8(const Activations& problem) : is_float(problem.is_float) {
    const auto half = static_cast<float>(1 << (problem.bits - 1));
    lowest = broadcast(is_float ? -448.0f : -half);
    highest = broadcast(is_float ? 448.0f : half - 1.0f);
  }
  // What is not a number stays so: it comes second in both comparisons.
  F32 nearest(F32 ratio) const {
    const F32 clamped = minimum(highest, maximum(lowest, ratio));
    return is_float ? as_float8(clamped) : round_to_even(clamped);
  }
};

template <Float type>
Range range_of(const char* x, int64_t count) {
  // Each of the values times zero: no number as soon as one of them is not finite.
  F32 poison = zero(), least = zero(), greatest = zero();  // zero is always within the range
  for (int64_t i = 0; i < count; i += lanes) {
    const F32 values = load<type>(x + i * float_bytes(type), steps(count - i));
    least = minimum(least, values);
    greatest = maximum(greatest, values);
    poison = multiply_add(values, zero(), poison);
  }
  const float nothing = sum(poison);
  return {smallest(least) + nothing, largest(greatest) + nothing};
}

// scales.scale_of_range, in the type of the values; for a whole tensor a difference is taken in float32.
template <Float type>
Step step_of(const Activations& problem, Range range) {
  const F32 least = broadcast(range.least), greatest = broadcast(range.greatest);
  const float half = static_cast<float>(1 << (problem.bits - 1));
  if (problem.is_float || problem.symmetric) {
    const F32 bound = maximum(absolute(least), greatest);
    const float scale = lane(rounded<type>(bound / broadcast(problem.is_float ? 448.0f : half - 0.5f)));
    return {scale == 0.0f ? epsilon(type) : scale, 0.0f, false};
  }
  const F32 scale = rounded<type>(rounded<type>(greatest - least) / broadcast(2.0f * half - 1.0f));
  const F32 ratio = rounded<type>(least / scale);
  const F32 difference = broadcast(-half) - ratio;
  const Codes8 codes(problem);
  const float zero_point = lane(codes.nearest(problem.whole_tensor ? difference : rounded<type>(difference)));
  const bool is_number = zero_point == zero_point;  // zero divided by zero has been none
  const float value = lane(scale);
  // An integer zero has no sign: adding zero takes it away.
  return {value == 0.0f ? epsilon(type) : value, is_number ? zero_point + 0.0f : 0.0f, true};
}

template <Float type, Float scale_type>
Step step_at(const Activations& problem, const Range* whole, int64_t token, int64_t group) {
  if (problem.scale == nullptr) {
    if (problem.whole_tensor) return step_of<type>(problem, *whole);
    const int64_t begin = token * problem.columns + group * problem.group_size;
    const auto* const x = static_cast<const char*>(problem.x) + begin * float_bytes(type);
    return step_of<type>(problem, range_of<type>(x, problem.group_size));
  }
  const int64_t index = token * problem.scales_per_token + group;
  const auto* const scale = static_cast<const char*>(problem.scale) + index * float_bytes(scale_type);
  const bool has_zero_point = problem.zero_point != nullptr;
  const float zero_point = has_zero_point ? static_cast<float>(problem.zero_point[index]) : 0.0f;
  return {lane(load<scale_type>(scale, 1)), zero_point, has_zero_point};
}

// Calls emit(place, codes, how many) for all codes of a group.
template <Float type, Float scale_type, typename Emit>
void round_group(const char* x, int64_t count, const Codes8& codes, const Step& step, Emit emit) {
  constexpr Float wide = promoted(type, scale_type);
  const F32 scale = broadcast(step.scale), zero_point = broadcast(step.zero_point);
  for (int64_t i = 0; i < count; i += lanes) {
    const int part = steps(count - i);
    F32 ratio = rounded<wide>(load<type>(x + i * float_bytes(type), part) / scale);
    if (step.has_zero_point) ratio = rounded<wide>(ratio + zero_point);
    emit(i, codes.nearest(ratio), part);
  }
}

template <Float type, Float scale_type>
void fake_quantize_as(const Activations& problem, const Range* whole, void* y, int64_t first, int64_t last) {
  const Codes8 codes(problem);
  const int64_t groups = problem.columns / problem.group_size;
  for (int64_t token = first; token < last; ++token) {
    for (int64_t group = 0; group < groups; ++group) {
      const Step step = step_at<type, scale_type>(problem, whole, token, group);
      const int64_t begin = (token * problem.columns + group * problem.group_size) * float_bytes(type);
      char* const target = static_cast<char*>(y) + begin;
      const F32 scale = broadcast(step.scale), zero_point = broadcast(step.zero_point);
      const auto* const x = static_cast<const char*>(problem.x) + begin;
      round_group<type, scale_type>(x, problem.group_size, codes, step, [&](int64_t i, F32 values, int part) {
        if (step.has_zero_point) values = rounded<scale_type>(values - zero_point);
        store<type>(target + i * float_bytes(type), rounded<scale_type>(values * scale), part);
      });
    }
  }
}

template <Float type, Float scale_type>
TokenScale codes_of_group(const char* x, int64_t count, const Codes8& codes, const Step& step, void* target) {
  // Lanes beyond the last column hold no code, and must not be counted.
  F32 total = zero(), poison = zero();
  if (codes.is_float) {
    auto* const halves = static_cast<char*>(target);
    round_group<type, scale_type>(x, count, codes, step, [&](int64_t i, F32 values, int part) {
      store<Float::bfloat16>(halves + 2 * i, values, part);
    });
  } else {
    auto* const bytes = static_cast<int8_t*>(target);
    round_group<type, scale_type>(x, count, codes, step, [&](int64_t i, F32 values, int part) {
      F32 given = values;
      if (part < lanes) {
        float kept[lanes];
        store_float32(kept, values, part);
        given = load_float32(kept, part);
      }
      const F32 numbers = maximum(given, codes.lowest);
      poison = multiply_add(given, zero(), poison);
      total = total + numbers;
      part == lanes ? store_int8(bytes + i, numbers) : store_int8(bytes + i, numbers, part);
    });
  }
  // Sums are whole numbers below 2**24: floats hold them all.
  return {step.scale + sum(poison), static_cast<int32_t>(step.zero_point), static_cast<int32_t>(sum(total))};
}

template <Float type, Float scale_type>
void codes_as(const Activations& problem, const Range* whole, void* target, int64_t stride, TokenScale* scales,
              int64_t first, int64_t last) {
  const Codes8 codes(problem);
  const int64_t groups = problem.columns / problem.group_size, code_bytes = problem.is_float ? 2 : 1;
  for (int64_t token = first; token < last; ++token) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * problem.group_size;
      const auto* const x =
          static_cast<const char*>(problem.x) + (token * problem.columns + begin) * float_bytes(type);
      char* const to = static_cast<char*>(target) + ((token - first) * stride + begin) * code_bytes;
      const Step step = step_at<type, scale_type>(problem, whole, token, group);
      scales[(token - first) * groups + group] =
          codes_of_group<type, scale_type>(x, problem.group_size, codes, step, to);
    }
  }
}

// Calls the instance for the types of values and scales; scales found from the values have their type.
template <Float type, typename Call>
void with_scale_type(const Activations& problem, Call call) {
  switch (problem.scale == nullptr ? type : problem.scale_type) {
    case Float::bfloat16: return call.template operator()<type, Float::bfloat16>();
    case Float::float16: return call.template operator()<type, Float::float16>();
    case Float::float32: return call.template operator()<type, Float::float32>();
  }
}

template <typename Call>
void with_types(const Activations& problem, Call call) {
  switch (problem.x_type) {
    case Float::bfloat16: return with_scale_type<Float::bfloat16>(problem, call);
    case Float::float16: return with_scale_type<Float::float16>(problem, call);
    case Float::float32: return with_scale_type<Float::float32>(problem, call);
  }
}

template <Float type>
void ranges_as(const Activations& problem, Range* ranges, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const auto* const x = static_cast<const char*>(problem.x) + token * problem.columns * float_bytes(type);
    ranges[token] = range_of<type>(x, problem.columns);
  }
}

void find_ranges(const Activations& problem, Range* ranges, int64_t first, int64_t last) {
  with_types(problem, [&]<Float type, Float>() { ranges_as<type>(problem, ranges, first, last); });
}

void fake_quantize(const Activations& problem, const Range* whole, void* y, int64_t first, int64_t last) {
  with_types(problem, [&]<Float type, Float scale_type>() {
    fake_quantize_as<type, scale_type>(problem, whole, y, first, last);
  });
}

void make_codes(const Activations& problem, const Range* whole, void* codes, int64_t stride, TokenScale* scales,
                int64_t first, int64_t last) {
  with_types(problem, [&]<Float type, Float scale_type>() {
    codes_as<type, scale_type>(problem, whole, codes, stride, scales, first, last);
  });
}

}  // namespace
}  // namespace compressed_format
