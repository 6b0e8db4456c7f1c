#include "cpu/simd/avx512.h"

namespace compressed_format {
namespace {

inline __m128i narrow_to_float8(F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  // From 2**-6 on, the smallest normal one, three bits of mantissa stay.
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(_mm512_add_epi32(magnitude, _mm512_set1_epi32(0x7ffff)), odd);
  const __m512i normal = _mm512_sub_epi32(_mm512_srli_epi32(half, 20), _mm512_set1_epi32(120 << 3));
  // Below, all steps are 2**-9, which is what the last bit of a float from 2**14 on counts.
  const __m512 steps = _mm512_set1_ps(0x1p14f);
  const __m512i counted = _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), steps));
  const __m512i small = _mm512_sub_epi32(counted, _mm512_castps_si512(steps));
  const __mmask16 is_small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x3c800000));
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  return _mm512_cvtepi32_epi8(_mm512_or_si512(_mm512_mask_mov_epi32(normal, is_small, small), sign));
}

inline void store_float8(void* target, F32 values) {
  _mm_storeu_si128(static_cast<__m128i*>(target), narrow_to_float8(values));
}
inline void store_float8(void* target, F32 values, int count) {
  _mm_mask_storeu_epi8(target, first(count), narrow_to_float8(values));
}

// Conversions round so by themselves.
inline void store_nearest_int8(void* target, F32 values) { store_int8(target, values); }
inline void store_nearest_int8(void* target, F32 values, int count) { store_int8(target, values, count); }

inline F32 nearest_bfloat16(F32 values) {
  const __m512i bits = _mm512_castps_si512(values.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  return {_mm512_castsi512_ps(_mm512_and_si512(half, _mm512_set1_epi32(~0xffff)))};
}

inline uint16_t largest_of(__m128i magnitudes) {
  // There is an instruction for the smallest of eight only.
  const __m128i inverted = _mm_xor_si128(magnitudes, _mm_set1_epi16(-1));
  return static_cast<uint16_t>(~_mm_extract_epi16(_mm_minpos_epu16(inverted), 0));
}

inline uint16_t largest_half(const char* halves, int64_t count) {
  const __m512i no_sign = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(halves + 2 * i), no_sign));
  }
  if (i < count) {
    const __mmask32 left = _bzhi_u32(~0u, static_cast<unsigned>(count - i));
    const __m512i bits = _mm512_maskz_loadu_epi16(left, halves + 2 * i);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(bits, no_sign));
  }
  const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1));
  return largest_of(_mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}

// Two vectors of floats as bfloat16 numbers, and such numbers apart again: those at even and at odd places. Nothing is
// brought into order on the way, only at the end, by one permutation of bytes.
inline F32 even_halves(__m512i halves) { return {_mm512_castsi512_ps(_mm512_slli_epi32(halves, 16))}; }
inline F32 odd_halves(__m512i halves) {
  return {_mm512_castsi512_ps(_mm512_and_si512(halves, _mm512_set1_epi32(~0xffff)))};
}
inline __m512i join_halves(F32 low, F32 high) {
  const __m512bh joined = _mm512_cvtne2ps_pbh(high.v, low.v);
  __m512i halves;
  __builtin_memcpy(&halves, &joined, sizeof halves);
  return halves;
}

// Which of 32 values is at a place of what `join_halves` makes of their even and odd ones.
constexpr int value_of_half(int place) { return place < 16 ? 2 * place : 2 * (place - 16) + 1; }

// Where 64 codes are once two vectors of 32 halves have been packed to bytes: of halves at once, or of 32-bit numbers
// from their even and odd places, packed to halves before. Packing goes by quarters of a register.
struct Order {
  alignas(64) uint8_t place[64];
};
constexpr Order order_of(bool apart) {
  Order order = {};
  for (int place = 0; place < 64; ++place) {
    const int quarter = place / 16, within = place % 8, second = place % 16 / 8;
    const int half = apart ? 2 * (4 * quarter + within % 4) + within / 4 : 8 * quarter + within;
    order.place[32 * second + value_of_half(half)] = static_cast<uint8_t>(place);
  }
  return order;
}
constexpr Order order_of_halves = order_of(false), order_of_numbers = order_of(true);

// The processor's conversion to bfloat16 takes subnormal numbers for zeros, whose integer codes are the same.
template <bool has_zero_point>
inline __m512i integers_of(__m512i values, F32 reciprocal, F32 zero_point, F32 highest) {
  const __m512i ratio = join_halves(even_halves(values) * reciprocal, odd_halves(values) * reciprocal);
  F32 even = even_halves(ratio), odd = odd_halves(ratio);
  if constexpr (has_zero_point) {
    even = nearest_bfloat16(even + zero_point);
    odd = nearest_bfloat16(odd + zero_point);
  }
  // What is too large for an integer becomes the least of them, which is right for negative ones only.
  const __m512i low = _mm512_cvtps_epi32(minimum(even, highest).v);
  const __m512i high = _mm512_cvtps_epi32(minimum(odd, highest).v);
  return _mm512_packs_epi32(low, high);
}

// Codes of 64 integers at a time; packing to bytes saturates.
template <bool has_zero_point>
inline int64_t most_integers(const char* x, int64_t count, F32 reciprocal, F32 zero_point, int lowest, int highest,
                             int8_t* target) {
  const __m512i order = _mm512_load_si512(order_of_numbers.place);
  const __m512i least = _mm512_set1_epi8(static_cast<char>(lowest));
  const F32 greatest = broadcast(static_cast<float>(highest));
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const __m512i first = _mm512_loadu_si512(x + 2 * i), second = _mm512_loadu_si512(x + 2 * i + 64);
    const __m512i codes = _mm512_packs_epi16(integers_of<has_zero_point>(first, reciprocal, zero_point, greatest),
                                             integers_of<has_zero_point>(second, reciprocal, zero_point, greatest));
    _mm512_storeu_si512(target + i, _mm512_permutexvar_epi8(order, _mm512_max_epi8(codes, least)));
  }
  return i;
}

// E4M3 codes of 32 bfloat16 numbers, a half each.
inline __m512i float8_of_halves(__m512i halves) {
  const __m512i all = _mm512_and_si512(halves, _mm512_set1_epi16(0x7fff));
  const __m512i magnitude = _mm512_min_epu16(all, _mm512_set1_epi16(0x43e0));  // 448
  // From 2**-6 on, the smallest normal one, three bits of mantissa stay.
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(magnitude, 4), _mm512_set1_epi16(1));
  const __m512i rounded = _mm512_add_epi16(_mm512_add_epi16(magnitude, _mm512_set1_epi16(7)), odd);
  __m512i codes = _mm512_sub_epi16(_mm512_srli_epi16(rounded, 4), _mm512_set1_epi16(120 << 3));
  const __mmask32 is_small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(0x3c80));
  if (is_small != 0) {
    // Below, all steps are 2**-9: the significand is shifted until its last bit counts that. Shifts by more bits than
    // there are leave zero.
    const __m512i significand =
        _mm512_or_si512(_mm512_and_si512(magnitude, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x80));
    const __m512i shift = _mm512_sub_epi16(_mm512_set1_epi16(125), _mm512_srli_epi16(magnitude, 7));
    const __m512i ones = _mm512_set1_epi16(1);
    const __m512i last = _mm512_and_si512(_mm512_srlv_epi16(significand, shift), ones);
    const __m512i half = _mm512_sub_epi16(_mm512_srli_epi16(_mm512_sllv_epi16(ones, shift), 1), ones);
    const __m512i sum = _mm512_add_epi16(_mm512_add_epi16(significand, half), last);
    codes = _mm512_mask_srlv_epi16(codes, is_small, sum, shift);
  }
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(halves, 8), _mm512_set1_epi16(0x80));
  return _mm512_or_si512(codes, sign);
}

inline __m512i ratio_of(__m512i values, F32 reciprocal) {
  // -0.0, of pruned weights, is the code 0.
  const __mmask32 some = _mm512_test_epi16_mask(values, _mm512_set1_epi16(0x7fff));
  const __m512i numbers = _mm512_maskz_mov_epi16(some, values);
  return join_halves(even_halves(numbers) * reciprocal, odd_halves(numbers) * reciprocal);
}

inline int64_t most_floats(const char* x, int64_t count, F32 reciprocal, int8_t* target) {
  const __m512i order = _mm512_load_si512(order_of_halves.place);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const __m512i first = _mm512_loadu_si512(x + 2 * i), second = _mm512_loadu_si512(x + 2 * i + 64);
    const __m512i codes = _mm512_packus_epi16(float8_of_halves(ratio_of(first, reciprocal)),
                                              float8_of_halves(ratio_of(second, reciprocal)));
    _mm512_storeu_si512(target + i, _mm512_permutexvar_epi8(order, codes));
  }
  return i;
}

template <bool is_float, bool has_zero_point>
int64_t most_codes(const char* x, int64_t count, float scale, int zero_point, int bits, int8_t* target) {
  const F32 reciprocal = broadcast(1.0f / scale);
  if constexpr (is_float) {
    // Of a larger scale, a quotient can be so small that it is zero, which has no sign then. A subnormal one has.
    return scale > 0.0f && scale <= 1.0f ? most_floats(x, count, reciprocal, target) : 0;
  } else {
    const int half = 1 << (bits - 1);
    const F32 offset = broadcast(static_cast<float>(zero_point));
    return most_integers<has_zero_point>(x, count, reciprocal, offset, -half, half - 1, target);
  }
}

}  // namespace
}  // namespace compressed_format

#include "cpu/quantize/quantize.inl"

namespace compressed_format {

extern const QuantizeKernel quantize_avx512;
const QuantizeKernel quantize_avx512 = {find_extremes, find_scales, make_codes, quantize_rows};

}  // namespace compressed_format
