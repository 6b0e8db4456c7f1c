// Pairs of a weight whose columns say which group they lie in.

#include "cpu/linear/indexed_groups/indexed_groups.inl"

namespace compressed_format {
namespace {

struct IndexedPairs : Pairs {
  static bool takes(const Weight& weight) { return is_indexed(weight); }

  // A panel has whole chunks of columns, so that a tile may have them too.
  static int64_t steps(const Linear& problem) {
    return ceil_div(problem.weight->columns, indexed_columns) * indexed_columns / pair_columns;
  }
  static int64_t panel_steps(const Linear& problem) { return steps(problem); }
  static void pack(const Linear& problem, int64_t first_token, int tokens, char* panel) {
    pack_in_order(problem, first_token, tokens, panel, steps(problem) * pair_columns, every(32),
                  [](int64_t left, int pair) { return left / pair_columns + pair; });
  }

  static void decode(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_step, int64_t last_step,
                     char* tile) {
    const int64_t left = first_step * pair_columns, right = last_step * pair_columns;
    alignas(64) uint16_t groups[block_steps * pair_columns];
    write_groups(weight, left, smaller(weight.columns, right) - left, groups);
    const CodeBytes codes(weight);
    with_table(weight, [&](auto table) {
      typename decltype(table)::Rows rows(weight);
      for (int64_t row = first_row; row < last_row; ++row, tile += tile_row_bytes) {
        rows.load(row);
        const char* const source = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
        for (int64_t column = left; column < right; column += indexed_columns) {
          __m512 values[4];
          rows.multiply(codes.load(source, column), groups + (column - left), values);
          if (weight.scale_type == Float::float16) {
            for (__m512& value : values) value = as_float16({value}).v;
          }
          char* const out = tile + 2 * (column - left);
          const int64_t count = weight.columns - column;
#pragma GCC unroll 2
          for (int half = 0; half < 2; ++half) {
            const __m512bh both = _mm512_cvtne2ps_pbh(values[2 * half + 1], values[2 * half]);
            __m512i halves;
            __builtin_memcpy(&halves, &both, sizeof halves);
            // What scales of the first group make of nothing need not be a number.
            _mm512_storeu_si512(out + 64 * half,
                                _mm512_maskz_mov_epi16(first_columns(count - 32 * half), halves));
          }
        }
      }
    });
  }
};

// What `action` makes of the best pairs for a weight, multiplied in a way that the instruction set has.
template <template <typename> typename Way, typename Action>
inline auto with_pairs(const Weight& weight, Action action) {
  if (NibblePairs::takes(weight)) return action(Way<NibblePairs>{});
  if (WindowPairs::takes(weight)) return action(Way<WindowPairs>{});
  if (BytePairs::takes(weight)) return action(Way<BytePairs>{});
  if (IndexedPairs::takes(weight)) return action(Way<IndexedPairs>{});
  return action(Way<Pairs>{});
}

}  // namespace
}  // namespace compressed_format
