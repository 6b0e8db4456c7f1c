// y = x @ dense(weight).T for few tokens and weights of plain values, all of them or those that a bitmask keeps (2:4),
// with AVX-512: bound by reading the weight. Kept values are spread to their columns by one instruction, and the next
// ones begin as far on as the mask has bits, whether or not it has two of every four.

#include <immintrin.h>

#include "cpu/linear/linear.h"
#include "cpu/simd/avx512_floats.h"

namespace compressed_format {
namespace {

// Beyond these, tiles of weights that are spread once are faster.
constexpr int64_t most_tokens = 4;
constexpr int64_t task_rows = 16;
// Less than this much weight is read faster than another thread wakes up.
constexpr int64_t bytes_per_thread = 64 * 1024;
constexpr int64_t ahead = 2048;

Float float_type_of(Codes type) {
  if (type == Codes::bfloat16) return Float::bfloat16;
  return type == Codes::float16 ? Float::float16 : Float::float32;
}

__mmask32 first_lanes(int64_t count) {
  if (count >= 32) return 0xffffffffu;
  return count <= 0 ? 0u : _bzhi_u32(0xffffffffu, static_cast<unsigned>(count));
}

__m512 widen(Float type, __m256i halves) {
  if (type == Float::float16) return _mm512_cvtph_ps(halves);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

bool takes(const Linear& problem) {
  const Weight& weight = *problem.weight;
  const bool plain =
      weight.type == Codes::bfloat16 || weight.type == Codes::float16 || weight.type == Codes::float32;
  return plain && weight.scale == nullptr && weight.g_idx == nullptr && weight.row_offsets == nullptr &&
         problem.tokens <= most_tokens && weight.columns > 0;
}

// x is read as it is.
size_t prepared_bytes(const Linear&) { return 64; }
int64_t parts(const Linear&) { return 1; }
void prepare(const Linear&, void*, int64_t, int64_t) {}

// The values of a row, from left to right, spread to their columns.
template <bool masked>
struct Row {
  const char* values;
  const uint8_t* mask;
  int64_t left;   // values of the row
  int value_bytes;

  Row(const Weight& weight, int64_t row) {
    values = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
    mask = masked ? weight.bitmask + row * ((weight.columns + 7) / 8) : nullptr;
    left = masked ? weight.columns / 2 : weight.columns;
    value_bytes = weight.type == Codes::float32 ? 4 : 2;
  }

  // Which of the next `count` columns, 32 at most, have values, and goes on by them.
  __attribute__((always_inline)) uint32_t next_bits(int64_t count) {
    uint32_t bits = 0;
    if (count >= 32) {
      __builtin_memcpy(&bits, mask, sizeof bits);
    } else {
      for (int64_t i = 0; 8 * i < count; ++i) bits |= static_cast<uint32_t>(mask[i]) << 8 * i;
      bits &= first_lanes(count);
    }
    mask += 4;
    return bits;
  }

  __attribute__((always_inline)) void skip(int64_t count) {
    const int64_t taken = smaller(count, left);
    values += taken * value_bytes;
    left -= taken;
    _mm_prefetch(values + ahead, _MM_HINT_T0);
  }

  // 32 columns of 16-bit values, of which `count` are there.
  __attribute__((always_inline)) __m512i halves(int64_t count) {
    // Where there are fewer bits than values, more is read than is needed, but only of the row.
    __m512i found = left >= 32 ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi16(first_lanes(left), values);
    if constexpr (masked) {
      const uint32_t bits = next_bits(count);
      found = _mm512_maskz_expand_epi16(bits, found);
      skip(__builtin_popcount(bits));
    } else {
      skip(count);
    }
    return found;
  }

  // The same as floats, of values of any type.
  __attribute__((always_inline)) void floats(Float type, int64_t count, __m512 (&found)[2]) {
    if (type != Float::float32) {
      const __m512i both = halves(count);
      found[0] = widen(type, _mm512_castsi512_si256(both));
      found[1] = widen(type, _mm512_extracti64x4_epi64(both, 1));
      return;
    }
    const uint32_t bits = masked ? next_bits(count) : first_lanes(count);
    for (int i = 0; i < 2; ++i) {
      const uint32_t half = bits >> 16 * i & 0xffffu;
      const __m512 read = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(left)), values);
      found[i] = masked ? _mm512_maskz_expand_ps(static_cast<__mmask16>(half), read) : read;
      skip(__builtin_popcount(half));
    }
  }
};

// A row times some tokens. A product of pairs of bfloat16 takes both as they are.
template <bool masked, bool pairs, int tokens>
void multiply(const Linear& problem, int64_t row, int64_t token) {
  const Weight& weight = *problem.weight;
  const Float type = float_type_of(weight.type);
  const int64_t x_value = float_bytes(problem.x_type);
  const char* const x = static_cast<const char*>(problem.x) + token * problem.x_row_bytes;
  Row<masked> values(weight, row);
  __m512 total[tokens], other[tokens];
#pragma GCC unroll 4
  for (int t = 0; t < tokens; ++t) total[t] = other[t] = _mm512_setzero_ps();
  for (int64_t column = 0; column < weight.columns; column += 32) {
    const int64_t count = smaller(32, weight.columns - column);
    if constexpr (pairs) {
      const __m512i found = values.halves(count);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        const char* const source = x + t * problem.x_row_bytes + 2 * column;
        const __m512i read = count == 32 ? _mm512_loadu_si512(source)
                                         : _mm512_maskz_loadu_epi16(first_lanes(count), source);
        total[t] = _mm512_dpbf16_ps(total[t], (__m512bh)found, (__m512bh)read);
      }
    } else {
      __m512 found[2];
      values.floats(type, count, found);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        const char* const source = x + t * problem.x_row_bytes + x_value * column;
        const __m512 low = load_floats(source, problem.x_type, 0, count);
        total[t] = _mm512_fmadd_ps(found[0], low, total[t]);
        if (count <= 16) continue;
        const __m512 high = load_floats(source, problem.x_type, 16, count - 16);
        other[t] = _mm512_fmadd_ps(found[1], high, other[t]);
      }
    }
  }
  const float bias = problem.bias == nullptr ? 0.0f : load_float(problem.bias, problem.bias_type, row);
#pragma GCC unroll 4
  for (int t = 0; t < tokens; ++t) {
    store_float(problem.y, problem.x_type, (token + t) * weight.rows + row,
                _mm512_reduce_add_ps(_mm512_add_ps(total[t], other[t])) + bias);
  }
}

int64_t tasks(const Linear& problem) { return (problem.weight->rows + task_rows - 1) / task_rows; }

int64_t tasks_per_thread(const Linear& problem) {
  return 1 + bytes_per_thread / (task_rows * problem.weight->row_bytes * problem.tokens + 1);
}

template <bool masked, bool pairs>
void run_rows(const Linear& problem, int64_t first_row, int64_t last_row) {
  for (int64_t row = first_row; row < last_row; ++row) {
    switch (problem.tokens) {
      case 1: multiply<masked, pairs, 1>(problem, row, 0); break;
      case 2: multiply<masked, pairs, 2>(problem, row, 0); break;
      case 3: multiply<masked, pairs, 3>(problem, row, 0); break;
      default: multiply<masked, pairs, 4>(problem, row, 0); break;
    }
  }
}

void run(const Linear& problem, const void*, int64_t first_task, int64_t last_task) {
  const Weight& weight = *problem.weight;
  const int64_t first = first_task * task_rows;
  const int64_t last = smaller(last_task * task_rows, weight.rows);
  const bool pairs = weight.type == Codes::bfloat16 && problem.x_type == Float::bfloat16;
  if (weight.bitmask != nullptr) {
    pairs ? run_rows<true, true>(problem, first, last) : run_rows<true, false>(problem, first, last);
  } else {
    pairs ? run_rows<false, true>(problem, first, last) : run_rows<false, false>(problem, first, last);
  }
}

}  // namespace

extern const LinearKernel plain_values_avx512;
const LinearKernel plain_values_avx512{takes, prepared_bytes, parts, prepare, tasks, tasks_per_thread, run};

}  // namespace compressed_format
