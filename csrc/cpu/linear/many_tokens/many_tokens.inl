// y = x @ dense(weight).T + bias for many tokens, on one instruction set. The file that includes this one has included
// the vectors of cpu/simd, and defined `strip_rows` and `block_rows`; it defines `transpose` and what chooses a product
// at its end.
// Everything is in an anonymous namespace, and nothing of the standard library is called: csrc/CMakeLists.txt says why.
//
// The lanes of a vector are tokens. x is copied once into panels of `lanes` tokens each; a tile of weights is decoded
// into memory of the thread, row by row as it is; a row's weights are then broadcast, one after the other, and
// multiplied with the panels. So no weight is ever moved across lanes, and only the result is transposed.
//
// What a multiplication takes of k at once is a step: one float, or a pair of bfloat16. It is four bytes either way, of
// a row and of a token, so that all but the multiplication itself is the same.

#include "cpu/numbers.h"
#include "cpu/zero_point.h"

namespace compressed_format {
namespace {

// Rows become columns.
void transpose(F32 (&rows)[lanes]);

constexpr int64_t step_bytes = 4;
constexpr int64_t panel_step_bytes = lanes * step_bytes;

// A multiplication computes a strip of `strip_rows` rows for two panels, or two strips for a single one: their sums
// fill the registers.
constexpr int strip_panels = 2;

// The panels that are multiplied stay in the first level of the cache while all strips of a tile pass by: 32 KB of 48
// with sixteen lanes, 16 KB of 32 with eight.
constexpr int64_t block_steps = 256;
constexpr int64_t tile_row_bytes = block_steps * step_bytes;

// A tile of `block_rows` rows serves this many tokens before the next is decoded: tile and sums (each some 50 KB, with
// AMX 128 KB) stay in the second level of the cache, and decoding is a small part of the work. What a single panel is
// multiplied with is less, so that it stays in the first level with the panel: there, decoding is much of the work.
constexpr int64_t block_strips = block_rows / strip_rows;
constexpr int64_t block_panels = 256 / lanes;
static_assert(block_rows % (strip_panels * strip_rows) == 0 && block_rows % lanes == 0);

// The sums of a block lie panel by panel, in each row by row.
constexpr int64_t sums_panel_bytes = block_rows * panel_step_bytes;

inline F32 load_value(Float type, const void* source) {
  switch (type) {
    case Float::bfloat16: return load_bfloat16(source);
    case Float::float16: return load_float16(source);
    case Float::float32: return load_float32(source);
  }
  return zero();
}
inline F32 load_value(Float type, const void* source, int count) {
  if (count == lanes) return load_value(type, source);
  switch (type) {
    case Float::bfloat16: return load_bfloat16(source, count);
    case Float::float16: return load_float16(source, count);
    case Float::float32: return load_float32(source, count);
  }
  return zero();
}
inline void store_value(Float type, void* target, F32 a, int count) {
  const bool whole = count == lanes;
  switch (type) {
    case Float::bfloat16: return whole ? store_bfloat16(target, a) : store_bfloat16(target, a, count);
    case Float::float16: return whole ? store_float16(target, a) : store_float16(target, a, count);
    case Float::float32: return whole ? store_float32(target, a) : store_float32(target, a, count);
  }
}

// Where a token's row of x begins.
inline const char* token_of(const Linear& problem, int64_t token) {
  return static_cast<const char*>(problem.x) + token * problem.x_row_bytes;
}

// Decodes in floats a weight whose columns name their groups, of which there may be so many. Codes come as they are,
// from a weight without scales; a row's scales are made floats once for all columns of the tile that look them up.
constexpr int64_t most_indexed_groups = 256;

inline bool decodes_indexed(const Weight& weight) {
  const bool codes = weight.type == Codes::packed || weight.type == Codes::int8;
  return codes && weight.g_idx != nullptr && weight.bitmask == nullptr && weight.block_rows == 1 &&
         weight.scale_columns <= most_indexed_groups;
}

inline void decode_indexed(const Weight& weight, int64_t first_row, int64_t last_row, int64_t left, int64_t right,
                           char* tile) {
  const float one = 1.0f;
  Weight codes = weight;
  codes.scale = &one;
  codes.scale_type = Float::float32;
  codes.block_rows = weight.rows;
  codes.block_columns = weight.columns;
  codes.scale_columns = 1;
  codes.zero_point = nullptr;
  codes.zero_points = ZeroPoints::none;
  codes.g_idx = nullptr;
  dequantize_rows(codes, first_row, last_row, left, right, tile, tile_row_bytes, Float::float32);

  const bool asymmetric = weight.zero_points != ZeroPoints::none;
  const int64_t columns = right - left, groups = weight.scale_columns, scale_bytes = float_bytes(weight.scale_type);
  // Vectors are whole: a tile's row has room for them, and what is missing has the first group.
  int32_t group_of[block_steps] = {};
  const auto* const first_group = reinterpret_cast<const char*>(weight.g_idx) + 4 * left;
  __builtin_memcpy(group_of, first_group, static_cast<uint64_t>(4 * columns));
  float scales[most_indexed_groups], zeros[most_indexed_groups];
  for (int64_t row = first_row; row < last_row; ++row, tile += tile_row_bytes) {
    const char* const source = static_cast<const char*>(weight.scale) + row * groups * scale_bytes;
    for (int64_t i = 0; i < groups; i += lanes) {
      const int count = static_cast<int>(smaller(lanes, groups - i));
      store_float32(scales + i, load_value(weight.scale_type, source + i * scale_bytes, count), count);
    }
    for (int64_t i = 0; asymmetric && i < groups; ++i) zeros[i] = static_cast<float>(zero_point_at(weight, row, i));
    for (int64_t i = 0; i < columns; i += lanes) {
      float scale[lanes], zero[lanes] = {};
      for (int lane = 0; lane < lanes; ++lane) scale[lane] = scales[group_of[i + lane]];
      for (int lane = 0; asymmetric && lane < lanes; ++lane) zero[lane] = zeros[group_of[i + lane]];
      F32 value = (load_float32(tile + 4 * i) - load_float32(zero)) * load_float32(scale);
      if (weight.scale_type == Float::bfloat16) value = as_bfloat16(value);
      if (weight.scale_type == Float::float16) value = as_float16(value);
      store_float32(tile + 4 * i, value);
    }
  }
}

// The product in floats, for activations of any type: values that a smaller type holds are exact in it.
struct Floats {
  // Each addition to a long sum rounds it, and a sum of short sums errs less than one long sum.
  static constexpr int64_t sum_steps = 32;
  static constexpr bool scales_sums = false;

  static int64_t steps(const Linear& problem) { return problem.weight->columns; }
  // Whole squares of tokens and steps are transposed into the panels.
  static int64_t panel_steps(const Linear& problem) { return ceil_div(problem.weight->columns, lanes) * lanes; }

  static F32 broadcast_step(const char* weights) {
    float value;
    __builtin_memcpy(&value, weights, sizeof value);
    return broadcast(value);
  }
  static F32 multiply(F32 weights, F32 x, F32 sum) { return multiply_add(weights, x, sum); }

  static void pack(const Linear& problem, int64_t first_token, int tokens, char* panel) {
    const int64_t columns = problem.weight->columns;
    for (int64_t left = 0; left < columns; left += lanes, panel += lanes * panel_step_bytes) {
      F32 square[lanes];
      for (int token = 0; token < lanes; ++token) {
        const char* const source = token_of(problem, first_token + token) + left * float_bytes(problem.x_type);
        const int count = static_cast<int>(smaller(lanes, columns - left));
        square[token] = token < tokens ? load_value(problem.x_type, source, count) : zero();
      }
      transpose(square);
      for (int step = 0; step < lanes; ++step) store_float32(panel + step * panel_step_bytes, square[step]);
    }
  }

  static void decode(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_step, int64_t last_step,
                     char* tile) {
    if (decodes_indexed(weight)) return decode_indexed(weight, first_row, last_row, first_step, last_step, tile);
    dequantize_rows(weight, first_row, last_row, first_step, last_step, tile, tile_row_bytes, Float::float32);
  }
};

// A product that broadcasts weights and multiplies them with vectors of tokens.
template <typename Product>
struct InVectors : Product {
  // sums[panel][row] += weights[row] * x[panel] over so many steps, for a strip of rows and two panels, or two strips
  // and one panel; sums begin at zero where these steps are the first.
  template <int panels>
  static void multiply_strip(const char* weights, const char* x, int64_t panel_bytes, int64_t steps, char* sums,
                             bool first) {
    constexpr int rows = strip_panels / panels * strip_rows;
    F32 sum[panels][rows];
#pragma GCC unroll 2
    for (int panel = 0; panel < panels; ++panel) {
#pragma GCC unroll 24
      for (int row = 0; row < rows; ++row) sum[panel][row] = zero();
    }
    for (int64_t step = 0; step < steps; ++step) {
      F32 tokens[panels];
#pragma GCC unroll 2
      for (int panel = 0; panel < panels; ++panel) {
        tokens[panel] = load_float32(x + panel * panel_bytes + step * panel_step_bytes);
      }
#pragma GCC unroll 24
      for (int row = 0; row < rows; ++row) {
        const F32 weight = Product::broadcast_step(weights + row * tile_row_bytes + step * step_bytes);
#pragma GCC unroll 2
        for (int panel = 0; panel < panels; ++panel) {
          sum[panel][row] = Product::multiply(weight, tokens[panel], sum[panel][row]);
        }
      }
    }
#pragma GCC unroll 2
    for (int panel = 0; panel < panels; ++panel) {
#pragma GCC unroll 24
      for (int row = 0; row < rows; ++row) {
        char* const target = sums + panel * sums_panel_bytes + row * panel_step_bytes;
        store_float32(target, first ? sum[panel][row] : load_float32(target) + sum[panel][row]);
      }
    }
  }
};

// The same for a whole block of steps, of which never more than a product wants are summed in one go.
template <typename Product, int panels>
inline void multiply_steps(const char* weights, const char* x, int64_t panel_bytes, int64_t steps, char* sums,
                           bool first) {
  for (int64_t step = 0; step < steps; step += Product::sum_steps) {
    Product::template multiply_strip<panels>(weights + step * step_bytes, x + step * panel_step_bytes, panel_bytes,
                                             smaller(Product::sum_steps, steps - step), sums, first && step == 0);
  }
}

// The scale of a whole row.
inline F32 scale_of_row(const Weight& weight, int64_t row) {
  const int64_t index = weight.block_rows == 1 ? row : row / weight.block_rows;
  const char* const source = static_cast<const char*>(weight.scale) + index * float_bytes(weight.scale_type);
  float value[lanes];
  store_float32(value, load_value(weight.scale_type, source, 1));
  return broadcast(value[0]);
}

// Sums of a panel's tokens into y, for rows [first_row, last_row).
template <typename Product>
void store_panel(const Linear& problem, int64_t first_row, int64_t last_row, int64_t panel, const char* sums) {
  const int64_t first_token = panel * lanes;
  const int tokens = static_cast<int>(smaller(lanes, problem.tokens - first_token));
  const int64_t rows = problem.weight->rows;
  for (int64_t row = first_row; row < last_row; row += lanes, sums += lanes * panel_step_bytes) {
    const int count = static_cast<int>(smaller(lanes, last_row - row));
    F32 square[lanes];
    for (int i = 0; i < lanes; ++i) square[i] = i < count ? load_float32(sums + i * panel_step_bytes) : zero();
    if constexpr (Product::scales_sums) {
      for (int i = 0; i < count; ++i) square[i] = square[i] * scale_of_row(*problem.weight, row + i);
    }
    transpose(square);
    if (problem.bias != nullptr) {
      const char* const source = static_cast<const char*>(problem.bias) + row * float_bytes(problem.bias_type);
      const F32 bias = load_value(problem.bias_type, source, count);
      for (int token = 0; token < tokens; ++token) square[token] = square[token] + bias;
    }
    for (int token = 0; token < tokens; ++token) {
      char* const target =
          static_cast<char*>(problem.y) + ((first_token + token) * rows + row) * float_bytes(problem.x_type);
      store_value(problem.x_type, target, square[token], count);
    }
  }
}

// Codes of so many bytes of each row of a tile fit into the first level of the cache besides a panel; more of them
// would be out again before they are decoded.
constexpr int64_t most_near_bytes = 320;
constexpr int to_second_level = 2;

// Asks memory for a strip's codes of the next block while this one is multiplied. Rows are far apart, so that the
// processor does not foresee them by itself.
inline void prefetch_codes(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_byte,
                           int64_t last_byte) {
  const bool near = last_byte - first_byte <= most_near_bytes;
  for (int64_t row = first_row; row < last_row; ++row) {
    const char* const codes = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
    for (int64_t byte = first_byte; byte < last_byte; byte += 64) {
      if (near) __builtin_prefetch(codes + byte);
      else __builtin_prefetch(codes + byte, 0, to_second_level);
    }
  }
}

template <typename Product>
void multiply_block(const Linear& problem, const char* prepared, int64_t first_row, int64_t last_row,
                    int64_t first_panel, int64_t last_panel, char* tile, char* sums) {
  const Weight& weight = *problem.weight;
  const int64_t steps = Product::steps(problem);
  const int64_t panel_bytes = Product::panel_steps(problem) * panel_step_bytes;
  const int64_t strips = ceil_div(last_row - first_row, strip_rows);
  // Whole strips are multiplied, where there is a single panel even whole pairs of them.
  const int64_t missing = ceil_div(strips, strip_panels) * strip_panels * strip_rows - (last_row - first_row);
  __builtin_memset(tile + (last_row - first_row) * tile_row_bytes, 0, static_cast<uint64_t>(missing * tile_row_bytes));
  // Of the codes, this much belongs to a step, near enough to ask memory for them.
  const int64_t code_bytes = weight.bitmask == nullptr ? weight.row_bytes : 0;

  for (int64_t left = 0; left < steps; left += block_steps) {
    const int64_t right = smaller(steps, left + block_steps);
    Product::decode(weight, first_row, last_row, left, right, tile);
    // After the last steps of these rows come the first ones of the next rows.
    const bool last = right == steps;
    const int64_t next_row = last ? last_row : first_row;
    const int64_t next_last_row = last ? smaller(weight.rows, last_row + (last_row - first_row)) : last_row;
    const int64_t next_byte = last ? 0 : code_bytes * right / steps;
    const int64_t next_end = code_bytes * smaller(steps, last ? block_steps : right + block_steps) / steps;
    for (int64_t panel = first_panel; panel < last_panel; panel += strip_panels) {
      const char* const x = prepared + panel * panel_bytes + left * panel_step_bytes;
      const bool single = panel + 1 == last_panel;
      const int64_t strips_at_once = single ? strip_panels : 1;
      for (int64_t strip = 0; strip < strips; strip += strips_at_once) {
        if (panel == first_panel) {
          const int64_t row = next_row + strip * strip_rows;
          prefetch_codes(weight, row, smaller(next_last_row, row + strips_at_once * strip_rows), next_byte, next_end);
        }
        const char* const rows = tile + strip * strip_rows * tile_row_bytes;
        char* const target = sums + (panel - first_panel) * sums_panel_bytes + strip * strip_rows * panel_step_bytes;
        if (single) {
          multiply_steps<Product, 1>(rows, x, panel_bytes, right - left, target, left == 0);
        } else {
          multiply_steps<Product, 2>(rows, x, panel_bytes, right - left, target, left == 0);
        }
      }
    }
  }
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    store_panel<Product>(problem, first_row, last_row, panel, sums + (panel - first_panel) * sums_panel_bytes);
  }
}

inline int64_t panels_of(const Linear& problem) { return ceil_div(problem.tokens, lanes); }

// What a kernel does, with one product.

template <typename Product>
size_t prepared_bytes(const Linear& problem) {
  return static_cast<size_t>(panels_of(problem) * Product::panel_steps(problem) * panel_step_bytes);
}

template <typename Product>
void prepare(const Linear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  const int64_t panel_bytes = Product::panel_steps(problem) * panel_step_bytes;
  for (int64_t panel = first_part; panel < last_part; ++panel) {
    const int tokens = static_cast<int>(smaller(lanes, problem.tokens - panel * lanes));
    Product::pack(problem, panel * lanes, tokens, static_cast<char*>(prepared) + panel * panel_bytes);
  }
}

// A task is a strip of rows: any number of threads gets equally much, and takes its strips in blocks.
template <typename Product>
void run(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  const int64_t panels = panels_of(problem);
  const int64_t tile_bytes = block_rows * tile_row_bytes;
  const int64_t sums_bytes = smaller(panels, block_panels) * sums_panel_bytes;
  const int64_t strips = panels == 1 ? strip_panels : block_strips;
  const auto bytes = static_cast<size_t>(tile_bytes + sums_bytes);
  char* const tile = static_cast<char*>(scratch(Scratch::for_this_thread, bytes));
  for (int64_t panel = 0; panel < panels; panel += block_panels) {
    for (int64_t strip = first_task; strip < last_task; strip += strips) {
      const int64_t last_strip = smaller(last_task, strip + strips);
      multiply_block<Product>(problem, static_cast<const char*>(prepared), strip * strip_rows,
                              smaller(problem.weight->rows, last_strip * strip_rows), panel,
                              smaller(panels, panel + block_panels), tile, tile + tile_bytes);
    }
  }
}

inline int64_t parts(const Linear& problem) { return panels_of(problem); }
inline int64_t tasks(const Linear& problem) { return ceil_div(problem.weight->rows, strip_rows); }

// A thread of its own is worth some ten thousand cycles.
inline int64_t tasks_per_thread(const Linear& problem) {
  constexpr int64_t steps_per_thread = 10000 * lanes;
  const int64_t steps = strip_rows * problem.weight->columns * panels_of(problem) * lanes / 2;
  return ceil_div(steps_per_thread, steps);
}

inline bool takes(const Linear& problem) { return problem.weight->columns > 0 && can_dequantize(*problem.weight); }

}  // namespace
}  // namespace compressed_format
