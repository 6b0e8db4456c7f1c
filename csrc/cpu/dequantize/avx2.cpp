#include "cpu/dequantize/dequantize.h"
#include "cpu/simd/avx2.h"

#include "cpu/dequantize/dequantize.inl"

namespace compressed_format {
namespace {

// A code has the bits of a float16 whose exponent is 8 less, so that the processor's conversion does most of it,
// subnormal numbers included.
inline F32 widen_float8(__m128i bytes) {
  const __m128i halves =
      _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7), _mm_set1_epi16(static_cast<int16_t>(0xbf80)));
  const __m128i magnitude = _mm_set1_epi16(0x3f80);
  const __m128i nan = _mm_cmpeq_epi16(_mm_and_si128(halves, magnitude), magnitude);
  const __m128i with_nan = _mm_or_si128(halves, _mm_and_si128(nan, _mm_set1_epi16(0x7e00)));
  return {_mm256_mul_ps(_mm256_cvtph_ps(with_nan), _mm256_set1_ps(256.0f))};
}
F32 load_float8(const unsigned char* codes) {
  return widen_float8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
}
F32 load_float8(const unsigned char* codes, int count) { return widen_float8(load_part<1>(codes, count)); }

// Each code comes into 16 bits together with what is beside it; a product moves it to their top, a shift down again.
void unpack(const unsigned char* bytes, int bits, int64_t count, int8_t* codes) {
  alignas(16) unsigned char places[16];
  alignas(16) uint16_t factors[8];
  for (int k = 0; k < 8; ++k) {
    places[2 * k] = static_cast<unsigned char>(k * bits / 8);
    places[2 * k + 1] = static_cast<unsigned char>(k * bits / 8 + 1);
    factors[k] = static_cast<uint16_t>(1u << (16 - bits - k * bits % 8));
  }
  const __m256i shuffle = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(places)));
  const __m256i factor = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(factors)));
  const __m128i down = _mm_cvtsi32_si128(16 - bits);
  const int half = 1 << (bits - 1);
  const __m256i offset = _mm256_set1_epi16(static_cast<int16_t>(half));
  const int64_t size = (count * bits + 7) / 8;
  int64_t i = 0;
  // Eight codes fill `bits` bytes, of which eight are read.
  for (; i + 16 <= count && (i / 8 + 1) * bits + 8 <= size; i += 16) {
    const unsigned char* const source = bytes + i / 8 * bits;
    const __m256i joined = _mm256_set_m128i(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source + bits)),
                                            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
    const __m256i high = _mm256_mullo_epi16(_mm256_shuffle_epi8(joined, shuffle), factor);
    const __m256i values = _mm256_sub_epi16(_mm256_srl_epi16(high, down), offset);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(values, values), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm256_castsi256_si128(packed));
  }
  for (; i < count; i += 8) {
    const int part = static_cast<int>(smaller(8, count - i));
    uint64_t joined = 0;
    __builtin_memcpy(&joined, bytes + i / 8 * bits, static_cast<unsigned>((part * bits + 7) / 8));
    for (int k = 0; k < part; ++k) {
      codes[i + k] = static_cast<int8_t>(static_cast<int>(joined >> (k * bits) & ((1u << bits) - 1)) - half);
    }
  }
}

template <int bytes>
int64_t expand(const unsigned char* mask, int64_t count, const unsigned char* values, int64_t available,
               unsigned char* out) {
  return expand_one_by_one<bytes>(mask, count, values, available, out);
}

template <Code code, Float scale_type, Float out_type>
int64_t scale_most(const unsigned char*, int, int64_t, Scaling, char*) {
  return 0;
}

}  // namespace

void dequantize_rows_avx2(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_column,
                          int64_t last_column, void* out, int64_t out_row_bytes, Float out_type) {
  dequantize_part(weight, {first_row, last_row, first_column, last_column, static_cast<char*>(out), out_row_bytes},
                  out_type);
}

void expand_rows_avx2(const Weight& weight, int value_bytes, int64_t first_row, int64_t last_row, void* out) {
  expand_all(weight, value_bytes, first_row, last_row, out);
}

void unpack_rows_avx2(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row, int8_t* codes) {
  unpack_all(words, bits, size, first_row, last_row, codes);
}

}  // namespace compressed_format
