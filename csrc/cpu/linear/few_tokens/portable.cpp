// The product for few tokens without instructions of any one processor.
#include "cpu/simd/portable.h"

#include "cpu/linear/few_tokens/few_tokens.inl"

namespace compressed_format {
namespace {

F32 two_halves(float first, float second) {
  return each([=](int i) { return i < lanes / 2 ? first : second; });
}

// Whole numbers to floats, of words that are no negative numbers.
template <typename Operation>
inline F32 converted(Operation operation) {
  return each([&](int i) { return static_cast<float>(static_cast<int32_t>(operation(i))); });
}

inline void Nibbles::operator()(const char* source, F32 (&values)[vectors]) const {
  uint32_t words[lanes];
  std::memcpy(words, source, sizeof words);
  for (int v = 0; v < vectors; ++v) {
    const uint32_t mask = 15u << 4 * (v % 4);
    values[v] = converted([&](int i) { return words[i] >> v / 4 * 16 & mask; });
  }
}

// Four codes lie in a word, the other four in the one that begins where these end.
void Fields::prepare() {
  for (int lane = 0; lane < lanes; ++lane) masks[lane] = ((1 << bits) - 1) << lane % 4 * bits;
}
int Fields::shift_of(int, int lane) const { return lane % 4 * bits; }

inline void Fields::operator()(const char* source, F32 (&values)[vectors]) const {
  for (int v = 0; v < vectors; ++v) {
    uint64_t bytes;
    std::memcpy(&bytes, source + v * bits, sizeof bytes);
    const auto low = static_cast<int32_t>(bytes), high = static_cast<int32_t>(bytes >> 4 * bits);
    values[v] = converted([&](int i) { return (i < 4 ? low : high) & masks[i]; });
  }
}

template <Byte kind>
inline void Bytes<kind>::operator()(const char* source, F32 (&values)[vectors]) const {
  for (int v = 0; v < vectors; ++v) {
    const char* const codes = source + v * lanes;
    if constexpr (kind == Byte::float8) {
      values[v] = each([&](int i) {
        const auto code = static_cast<uint8_t>(codes[i]);
        const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24, magnitude = code & 0x7fu;
        // Exponent and mantissa where a float has them; the difference of the biases is a factor, but for what x is
        // prepared with.
        const float value = float_of(magnitude << 20) * 0x1p112f;
        return float_of(sign | (magnitude == 0x7fu ? 0x7fc00000u : bits_of(value)));
      });
    } else if constexpr (kind == Byte::signed_integer) {
      values[v] = load_int8(codes);
    } else {
      values[v] = converted([&](int i) { return static_cast<uint8_t>(codes[i]); });
    }
  }
}

}  // namespace

extern const LinearKernel few_tokens_portable;
const LinearKernel few_tokens_portable{takes, prepared_bytes, parts, prepare, tasks, tasks_per_thread, run};

}  // namespace compressed_format
