#include "cpu/dequantize/dequantize.h"
#include "cpu/simd/portable.h"

#include "cpu/dequantize/dequantize.inl"

namespace compressed_format {
namespace {

float float8_to_float(unsigned char code) {
  const uint32_t sign = static_cast<uint32_t>(code & 0x80u) << 24;
  const uint32_t magnitude = code & 0x7fu;
  if (magnitude == 0x7fu) return float_of(sign | 0x7fc00000u);
  // Exponent and mantissa where a float has them; the difference of the biases is a factor, exact for subnormals too.
  return float_of(sign | bits_of(float_of(magnitude << 20) * 0x1p120f));
}

F32 load_float8(const unsigned char* codes, int count) {
  return each([=](int i) { return i < count ? float8_to_float(codes[i]) : 0.0f; });
}
F32 load_float8(const unsigned char* codes) { return load_float8(codes, lanes); }

// Eight codes fill exactly `bits` bytes.
void unpack(const unsigned char* bytes, int bits, int64_t count, int8_t* codes) {
  const uint64_t mask = (1u << bits) - 1;
  const int half = 1 << (bits - 1);
  for (int64_t i = 0; i < count; i += 8) {
    const int part = static_cast<int>(smaller(8, count - i));
    uint64_t joined = 0;
    std::memcpy(&joined, bytes + i / 8 * bits, static_cast<unsigned>((part * bits + 7) / 8));
    for (int k = 0; k < part; ++k) {
      codes[i + k] = static_cast<int8_t>(static_cast<int>(joined >> (k * bits) & mask) - half);
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

void dequantize_rows_portable(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_column,
                              int64_t last_column, void* out, int64_t out_row_bytes, Float out_type) {
  dequantize_part(weight, {first_row, last_row, first_column, last_column, static_cast<char*>(out), out_row_bytes},
                  out_type);
}

void expand_rows_portable(const Weight& weight, int value_bytes, int64_t first_row, int64_t last_row, void* out) {
  expand_all(weight, value_bytes, first_row, last_row, out);
}

void unpack_rows_portable(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row,
                          int8_t* codes) {
  unpack_all(words, bits, size, first_row, last_row, codes);
}

}  // namespace compressed_format
