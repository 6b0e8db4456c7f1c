// The product for many tokens on AMX: of bfloat16 in tiles, of all else as AVX-512 does it.
//
// A tile is sixteen rows of 64 bytes. Sixteen rows of decoded weights are one, sixteen steps of a panel another, and
// the sums of those rows for that panel the third: all three lie in memory as vectors want them, so that only the
// multiplication itself differs.
#include "cpu/simd/amx.h"

#include "cpu/dequantize/dequantize.h"
#include "cpu/linear/many_tokens/many_tokens.h"
#include "cpu/scratch.h"

namespace compressed_format {
namespace {

// Two tiles of weights times two panels: their sums are four of eight tiles, and each that is loaded is used twice.
constexpr int strip_rows = 2 * tile_rows;
constexpr int64_t block_rows = 128;

}  // namespace
}  // namespace compressed_format

#include "cpu/linear/many_tokens/many_tokens.inl"
#include "cpu/linear/many_tokens/pairs.inl"
#include "cpu/linear/many_tokens/coded_pairs.inl"
#include "cpu/linear/many_tokens/indexed_pairs.inl"

namespace compressed_format {
namespace {

// How many steps a tile holds. Whole tiles are multiplied: panels are filled up with zeros, and so are decoded rows.
constexpr int64_t tile_steps = 16;
static_assert(block_steps % tile_steps == 0 && lanes == tile_rows);

// As Product, whose weights and panels it takes, but multiplied in tiles.
template <typename Product>
struct InTiles : Product {
  static void decode(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_step, int64_t last_step,
                     char* tile) {
    Product::decode(weight, first_row, last_row, first_step, last_step, tile);
    const int64_t steps = last_step - first_step;
    const int64_t missing = ceil_div(steps, tile_steps) * tile_steps - steps;
    for (int64_t row = 0; missing > 0 && row < last_row - first_row; ++row) {
      char* const rest = tile + row * tile_row_bytes + steps * step_bytes;
      __builtin_memset(rest, 0, static_cast<uint64_t>(missing * step_bytes));
    }
  }

  // As InVectors has it.
  template <int panels>
  static void multiply_strip(const char* weights, const char* x, int64_t panel_bytes, int64_t steps, char* sums,
                             bool first) {
    constexpr int64_t sums_tile_bytes = tile_rows * panel_step_bytes;
    constexpr int64_t weights_tile_bytes = tile_rows * tile_row_bytes;
    char* const sums_2 = sums + (panels == 2 ? sums_panel_bytes : 2 * sums_tile_bytes);
    write_out();
    if (first) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, sums, panel_step_bytes);
      _tile_loadd(1, sums + sums_tile_bytes, panel_step_bytes);
      _tile_loadd(2, sums_2, panel_step_bytes);
      _tile_loadd(3, sums_2 + sums_tile_bytes, panel_step_bytes);
    }
#pragma GCC unroll 2
    for (int64_t step = 0; step < steps; step += tile_steps) {
      const char* const rows = weights + step * step_bytes;
      const char* const tokens = x + step * panel_step_bytes;
      _tile_loadd(6, tokens, panel_step_bytes);
      _tile_loadd(4, rows, tile_row_bytes);
      _tile_loadd(5, rows + weights_tile_bytes, tile_row_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 5, 6);
      if constexpr (panels == 2) {
        _tile_loadd(7, tokens + panel_bytes, panel_step_bytes);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_loadd(4, rows + 2 * weights_tile_bytes, tile_row_bytes);
        _tile_loadd(5, rows + 3 * weights_tile_bytes, tile_row_bytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
    _tile_stored(0, sums, panel_step_bytes);
    _tile_stored(1, sums + sums_tile_bytes, panel_step_bytes);
    _tile_stored(2, sums_2, panel_step_bytes);
    _tile_stored(3, sums_2 + sums_tile_bytes, panel_step_bytes);
  }
};

bool in_tiles(const Linear& problem) { return problem.x_type == Float::bfloat16; }

size_t prepared_bytes_of(const Linear& problem) {
  if (!in_tiles(problem)) return many_tokens_avx512.prepared_bytes(problem);
  return with_pairs<InTiles>(*problem.weight, [&](auto product) { return prepared_bytes<decltype(product)>(problem); });
}
int64_t parts_of(const Linear& problem) {
  return in_tiles(problem) ? parts(problem) : many_tokens_avx512.parts(problem);
}
void prepare_any(const Linear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  if (!in_tiles(problem)) return many_tokens_avx512.prepare(problem, prepared, first_part, last_part);
  with_pairs<InTiles>(*problem.weight, [&](auto product) {
    prepare<decltype(product)>(problem, prepared, first_part, last_part);
  });
}
int64_t tasks_of(const Linear& problem) {
  return in_tiles(problem) ? tasks(problem) : many_tokens_avx512.tasks(problem);
}
int64_t tasks_per_thread_of(const Linear& problem) {
  return in_tiles(problem) ? tasks_per_thread(problem) : many_tokens_avx512.tasks_per_thread(problem);
}
void run_any(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  if (!in_tiles(problem)) return many_tokens_avx512.run(problem, prepared, first_task, last_task);
  take_tiles();
  with_pairs<InTiles>(*problem.weight, [&](auto product) {
    run<decltype(product)>(problem, prepared, first_task, last_task);
  });
  _tile_release();
}

}  // namespace

const LinearKernel many_tokens_amx{takes, prepared_bytes_of, parts_of, prepare_any, tasks_of, tasks_per_thread_of,
                                   run_any};

}  // namespace compressed_format
