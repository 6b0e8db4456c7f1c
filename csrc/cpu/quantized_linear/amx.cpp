// Codes multiplied in tiles, where there are many tokens and one scale a row; all else as AVX-512 does it.
//
// Sixteen steps of a panel are a tile as they lie in memory, and so are sixteen rows of 64 bytes of the weight: E4M3 as
// bfloat16, integers as they are, since these instructions multiply signed bytes with signed ones.
#include "cpu/simd/amx.h"

#include "cpu/quantized_linear/quantized_linear.inl"
#include "cpu/quantized_linear/whole_rows_avx512.inl"

namespace compressed_format {

extern const QuantizedLinearKernel quantized_linear_amx;
extern const QuantizedLinearKernel quantized_linear_avx512;

namespace {

// Two tiles of the weight times two panels are four of the eight tiles, and each that is loaded is used twice.
constexpr int64_t strip_rows = 2 * tile_rows;
constexpr int64_t rows_of_tiles = 64;
static_assert(rows_of_tiles <= most_rows && rows_of_tiles % (2 * strip_rows) == 0);
// The columns of a block, in steps: its rows, 32 KB, stay in the first-level cache with the two panels they meet.
constexpr int64_t tile_block_steps = 128;
constexpr int64_t tile_row_bytes = tile_block_steps * 4 + 64;  // the rest over a power of two, as in decoded_stride
constexpr int64_t tile_steps = 16;

struct Int8Tiles : Int8 {
  static constexpr int64_t tokens_of_task = chunk_tokens;
  static constexpr int32_t offset = 0;
  static constexpr int64_t steps_at_once = tile_steps;

  // Codes of a row, with zeros up to the next multiple of 64; what comes after them is fetched.
  static void take(const char* codes, int64_t count, char* target) {
    for (int64_t i = 0; i < count; i += 64) {
      const __mmask64 there = _bzhi_u64(~0ull, static_cast<unsigned>(smaller(64, count - i)));
      _mm512_storeu_si512(target + i, _mm512_maskz_loadu_epi8(there, codes + i));
      _mm_prefetch(codes + i + tile_block_steps * 4, _MM_HINT_T1);
    }
  }

  // Adds to tile C what tiles A, of the weight, and B, of x, give. The compiler's own takes literal numbers only.
  template <int C, int A, int B>
  static void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

struct Float8Tiles : Float8 {
  // Decoded once for all of these; for half of them that would be a fifth of the time.
  static constexpr int64_t tokens_of_task = 2 * chunk_tokens;
  static constexpr int64_t steps_at_once = tile_steps;

  static void take(const char* codes, int64_t count, char* target) {
    decode_row(codes, count, target);
    for (int64_t i = 0; i < count; i += 64) _mm_prefetch(codes + i + tile_block_steps * 2, _MM_HINT_T1);
  }

  template <int C, int A, int B>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};


// Between sums of one row and of the next: again the rest over a power of two.
template <typename Kind>
constexpr int64_t sums_of_row = Kind::tokens_of_task + panel_tokens;

// Rows of the weight times panels of x, P * 64 bytes a step apart, added to sums unless these begin here: two tiles of
// rows and two panels, or four tiles of rows and one panel.
template <typename Kind, int panels>
void multiply_strip(const char* weight, const char* x, int64_t x_stride, int64_t steps, typename Kind::Sum* sums,
                    bool begins) {
  constexpr int64_t tile_of_weight = tile_rows * tile_row_bytes, sums_stride = sums_of_row<Kind> * 4;
  constexpr int64_t tile_of_sums = tile_rows * sums_of_row<Kind>;
  typename Kind::Sum* const others = sums + (panels == 2 ? panel_tokens : 2 * tile_of_sums);
  write_out();
  if (begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, sums_stride);
    _tile_loadd(1, sums + tile_of_sums, sums_stride);
    _tile_loadd(2, others, sums_stride);
    _tile_loadd(3, others + tile_of_sums, sums_stride);
  }
  for (int64_t step = 0; step < steps; step += tile_steps) {
    const char* const rows = weight + step * 4;
    const char* const tokens = x + step * x_stride;
    _tile_loadd(6, tokens, x_stride);
    _tile_loadd(4, rows, tile_row_bytes);
    _tile_loadd(5, rows + tile_of_weight, tile_row_bytes);
    Kind::template multiply<0, 4, 6>();
    Kind::template multiply<1, 5, 6>();
    if constexpr (panels == 2) {
      _tile_loadd(7, tokens + 64, x_stride);
      Kind::template multiply<2, 4, 7>();
      Kind::template multiply<3, 5, 7>();
    } else {
      _tile_loadd(4, rows + 2 * tile_of_weight, tile_row_bytes);
      _tile_loadd(5, rows + 3 * tile_of_weight, tile_row_bytes);
      Kind::template multiply<2, 4, 6>();
      Kind::template multiply<3, 5, 6>();
    }
  }
  _tile_stored(0, sums, sums_stride);
  _tile_stored(1, sums + tile_of_sums, sums_stride);
  _tile_stored(2, others, sums_stride);
  _tile_stored(3, others + tile_of_sums, sums_stride);
  write_out();
}

// The rows of a task times a group of panels.
template <typename Kind>
void multiply_group(const char* weight, int64_t count, const char* x, int64_t panels, int64_t steps,
                    typename Kind::Sum* sums, bool begins) {
  const int64_t x_stride = panels * 64;
  int64_t panel = 0;
  for (; panel + 2 <= panels; panel += 2) {
    for (int64_t row = 0; row < count; row += strip_rows) {
      multiply_strip<Kind, 2>(weight + row * tile_row_bytes, x + panel * 64, x_stride, steps,
                              sums + row * sums_of_row<Kind> + panel * panel_tokens, begins);
    }
  }
  if (panel < panels) {
    for (int64_t row = 0; row < count; row += 2 * strip_rows) {
      multiply_strip<Kind, 1>(weight + row * tile_row_bytes, x + panel * 64, x_stride, steps,
                              sums + row * sums_of_row<Kind> + panel * panel_tokens, begins);
    }
  }
}

template <typename Kind>
int64_t tasks_in_tiles(const QuantizedLinear& problem) {
  return ceil_div(problem.activations->tokens, Kind::tokens_of_task) * ceil_div(problem.weight->rows, rows_of_tiles);
}

template <typename Kind>
void run_in_tiles(const QuantizedLinear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  using Sum = typename Kind::Sum;
  constexpr int64_t columns_of_block = tile_block_steps * 4 / Kind::code_bytes;
  const Weight& weight = *problem.weight;
  const Activations& activations = *problem.activations;
  const int64_t row_tasks = ceil_div(weight.rows, rows_of_tiles), all_steps = steps_of<Kind>(activations);
  const auto* const scales = static_cast<const TokenScale*>(prepared);
  const char* const x = static_cast<const char*>(prepared) + scales_bytes(problem);
  constexpr int64_t sums_bytes = rows_of_tiles * sums_of_row<Kind> * 4;
  auto* const memory = static_cast<char*>(
      scratch(Scratch::for_this_thread, size(sums_bytes + rows_of_tiles * tile_row_bytes)));
  auto* const sums = reinterpret_cast<Sum*>(memory);
  char* const taken = memory + sums_bytes;
  take_tiles();
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t chunk = task / row_tasks;  // tasks that follow each other read the same x
    const int64_t first = task % row_tasks * rows_of_tiles;
    const int64_t first_token = chunk * Kind::tokens_of_task;
    const int64_t tokens = smaller(Kind::tokens_of_task, activations.tokens - first_token);
    const int64_t first_group = first_token / group_tokens, groups = ceil_div(tokens, group_tokens);
    Rows rows;
    describe<Kind>(problem, first, smaller(rows_of_tiles, weight.rows - first), rows);
    for (int64_t step = 0; step < all_steps; step += tile_block_steps) {
      const int64_t steps = smaller(tile_block_steps, all_steps - step);
      const int64_t begin = step * 4 / Kind::code_bytes;
      const int64_t columns = smaller(columns_of_block, weight.columns - begin);
      for (int64_t row = 0; row < rows.count; ++row) {
        Kind::take(row_of(weight, first + row) + begin, columns, taken + row * tile_row_bytes);
      }
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t panels = panels_of_group(activations, first_group + group);
        const char* const at = x + ((first_group + group) * group_panels * all_steps + step * panels) * 64;
        multiply_group<Kind>(taken, rows.count, at, panels, steps, sums + group * group_tokens, step == 0);
      }
    }
    finish_chunk<Kind>(problem, scales, rows, sums, sums_of_row<Kind>, first_token, tokens);
  }
  _tile_release();
}

template <typename Kind>
constexpr QuantizedLinearKernel in_tiles = {
    bytes_by_panel<Kind>,
    parts_by_token,  // sixteen tokens, which are a panel
    prepare_by_panel<Kind>,
    tasks_in_tiles<Kind>,
    [](const QuantizedLinear&) -> int64_t { return 1; },
    run_in_tiles<Kind>,
};

const QuantizedLinearKernel& kernel_for(const QuantizedLinear& problem) {
  if (problem.span != 0 || is_few(problem)) return quantized_linear_avx512;
  return problem.activations->is_float ? in_tiles<Float8Tiles> : in_tiles<Int8Tiles>;
}

}  // namespace
}  // namespace compressed_format

#include "cpu/quantized_linear/by_problem.inl"

namespace compressed_format {

const QuantizedLinearKernel quantized_linear_amx = by_problem;

}  // namespace compressed_format
