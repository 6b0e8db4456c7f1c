// Makes weights of every kind dense, by every level and in parts of rows by several threads, and compares with a
// definition that goes bit by bit. Sanitizers see what a comparison cannot, and an emulator of an older processor stops
// at an instruction that it does not know.

#include "cpu/dequantize/dequantize.h"

#include "random_weight.h"

using namespace driver;

namespace {

constexpr ByIsa<DequantizeRows> dequantize COMPRESSED_FORMAT_BY_ISA(dequantize_rows);
constexpr ByIsa<UnpackRows> unpack COMPRESSED_FORMAT_BY_ISA(unpack_rows);

// Of products of short numbers, which float32 holds exactly.
float rounded(float value, Float type) { return type == Float::bfloat16 ? as_bfloat16(value) : value; }

bool right(const Kind& kind, int64_t rows, int64_t columns, Float out_type) {
  const RandomWeight made(kind, rows, columns);
  const Weight& weight = made.weight();
  if (!can_dequantize(weight)) return true;
  const int64_t first = random_below(columns), row_bytes = (columns - first) * float_bytes(out_type);
  for (DequantizeRows* const run : levels(dequantize)) {
    Tensor out(rows * row_bytes);
    in_threads(rows, [&](int64_t begin, int64_t end) {
      run(weight, begin, end, first, columns, out.data() + begin * row_bytes, row_bytes, out_type);
    });
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = first; column < columns; ++column) {
        const bool coded = weight.scale != nullptr;
        const auto exact = static_cast<float>(made.value(row, column));
        const float expected = rounded(coded ? rounded(exact, weight.scale_type) : exact, out_type);
        const float found = get(out.data(), out_type, row * (columns - first) + column - first);
        if (found != expected) {
          std::printf("wrong: codes %d, %d bits, %d x %d, blocks of %d x %d, row %d, column %d: %g, not %g\n",
                      int(kind.type), kind.bits, int(rows), int(columns), int(kind.block_rows),
                      int(kind.block_columns), int(row), int(column), double(found), double(expected));
          return false;
        }
      }
    }
  }
  return true;
}

bool unpacks_right(int bits, int64_t rows, int64_t size) {
  const int64_t row_bytes = words(size, bits) * 4;
  const Tensor packed(rows * row_bytes);
  for (UnpackRows* const run : levels(unpack)) {
    Tensor codes(rows * size);
    in_threads(rows, [&](int64_t first, int64_t last) {
      run(packed.data(), bits, size, first, last, reinterpret_cast<int8_t*>(codes.data()));
    });
    for (int64_t i = 0; i < rows * size; ++i) {
      const auto found = static_cast<int8_t>(codes.data()[i]);
      if (found != code_at(packed.data() + i / size * row_bytes, bits, i % size)) {
        std::printf("wrong: code %d of %d rows of %d, %d bits\n", int(i), int(rows), int(size), bits);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  const Float outs[] = {Float::float32, Float::bfloat16};
  for (int64_t columns : {1, 7, 64, 65, 200, 1100}) {
    for (int64_t group : {int64_t{32}, int64_t{48}, columns}) {
      for (int bits = 1; bits <= 8; ++bits) {
        if (!unpacks_right(bits, 1 + random_below(9), columns)) return 1;
        for (ZeroPoints zero_points : {ZeroPoints::none, ZeroPoints::int8, ZeroPoints::packed}) {
          const Float scale_type = bits % 2 == 0 ? Float::bfloat16 : Float::float32;
          const Kind kind{Codes::packed, bits, 1, group, scale_type, zero_points, random_below(4) != 0};
          if (!right(kind, 1 + random_below(9), columns, outs[random_below(2)])) return 1;
        }
      }
      for (Codes type : {Codes::int8, Codes::float8}) {
        for (int64_t block_rows : {1, 4}) {
          for (int kept : {0, 1, columns % 4 == 0 ? 2 : 1}) {
            const ZeroPoints zero_points = type == Codes::int8 && kept == 0 ? ZeroPoints::int8 : ZeroPoints::none;
            const Kind kind{type, 8, block_rows, group, Float::bfloat16, zero_points, true, kept};
            if (!right(kind, 1 + random_below(9), columns, outs[random_below(2)])) return 1;
          }
        }
      }
    }
    for (Codes type : {Codes::bfloat16, Codes::float16, Codes::float32}) {
      for (int kept : {0, 1, columns % 4 == 0 ? 2 : 1}) {
        const Kind kind{type, 16, 1, 1, Float::float32, ZeroPoints::none, true, kept};
        if (!right(kind, 5, columns, Float::float32)) return 1;
      }
    }
  }
  return 0;
}
