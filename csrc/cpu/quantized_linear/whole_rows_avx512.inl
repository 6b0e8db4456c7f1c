// Few tokens: lanes along the columns, bound by reading the weight. Many: tokens are the lanes. Sixteen of them make a
// panel, four panels a group; a group of P panels is laid out as [columns / 4][P][16 tokens][4 codes] (E4M3: as
// [columns / 2][P][16 tokens][2 bfloat16]), so that four codes of a row of the weight, broadcast as they lie in the
// checkpoint, meet P vectors that follow each other. Nothing of the weight is repacked; E4M3 codes become bfloat16.
// Whoever includes this has included cpu/simd/avx512.h and quantized_linear.inl.

#include "cpu/scratch.h"

namespace compressed_format {
namespace {

// From here on, panels are faster although they leave lanes unused.
constexpr int64_t few_tokens = 4;

constexpr int64_t panel_tokens = 16;
constexpr int64_t group_panels = 4;
constexpr int64_t group_tokens = panel_tokens * group_panels;
// So many tokens share what a task reads of the weight and makes of it.
constexpr int64_t chunk_tokens = 4 * group_tokens;
// 48 rows are six or eight at a time without a rest, and three vectors of results.
constexpr int64_t rows_of_panels = 48;
// The columns of a block, in steps of four bytes of x: 256 tokens of them take half of a second-level cache of 1 MB.
constexpr int64_t block_steps = 512;
// Between rows of decoded codes; the rest over a power of two spreads them over the sets of the first-level cache.
constexpr int64_t decoded_stride = block_steps * 4 + 64;

// _mm512_dpbusd_epi32(sum, codes, x), unsigned times signed. GCC 12 copies the sum before and after that one, and runs
// out of registers where there are many.
inline __m512i add_products(__m512i sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
}

struct Int8 {
  using Sum = int32_t;
  using Vector = __m512i;
  static constexpr int64_t code_bytes = 1;
  static constexpr int32_t offset = 128;
  static constexpr int64_t steps_at_once = 1;
  static constexpr bool decodes = false;

  // The instruction takes unsigned codes on one side: those of the weight, 128 more than they are. What that adds is
  // the sum of the codes of x, which is known.
  static __m512i raised(__m512i codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8(-128)); }
  static __m512i raised(const char* codes) {
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof four);
    return raised(_mm512_set1_epi32(four));
  }
  static Vector none() { return _mm512_setzero_si512(); }
  static Vector from_sums(const Sum* sums) { return _mm512_loadu_si512(sums); }
  static void to_sums(Sum* sums, Vector values) { _mm512_storeu_si512(sums, values); }
  static Vector add_product(Vector sum, const char* x, __m512i codes) {
    return add_products(sum, codes, _mm512_loadu_si512(x));
  }

  template <int R, int M>
  static void add_dots(__m512i (&total)[R][M], const __m512i (&codes)[R], const char* x, int64_t x_stride) {
    for (int token = 0; token < M; ++token) {
      const __m512i values = _mm512_loadu_si512(x + token * x_stride);
      for (int row = 0; row < R; ++row) {
        total[row][token] = add_products(total[row][token], raised(codes[row]), values);
      }
    }
  }
  static Sum sum_of(Vector total) { return _mm512_reduce_add_epi32(total); }

  template <int M>
  static void dots(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, Sum* sums);

  static int32_t sum_of_row(const char* row, int64_t columns) {
    __m512i total = none();
    const __m512i ones = _mm512_set1_epi8(1);
    int64_t i = 0;
    for (; i + 64 <= columns; i += 64) total = add_products(total, ones, _mm512_loadu_si512(row + i));
    const __mmask64 rest = _bzhi_u64(~0ull, static_cast<unsigned>(columns - i));
    return sum_of(add_products(total, ones, _mm512_maskz_loadu_epi8(rest, row + i)));
  }
};

// Low and high bytes of bfloat16 by code.
struct ByteTables {
  alignas(64) unsigned char low[128];
  alignas(64) unsigned char high[128];

  constexpr ByteTables() : low(), high() {
    for (int code = 0; code < 128; ++code) {
      low[code] = static_cast<unsigned char>(float8_table.value[code] & 255);
      high[code] = static_cast<unsigned char>(float8_table.value[code] >> 8);
    }
  }
};

constexpr ByteTables byte_tables;

struct Float8 {
  using Sum = float;
  using Vector = __m512;
  static constexpr int64_t code_bytes = 2;
  static constexpr int32_t offset = 0;
  static constexpr int64_t steps_at_once = 1;
  static constexpr bool decodes = true;

  struct Pair {
    __m512i first, second;
  };

  // 64 codes to 64 bfloat16: of each quarter the first half of the codes, then the second.
  static Pair decode_by_quarters(__m512i codes) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(byte_tables.low), codes,
                                                 _mm512_load_si512(byte_tables.low + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(byte_tables.high), codes,
                                                  _mm512_load_si512(byte_tables.high + 64));
    const __m512i with_sign = _mm512_ternarylogic_epi64(high, codes, _mm512_set1_epi8(-128), 0xf8);
    return {_mm512_unpacklo_epi8(low, with_sign), _mm512_unpackhi_epi8(low, with_sign)};
  }

  // The same in order: the first and the second half of all codes go into those of the quarters.
  static Pair decode(__m512i codes) {
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    return decode_by_quarters(_mm512_permutexvar_epi64(order, codes));
  }

  // 64 bfloat16 of x, in order, to where decode_by_quarters has those of the weight.
  static void order_by_quarters(char* x) {
    const __m512i first = _mm512_loadu_si512(x), second = _mm512_loadu_si512(x + 64);
    _mm512_storeu_si512(x, _mm512_shuffle_i32x4(first, second, 0x88));
    _mm512_storeu_si512(x + 64, _mm512_shuffle_i32x4(first, second, 0xdd));
  }

  static __m512i raised(const char* codes) {
    int32_t two;
    __builtin_memcpy(&two, codes, sizeof two);
    return _mm512_set1_epi32(two);
  }
  static Vector none() { return _mm512_setzero_ps(); }
  static Vector from_sums(const Sum* sums) { return _mm512_loadu_ps(sums); }
  static void to_sums(Sum* sums, Vector values) { _mm512_storeu_ps(sums, values); }
  static Vector add_product(Vector sum, __m512i x, __m512i codes) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(codes));
  }
  static Vector add_product(Vector sum, const char* x, __m512i codes) {
    return add_product(sum, _mm512_loadu_si512(x), codes);
  }

  template <int R, int M>
  static void add_dots(__m512 (&total)[R][M], const __m512i (&codes)[R], const char* x, int64_t x_stride) {
    for (int row = 0; row < R; ++row) {
      const Pair values = decode_by_quarters(codes[row]);
      for (int token = 0; token < M; ++token) {
        const char* const at = x + token * x_stride;
        total[row][token] = add_product(total[row][token], at, values.first);
        total[row][token] = add_product(total[row][token], at + 64, values.second);
      }
    }
  }
  static Sum sum_of(Vector total) { return _mm512_reduce_add_ps(total); }

  template <int M>
  static void dots(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, Sum* sums);

  static int32_t sum_of_row(const char*, int64_t) { return 0; }
};

// Sums of R rows and M tokens. While a row is read, what lies `ahead` bytes further on is fetched.
template <typename Kind, int R, int M>
void dots_of_rows(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, int64_t ahead,
                  typename Kind::Sum* sums) {
  typename Kind::Vector total[R][M];
  for (auto& of_row : total) {
    for (auto& sum : of_row) sum = Kind::none();
  }
  __m512i codes[R];
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) {
    for (int row = 0; row < R; ++row) {
      codes[row] = _mm512_loadu_si512(rows[row] + i);
      _mm_prefetch(rows[row] + i + ahead, _MM_HINT_T0);
    }
    Kind::template add_dots<R, M>(total, codes, x + i * Kind::code_bytes, x_stride);
  }
  if (i < columns) {
    const __mmask64 rest = _bzhi_u64(~0ull, static_cast<unsigned>(columns - i));
    for (int row = 0; row < R; ++row) codes[row] = _mm512_maskz_loadu_epi8(rest, rows[row] + i);
    Kind::template add_dots<R, M>(total, codes, x + i * Kind::code_bytes, x_stride);
  }
  for (int token = 0; token < M; ++token) {
    for (int row = 0; row < R; ++row) sums[token * rows_of_task + row] = Kind::sum_of(total[row][token]);
  }
}

template <typename Kind, int M>
void dots_of(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, typename Kind::Sum* sums) {
  if constexpr (M == 1) {
    // Memory is read faster row by row, which one token allows: there are no loads of x for rows to share. A page
    // ahead, as the processor itself fetches within a page only.
    constexpr int64_t ahead = 4096;
    for (int64_t row = 0; row < rows_at_once; ++row) {
      dots_of_rows<Kind, 1, 1>(rows + row, columns, x, x_stride, ahead, sums + row);
    }
  } else {
    const int64_t ahead = rows_at_once * (rows[1] - rows[0]);
    dots_of_rows<Kind, static_cast<int>(rows_at_once), M>(rows, columns, x, x_stride, ahead, sums);
  }
}

template <int M>
void Int8::dots(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, Sum* sums) {
  dots_of<Int8, M>(rows, columns, x, x_stride, sums);
}

template <int M>
void Float8::dots(const char* const* rows, int64_t columns, const char* x, int64_t x_stride, Sum* sums) {
  dots_of<Float8, M>(rows, columns, x, x_stride, sums);
}

// Sixteen rows of sixteen elements of four bytes to columns.
inline void transpose(const void* source, int64_t source_stride, void* target, int64_t target_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(static_cast<const char*>(source) + i * source_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // Now a[4 q + c] has, in its quarter p, column 4 p + c of rows 4 q and on.
  for (int c = 0; c < 4; ++c) {
    b[c] = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44);
    b[4 + c] = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee);
    b[8 + c] = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    b[12 + c] = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    a[c] = _mm512_shuffle_i32x4(b[c], b[8 + c], 0x88);
    a[4 + c] = _mm512_shuffle_i32x4(b[c], b[8 + c], 0xdd);
    a[8 + c] = _mm512_shuffle_i32x4(b[4 + c], b[12 + c], 0x88);
    a[12 + c] = _mm512_shuffle_i32x4(b[4 + c], b[12 + c], 0xdd);
  }
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(static_cast<char*>(target) + i * target_stride, a[i]);
}

// In steps of four bytes; filled up with zeros where the kind takes several of them at once.
template <typename Kind>
int64_t steps_of(const Activations& activations) {
  return ceil_div(activations.columns * Kind::code_bytes, 4 * Kind::steps_at_once) * Kind::steps_at_once;
}

inline int64_t panels_of_group(const Activations& activations, int64_t group) {
  return smaller(group_panels, ceil_div(activations.tokens, panel_tokens) - group * group_panels);
}

template <typename Kind>
size_t bytes_by_panel(const QuantizedLinear& problem) {
  const int64_t panels = ceil_div(problem.activations->tokens, panel_tokens);
  // Sixteen steps are written at once.
  return scales_bytes(problem) + size(panels * (steps_of<Kind>(*problem.activations) + 15) * 64);
}

// Where a panel begins, in those of all tokens.
inline int64_t panel_offset(int64_t panel, int64_t steps) {
  return panel / group_panels * group_panels * steps * 64 + panel % group_panels * 64;
}

// Sixteen rows of codes to a panel, whose steps are `target_stride` bytes apart.
inline void lay_out_panel(const char* rows, int64_t row_bytes, int64_t steps, char* target, int64_t target_stride) {
  for (int64_t step = 0; step < steps; step += 16) {
    if (steps - step >= 16) {
      transpose(rows + step * 4, row_bytes, target + step * target_stride, target_stride);
    } else {
      alignas(64) char part[16 * 64];
      transpose(rows + step * 4, row_bytes, part, 64);
      for (int64_t i = 0; i < steps - step; ++i) {
        __builtin_memcpy(target + (step + i) * target_stride, part + i * 64, 64);
      }
    }
  }
}

template <typename Kind>
void prepare_by_panel(const QuantizedLinear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  const Activations& activations = *problem.activations;
  const int64_t stride = padded(activations.columns), steps = steps_of<Kind>(activations);
  auto* const rows = static_cast<char*>(
      scratch(Scratch::for_this_thread, size(panel_tokens * stride * Kind::code_bytes)));
  __builtin_memset(rows, 0, size(panel_tokens * stride * Kind::code_bytes));
  for (int64_t panel = first_part; panel < last_part; ++panel) {
    const int64_t first = panel * panel_tokens, last = smaller(first + panel_tokens, activations.tokens);
    auto* const scales = static_cast<TokenScale*>(prepared) + first;
    problem.quantize->codes(activations, &problem.whole, rows, stride, scales, first, last);
    if (last < first + panel_tokens) {  // after a whole panel, in the same memory
      const int64_t row_bytes = stride * Kind::code_bytes;
      __builtin_memset(rows + (last - first) * row_bytes, 0, size((first + panel_tokens - last) * row_bytes));
    }
    const int64_t panels = panels_of_group(activations, panel / group_panels);
    char* const target = static_cast<char*>(prepared) + scales_bytes(problem) + panel_offset(panel, steps);
    lay_out_panel(rows, stride * Kind::code_bytes, steps, target, panels * 64);
  }
}

// R rows times P panels, over `steps` steps and a last one of `rest` bytes, added to sums unless these begin here.
template <typename Kind, int R, int P>
void multiply(const char* x, const char* const* rows, int64_t steps, int64_t rest, typename Kind::Sum* sums,
              bool begins) {
  typename Kind::Vector total[R][P];
  for (int row = 0; row < R; ++row) {
    for (int panel = 0; panel < P; ++panel) {
      total[row][panel] = begins ? Kind::none() : Kind::from_sums(sums + row * chunk_tokens + panel * panel_tokens);
    }
  }
  const char* at[R];
  for (int row = 0; row < R; ++row) at[row] = rows[row];
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int row = 0; row < R; ++row) {
      const __m512i codes = Kind::raised(at[row] + step * 4);
#pragma GCC unroll 4
      for (int panel = 0; panel < P; ++panel) {
        total[row][panel] = Kind::add_product(total[row][panel], x + panel * 64, codes);
      }
    }
    x += P * 64;
  }
  if (rest > 0) {
    for (int row = 0; row < R; ++row) {
      char last[4] = {};
      __builtin_memcpy(last, rows[row] + steps * 4, size(rest));
      const __m512i codes = Kind::raised(last);
      for (int panel = 0; panel < P; ++panel) {
        total[row][panel] = Kind::add_product(total[row][panel], x + panel * 64, codes);
      }
    }
  }
  for (int row = 0; row < R; ++row) {
    for (int panel = 0; panel < P; ++panel) {
      Kind::to_sums(sums + row * chunk_tokens + panel * panel_tokens, total[row][panel]);
    }
  }
}

// As many sums as leave registers for their operands.
constexpr int64_t rows_with(int64_t panels) { return panels == 4 ? 6 : 8; }

// A block of columns of some rows, as the multiplication reads it: where each row begins, the last one again for those
// that there are not.
struct Operand {
  const char* rows[rows_of_panels + 8];
  int64_t count;
  int64_t steps;
  int64_t rest;
};

template <typename Kind, int P>
void multiply_rows(const Operand& operand, const char* x, typename Kind::Sum* sums, bool begins) {
  constexpr int64_t R = rows_with(P);
  for (int64_t row = 0; row < operand.count; row += R) {
    multiply<Kind, R, P>(x, operand.rows + row, operand.steps, operand.rest, sums + row * chunk_tokens, begins);
  }
}

// E4M3 codes to bfloat16, with zeros up to the next multiple of 64.
inline void decode_row(const char* codes, int64_t count, char* target) {
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    const Float8::Pair values = Float8::decode(_mm512_loadu_si512(codes + i));
    _mm512_storeu_si512(target + 2 * i, values.first);
    _mm512_storeu_si512(target + 2 * i + 64, values.second);
  }
  if (i < count) {
    const __mmask64 rest = _bzhi_u64(~0ull, static_cast<unsigned>(count - i));
    const Float8::Pair values = Float8::decode(_mm512_maskz_loadu_epi8(rest, codes + i));
    _mm512_storeu_si512(target + 2 * i, values.first);
    _mm512_storeu_si512(target + 2 * i + 64, values.second);
  }
}

template <typename Kind>
void take_block(const Weight& weight, const Rows& rows, int64_t first_step, int64_t steps, char* decoded,
                Operand& operand) {
  const int64_t begin = first_step * 4 / Kind::code_bytes;
  const int64_t columns = smaller(steps * 4 / Kind::code_bytes, weight.columns - begin);
  operand.count = rows.count;
  operand.steps = Kind::decodes ? steps : columns / 4;
  operand.rest = Kind::decodes ? 0 : columns % 4;
  for (int64_t i = 0; i < rows_of_panels + 8; ++i) {
    const int64_t row = smaller(i, rows.count - 1);
    const char* const codes = row_of(weight, rows.first + row) + begin;
    operand.rows[i] = Kind::decodes ? decoded + row * decoded_stride : codes;
    if constexpr (Kind::decodes) {
      if (i == row) decode_row(codes, columns, decoded + row * decoded_stride);
    }
  }
}

inline int64_t chunks(const QuantizedLinear& problem) { return ceil_div(problem.activations->tokens, chunk_tokens); }

inline int64_t tasks_by_panel(const QuantizedLinear& problem) {
  return chunks(problem) * ceil_div(problem.weight->rows, rows_of_panels);
}

// Sums of the rows of a task, `stride` from one row to the next, into y.
template <typename Kind>
void finish_chunk(const QuantizedLinear& problem, const TokenScale* scales, const Rows& rows,
                  const typename Kind::Sum* sums, int64_t stride, int64_t first_token, int64_t tokens) {
  for (int64_t row = 0; row < rows.count; row += rows_of_task) {
    for (int64_t token = 0; token < tokens; token += panel_tokens) {
      alignas(64) typename Kind::Sum by_token[panel_tokens][rows_of_task];
      transpose(sums + row * stride + token, stride * 4, by_token, rows_of_task * 4);
      for (int64_t i = 0; i < smaller(panel_tokens, tokens - token); ++i) {
        const int64_t index = first_token + token + i;
        finish<Kind>(problem, scales[index], rows, row, by_token[i], index);
      }
    }
  }
}

template <typename Kind>
void run_by_panel(const QuantizedLinear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  using Sum = typename Kind::Sum;
  const Weight& weight = *problem.weight;
  const Activations& activations = *problem.activations;
  const int64_t row_tasks = ceil_div(weight.rows, rows_of_panels), all_steps = steps_of<Kind>(activations);
  const auto* const scales = static_cast<const TokenScale*>(prepared);
  const char* const x = static_cast<const char*>(prepared) + scales_bytes(problem);
  // Rows of sums, and room for those that are computed beyond the last.
  constexpr int64_t sums_bytes = (rows_of_panels + 8) * chunk_tokens * 4;
  constexpr int64_t decoded_bytes = Kind::decodes ? rows_of_panels * decoded_stride + 128 : 0;
  auto* const memory = static_cast<char*>(scratch(Scratch::for_this_thread, size(sums_bytes + decoded_bytes)));
  auto* const sums = reinterpret_cast<Sum*>(memory);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t chunk = task / row_tasks;  // tasks that follow each other read the same x
    const int64_t first = task % row_tasks * rows_of_panels;
    const int64_t first_token = chunk * chunk_tokens;
    const int64_t tokens = smaller(chunk_tokens, activations.tokens - first_token);
    const int64_t first_group = first_token / group_tokens, groups = ceil_div(tokens, group_tokens);
    Rows rows;
    describe<Kind>(problem, first, smaller(rows_of_panels, weight.rows - first), rows);
    for (int64_t step = 0; step < all_steps; step += block_steps) {
      Operand operand;
      take_block<Kind>(weight, rows, step, smaller(block_steps, all_steps - step), memory + sums_bytes, operand);
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t panels = panels_of_group(activations, first_group + group);
        const char* const at = x + ((first_group + group) * group_panels * all_steps + step * panels) * 64;
        Sum* const into = sums + group * group_tokens;
        switch (panels) {
          case 1: multiply_rows<Kind, 1>(operand, at, into, step == 0); break;
          case 2: multiply_rows<Kind, 2>(operand, at, into, step == 0); break;
          case 3: multiply_rows<Kind, 3>(operand, at, into, step == 0); break;
          default: multiply_rows<Kind, 4>(operand, at, into, step == 0);
        }
      }
    }
    finish_chunk<Kind>(problem, scales, rows, sums, chunk_tokens, first_token, tokens);
  }
}

inline bool is_few(const QuantizedLinear& problem) { return problem.activations->tokens <= few_tokens; }

template <typename Kind>
void prepare_few_rows(const QuantizedLinear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  prepare_by_token<Kind>(problem, prepared, first_part, last_part);
  if constexpr (Kind::decodes) {
    char* const codes = static_cast<char*>(prepared) + scales_bytes(problem);
    const int64_t bytes = problem.activations->tokens * padded(problem.activations->columns) * Kind::code_bytes;
    for (int64_t i = 0; i < bytes; i += 128) Kind::order_by_quarters(codes + i);
  }
}

template <typename Kind>
constexpr QuantizedLinearKernel kernel_of = {
    [](const QuantizedLinear& problem) {
      return is_few(problem) ? bytes_by_token<Kind>(problem) : bytes_by_panel<Kind>(problem);
    },
    parts_by_token,  // sixteen tokens, which are a panel
    [](const QuantizedLinear& problem, void* prepared, int64_t first, int64_t last) {
      (is_few(problem) ? prepare_few_rows<Kind> : prepare_by_panel<Kind>)(problem, prepared, first, last);
    },
    [](const QuantizedLinear& problem) { return is_few(problem) ? tasks_by_token(problem) : tasks_by_panel(problem); },
    [](const QuantizedLinear& problem) { return is_few(problem) ? tasks_per_thread_by_token(problem) : 1; },
    [](const QuantizedLinear& problem, const void* prepared, int64_t first, int64_t last) {
      (is_few(problem) ? run_by_token<Kind> : run_by_panel<Kind>)(problem, prepared, first, last);
    },
};

}  // namespace
}  // namespace compressed_format
