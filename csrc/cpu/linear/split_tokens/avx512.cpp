// y = x @ dense(weight).T for few tokens of 16-bit floats and integer codes, with AVX-512 VNNI: codes are multiplied as
// the integers they are, and are not decoded beyond bytes. How is said in split_codes.inl.

#include "cpu/linear/split_codes.inl"
#include "cpu/scratch.h"

namespace compressed_format {
namespace {

// More of them are taken by split_panels, which unpacks codes once for all tokens.
constexpr int64_t most_tokens = 4;
// A task; the x of a pass over it is read from the first level of the cache.
constexpr int64_t task_rows = 16;
constexpr int64_t pass_bytes = 32 * 1024;
constexpr int64_t least_pass_blocks = 8;
// So many products of a pass have a scale of their own, at most: pass_bytes over a block's bytes, or the least blocks.
constexpr int64_t most_pass_scales = 256;
constexpr int most_segments = 4;
// Less than this much weight is read faster than another thread wakes up; likewise x of fewer columns is split faster.
constexpr int64_t bytes_per_thread = 64 * 1024;
constexpr int64_t columns_of_parts = 64 * 1024;
// Codes are prefetched this far ahead, which is in the next rows where rows are short.
constexpr int64_t ahead = 8192;

Kind kind_of(const Weight& weight) {
  const bool small = weight.scale_columns > 1 && weight.block_columns % 128 != 0;
  if (weight.type == Codes::int8 || weight.bits == 8) return small ? Kind::small_bytes : Kind::bytes;
  switch (weight.bits) {
    case 1: return Kind::ones;
    case 2: return Kind::pairs;
    case 4: return Kind::nibbles;
    default: return small ? Kind::small_windows : Kind::windows;
  }
}

__mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(_bzhi_u32(0xffffu, static_cast<unsigned>(count)));
}

// How a problem is cut, and where prepared memory has what: the bytes of x, [blocks][tokens][high or low][vectors][64];
// the scales of its blocks, [tokens][blocks]; its sums over segments, [tokens][segments]. A segment is what of a block
// lies in one group. Both numbers are padded to whole vectors.
struct Plan {
  int64_t vectors, columns, blocks, padded_blocks;
  int64_t segment_columns, segments_of_block, padded_segments;
  int64_t block_bytes;  // of codes
  int64_t token_bytes;  // of x, in a block
  int64_t scales_offset, sums_offset, bytes;

  explicit Plan(const Linear& problem) {
    const Weight& weight = *problem.weight;
    vectors = vectors_of(kind_of(weight));
    columns = 64 * vectors;
    blocks = ceil_div(weight.columns, columns);
    padded_blocks = ceil_div(blocks, 16) * 16;
    segment_columns = weight.scale_columns == 1 ? columns : smaller(weight.block_columns, columns);
    segments_of_block = columns / segment_columns;
    padded_segments = padded_blocks * segments_of_block;
    block_bytes = columns / 8 * bits_of_codes(weight);
    token_bytes = 2 * columns;
    scales_offset = blocks * problem.tokens * token_bytes;
    sums_offset = scales_offset + problem.tokens * padded_blocks * 4;
    bytes = sums_offset + problem.tokens * padded_segments * 4;
  }
};

bool takes(const Linear& problem) {
  const Weight& weight = *problem.weight;
  if (weight.type != Codes::packed && weight.type != Codes::int8) return false;
  if (weight.scale == nullptr || weight.bitmask != nullptr || weight.g_idx != nullptr) return false;
  if (problem.x_type == Float::float32 || problem.tokens > most_tokens || weight.columns == 0) return false;
  const int64_t group = weight.block_columns;
  return weight.scale_columns == 1 || group == 32 || group == 64 || group % (64 * vectors_of(kind_of(weight))) == 0;
}

size_t prepared_bytes(const Linear& problem) { return static_cast<size_t>(Plan(problem).bytes); }

int64_t parts(const Linear& problem) {
  return problem.tokens * problem.weight->columns > columns_of_parts ? problem.tokens : 1;
}

// Splits a token. Its scales and sums are written beyond the last block too, as zeros.
void prepare_token(const Linear& problem, const Plan& plan, char* prepared, int64_t token) {
  const Kind kind = kind_of(*problem.weight);
  const char* const x = static_cast<const char*>(problem.x) + token * problem.x_row_bytes;
  auto* const scales = reinterpret_cast<float*>(prepared + plan.scales_offset) + token * plan.padded_blocks;
  auto* const sums = reinterpret_cast<float*>(prepared + plan.sums_offset) + token * plan.padded_segments;
  alignas(64) uint8_t order[2][64];
  for (int vector = 0; vector < plan.vectors; ++vector) {
    for (int byte = 0; byte < 64; ++byte) order[vector][byte] = static_cast<uint8_t>(column_of(kind, vector, byte));
  }
  for (int64_t block = 0; block < plan.padded_blocks; ++block) {
    const int64_t first = block * plan.columns;
    Split parts;
    split(x, problem.x_type, first, problem.weight->columns - first, plan.columns, parts);
    scales[block] = parts.scale;
    const int64_t of_segment = plan.segment_columns / 16;
    for (int64_t segment = 0; segment < plan.segments_of_block; ++segment) {
      int32_t sum = 0;
      for (int64_t i = 0; i < of_segment; ++i) sum += parts.sums[segment * of_segment + i];
      sums[block * plan.segments_of_block + segment] = static_cast<float>(sum) * parts.scale;
    }
    if (block >= plan.blocks) continue;
    char* const target = prepared + (block * problem.tokens + token) * plan.token_bytes;
    for (int64_t vector = 0; vector < plan.vectors; ++vector) {
      const __m512i index = _mm512_load_si512(order[vector]);
      _mm512_store_si512(target + 64 * vector, _mm512_permutex2var_epi8(_mm512_load_si512(parts.high), index,
                                                                        _mm512_load_si512(parts.high + 64)));
      _mm512_store_si512(
          target + 64 * (plan.vectors + vector),
          _mm512_permutex2var_epi8(_mm512_load_si512(parts.low), index, _mm512_load_si512(parts.low + 64)));
    }
  }
}

void prepare(const Linear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  const Plan plan(problem);
  const bool all = parts(problem) == 1;
  for (int64_t token = all ? 0 : first_part; token < (all ? problem.tokens : last_part); ++token) {
    prepare_token(problem, plan, static_cast<char*>(prepared), token);
  }
}

// A truth that an argument carries as its type.
template <bool truth>
struct Truth {
  static constexpr bool value = truth;
};

struct Task {
  const Linear& problem;
  const Plan& plan;
  const char* prepared;
  float* totals;  // [task_rows][tokens][16], between passes
  int64_t first_row;
};

// Some rows times some tokens, over the blocks of a pass. A row's sums are made in the same order whatever it is
// computed with. Where blocks have several segments, each lane has the scale of its own.
template <Kind kind, bool segmented, int rows, int tokens>
void multiply(const Task& task, const Decoder<kind>& decode, int64_t row, int64_t token, int64_t first_block,
              int64_t last_block) {
  constexpr int vectors = vectors_of(kind);
  const Linear& problem = task.problem;
  const Plan& plan = task.plan;
  const Weight& weight = *problem.weight;
  const int64_t blocks = last_block - first_block;
  const int64_t first_segment = first_block * plan.segments_of_block;
  const int64_t segments = blocks * plan.segments_of_block;
  const auto* const x_scales =
      reinterpret_cast<const float*>(task.prepared + plan.scales_offset) + token * plan.padded_blocks + first_block;
  const auto* const x_sums =
      reinterpret_cast<const float*>(task.prepared + plan.sums_offset) + token * plan.padded_segments + first_segment;
  const bool first_pass = first_block == 0;

  // Scales of weights, by segment; or their products with those of x, by token and block.
  alignas(64) float scales[rows][segmented ? most_pass_scales * most_segments + 16 : most_pass_scales * 2 + 16];
  const int64_t scale_stride = ceil_div(blocks, 16) * 16;
  const char* codes[rows];
  __m512 total[rows][tokens];
#pragma GCC unroll 2
  for (int r = 0; r < rows; ++r) {
    codes[r] = static_cast<const char*>(weight.codes) + (row + r) * weight.row_bytes;
    const float* const totals = task.totals + ((row + r - task.first_row) * problem.tokens + token) * 16;
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) total[r][t] = first_pass ? _mm512_setzero_ps() : _mm512_load_ps(totals + 16 * t);
    const int64_t scale_row = (row + r) / weight.block_rows;
    for (int64_t segment = 0; segment < segments; segment += 16) {
      const __m512 scale = scales_at(weight, plan.segment_columns, scale_row, first_segment + segment);
      const __m512 offset = _mm512_mul_ps(
          scale, offsets_at(weight, plan.segment_columns, scale_row, first_segment + segment, segments - segment));
      if constexpr (segmented) _mm512_store_ps(scales[r] + segment, scale);
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        const __mmask16 lanes = first_lanes(smaller(16, segments - segment));
        const __m512 sums = _mm512_maskz_loadu_ps(lanes, x_sums + t * plan.padded_segments + segment);
        total[r][t] = _mm512_fnmadd_ps(offset, sums, total[r][t]);
        if constexpr (!segmented) {
          const __m512 x_scale = _mm512_maskz_loadu_ps(lanes, x_scales + t * plan.padded_blocks + segment);
          _mm512_store_ps(scales[r] + t * scale_stride + segment, _mm512_mul_ps(scale, x_scale));
        }
      }
    }
  }

  __m512i segment_of_lane = _mm512_setzero_si512();
  if constexpr (segmented) {
    alignas(64) int32_t of_lane[16];
    for (int lane = 0; lane < 16; ++lane) {
      of_lane[lane] = column_of(kind, 0, 4 * lane) / static_cast<int>(plan.segment_columns);
    }
    segment_of_lane = _mm512_load_si512(of_lane);
  }
  const char* x = task.prepared + (first_block * problem.tokens + token) * plan.token_bytes;
  const int64_t x_stride = problem.tokens * plan.token_bytes;
  constexpr int64_t token_bytes = 128 * vectors;

  const auto multiply_block = [&](auto whole, int64_t block) __attribute__((always_inline)) {
    const int64_t position = (first_block + block) * plan.block_bytes;
    const int64_t left =
        (weight.type == Codes::packed ? (weight.columns * weight.bits + 31) / 32 * 4 : weight.columns) - position;
    __m512i code[rows][2];
    __m512 scale[rows];
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      _mm_prefetch(codes[r] + position + ahead, _MM_HINT_T0);
      decode.template operator()<decltype(whole)::value>(codes[r] + position, left, code[r]);
      if constexpr (segmented) {
        scale[r] = _mm512_permutexvar_ps(segment_of_lane,
                                         _mm512_loadu_ps(scales[r] + block * plan.segments_of_block));
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) {
      __m512i sum[rows];
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) sum[r] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int part = 0; part < 2 * vectors; ++part) {
        __m512i bytes = _mm512_load_si512(x + t * token_bytes + 64 * part);
        // Loads are what there is least of: without this, the compiler makes one for each row.
        if constexpr (rows > 1) __asm__("" : "+v"(bytes));
#pragma GCC unroll 2
        for (int r = 0; r < rows; ++r) {
          if (part == vectors) sum[r] = _mm512_slli_epi32(sum[r], 8);
          sum[r] = _mm512_dpbusd_epi32(sum[r], code[r][part % vectors], bytes);
        }
      }
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) {
        const __m512 exact = _mm512_cvtepi32_ps(sum[r]);
        if constexpr (segmented) {
          const __m512 x_scale = _mm512_set1_ps(x_scales[t * plan.padded_blocks + block]);
          total[r][t] = _mm512_fmadd_ps(_mm512_mul_ps(exact, x_scale), scale[r], total[r][t]);
        } else {
          total[r][t] = _mm512_fmadd_ps(exact, _mm512_set1_ps(scales[r][t * scale_stride + block]), total[r][t]);
        }
      }
    }
    x += x_stride;
  };
  // Only the last block of a row may be short.
  const bool short_end = last_block == plan.blocks && weight.columns % plan.columns != 0;
  const int64_t whole_blocks = short_end ? blocks - 1 : blocks;
  for (int64_t block = 0; block < whole_blocks; ++block) multiply_block(Truth<true>{}, block);
  if (short_end) multiply_block(Truth<false>{}, blocks - 1);

  const bool last_pass = last_block == plan.blocks;
#pragma GCC unroll 2
  for (int r = 0; r < rows; ++r) {
    float* const totals = task.totals + ((row + r - task.first_row) * problem.tokens + token) * 16;
    const float bias = last_pass && problem.bias != nullptr ? load_float(problem.bias, problem.bias_type, row + r) : 0;
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) {
      if (last_pass) {
        store_float(problem.y, problem.x_type, (token + t) * weight.rows + row + r,
                    _mm512_reduce_add_ps(total[r][t]) + bias);
      } else {
        _mm512_store_ps(totals + 16 * t, total[r][t]);
      }
    }
  }
}

template <Kind kind, bool segmented, int tokens>
void multiply_rows(const Task& task, const Decoder<kind>& decode, int64_t last_row, int64_t token, int64_t first_block,
                   int64_t last_block) {
  int64_t row = task.first_row;
  // Rows share loads of x where several tokens are multiplied. With one, memory is read faster row by row.
  constexpr int rows = tokens > 1 ? 2 : 1;
  for (; row + rows <= last_row; row += rows) {
    multiply<kind, segmented, rows, tokens>(task, decode, row, token, first_block, last_block);
  }
  for (; row < last_row; ++row) {
    multiply<kind, segmented, 1, tokens>(task, decode, row, token, first_block, last_block);
  }
}

template <Kind kind, bool segmented>
void run_kind(const Linear& problem, const Plan& plan, const char* prepared, int64_t first_task, int64_t last_task) {
  const Decoder<kind> decode(*problem.weight);
  const int64_t tokens = problem.tokens;
  int64_t pass_blocks = pass_bytes / (tokens * plan.token_bytes);
  if (pass_blocks < least_pass_blocks) pass_blocks = least_pass_blocks;
  float* totals = nullptr;
  if (pass_blocks < plan.blocks) {
    totals = static_cast<float*>(scratch(Scratch::for_this_thread, static_cast<size_t>(task_rows * tokens * 64)));
  }
  for (int64_t number = first_task; number < last_task; ++number) {
    const Task task{problem, plan, prepared, totals, number * task_rows};
    const int64_t last_row = smaller(problem.weight->rows, task.first_row + task_rows);
    for (int64_t block = 0; block < plan.blocks; block += pass_blocks) {
      const int64_t last_block = smaller(plan.blocks, block + pass_blocks);
      int64_t token = 0;
      if (tokens == most_tokens) {
        multiply_rows<kind, segmented, most_tokens>(task, decode, last_row, 0, block, last_block);
        token = most_tokens;
      }
      if (token + 2 <= tokens) {
        multiply_rows<kind, segmented, 2>(task, decode, last_row, token, block, last_block);
        token += 2;
      }
      if (token < tokens) multiply_rows<kind, segmented, 1>(task, decode, last_row, token, block, last_block);
    }
  }
}

template <Kind kind>
void run_tasks(const Linear& problem, const char* prepared, int64_t first_task, int64_t last_task) {
  const Plan plan(problem);
  if constexpr (kind != Kind::windows && kind != Kind::bytes) {
    if (plan.segments_of_block > 1) return run_kind<kind, true>(problem, plan, prepared, first_task, last_task);
  }
  run_kind<kind, false>(problem, plan, prepared, first_task, last_task);
}

int64_t tasks(const Linear& problem) { return ceil_div(problem.weight->rows, task_rows); }

int64_t tasks_per_thread(const Linear& problem) {
  const int64_t task_bytes = task_rows * problem.weight->columns * bits_of_codes(*problem.weight) / 8;
  return 1 + bytes_per_thread / (task_bytes * problem.tokens + 1);
}

void run(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  const auto* const memory = static_cast<const char*>(prepared);
  switch (kind_of(*problem.weight)) {
    case Kind::nibbles: return run_tasks<Kind::nibbles>(problem, memory, first_task, last_task);
    case Kind::pairs: return run_tasks<Kind::pairs>(problem, memory, first_task, last_task);
    case Kind::ones: return run_tasks<Kind::ones>(problem, memory, first_task, last_task);
    case Kind::windows: return run_tasks<Kind::windows>(problem, memory, first_task, last_task);
    case Kind::bytes: return run_tasks<Kind::bytes>(problem, memory, first_task, last_task);
    case Kind::small_windows: return run_tasks<Kind::small_windows>(problem, memory, first_task, last_task);
    case Kind::small_bytes: return run_tasks<Kind::small_bytes>(problem, memory, first_task, last_task);
  }
}

}  // namespace

extern const LinearKernel split_tokens_avx512;
const LinearKernel split_tokens_avx512{takes, prepared_bytes, parts, prepare, tasks, tasks_per_thread, run};

}  // namespace compressed_format
