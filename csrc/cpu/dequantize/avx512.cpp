#include "cpu/dequantize/dequantize.h"
#include "cpu/simd/avx512.h"

#include "cpu/dequantize/dequantize.inl"

namespace compressed_format {
namespace {

inline __mmask64 first_of_64(int64_t count) {
  return _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(smaller(64, count)));
}

// A code has the bits of a float16 whose exponent is 8 less, so that the processor's conversion does most of it,
// subnormal numbers included.
inline F32 widen_float8(__m128i bytes) {
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7),
                                          _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __m256i magnitude = _mm256_set1_epi16(0x3f80);
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(_mm256_and_si256(halves, magnitude), magnitude);
  const __m256i with_nan = _mm256_mask_mov_epi16(halves, nan, _mm256_set1_epi16(0x7e00));
  return {_mm512_mul_ps(_mm512_cvtph_ps(with_nan), _mm512_set1_ps(256.0f))};
}
F32 load_float8(const unsigned char* codes) {
  return widen_float8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}
F32 load_float8(const unsigned char* codes, int count) {
  return widen_float8(_mm_maskz_loadu_epi8(first(count), codes));
}

// For every width: which byte each byte of a register is taken from, and at which bit of its 64 a code begins.
struct UnpackControl {
  alignas(64) unsigned char places[9][64];
  alignas(64) unsigned char shifts[9][64];
};

constexpr UnpackControl unpack_control = [] {
  UnpackControl made{};
  for (int bits = 1; bits <= 8; ++bits) {
    for (int k = 0; k < 64; ++k) {
      made.places[bits][k] = static_cast<unsigned char>(k / 8 * bits + k % 8);
      made.shifts[bits][k] = static_cast<unsigned char>(k % 8 * bits);
    }
  }
  return made;
}();

// Eight codes fill `bits` bytes: those go into a register's 64 bits, out of which one instruction takes eight times
// eight bits at any place.
void unpack(const unsigned char* bytes, int bits, int64_t count, int8_t* codes) {
  const __m512i permutation = _mm512_load_si512(unpack_control.places[bits]);
  const __m512i shift = _mm512_load_si512(unpack_control.shifts[bits]);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
  const __m512i half = _mm512_set1_epi8(static_cast<char>(1 << (bits - 1)));
  for (int64_t i = 0; i < count; i += 64) {
    const int64_t rest = count - i;
    const __mmask64 used = first_of_64((smaller(64, rest) * bits + 7) / 8);
    const __m512i stored = _mm512_maskz_loadu_epi8(used, bytes + i / 8 * bits);
    const __m512i spread = _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(permutation, stored));
    const __m512i values = _mm512_sub_epi8(_mm512_and_si512(spread, mask), half);
    _mm512_mask_storeu_epi8(codes + i, first_of_64(rest), values);
  }
}

template <int bytes>
int64_t expand(const unsigned char* mask, int64_t count, const unsigned char* values, int64_t available,
               unsigned char* out) {
  constexpr int step = 64 / bytes;
  int64_t taken = 0;
  for (int64_t i = 0; i < count; i += step) {
    const int64_t part = smaller(step, count - i);
    uint64_t set = 0;
    __builtin_memcpy(&set, mask + i / 8, static_cast<unsigned>((part + 7) / 8));
    set &= first_of_64(part);
    const int64_t kept = __builtin_popcountll(set);
    const int64_t rest = available > taken ? available - taken : 0;
    const __mmask64 read = first_of_64(smaller(kept, rest));
    const unsigned char* const source = values + smaller(taken, available) * bytes;
    if constexpr (bytes == 1) {
      const __m512i found = _mm512_maskz_loadu_epi8(read, source);
      _mm512_mask_storeu_epi8(out + i, first_of_64(part), _mm512_maskz_expand_epi8(set, found));
    } else if constexpr (bytes == 2) {
      const __m512i found = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(read), source);
      _mm512_mask_storeu_epi16(out + i * 2, static_cast<__mmask32>(first_of_64(part)),
                               _mm512_maskz_expand_epi16(static_cast<__mmask32>(set), found));
    } else {
      const __m512i found = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(read), source);
      _mm512_mask_storeu_epi32(out + i * 4, static_cast<__mmask16>(first_of_64(part)),
                               _mm512_maskz_expand_epi32(static_cast<__mmask16>(set), found));
    }
    taken += kept;
  }
  return taken;
}

template <Float type>
inline __m256i narrow(F32 a) {
  if constexpr (type == Float::bfloat16) return narrow_to_bfloat16(a);
  else return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT);
}

// The dense values of all codes of five bits, at the places that the low five bits of a code name.
template <Float scale_type, Float out_type>
inline __m512i dense_values(Scaling scaling) {
  const F32 scale = broadcast(scaling.scale), zero_point = broadcast(scaling.zero_point);
  const __m512 upward = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const F32 positive = (F32{upward} - zero_point) * scale;
  const F32 negative = (F32{upward} - broadcast(16.0f) - zero_point) * scale;
  const __m256i low = narrow<out_type>(rounded<scale_type, out_type>(positive));
  const __m256i high = narrow<out_type>(rounded<scale_type, out_type>(negative));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// The processor's own conversion to bfloat16 takes subnormal numbers for zeros. Of a scale no smaller than this, the
// least product is none: differences of integers are at least 1, and float8 codes at least 2**-9.
constexpr float least_plain_scale = 0x1p-100f;

inline bool is_plain(float scale) { return scale >= least_plain_scale || scale <= -least_plain_scale; }

template <Code code, Float scale_type, Float out_type>
int64_t scale_most(const unsigned char* codes, int bits, int64_t count, Scaling scaling, char* out) {
  int64_t i = 0;
  if constexpr (code == Code::integer && out_type != Float::float32) {
    if (bits <= 5 && count >= 64) {  // fewer would not pay for the table
      const __m512i table = dense_values<scale_type, out_type>(scaling);
      for (; i + 64 <= count; i += 64) {
        const __m512i some = _mm512_loadu_si512(codes + i);
        const __m512i low = _mm512_cvtepi8_epi16(_mm512_castsi512_si256(some));
        const __m512i high = _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(some, 1));
        _mm512_storeu_si512(out + i * 2, _mm512_permutexvar_epi16(low, table));
        _mm512_storeu_si512(out + i * 2 + 64, _mm512_permutexvar_epi16(high, table));
      }
      return i;
    }
  }
  if constexpr (out_type == Float::bfloat16) {
    if (!is_plain(scaling.scale)) return 0;
    const F32 scale = broadcast(scaling.scale), zero_point = broadcast(scaling.zero_point);
    for (; i + 32 <= count; i += 32) {
      const F32 low = rounded<scale_type, out_type>((load_code<code>(codes + i) - zero_point) * scale);
      const F32 high = rounded<scale_type, out_type>((load_code<code>(codes + i + 16) - zero_point) * scale);
      const __m512bh halves = _mm512_cvtne2ps_pbh(high.v, low.v);
      __builtin_memcpy(out + i * 2, &halves, sizeof halves);
    }
  }
  return i;
}

}  // namespace

void dequantize_rows_avx512(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_column,
                            int64_t last_column, void* out, int64_t out_row_bytes, Float out_type) {
  dequantize_part(weight, {first_row, last_row, first_column, last_column, static_cast<char*>(out), out_row_bytes},
                  out_type);
}

void expand_rows_avx512(const Weight& weight, int value_bytes, int64_t first_row, int64_t last_row, void* out) {
  expand_all(weight, value_bytes, first_row, last_row, out);
}

void unpack_rows_avx512(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row,
                        int8_t* codes) {
  unpack_all(words, bits, size, first_row, last_row, codes);
}

}  // namespace compressed_format
