// y = x @ dense(weight).T for few tokens, with AVX-512: bound by reading the weight, so each byte of it is read once,
// decoded in registers to bfloat16 and multiplied at once.
//
// Codes come out as whole numbers (or FP8 values), which bfloat16 holds exactly; the sum over a group is scaled, in
// float32. That has fewer roundings than dense weights have, and needs no table for each group. A row is worked off in
// chunks of 64 columns, which decode to two fragments of 32 values. Decoding leaves the columns of a chunk in an order
// of its own; x is brought into the same order once, and is padded with zeros to whole chunks.

#include <immintrin.h>

#include "cpu/linear/linear.h"
#include "cpu/simd/avx512_floats.h"
#include "cpu/zero_point.h"

namespace compressed_format {
namespace {

constexpr int64_t chunk_columns = 64;
// Weights are decoded once for each four tokens; with more of them, tiles that stay in the cache save that work.
constexpr int64_t most_tokens = 4;
// Two rows share loads of x, where there are several tokens. With one, memory is read faster row by row.
constexpr int64_t task_rows = 4;
// Codes are prefetched this far ahead, which is in the next row where rows are short.
constexpr int64_t ahead = 4096;
// Less than this much weight is read faster than another thread wakes up.
constexpr int64_t bytes_per_thread = 64 * 1024;

enum class Decoding { nibbles, windows, bytes, signed_bytes, float8 };

// Packed codes of up to five bits fit the index of a table of 32 words; longer ones take tables of bytes.
Decoding decoding_of(const Weight& weight) {
  if (weight.type == Codes::float8) return Decoding::float8;
  if (weight.type == Codes::int8 || weight.bits == 8) return Decoding::signed_bytes;
  if (weight.bits == 4) return Decoding::nibbles;
  return weight.bits <= 5 ? Decoding::windows : Decoding::bytes;
}

int bits_of_codes(const Weight& weight) { return weight.type == Codes::packed ? weight.bits : 8; }

int64_t chunks_of(const Weight& weight) { return (weight.columns + chunk_columns - 1) / chunk_columns; }

// The column, within its chunk, of each of the 32 values of a fragment.
int column_of(Decoding decoding, int fragment, int lane) {
  switch (decoding) {
    case Decoding::nibbles: return 4 * (lane % 16) + lane / 16 + 2 * fragment;
    case Decoding::windows: return 2 * lane + fragment;
    default: return lane / 8 * 16 + lane % 8 + 8 * fragment;
  }
}

// Which sums of a chunk belong to its second group, where groups have 32 columns.
__mmask16 second_group(Decoding decoding) { return decoding == Decoding::nibbles ? 0xf0f0 : 0xff00; }

// The value of a code whose unused high bits may be anything.
float value_of(const Weight& weight, int code) {
  if (weight.type == Codes::float8) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if (exponent == 15 && mantissa == 7) return __builtin_nanf("");
    const float magnitude =
        exponent == 0 ? static_cast<float>(mantissa) / 512.0f
                      : static_cast<float>(8 + mantissa) * static_cast<float>(1 << exponent) / 1024.0f;
    return code & 128 ? -magnitude : magnitude;
  }
  if (weight.type == Codes::int8) return static_cast<float>(static_cast<int8_t>(code));
  const int mask = (1 << weight.bits) - 1;
  return static_cast<float>((code & mask) - (1 << (weight.bits - 1)));
}

// What prepare leaves for all threads: the tables that decode, x as [chunks][tokens][values of a chunk], and the sums
// of x over the values that meet in each lane, [chunks][tokens][16], for weights with zero points.
constexpr int64_t table_bytes = 512;

int64_t value_bytes(const Linear& problem) { return problem.x_type == Float::bfloat16 ? 2 : 4; }

int64_t sums_offset(const Linear& problem) {
  return table_bytes + chunks_of(*problem.weight) * problem.tokens * chunk_columns * value_bytes(problem);
}

bool takes(const Linear& problem) {
  const Weight& weight = *problem.weight;
  const bool coded = weight.type == Codes::packed || weight.type == Codes::int8 || weight.type == Codes::float8;
  if (!coded || weight.scale == nullptr || weight.bitmask != nullptr || weight.g_idx != nullptr) return false;
  if (weight.type == Codes::float8 && weight.zero_points != ZeroPoints::none) return false;
  if (problem.tokens > most_tokens || weight.columns == 0) return false;
  const bool whole_groups = weight.block_columns == 32 || weight.block_columns % chunk_columns == 0;
  return whole_groups || weight.scale_columns == 1;
}

size_t prepared_bytes(const Linear& problem) {
  const bool sums = problem.weight->zero_points != ZeroPoints::none;
  const int64_t bytes = sums_offset(problem) + (sums ? chunks_of(*problem.weight) * problem.tokens * 64 : 0);
  return static_cast<size_t>(bytes);
}

int64_t parts(const Linear&) { return 1; }

void write_tables(const Weight& weight, char* tables) {
  if (bits_of_codes(weight) <= 5) {
    for (int code = 0; code < 32; ++code) {
      const auto half = static_cast<uint16_t>(bits_of(value_of(weight, code)) >> 16);
      __builtin_memcpy(tables + 2 * code, &half, sizeof half);
    }
    return;
  }
  for (int code = 0; code < 256; ++code) {
    const uint32_t bits = bits_of(value_of(weight, code));
    tables[code] = static_cast<char>(bits >> 16 & 255u);
    tables[256 + code] = static_cast<char>(bits >> 24);
  }
}

void prepare_token(const Linear& problem, char* prepared, int64_t token) {
  const Weight& weight = *problem.weight;
  const Decoding decoding = decoding_of(weight);
  alignas(64) uint16_t order[2][32];
  alignas(64) int32_t wide_order[4][16];
  for (int fragment = 0; fragment < 2; ++fragment) {
    for (int lane = 0; lane < 32; ++lane) {
      const int column = column_of(decoding, fragment, lane);
      order[fragment][lane] = static_cast<uint16_t>(column);
      wide_order[2 * fragment + lane % 2][lane / 2] = column;
    }
  }
  const char* const x = static_cast<const char*>(problem.x) + token * problem.x_row_bytes;
  const bool sums = weight.zero_points != ZeroPoints::none;
  for (int64_t chunk = 0; chunk < chunks_of(weight); ++chunk) {
    const int64_t first = chunk * chunk_columns;
    const int64_t count = weight.columns - first < chunk_columns ? weight.columns - first : chunk_columns;
    const uint64_t mask = ~uint64_t{0} >> (64 - count);
    char* const target =
        prepared + table_bytes + (chunk * problem.tokens + token) * chunk_columns * value_bytes(problem);
    __m512 total = _mm512_setzero_ps();
    if (problem.x_type == Float::bfloat16) {
      const __m512i low = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), x + 2 * first);
      // No address beyond the row is made for a half that has no columns.
      const __m512i high =
          count <= 32 ? _mm512_setzero_si512()
                      : _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask >> 32), x + 2 * first + 64);
      for (int fragment = 0; fragment < 2; ++fragment) {
        const __m512i values = _mm512_permutex2var_epi16(low, _mm512_load_si512(order[fragment]), high);
        _mm512_store_si512(target + 64 * fragment, values);
        total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(values, 16)));
        total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_and_si512(values, _mm512_set1_epi32(-65536))));
      }
    } else {
      alignas(64) float values[chunk_columns] = {};
      for (int64_t i = 0; i < count; ++i) values[i] = load_float(x, problem.x_type, first + i);
      for (int part = 0; part < 4; ++part) {
        const __m512 found = _mm512_i32gather_ps(_mm512_load_si512(wide_order[part]), values, 4);
        _mm512_store_ps(target + 64 * part, found);
        total = _mm512_add_ps(total, found);
      }
    }
    if (sums) _mm512_store_ps(prepared + sums_offset(problem) + (chunk * problem.tokens + token) * 64, total);
  }
}

void prepare(const Linear& problem, void* prepared, int64_t, int64_t) {
  auto* const memory = static_cast<char*>(prepared);
  write_tables(*problem.weight, memory);
  for (int64_t token = 0; token < problem.tokens; ++token) prepare_token(problem, memory, token);
}

struct Fragments {
  __m512i low, high;
};

// Decodes a chunk from the bytes that hold it; those beyond the end of the row are zero.
template <Decoding decoding>
struct Decoder {
  __m512i words, permutation, shifts;
  __m512i low[4], high[4];

  Decoder(const void* tables, int bits) {
    const auto* const bytes = static_cast<const char*>(tables);
    words = _mm512_load_si512(bytes);
    alignas(64) int8_t index[64];
    alignas(64) int8_t shift[64];
    for (int i = 0; i < 64; ++i) {  // eight codes to each part of eight bytes
      index[i] = static_cast<int8_t>((i / 8 * bits + i % 8) % 64);
      shift[i] = static_cast<int8_t>(i % 8 * bits);
    }
    permutation = _mm512_load_si512(index);
    shifts = _mm512_load_si512(shift);
    if (decoding == Decoding::nibbles) {
      shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    }
    for (int i = 0; i < 4; ++i) {
      const bool used = decoding != Decoding::nibbles && decoding != Decoding::windows;
      low[i] = used ? _mm512_load_si512(bytes + 64 * i) : _mm512_setzero_si512();
      high[i] = used ? _mm512_load_si512(bytes + 256 + 64 * i) : _mm512_setzero_si512();
    }
  }

  __attribute__((always_inline)) Fragments operator()(const char* source, __mmask64 present) const {
    if constexpr (decoding == Decoding::nibbles) {
      // A word holds four codes. Both halves get the same words, the upper one shifted by a code; the table has each
      // value twice, as the index is five bits of what is there.
      const __m256i half = _mm256_maskz_loadu_epi8(static_cast<__mmask32>(present), source);
      const __m512i codes = _mm512_srlv_epi16(_mm512_broadcast_i64x4(half), shifts);
      return {_mm512_permutexvar_epi16(codes, words), _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), words)};
    }
    __m512i codes = _mm512_maskz_loadu_epi8(present, source);
    if constexpr (decoding == Decoding::windows || decoding == Decoding::bytes) {
      codes = _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(permutation, codes));
    }
    if constexpr (decoding == Decoding::windows) {
      return {_mm512_permutexvar_epi16(codes, words), _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 8), words)};
    }
    __m512i lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    __m512i upper = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    if constexpr (decoding == Decoding::float8) {
      constexpr int sign_of_codes = 0xf8;  // upper | (codes & 0x80)
      upper = _mm512_ternarylogic_epi32(upper, codes, _mm512_set1_epi8(-128), sign_of_codes);
    }
    if constexpr (decoding == Decoding::signed_bytes) {
      const __mmask64 second = _mm512_movepi8_mask(codes);
      lower = _mm512_mask_mov_epi8(lower, second, _mm512_permutex2var_epi8(low[2], codes, low[3]));
      upper = _mm512_mask_mov_epi8(upper, second, _mm512_permutex2var_epi8(high[2], codes, high[3]));
    }
    return {_mm512_unpacklo_epi8(lower, upper), _mm512_unpackhi_epi8(lower, upper)};
  }
};

// Adds the products of a fragment with its part of x.
template <bool narrow>
__attribute__((always_inline)) inline __m512 multiply(__m512 sum, __m512i weights, const char* x) {
  if constexpr (narrow) return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)_mm512_load_si512(x));
  const __m512i odd = _mm512_set1_epi32(-65536);
  sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), _mm512_load_ps(x), sum);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(weights, odd)), _mm512_load_ps(x + 64), sum);
}

// `rows` rows times `tokens` tokens. A row's sums are made in the same order whatever it is computed with.
template <Decoding decoding, bool narrow, int rows, int tokens>
void block(const Linear& problem, const char* prepared, const Decoder<decoding>& decode, int64_t row, int64_t token) {
  const Weight& weight = *problem.weight;
  const int64_t all = chunks_of(weight);
  const int chunk_bytes = 8 * bits_of_codes(weight);
  const int64_t stored_bytes =
      weight.type == Codes::packed ? (weight.columns * weight.bits + 31) / 32 * 4 : weight.columns;
  constexpr int64_t x_bytes = chunk_columns * (narrow ? 2 : 4);
  const char* const x = prepared + table_bytes + token * x_bytes;
  const int64_t x_stride = problem.tokens * x_bytes;
  const char* const x_sums = prepared + sums_offset(problem) + token * 64;
  const bool zero_points = weight.zero_points != ZeroPoints::none;
  const bool halves = weight.block_columns == 32 && weight.scale_columns > 1;
  const int64_t chunks_of_group =
      weight.scale_columns == 1 ? all : halves ? 1 : weight.block_columns / chunk_columns;
  const __mmask64 full = ~uint64_t{0} >> (64 - chunk_bytes);

  const char* codes[rows];
  int64_t scale_row[rows];
  __m512 total[rows][tokens];
  for (int r = 0; r < rows; ++r) {
    codes[r] = static_cast<const char*>(weight.codes) + (row + r) * weight.row_bytes;
    scale_row[r] = (row + r) / weight.block_rows;
    for (int t = 0; t < tokens; ++t) total[r][t] = _mm512_setzero_ps();
  }
  // A sum waits for the one before it. Where there are few of them, fragments have sums of their own.
  constexpr int sums = tokens == 1 ? 2 : 1;
  int64_t group = 0;
  for (int64_t first = 0; first < all; first += chunks_of_group, group += halves ? 2 : 1) {
    const int64_t last = first + chunks_of_group < all ? first + chunks_of_group : all;
    __m512 sum[rows][tokens][sums];
    for (int r = 0; r < rows; ++r) {
      for (int t = 0; t < tokens; ++t) {
        for (__m512& part : sum[r][t]) part = _mm512_setzero_ps();
      }
    }
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t offset = chunk * chunk_bytes;
      const int64_t left = stored_bytes - offset;
      const __mmask64 present = left >= chunk_bytes ? full : ~uint64_t{0} >> (64 - left);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        _mm_prefetch(codes[r] + offset + ahead, _MM_HINT_T0);
        const Fragments weights = decode(codes[r] + offset, present);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t) {
          const char* const of_x = x + chunk * x_stride + t * x_bytes;
          __m512& second = sum[r][t][sums - 1];
          sum[r][t][0] = multiply<narrow>(sum[r][t][0], weights.low, of_x);
          second = multiply<narrow>(second, weights.high, of_x + x_bytes / 2);
        }
      }
    }
    const bool two_groups = halves && group + 1 < weight.scale_columns;
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < tokens && sums == 2; ++t) sum[r][t][0] = _mm512_add_ps(sum[r][t][0], sum[r][t][1]);
      const int64_t index = scale_row[r] * weight.scale_columns + group;
      __m512 scale = _mm512_set1_ps(load_float(weight.scale, weight.scale_type, index));
      if (two_groups) {
        const __m512 other = _mm512_set1_ps(load_float(weight.scale, weight.scale_type, index + 1));
        scale = _mm512_mask_mov_ps(scale, second_group(decoding), other);
      }
      if (zero_points) {
        __m512 zero = _mm512_set1_ps(static_cast<float>(zero_point_at(weight, scale_row[r], group)));
        if (two_groups) {
          const __m512 other = _mm512_set1_ps(static_cast<float>(zero_point_at(weight, scale_row[r], group + 1)));
          zero = _mm512_mask_mov_ps(zero, second_group(decoding), other);
        }
        for (int t = 0; t < tokens; ++t) {
          for (int64_t chunk = first; chunk < last; ++chunk) {
            const __m512 x_sum = _mm512_load_ps(x_sums + (chunk * problem.tokens + t) * 64);
            sum[r][t][0] = _mm512_fnmadd_ps(zero, x_sum, sum[r][t][0]);
          }
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) total[r][t] = _mm512_fmadd_ps(scale, sum[r][t][0], total[r][t]);
    }
  }
  for (int r = 0; r < rows; ++r) {
    const float bias = problem.bias == nullptr ? 0.0f : load_float(problem.bias, problem.bias_type, row + r);
    for (int t = 0; t < tokens; ++t) {
      const float value = _mm512_reduce_add_ps(total[r][t]) + bias;
      store_float(problem.y, problem.x_type, (token + t) * weight.rows + row + r, value);
    }
  }
}

template <Decoding decoding, bool narrow>
void run_rows(const Linear& problem, const char* prepared, int64_t first_row, int64_t last_row) {
  const Decoder<decoding> decode(prepared, bits_of_codes(*problem.weight));
  for (int64_t row = first_row; row < last_row; row += task_rows) {
    const int64_t end = row + task_rows < last_row ? row + task_rows : last_row;
    int64_t token = 0;
    for (; token + 4 <= problem.tokens; token += 4) {
      int64_t r = row;
      for (; r + 2 <= end; r += 2) block<decoding, narrow, 2, 4>(problem, prepared, decode, r, token);
      for (; r < end; ++r) block<decoding, narrow, 1, 4>(problem, prepared, decode, r, token);
    }
    for (; token < problem.tokens; ++token) {
      for (int64_t r = row; r < end; ++r) block<decoding, narrow, 1, 1>(problem, prepared, decode, r, token);
    }
  }
}

int64_t tasks(const Linear& problem) { return (problem.weight->rows + task_rows - 1) / task_rows; }

int64_t tasks_per_thread(const Linear& problem) {
  const int64_t task_bytes = task_rows * problem.weight->columns * bits_of_codes(*problem.weight) / 8;
  return 1 + bytes_per_thread / (task_bytes * problem.tokens + 1);
}

template <Decoding decoding>
void run_decoding(const Linear& problem, const char* prepared, int64_t first_row, int64_t last_row) {
  if (problem.x_type == Float::bfloat16) {
    run_rows<decoding, true>(problem, prepared, first_row, last_row);
  } else {
    run_rows<decoding, false>(problem, prepared, first_row, last_row);
  }
}

void run(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  const auto* const memory = static_cast<const char*>(prepared);
  const int64_t first = first_task * task_rows;
  const int64_t end = last_task * task_rows;
  const int64_t last = end < problem.weight->rows ? end : problem.weight->rows;
  switch (decoding_of(*problem.weight)) {
    case Decoding::nibbles: return run_decoding<Decoding::nibbles>(problem, memory, first, last);
    case Decoding::windows: return run_decoding<Decoding::windows>(problem, memory, first, last);
    case Decoding::bytes: return run_decoding<Decoding::bytes>(problem, memory, first, last);
    case Decoding::signed_bytes: return run_decoding<Decoding::signed_bytes>(problem, memory, first, last);
    case Decoding::float8: return run_decoding<Decoding::float8>(problem, memory, first, last);
  }
}

}  // namespace

extern const LinearKernel few_tokens_avx512;
const LinearKernel few_tokens_avx512{takes, prepared_bytes, parts, prepare, tasks, tasks_per_thread, run};

}  // namespace compressed_format
