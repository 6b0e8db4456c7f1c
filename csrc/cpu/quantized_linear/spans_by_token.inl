// The products of spans.inl, token by token, for instruction sets that take all problems so. Int8 and Float8 are those
// of quantized_linear.inl.

#include "cpu/quantized_linear/spans.inl"
#include "cpu/scratch.h"

namespace compressed_format {
namespace {

// `count` packed codes from a multiple of eight columns on, as two's complement.
inline void unpack(const char* row, int bits, int64_t begin, int64_t count, int8_t* target) {
  const char* from = row + begin * bits / 8;
  const int32_t half = 1 << (bits - 1);
  const uint64_t mask = (1u << bits) - 1u;
  for (int64_t i = 0; i < count; i += 8) {
    const int64_t part = smaller(8, count - i);
    uint64_t window = 0;
    __builtin_memcpy(&window, from, size(ceil_div(part * bits, 8)));
    for (int64_t k = 0; k < part; ++k) {
      target[i + k] = static_cast<int8_t>(static_cast<int32_t>(window >> (k * bits) & mask) - half);
    }
    from += bits;
  }
}

// The last codes of a token are read by whole vectors.
inline int64_t stride_of_spans(const QuantizedLinear& problem) { return padded(problem.weight->columns) + 64; }

// The prepared x: what the codes of each token stand for, span by span, then the codes.
inline size_t span_scales_bytes(const QuantizedLinear& problem) {
  return size(problem.activations->tokens * spans_of(problem)) * sizeof(TokenScale);
}

template <typename Kind>
size_t bytes_of_spans(const QuantizedLinear& problem) {
  return span_scales_bytes(problem) + size(problem.activations->tokens * stride_of_spans(problem) * Kind::code_bytes);
}

template <typename Kind>
void prepare_spans(const QuantizedLinear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  const Activations& activations = *problem.activations;
  const int64_t stride = stride_of_spans(problem), spans = spans_of(problem), groups = groups_of(activations);
  auto* const scales = static_cast<TokenScale*>(prepared);
  char* const codes = static_cast<char*>(prepared) + span_scales_bytes(problem);
  auto* const given = static_cast<TokenScale*>(scratch(Scratch::for_this_thread, size(groups) * sizeof(TokenScale)));
  for (int64_t token = first_part * 16; token < smaller(last_part * 16, activations.tokens); ++token) {
    char* const row = codes + token * stride * Kind::code_bytes;
    problem.quantize->codes(activations, &problem.whole, row, stride, given, token, token + 1);
    __builtin_memset(row + activations.columns * Kind::code_bytes, 0,
                     size((stride - activations.columns) * Kind::code_bytes));
    for (int64_t span = 0; span < spans; ++span) {
      TokenScale& scale = scales[token * spans + span];
      const int64_t count = columns_of_span(problem, span);
      scale = scale_of_span(problem, given, span);
      const int32_t sum = Kind::sum_of_row(row + span * problem.span * Kind::code_bytes, count);
      scale.sum = sum - scale.zero_point * static_cast<int32_t>(count);
    }
  }
}

// What all tokens need to know of a span of four rows.
struct SpanOfRows {
  const char* rows[rows_at_once];
  float scale[rows_at_once];
  int32_t zero_point[rows_at_once];
  int32_t sum[rows_at_once];
};

template <typename Kind, int M>
void add_span(const SpanOfRows& given, int64_t columns, const char* x, int64_t x_stride, const TokenScale* scales,
              int64_t scales_stride, float* totals) {
  typename Kind::Sum sums[M * rows_of_task];
  Kind::template dots<M>(given.rows, columns, x, x_stride, sums);
  for (int token = 0; token < M; ++token) {
    const TokenScale& scale = scales[token * scales_stride];
    for (int64_t row = 0; row < rows_at_once; ++row) {
      auto sum = sums[token * rows_of_task + row];
      if constexpr (Kind::code_bytes == 1) sum -= scale.zero_point * given.sum[row] + given.zero_point[row] * scale.sum;
      totals[token * rows_of_task + row] += static_cast<float>(sum) * scale.scale * given.scale[row];
    }
  }
}

template <typename Kind>
void run_spans(const QuantizedLinear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  const Weight& weight = *problem.weight;
  const Activations& activations = *problem.activations;
  const int64_t stride = stride_of_spans(problem) * Kind::code_bytes, spans = spans_of(problem);
  const auto* const scales = static_cast<const TokenScale*>(prepared);
  const char* const x = static_cast<const char*>(prepared) + span_scales_bytes(problem);
  const bool packed = weight.type == Codes::packed, sums = needs_sums_of_codes(problem);
  // Sums of tokens, scales and zero points of four rows, codes of a span of them.
  const int64_t totals_count = activations.tokens * rows_of_task, scales_count = rows_at_once * spans;
  auto* const totals = static_cast<float*>(
      scratch(Scratch::for_this_thread, size(totals_count + 2 * scales_count) * 4 + rows_at_once * most_span_bytes));
  float* const row_scales = totals + totals_count;
  auto* const zero_points = reinterpret_cast<int32_t*>(row_scales + scales_count);
  auto* const unpacked = reinterpret_cast<int8_t*>(zero_points + scales_count);
  for (int64_t task = first_task; task < last_task; ++task) {
    const int64_t first = task * rows_of_task, count = smaller(rows_of_task, weight.rows - first);
    __builtin_memset(totals, 0, size(totals_count) * 4);
    for (int64_t row = 0; row < count; row += rows_at_once) {
      for (int64_t r = 0; r < rows_at_once; ++r) {
        take_row(problem, first + smaller(row + r, count - 1), 0, row_scales + r * spans, zero_points + r * spans);
      }
      for (int64_t span = 0; span < spans; ++span) {
        const int64_t columns = columns_of_span(problem, span), begin = span * problem.span;
        SpanOfRows given;
        for (int64_t r = 0; r < rows_at_once; ++r) {
          const char* const codes = row_of(weight, first + smaller(row + r, count - 1));
          given.rows[r] = codes + begin;
          if (packed) {
            unpack(codes, weight.bits, begin, columns, unpacked + r * most_span_bytes);
            given.rows[r] = reinterpret_cast<const char*>(unpacked + r * most_span_bytes);
          }
          given.scale[r] = row_scales[r * spans + span];
          given.zero_point[r] = zero_points[r * spans + span];
          given.sum[r] = sums ? Kind::sum_of_row(given.rows[r], columns) : 0;
        }
        for (int64_t token = 0; token < activations.tokens; token += tokens_at_once) {
          const char* const at = x + token * stride + begin * Kind::code_bytes;
          const TokenScale* const of_token = scales + token * spans + span;
          float* const into = totals + token * rows_of_task + row;
          switch (smaller(tokens_at_once, activations.tokens - token)) {
            case 1: add_span<Kind, 1>(given, columns, at, stride, of_token, spans, into); break;
            case 2: add_span<Kind, 2>(given, columns, at, stride, of_token, spans, into); break;
            case 3: add_span<Kind, 3>(given, columns, at, stride, of_token, spans, into); break;
            default: add_span<Kind, 4>(given, columns, at, stride, of_token, spans, into);
          }
        }
      }
    }
    for (int64_t token = 0; token < activations.tokens; ++token) {
      finish_spans(problem, first, count, totals + token * rows_of_task, token);
    }
  }
}

}  // namespace
}  // namespace compressed_format
