// The products of spans.inl with 512-bit vectors: lanes along the columns for few tokens, tokens as lanes for many, as
// in avx512.cpp, which includes this. Codes of integers are unsigned here: packed ones as they are stored, bytes with
// 128 added, both of which a zero point takes off again.

#include "cpu/quantized_linear/spans.inl"

namespace compressed_format {
namespace {

struct IntegerSums {
  using Kind = Int8;
  using Vector = __m512i;
  using Operand = __m512i;

  static Vector first_sum(const void* x_sums, int32_t zero_point) {
    return _mm512_mullo_epi32(_mm512_loadu_si512(x_sums), _mm512_set1_epi32(-zero_point));
  }
  static Operand operand(__m512i codes) { return codes; }
  static Vector add_product(Vector sum, const char* x, Operand codes) {
    return add_products(sum, codes, _mm512_loadu_si512(x));
  }
  static void store(char* target, __m512i codes) { _mm512_storeu_si512(target, codes); }
  static __m512i add_codes(__m512i sum, __m512i codes) { return add_products(sum, codes, _mm512_set1_epi8(1)); }
  static Vector less(Vector sum, __m512i zero_points, __m512i of_codes) {
    return _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero_points, of_codes));
  }
  static __m512 numbers(Vector sum) { return _mm512_cvtepi32_ps(sum); }
};

struct FloatSums {
  using Kind = Float8;
  using Vector = __m512;
  using Operand = Float8::Pair;

  static Vector first_sum(const void*, int32_t) { return _mm512_setzero_ps(); }
  static Operand operand(__m512i codes) { return Float8::decode_by_quarters(codes); }
  static Vector add_product(Vector sum, const char* x, Operand codes) {
    return Float8::add_product(Float8::add_product(sum, x, codes.first), x + 64, codes.second);
  }
  static void store(char* target, __m512i codes) {
    const Operand values = Float8::decode(codes);
    _mm512_storeu_si512(target, values.first);
    _mm512_storeu_si512(target + 64, values.second);
  }
  static __m512i add_codes(__m512i sum, __m512i) { return sum; }
  static Vector less(Vector sum, __m512i, __m512i) { return sum; }
  static __m512 numbers(Vector sum) { return sum; }
};

inline __mmask64 first_bytes(int64_t count) { return _bzhi_u64(~0ull, static_cast<unsigned>(count)); }

// Readers of codes: 64 of a row from a column on, or as many as there are and zeros.
struct Int8Codes {
  using Sums = IntegerSums;
  static constexpr int32_t offset = 128;
  static constexpr int bits = 8;

  explicit Int8Codes(const Weight&) {}
  __m512i operator()(const char* at) const { return Int8::raised(_mm512_loadu_si512(at)); }
  __m512i operator()(const char* at, int64_t count) const {
    const __mmask64 there = first_bytes(count);
    return _mm512_maskz_mov_epi8(there, Int8::raised(_mm512_maskz_loadu_epi8(there, at)));
  }
};

struct Float8Codes {
  using Sums = FloatSums;
  static constexpr int32_t offset = 0;
  static constexpr int bits = 8;

  explicit Float8Codes(const Weight&) {}
  __m512i operator()(const char* at) const { return _mm512_loadu_si512(at); }
  __m512i operator()(const char* at, int64_t count) const { return _mm512_maskz_loadu_epi8(first_bytes(count), at); }
};

struct PackedCodes {
  using Sums = IntegerSums;
  int32_t offset;
  int bits;
  __m512i places, shifts, code;

  // Eight codes take as many bytes as a code has bits. Those go into the eight bytes of a lane; then each byte picks
  // the bits of its code.
  explicit PackedCodes(const Weight& weight) : offset(1 << (weight.bits - 1)), bits(weight.bits) {
    alignas(64) unsigned char place[64], shift[64];
    for (int i = 0; i < 64; ++i) {
      place[i] = static_cast<unsigned char>((i / 8 * bits + i % 8) & 63);
      shift[i] = static_cast<unsigned char>(i % 8 * bits);
    }
    places = _mm512_load_si512(place);
    shifts = _mm512_load_si512(shift);
    code = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
  }
  __m512i spread(__m512i bytes) const {
    return _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(places, bytes));
  }
  __m512i operator()(const char* at) const {
    return _mm512_and_si512(spread(_mm512_maskz_loadu_epi8(first_bytes(8 * bits), at)), code);
  }
  __m512i operator()(const char* at, int64_t count) const {
    const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(ceil_div(count * bits, 8)), at);
    return _mm512_and_si512(spread(bytes), _mm512_maskz_mov_epi8(first_bytes(count), code));
  }
};

// Few tokens. The prepared x: for each span and token its scale and zero point; for each its sums of codes less the
// zero point, by lane; then the codes, span by span, filled up with zeros to whole vectors.
struct FewTokens {
  int64_t spans, tokens, span_bytes, token_bytes;
  size_t sums_begin, codes_begin, bytes;

  FewTokens(const QuantizedLinear& problem, int64_t code_bytes)
      : spans(spans_of(problem)), tokens(problem.activations->tokens), span_bytes(padded(problem.span) * code_bytes) {
    token_bytes = spans * span_bytes;
    sums_begin = size(ceil_div(spans * tokens * 8, 64) * 64);
    codes_begin = sums_begin + size(spans * tokens * 64);
    bytes = codes_begin + size(tokens * token_bytes);
  }
};

// The sum of codes less the zero point, of each lane of four.
inline __m512i sums_of_lanes(const char* codes, int64_t count, int32_t zero_point) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i sum = _mm512_setzero_si512(), places = sum;
  for (int64_t i = 0; i < count; i += 64) {
    const __m512i there = _mm512_maskz_mov_epi8(first_bytes(smaller(64, count - i)), ones);
    sum = add_products(sum, there, _mm512_loadu_si512(codes + i));
    places = add_products(places, there, ones);
  }
  return _mm512_sub_epi32(sum, _mm512_mullo_epi32(places, _mm512_set1_epi32(zero_point)));
}

template <typename Reader>
void prepare_few(const QuantizedLinear& problem, void* prepared) {
  using Kind = typename Reader::Sums::Kind;
  const Activations& activations = *problem.activations;
  const FewTokens places(problem, Kind::code_bytes);
  auto* const memory = static_cast<char*>(prepared);
  auto* const scales = reinterpret_cast<float*>(memory);
  auto* const zero_points = reinterpret_cast<int32_t*>(scales + places.spans * places.tokens);
  const int64_t stored = groups_of(activations) * static_cast<int64_t>(sizeof(TokenScale));
  const size_t scales_bytes = size(ceil_div(stored, 64) * 64);
  auto* const given = static_cast<TokenScale*>(
      scratch(Scratch::for_this_thread, scales_bytes + size(activations.columns * Kind::code_bytes)));
  char* const row = reinterpret_cast<char*>(given) + scales_bytes;
  for (int64_t token = 0; token < places.tokens; ++token) {
    problem.quantize->codes(activations, &problem.whole, row, activations.columns, given, token, token + 1);
    for (int64_t span = 0; span < places.spans; ++span) {
      const TokenScale& scale = scale_of_span(problem, given, span);
      const int64_t index = span * places.tokens + token, count = columns_of_span(problem, span);
      scales[index] = scale.scale;
      zero_points[index] = scale.zero_point;
      char* const codes = memory + places.codes_begin + token * places.token_bytes + span * places.span_bytes;
      __builtin_memcpy(codes, row + span * problem.span * Kind::code_bytes, size(count * Kind::code_bytes));
      __builtin_memset(codes + count * Kind::code_bytes, 0, size(places.span_bytes - count * Kind::code_bytes));
      if constexpr (Kind::code_bytes == 1) {
        _mm512_storeu_si512(memory + places.sums_begin + index * 64, sums_of_lanes(codes, count, scale.zero_point));
      } else {
        for (int64_t i = 0; i < places.span_bytes; i += 128) Float8::order_by_quarters(codes + i);
      }
    }
  }
}

// Sums of R rows and M tokens, scaled, at sums[token * rows_of_task + row].
template <typename Reader, int R, int M, bool with_sums_of_codes>
void dots_of_spans(const QuantizedLinear& problem, const Reader& read, const char* prepared, const char* const* rows,
                   const float* scales, const int32_t* zero_points, float* sums) {
  using Sums = typename Reader::Sums;
  const FewTokens places(problem, Sums::Kind::code_bytes);
  const auto* const x_scales = reinterpret_cast<const float*>(prepared);
  const auto* const x_zeros = reinterpret_cast<const int32_t*>(x_scales + places.spans * places.tokens);
  const int64_t row_bytes = problem.weight->row_bytes, vector_bytes = 8 * read.bits;
  // The rows that come next, where they are near: the processor fetches ahead within a page only.
  // A single row is followed by the next: a page ahead is what the processor does not fetch by itself.
  const int64_t ahead = R == 1 ? 4096 : R * row_bytes <= 16384 ? R * row_bytes : 2048;
  __m512 total[R][M];
  for (auto& of_row : total) {
    for (__m512& value : of_row) value = _mm512_setzero_ps();
  }
  for (int64_t span = 0; span < places.spans; ++span) {
    const int64_t count = columns_of_span(problem, span), begin = span * problem.span * read.bits / 8;
    const char* const x = prepared + places.codes_begin + span * places.span_bytes;
    const char* const x_sums = prepared + places.sums_begin + span * places.tokens * 64;
    typename Sums::Vector sum[R][M];
    __m512i of_codes[R];
#pragma GCC unroll 4
    for (int row = 0; row < R; ++row) {
      of_codes[row] = _mm512_setzero_si512();
      for (int token = 0; token < M; ++token) {
        sum[row][token] = Sums::first_sum(x_sums + token * 64, zero_points[row * places.spans + span]);
      }
    }
    const auto add = [&](int row, __m512i codes, int64_t column) __attribute__((always_inline)) {
      if constexpr (with_sums_of_codes) of_codes[row] = Sums::add_codes(of_codes[row], codes);
      const typename Sums::Operand operand = Sums::operand(codes);
      for (int token = 0; token < M; ++token) {
        const char* const at = x + token * places.token_bytes + column * Sums::Kind::code_bytes;
        sum[row][token] = Sums::add_product(sum[row][token], at, operand);
      }
    };
    int64_t column = 0, at = begin;
    for (; column + 64 <= count; column += 64, at += vector_bytes) {
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        _mm_prefetch(rows[row] + at + ahead, _MM_HINT_T0);
        add(row, read(rows[row] + at), column);
      }
    }
    if (column < count) {
#pragma GCC unroll 4
      for (int row = 0; row < R; ++row) {
        _mm_prefetch(rows[row] + at + ahead, _MM_HINT_T0);
        add(row, read(rows[row] + at, count - column), column);
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < R; ++row) {
      const __m512 scale = _mm512_set1_ps(scales[row * places.spans + span]);
      for (int token = 0; token < M; ++token) {
        const int64_t index = span * places.tokens + token;
        if constexpr (with_sums_of_codes) {
          sum[row][token] = Sums::less(sum[row][token], _mm512_set1_epi32(x_zeros[index]), of_codes[row]);
        }
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[index]));
        total[row][token] = _mm512_fmadd_ps(Sums::numbers(sum[row][token]), both, total[row][token]);
      }
    }
  }
  for (int token = 0; token < M; ++token) {
    for (int row = 0; row < R; ++row) sums[token * rows_of_task + row] = _mm512_reduce_add_ps(total[row][token]);
  }
}

template <typename Reader, int R, int M>
void dots_of_task(const QuantizedLinear& problem, const Reader& read, const char* prepared, const char* const* rows,
                  const float* scales, const int32_t* zero_points, float* sums) {
  const int64_t spans = spans_of(problem);
  for (int64_t row = 0; row < rows_of_task; row += R) {
    const bool summed = needs_sums_of_codes(problem);
    const auto dots = summed ? dots_of_spans<Reader, R, M, true> : dots_of_spans<Reader, R, M, false>;
    dots(problem, read, prepared, rows + row, scales + row * spans, zero_points + row * spans, sums + row);
  }
}

template <typename Reader>
void run_few(const QuantizedLinear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  const Weight& weight = *problem.weight;
  const int64_t spans = spans_of(problem), tokens = problem.activations->tokens;
  const auto* const x = static_cast<const char*>(prepared);
  const Reader read(weight);
  auto* const scales = static_cast<float*>(scratch(Scratch::for_this_thread, size(rows_of_task * spans * 8)));
  auto* const zero_points = reinterpret_cast<int32_t*>(scales + rows_of_task * spans);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t first = task * rows_of_task, count = smaller(rows_of_task, weight.rows - first);
    const char* rows[rows_of_task];
    for (int64_t i = 0; i < rows_of_task; ++i) {
      // Where there are fewer rows, the last is taken again, into sums that nobody reads.
      const int64_t row = first + smaller(i, count - 1);
      rows[i] = row_of(weight, row);
      take_row(problem, row, read.offset, scales + i * spans, zero_points + i * spans);
    }
    float sums[few_tokens][rows_of_task];
    // E4M3 is bound by memory, which is read faster row by row; integers by their scales, where rows share loads of x.
    constexpr int rows_of_one = Reader::Sums::Kind::decodes ? 1 : 4;
    switch (tokens) {
      case 1: dots_of_task<Reader, rows_of_one, 1>(problem, read, x, rows, scales, zero_points, sums[0]); break;
      case 2: dots_of_task<Reader, 4, 2>(problem, read, x, rows, scales, zero_points, sums[0]); break;
      case 3: dots_of_task<Reader, 2, 3>(problem, read, x, rows, scales, zero_points, sums[0]); break;
      default: dots_of_task<Reader, 2, 4>(problem, read, x, rows, scales, zero_points, sums[0]);
    }
    for (int64_t token = 0; token < tokens; ++token) finish_spans(problem, first, count, sums[token], token);
  }
}

// Many tokens. What the codes of a panel stand for in a span; the sums are of codes less the zero point.
struct PanelSpan {
  float scale[panel_tokens];
  int32_t zero_point[panel_tokens];
  int32_t sum[panel_tokens];
};

inline size_t panel_spans_bytes(const QuantizedLinear& problem) {
  return size(ceil_div(problem.activations->tokens, panel_tokens) * spans_of(problem)) * sizeof(PanelSpan);
}

template <typename Reader>
void prepare_many(const QuantizedLinear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  using Kind = typename Reader::Sums::Kind;
  const Activations& activations = *problem.activations;
  const int64_t row_bytes = padded(activations.columns) * Kind::code_bytes, steps = steps_of<Kind>(activations);
  const int64_t spans = spans_of(problem), groups = groups_of(activations);
  const int64_t span_steps = problem.span * Kind::code_bytes / 4;
  auto* const rows = static_cast<char*>(scratch(
      Scratch::for_this_thread, size(panel_tokens * (row_bytes + groups * static_cast<int64_t>(sizeof(TokenScale))))));
  auto* const given = reinterpret_cast<TokenScale*>(rows + panel_tokens * row_bytes);
  for (int64_t panel = first_part; panel < last_part; ++panel) {
    const int64_t first = panel * panel_tokens, last = smaller(first + panel_tokens, activations.tokens);
    __builtin_memset(rows, 0, size(panel_tokens * row_bytes));
    problem.quantize->codes(activations, &problem.whole, rows, row_bytes / Kind::code_bytes, given, first, last);
    const int64_t stride = panels_of_group(activations, panel / group_panels) * 64;
    char* const target = static_cast<char*>(prepared) + panel_spans_bytes(problem) + panel_offset(panel, steps);
    lay_out_panel(rows, row_bytes, steps, target, stride);
    auto* const of_panel = static_cast<PanelSpan*>(prepared) + panel * spans;
    for (int64_t span = 0; span < spans; ++span) {
      PanelSpan& of_span = of_panel[span];
      __builtin_memset(&of_span, 0, sizeof of_span);
      for (int64_t i = 0; i < last - first; ++i) {
        const TokenScale& scale = scale_of_span(problem, given + i * groups, span);
        of_span.scale[i] = scale.scale;
        of_span.zero_point[i] = scale.zero_point;
      }
      if constexpr (Kind::code_bytes == 1) {
        const __m512i count = _mm512_set1_epi32(-static_cast<int>(columns_of_span(problem, span)));
        __m512i sum = _mm512_mullo_epi32(_mm512_loadu_si512(of_span.zero_point), count);
        const int64_t end = span + 1 < spans ? (span + 1) * span_steps : steps;  // the last may end within a step
        for (int64_t step = span * span_steps; step < end; ++step) {
          sum = add_products(sum, _mm512_set1_epi8(1), _mm512_loadu_si512(target + step * stride));
        }
        _mm512_storeu_si512(of_span.sum, sum);
      }
    }
  }
}

// Rows of a task in the columns of a block, decoded, and what their codes stand for in each span of all columns.
struct DecodedRows {
  const char* codes;
  const float* scale;
  const int32_t* zero_point;
  const int32_t* sum;
  int64_t spans;
};

// R rows times P panels in a span, scaled, added to the totals.
template <typename Sums, int R, int P, bool with_sums_of_codes>
void multiply_span(const char* x, const PanelSpan* of_x, const DecodedRows& rows, int64_t steps, float* totals) {
  typename Sums::Vector total[R][P];
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row) {
    for (int panel = 0; panel < P; ++panel) {
      total[row][panel] = Sums::first_sum(of_x[panel * rows.spans].sum, rows.zero_point[row * rows.spans]);
    }
  }
  const char* at[R];
  for (int row = 0; row < R; ++row) at[row] = rows.codes + row * decoded_stride;
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 8
    for (int row = 0; row < R; ++row) {
      int32_t four;
      __builtin_memcpy(&four, at[row] + step * 4, sizeof four);
      const __m512i codes = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int panel = 0; panel < P; ++panel) {
        total[row][panel] = Sums::Kind::add_product(total[row][panel], x + panel * 64, codes);
      }
    }
    x += P * 64;
  }
#pragma GCC unroll 8
  for (int row = 0; row < R; ++row) {
    const __m512 scale = _mm512_set1_ps(rows.scale[row * rows.spans]);
    for (int panel = 0; panel < P; ++panel) {
      const PanelSpan& span = of_x[panel * rows.spans];
      if constexpr (with_sums_of_codes) {
        const __m512i of_codes = _mm512_set1_epi32(rows.sum[row * rows.spans]);
        total[row][panel] = Sums::less(total[row][panel], _mm512_loadu_si512(span.zero_point), of_codes);
      }
      const __m512 both = _mm512_mul_ps(scale, _mm512_loadu_ps(span.scale));
      float* const into = totals + row * chunk_tokens + panel * panel_tokens;
      _mm512_storeu_ps(into, _mm512_fmadd_ps(Sums::numbers(total[row][panel]), both, _mm512_loadu_ps(into)));
    }
  }
}

template <typename Sums, int P>
void multiply_span_of_rows(const char* x, const PanelSpan* of_x, DecodedRows rows, int64_t count, int64_t steps,
                           bool with_sums_of_codes, float* totals) {
  constexpr int64_t R = rows_with(P);
  const auto multiply = with_sums_of_codes ? multiply_span<Sums, R, P, true> : multiply_span<Sums, R, P, false>;
  for (int64_t row = 0; row < count; row += R) {
    multiply(x, of_x, rows, steps, totals);
    rows.codes += R * decoded_stride;
    rows.scale += R * rows.spans;
    rows.zero_point += R * rows.spans;
    rows.sum += R * rows.spans;
    totals += R * chunk_tokens;
  }
}

// Columns [begin, begin + count) of a row, decoded, with zeros up to the next multiple of 64; the sum of their codes.
template <typename Reader>
int32_t decode_columns(const Reader& read, const char* row, int64_t begin, int64_t count, char* target) {
  using Sums = typename Reader::Sums;
  __m512i sum = _mm512_setzero_si512();
  const char* at = row + begin * read.bits / 8;
  for (int64_t i = 0; i < count; i += 64, at += 8 * read.bits) {
    const __m512i codes = count - i >= 64 ? read(at) : read(at, count - i);
    sum = Sums::add_codes(sum, codes);
    Sums::store(target + i * Sums::Kind::code_bytes, codes);
  }
  return _mm512_reduce_add_epi32(sum);
}

template <typename Reader>
void run_many(const QuantizedLinear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  using Sums = typename Reader::Sums;
  constexpr int64_t code_bytes = Sums::Kind::code_bytes, rows_of_memory = rows_of_panels + 8;
  const Weight& weight = *problem.weight;
  const Activations& activations = *problem.activations;
  const int64_t spans = spans_of(problem), span_steps = problem.span * code_bytes / 4;
  const int64_t all_steps = steps_of<typename Sums::Kind>(activations);
  const int64_t spans_of_block = most_span_bytes / (problem.span * code_bytes);
  const int64_t row_tasks = ceil_div(weight.rows, rows_of_panels);
  const bool with_sums = needs_sums_of_codes(problem);
  const auto* const x_spans = static_cast<const PanelSpan*>(prepared);
  const char* const x = static_cast<const char*>(prepared) + panel_spans_bytes(problem);
  const Reader read(weight);
  // Totals, decoded codes, then scales, zero points and sums of codes.
  constexpr int64_t totals_bytes = rows_of_memory * chunk_tokens * 4;
  constexpr int64_t decoded_bytes = rows_of_memory * decoded_stride + 128;
  auto* const memory = static_cast<char*>(
      scratch(Scratch::for_this_thread, size(totals_bytes + decoded_bytes + rows_of_memory * spans * 12)));
  auto* const totals = reinterpret_cast<float*>(memory);
  char* const decoded = memory + totals_bytes;
  auto* const scales = reinterpret_cast<float*>(decoded + decoded_bytes);
  auto* const zero_points = reinterpret_cast<int32_t*>(scales + rows_of_memory * spans);
  auto* const sums = zero_points + rows_of_memory * spans;
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t chunk = task / row_tasks;  // tasks that follow each other read the same x
    const int64_t first = task % row_tasks * rows_of_panels, count = smaller(rows_of_panels, weight.rows - first);
    const int64_t first_token = chunk * chunk_tokens, tokens = smaller(chunk_tokens, activations.tokens - first_token);
    const int64_t first_group = first_token / group_tokens, groups = ceil_div(tokens, group_tokens);
    for (int64_t i = 0; i < rows_of_memory; ++i) {
      take_row(problem, first + smaller(i, count - 1), read.offset, scales + i * spans, zero_points + i * spans);
    }
    __builtin_memset(totals, 0, size(totals_bytes));
    for (int64_t block = 0; block < spans; block += spans_of_block) {
      const int64_t end = smaller(block + spans_of_block, spans), begin = block * problem.span;
      const int64_t columns = smaller(end * problem.span, weight.columns) - begin;
      const int64_t piece = with_sums ? problem.span : columns;
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t column = 0; column < columns; column += piece) {
          sums[i * spans + block + column / piece] =
              decode_columns(read, row_of(weight, first + i), begin + column, smaller(piece, columns - column),
                             decoded + i * decoded_stride + column * code_bytes);
        }
      }
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t panels = panels_of_group(activations, first_group + group);
        const char* const of_group = x + (first_group + group) * group_panels * all_steps * 64;
        const PanelSpan* const spans_of_group = x_spans + (first_group + group) * group_panels * spans;
        for (int64_t span = block; span < end; ++span) {
          const int64_t step = span * span_steps;
          const int64_t steps = span + 1 < spans ? span_steps : all_steps - step;
          const char* const at = of_group + step * panels * 64;
          const DecodedRows rows = {decoded + (span - block) * problem.span * code_bytes, scales + span,
                                    zero_points + span, sums + span, spans};
          const PanelSpan* const of_x = spans_of_group + span;
          float* const into = totals + group * group_tokens;
          switch (panels) {
            case 1: multiply_span_of_rows<Sums, 1>(at, of_x, rows, count, steps, with_sums, into); break;
            case 2: multiply_span_of_rows<Sums, 2>(at, of_x, rows, count, steps, with_sums, into); break;
            case 3: multiply_span_of_rows<Sums, 3>(at, of_x, rows, count, steps, with_sums, into); break;
            default: multiply_span_of_rows<Sums, 4>(at, of_x, rows, count, steps, with_sums, into);
          }
        }
      }
    }
    for (int64_t row = 0; row < count; row += rows_of_task) {
      for (int64_t token = 0; token < tokens; token += panel_tokens) {
        alignas(64) float by_token[panel_tokens][rows_of_task];
        transpose(totals + row * chunk_tokens + token, chunk_tokens * 4, by_token, rows_of_task * 4);
        for (int64_t i = 0; i < smaller(panel_tokens, tokens - token); ++i) {
          finish_spans(problem, first + row, smaller(rows_of_task, count - row), by_token[i], first_token + token + i);
        }
      }
    }
  }
}

template <typename Reader>
constexpr QuantizedLinearKernel of_spans = {
    [](const QuantizedLinear& problem) {
      constexpr int64_t code_bytes = Reader::Sums::Kind::code_bytes;
      if (is_few(problem)) return FewTokens(problem, code_bytes).bytes;
      const int64_t panels = ceil_div(problem.activations->tokens, panel_tokens);
      return panel_spans_bytes(problem) +
             size(panels * steps_of<typename Reader::Sums::Kind>(*problem.activations) * 64);
    },
    parts_by_token,
    [](const QuantizedLinear& problem, void* prepared, int64_t first, int64_t last) {
      is_few(problem) ? prepare_few<Reader>(problem, prepared) : prepare_many<Reader>(problem, prepared, first, last);
    },
    [](const QuantizedLinear& problem) { return is_few(problem) ? tasks_by_token(problem) : tasks_by_panel(problem); },
    [](const QuantizedLinear& problem) { return is_few(problem) ? tasks_per_thread_by_token(problem) : 1; },
    [](const QuantizedLinear& problem, const void* prepared, int64_t first, int64_t last) {
      (is_few(problem) ? run_few<Reader> : run_many<Reader>)(problem, prepared, first, last);
    },
};

}  // namespace
}  // namespace compressed_format
