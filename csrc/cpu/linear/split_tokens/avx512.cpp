// y = x @ dense(weight).T for few tokens of 16-bit floats and integer codes, with AVX-512 VNNI: codes are multiplied as
// the integers they are, and are not decoded beyond bytes.
//
// Of x, each block of columns gets a scale of its own, a power of two, and becomes integers of 15 bits and a sign. They
// are exact for bfloat16 within a factor of 64 of the block's largest, and finer than float16 needs. An integer is
// split into two signed bytes, 256 * high + low, which two products of bytes multiply by the codes; sums within a block
// are exact. So the error lies far below that of weights rounded to 16 bits. What is not finite makes a sum NaN.
//
// Codes are taken as they are stored, without sign. What that adds to a sum is the same for all rows but for scale and
// zero point: it is taken off by the sum of x over each group.

#include <immintrin.h>

#include "cpu/linear/linear.h"
#include "cpu/scratch.h"
#include "cpu/simd/avx512_floats.h"
#include "cpu/zero_point.h"

namespace compressed_format {
namespace {

// How codes become vectors of bytes. Blocks are 128 columns, two vectors; or 64, one, where groups are that small and
// the two vectors would lie in different ones.
enum class Kind { nibbles, pairs, ones, windows, bytes, small_windows, small_bytes };

constexpr int vectors_of(Kind kind) { return kind == Kind::small_windows || kind == Kind::small_bytes ? 1 : 2; }
constexpr bool are_windows(Kind kind) { return kind == Kind::windows || kind == Kind::small_windows; }
constexpr bool are_bytes(Kind kind) { return kind == Kind::bytes || kind == Kind::small_bytes; }

// The kernel for many tokens takes 16 in one go: beyond about three quarters of that, it is faster.
constexpr int64_t most_tokens = 12;
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
constexpr int64_t ahead = 4096;

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

int bits_of_codes(const Weight& weight) { return weight.type == Codes::packed ? weight.bits : 8; }

// What is added to values to store them without sign.
int offset_of(const Weight& weight) { return 1 << (bits_of_codes(weight) - 1); }

// The column, within its block, of a byte of a vector.
int column_of(Kind kind, int vector, int byte) {
  switch (kind) {
    case Kind::nibbles: return 2 * byte + vector;
    case Kind::pairs: return 4 * (byte % 32) + 2 * (byte / 32) + vector;
    case Kind::ones: return 8 * (byte % 16) + 2 * (byte / 16) + vector;
    default: return 64 * vector + byte;
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
    __m512 values[8];
    __m512 largest = _mm512_setzero_ps();
    const int64_t first = block * plan.columns;
    const int64_t vectors = plan.columns / 16;
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t left = problem.weight->columns - first - 16 * i;
      values[i] = left <= 0 ? _mm512_setzero_ps() : load_floats(x, problem.x_type, first + 16 * i, left);
      // As integers, so that one that is not a number is larger than all.
      largest = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_castps_si512(largest),
                                                     _mm512_castps_si512(_mm512_abs_ps(values[i]))));
    }
    const uint32_t magnitude = _mm512_reduce_max_epu32(_mm512_castps_si512(largest));
    // The largest becomes 2**14 to 2**15; half of that where rounding could make its high byte overflow. Numbers so
    // small that the scale would be subnormal lose bits.
    uint32_t exponent = (magnitude >> 23) + ((magnitude & 0x7fffffu) >= 0x7f0000u ? 1 : 0);
    if (exponent < 15) exponent = 15;
    const bool finite = magnitude < 0x7f800000u;
    const float scale = finite ? float_of((exponent - 14) << 23) : __builtin_nanf("");
    const __m512 factor = _mm512_set1_ps(finite ? float_of((268 - exponent) << 23) : 0.0f);
    alignas(64) uint8_t high[128], low[128];
    alignas(64) int32_t sum_of[8];
    for (int64_t i = 0; i < vectors; ++i) {
      const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], factor));
      const __m512i rounded = _mm512_srai_epi32(_mm512_add_epi32(integers, _mm512_set1_epi32(128)), 8);
      _mm_store_si128(reinterpret_cast<__m128i*>(low + 16 * i), _mm512_cvtepi32_epi8(integers));
      _mm_store_si128(reinterpret_cast<__m128i*>(high + 16 * i), _mm512_cvtepi32_epi8(rounded));
      sum_of[i] = _mm512_reduce_add_epi32(integers);
    }
    scales[block] = scale;
    const int64_t of_segment = plan.segment_columns / 16;
    for (int64_t segment = 0; segment < plan.segments_of_block; ++segment) {
      int32_t sum = 0;
      for (int64_t i = 0; i < of_segment; ++i) sum += sum_of[segment * of_segment + i];
      sums[block * plan.segments_of_block + segment] = static_cast<float>(sum) * scale;
    }
    if (block >= plan.blocks) continue;
    char* const target = prepared + (block * problem.tokens + token) * plan.token_bytes;
    for (int64_t vector = 0; vector < plan.vectors; ++vector) {
      const __m512i index = _mm512_load_si512(order[vector]);
      _mm512_store_si512(target + 64 * vector, _mm512_permutex2var_epi8(_mm512_load_si512(high), index,
                                                                        _mm512_load_si512(high + 64)));
      _mm512_store_si512(
          target + 64 * (plan.vectors + vector),
          _mm512_permutex2var_epi8(_mm512_load_si512(low), index, _mm512_load_si512(low + 64)));
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

__mmask64 first_bytes(int64_t count) { return count <= 0 ? 0 : _bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count)); }

// Bytes of a block's codes, as vectors. `left` bytes of the row are there; the others are not read.
template <Kind kind>
struct Decoder {
  __m512i permutation, shifts, mask;
  __mmask64 stored;
  int64_t vector_bytes;

  explicit Decoder(const Weight& weight) {
    const int bits = bits_of_codes(weight);
    alignas(64) int8_t index[64];
    alignas(64) int8_t shift[64];
    for (int i = 0; i < 64; ++i) {
      index[i] = static_cast<int8_t>((i / 8 * bits + i % 8) % 64);  // eight codes to each eight bytes
      shift[i] = static_cast<int8_t>(i % 8 * bits);
    }
    permutation = _mm512_load_si512(index);
    shifts = _mm512_load_si512(shift);
    mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    if (kind == Kind::pairs) shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    if (kind == Kind::ones) {
      for (int i = 0; i < 64; ++i) shift[i] = static_cast<int8_t>(i % 2 == 0 ? i / 16 * 2 : 0);
      shifts = _mm512_load_si512(shift);
    }
    // Signed bytes differ from those without sign by the highest bit.
    if (are_bytes(kind)) mask = _mm512_set1_epi8(weight.type == Codes::int8 ? -128 : 0);
    vector_bytes = 8 * bits;
    stored = ~uint64_t{0} >> (64 - (are_windows(kind) || are_bytes(kind) ? 8 : 16) * bits);
  }

  template <bool whole>
  __attribute__((always_inline)) void operator()(const char* source, int64_t left, __m512i (&codes)[2]) const {
    if constexpr (are_windows(kind) || are_bytes(kind)) {
      for (int vector = 0; vector < vectors_of(kind); ++vector) {
        const char* const place = source + vector * vector_bytes;
        const __mmask64 present = whole ? stored : first_bytes(left - vector * vector_bytes) & stored;
        codes[vector] = whole && are_bytes(kind) ? _mm512_loadu_si512(place) : _mm512_maskz_loadu_epi8(present, place);
        if constexpr (are_windows(kind)) {
          const __m512i windows = _mm512_permutexvar_epi8(permutation, codes[vector]);
          codes[vector] = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, windows), mask);
        } else {
          codes[vector] = _mm512_xor_si512(codes[vector], mask);
        }
      }
      return;
    }
    const __mmask64 present = whole ? stored : first_bytes(left);
    constexpr unsigned bits = kind == Kind::nibbles ? 4 : kind == Kind::pairs ? 2 : 1;
    if constexpr (kind == Kind::nibbles) {
      codes[0] = whole ? _mm512_loadu_si512(source) : _mm512_maskz_loadu_epi8(present, source);
    } else if constexpr (kind == Kind::pairs) {
      codes[0] = _mm512_broadcast_i64x4(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(present), source));
      codes[0] = _mm512_srlv_epi16(codes[0], shifts);
    } else {
      codes[0] = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi8(static_cast<__mmask16>(present), source));
      codes[0] = _mm512_srlv_epi16(codes[0], shifts);
    }
    codes[1] = _mm512_and_si512(_mm512_srli_epi16(codes[0], bits), mask);
    codes[0] = _mm512_and_si512(codes[0], mask);
  }
};

// The scales of 16 segments from one on, for a row; zero beyond the last.
__m512 scales_at(const Weight& weight, const Plan& plan, int64_t scale_row, int64_t segment) {
  if (weight.scale_columns == 1) return _mm512_set1_ps(load_float(weight.scale, weight.scale_type, scale_row));
  const int64_t first = scale_row * weight.scale_columns;
  if (plan.segment_columns == weight.block_columns) {
    const int64_t left = weight.scale_columns - segment;
    return left <= 0 ? _mm512_setzero_ps() : load_floats(weight.scale, weight.scale_type, first + segment, left);
  }
  // Each group has several segments: its scale is repeated. A half is added before a division by multiplication, which
  // is then far from rounding to the wrong side.
  const int64_t times = weight.block_columns / plan.segment_columns;
  const int64_t group = segment / times;
  if (group >= weight.scale_columns) return _mm512_setzero_ps();
  const __m512 lanes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 places = _mm512_add_ps(lanes, _mm512_set1_ps(static_cast<float>(segment - group * times) + 0.5f));
  const __m512i groups = _mm512_cvttps_epi32(_mm512_mul_ps(places, _mm512_set1_ps(1.0f / static_cast<float>(times))));
  const __m512 scales =
      load_floats(weight.scale, weight.scale_type, first + group, weight.scale_columns - group);
  return _mm512_permutexvar_ps(groups, scales);
}

// What is added to the values of 16 segments: the offset of codes, and the group's zero point.
__m512 offsets_at(const Weight& weight, const Plan& plan, int64_t scale_row, int64_t segment) {
  if (weight.zero_points == ZeroPoints::none) return _mm512_set1_ps(static_cast<float>(offset_of(weight)));
  alignas(64) int32_t found[16];
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t group =
        weight.scale_columns == 1 ? 0 : (segment + i) * plan.segment_columns / weight.block_columns;
    found[i] = group < weight.scale_columns ? zero_point_at(weight, scale_row, group) : 0;
  }
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(found), _mm512_set1_epi32(offset_of(weight))));
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
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) total[r][t] = first_pass ? _mm512_setzero_ps() : _mm512_load_ps(totals + 16 * t);
    const int64_t scale_row = (row + r) / weight.block_rows;
    for (int64_t segment = 0; segment < segments; segment += 16) {
      const __m512 scale = scales_at(weight, plan, scale_row, first_segment + segment);
      const __m512 offset =
          _mm512_mul_ps(scale, offsets_at(weight, plan, scale_row, first_segment + segment));
      if constexpr (segmented) _mm512_store_ps(scales[r] + segment, scale);
#pragma GCC unroll 8
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
#pragma GCC unroll 8
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
#pragma GCC unroll 8
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
      for (; token + 8 <= tokens; token += 8) {
        multiply_rows<kind, segmented, 8>(task, decode, last_row, token, block, last_block);
      }
      for (; token + 4 <= tokens; token += 4) {
        multiply_rows<kind, segmented, 4>(task, decode, last_row, token, block, last_block);
      }
      for (; token + 2 <= tokens; token += 2) {
        multiply_rows<kind, segmented, 2>(task, decode, last_row, token, block, last_block);
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
