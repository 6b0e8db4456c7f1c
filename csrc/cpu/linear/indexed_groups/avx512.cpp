// y = x @ dense(weight).T + bias for few tokens and a weight whose columns say which group they lie in, with AVX-512:
// each byte of the weight is read once, decoded and scaled in registers, in floats, and multiplied at once. No column
// waits for the others of its group, so that nothing is brought into another order.

#include "cpu/linear/linear.h"
#include "cpu/simd/avx512_floats.h"

#include "cpu/linear/indexed_groups/indexed_groups.inl"

namespace compressed_format {
namespace {

// Weights are decoded once for this many tokens; with more of them, tiles that stay in the cache save that work.
constexpr int64_t most_tokens = 4;
constexpr int64_t task_rows = 4;
constexpr int64_t ahead = 4096;
constexpr int64_t columns_per_thread = 64 * 1024;

bool takes(const Linear& problem) {
  return is_indexed(*problem.weight) && problem.tokens <= most_tokens && problem.weight->columns > 0;
}

// What prepare leaves for all threads: x in floats, [chunks][tokens][columns of a chunk], then the columns' groups.
int64_t chunks_of(const Linear& problem) { return ceil_div(problem.weight->columns, indexed_columns); }
int64_t groups_offset(const Linear& problem) { return chunks_of(problem) * problem.tokens * indexed_columns * 4; }

size_t prepared_bytes(const Linear& problem) {
  return static_cast<size_t>(groups_offset(problem) + chunks_of(problem) * indexed_columns * 2);
}

int64_t parts(const Linear&) { return 1; }

void prepare(const Linear& problem, void* prepared, int64_t, int64_t) {
  auto* x = static_cast<float*>(prepared);
  for (int64_t left = 0; left < problem.weight->columns; left += indexed_columns) {
    for (int64_t token = 0; token < problem.tokens; ++token, x += indexed_columns) {
      const char* const source = static_cast<const char*>(problem.x) + token * problem.x_row_bytes;
      for (int64_t i = 0; i < indexed_columns; i += 16) {
        const int64_t count = problem.weight->columns - left - i;
        _mm512_store_ps(x + i, load_floats(source, problem.x_type, count > 0 ? left + i : 0, count));
      }
    }
  }
  auto* const groups = reinterpret_cast<uint16_t*>(static_cast<char*>(prepared) + groups_offset(problem));
  write_groups(*problem.weight, 0, problem.weight->columns, groups);
}

// One row times all tokens.
template <int tokens, typename Rows>
void multiply_row(const Linear& problem, const char* prepared, const CodeBytes& codes, const Rows& scales,
                  int64_t row) {
  const Weight& weight = *problem.weight;
  const auto* x = reinterpret_cast<const float*>(prepared);
  const auto* const groups = reinterpret_cast<const uint16_t*>(prepared + groups_offset(problem));
  const char* const source = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
  const int bits = weight.type == Codes::packed ? weight.bits : 8;
  __m512 sum[tokens][2];
  for (int t = 0; t < tokens; ++t) sum[t][0] = sum[t][1] = _mm512_setzero_ps();
  for (int64_t column = 0; column < weight.columns; column += indexed_columns) {
    _mm_prefetch(source + column / 8 * bits + ahead, _MM_HINT_T0);
    __m512 values[4];
    scales.multiply(codes.load(source, column), groups + column, values);
    const int64_t left = weight.columns - column;
    if (left < indexed_columns) {
      // What the scale of another group makes of nothing need not be a number.
      for (int i = 0; i < 4; ++i) {
        values[i] = _mm512_maskz_mov_ps(static_cast<__mmask16>(lowest(left - 16 * i)), values[i]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t, x += indexed_columns) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[t][i % 2] = _mm512_fmadd_ps(values[i], _mm512_load_ps(x + 16 * i), sum[t][i % 2]);
    }
  }
  const float bias = problem.bias == nullptr ? 0.0f : load_float(problem.bias, problem.bias_type, row);
  for (int t = 0; t < tokens; ++t) {
    const float value = _mm512_reduce_add_ps(_mm512_add_ps(sum[t][0], sum[t][1])) + bias;
    store_float(problem.y, problem.x_type, t * weight.rows + row, value);
  }
}

int64_t tasks(const Linear& problem) { return ceil_div(problem.weight->rows, task_rows); }

int64_t tasks_per_thread(const Linear& problem) {
  return 1 + columns_per_thread / (task_rows * problem.weight->columns * problem.tokens);
}

void run(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  const auto* const memory = static_cast<const char*>(prepared);
  const int64_t last = smaller(problem.weight->rows, last_task * task_rows);
  const CodeBytes codes(*problem.weight);
  with_table(*problem.weight, [&](auto table) {
    typename decltype(table)::Rows scales(*problem.weight);
    for (int64_t row = first_task * task_rows; row < last; ++row) {
      scales.load(row);
      switch (problem.tokens) {
        case 1: multiply_row<1>(problem, memory, codes, scales, row); break;
        case 2: multiply_row<2>(problem, memory, codes, scales, row); break;
        case 3: multiply_row<3>(problem, memory, codes, scales, row); break;
        default: multiply_row<4>(problem, memory, codes, scales, row); break;
      }
    }
  });
}

}  // namespace

extern const LinearKernel indexed_groups_avx512;
const LinearKernel indexed_groups_avx512{takes, prepared_bytes, parts, prepare, tasks, tasks_per_thread, run};

}  // namespace compressed_format
