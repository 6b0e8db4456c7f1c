// The product for few tokens on AVX2 with FMA.
#include "cpu/simd/avx2.h"

#include "cpu/numbers.h"

namespace compressed_format {
namespace {

inline float bfloat16_to_float(uint16_t half) { return float_of(static_cast<uint32_t>(half) << 16); }
inline float float16_to_float(uint16_t half) { return _cvtsh_ss(half); }
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline uint16_t float_to_float16(float value) {
  return static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace compressed_format

#include "cpu/linear/few_tokens/few_tokens.inl"

namespace compressed_format {
namespace {

F32 two_halves(float first, float second) { return {_mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first))}; }

__attribute__((always_inline)) inline void Nibbles::operator()(const char* source, F32 (&values)[vectors]) const {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  const __m256i upper = _mm256_srli_epi32(words, 16);
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const __m256i mask = _mm256_set1_epi32(15 << 4 * (v % 4));
    values[v].v = _mm256_cvtepi32_ps(_mm256_and_si256(v < 4 ? words : upper, mask));
  }
}

// A lane gets the byte that its code begins in, and the next.
void Fields::prepare() {
  for (int lane = 0; lane < lanes; ++lane) {
    for (int byte = 0; byte < 4; ++byte) {
      places[4 * lane + byte] = static_cast<unsigned char>(byte < 2 ? lane * bits / 8 + byte : 0x80);
    }
    masks[lane] = ((1 << bits) - 1) << lane * bits % 8;
  }
}
int Fields::shift_of(int, int lane) const { return lane * bits % 8; }

__attribute__((always_inline)) inline void Fields::operator()(const char* source, F32 (&values)[vectors]) const {
  const __m256i place = _mm256_load_si256(reinterpret_cast<const __m256i*>(places));
  const __m256i mask = _mm256_load_si256(reinterpret_cast<const __m256i*>(masks));
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    int64_t bytes;
    __builtin_memcpy(&bytes, source + v * bits, sizeof bytes);
    const __m256i near = _mm256_shuffle_epi8(_mm256_set1_epi64x(bytes), place);
    values[v].v = _mm256_cvtepi32_ps(_mm256_and_si256(near, mask));
  }
}

template <Byte kind>
__attribute__((always_inline)) inline void Bytes<kind>::operator()(const char* source, F32 (&values)[vectors]) const {
#pragma GCC unroll 4
  for (int v = 0; v < vectors; v += 2) {
    const auto* const place = reinterpret_cast<const __m128i*>(source + v * lanes);
    if constexpr (kind == Byte::float8) {
      // A code has the bits of a float16 whose exponent is 8 less, subnormal numbers included; all ones is no number.
      const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(place)), 7);
      const __m256i magnitude = _mm256_set1_epi16(0x3f80);
      const __m256i nan = _mm256_cmpeq_epi16(_mm256_and_si256(wide, magnitude), magnitude);
      const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(0xbf80));
      const __m256i halves = _mm256_or_si256(_mm256_and_si256(wide, kept), nan);
      values[v].v = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
      values[v + 1].v = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    } else {
      for (int i = 0; i < 2; ++i) {
        const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source + (v + i) * lanes));
        const bool is_signed = kind == Byte::signed_integer;
        values[v + i].v =
            _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(codes) : _mm256_cvtepu8_epi32(codes));
      }
    }
  }
}
}  // namespace

extern const LinearKernel few_tokens_avx2;
const LinearKernel few_tokens_avx2{takes, prepared_bytes, parts, prepare, tasks, tasks_per_thread, run};

}  // namespace compressed_format
