// y = x @ dense(weight).T for a handful of tokens, of 16-bit floats and integer codes, with AVX-512 VNNI: codes and
// activations are made bytes as split_codes.inl says, and lanes are tokens.
//
// Tokens come in panels of 4, 8 or 16. A vector of a panel holds as many neighbouring columns of each token as fill it:
// 16, 8 or 4. Codes of a strip of rows are unpacked into bytes in the cache, from where as many of them are broadcast to
// all tokens. So a sum takes a vector for a row and a panel, not one for a row and a token: converting and scaling it,
// once a group, costs next to nothing.

#include "cpu/linear/split_codes.inl"
#include "cpu/scratch.h"

namespace compressed_format {
namespace {

// Fewer tokens are taken by split_tokens, whose codes stay in registers. With more, many_tokens is as fast: it multiplies
// in half as many steps of half as much, and decoding no longer counts.
constexpr int64_t least_tokens = 5;
constexpr int64_t most_tokens = 24;
constexpr int64_t block_columns = 128;
constexpr int most_panel_tokens = 16;
constexpr int most_segments = 4;
// The sums of a strip, as high and low parts and as floats, take 24 of 32 registers.
constexpr int strip_rows = 8;
constexpr int64_t tile_block_bytes = strip_rows * block_columns;
// A chunk of columns: its x lies in the first level of the cache, while strips of a group are multiplied by it.
constexpr int64_t chunk_bytes = 32 * 1024;
constexpr int64_t most_chunk_blocks = 16;
constexpr int64_t group_strips = 8;
// With several panels, so many strips are unpacked before the first panel is multiplied by them.
constexpr int64_t tile_strips = 4;
constexpr int64_t scale_stride = most_chunk_blocks * most_segments + 16;
// Less than this much work is done faster than another thread wakes up; likewise x of fewer columns is split faster.
constexpr int64_t products_per_thread = 256 * 1024;
constexpr int64_t columns_of_parts = 16 * 1024;
constexpr int64_t part_blocks = 4;

Kind kind_of(const Weight& weight) {
  if (weight.type == Codes::int8 || weight.bits == 8) return Kind::bytes;
  return weight.bits == 4 ? Kind::nibbles : Kind::windows;
}

// How a problem is cut. Prepared memory has panel after panel, each [blocks] of: the bytes of x,
// [steps][high or low][tokens][64 / tokens]; the scales of its tokens, lane by lane; for each segment, what sums begin
// with; and the sums of x over it. A segment is what of a block lies in one group.
struct Plan {
  int64_t blocks, segment_columns;
  int segments;
  int64_t code_bytes;  // of a block
  int64_t chunk_blocks;
  int64_t panels;

  explicit Plan(const Linear& problem) {
    const Weight& weight = *problem.weight;
    blocks = ceil_div(weight.columns, block_columns);
    segment_columns = weight.scale_columns == 1 ? block_columns : smaller(weight.block_columns, block_columns);
    segments = static_cast<int>(block_columns / segment_columns);
    code_bytes = block_columns / 8 * bits_of_codes(weight);
    // Two panels, of 8 tokens and of 4, where 12 suffice.
    const int64_t rest = problem.tokens % most_panel_tokens;
    panels = ceil_div(problem.tokens, most_panel_tokens) + (rest > 8 && rest <= 12 ? 1 : 0);
    chunk_blocks = smaller(most_chunk_blocks, chunk_bytes / record_bytes(tokens_of(problem.tokens, 0)));
  }

  int64_t record_bytes(int64_t tokens) const { return 2 * block_columns * tokens + 64 + 128 * segments; }

  // The room for tokens in the panel that begins with `first`.
  static int tokens_of(int64_t all, int64_t first) {
    const int64_t left = all - first;
    return left > 12 ? 16 : left > 4 ? 8 : 4;
  }
};

bool takes(const Linear& problem) {
  const Weight& weight = *problem.weight;
  if (weight.type != Codes::packed && weight.type != Codes::int8) return false;
  if (weight.scale == nullptr || weight.bitmask != nullptr || weight.g_idx != nullptr) return false;
  if (problem.x_type == Float::float32 || weight.columns == 0) return false;
  if (problem.tokens < least_tokens || problem.tokens > most_tokens) return false;
  const int64_t group = weight.block_columns;
  return weight.scale_columns == 1 || group == 32 || group == 64 || group % block_columns == 0;
}

size_t prepared_bytes(const Linear& problem) {
  const Plan plan(problem);
  int64_t bytes = 0;
  for (int64_t token = 0; token < problem.tokens; token += Plan::tokens_of(problem.tokens, token)) {
    bytes += plan.blocks * plan.record_bytes(Plan::tokens_of(problem.tokens, token));
  }
  return static_cast<size_t>(bytes);
}

int64_t parts(const Linear& problem) {
  const bool worth = problem.tokens * problem.weight->columns > columns_of_parts;
  return worth ? ceil_div(Plan(problem).blocks, part_blocks) : 1;
}

// Swaps places within vectors and numbers of vectors: of `tokens` vectors of as many elements.
template <int tokens>
void transpose(__m512i (&rows)[tokens]) {
  constexpr int words = 16 / tokens;  // of an element
#pragma GCC unroll 4
  for (int distance = 1; distance < tokens; distance *= 2) {
    alignas(64) int32_t first[16], second[16];
    for (int word = 0; word < 16; ++word) {
      const bool odd = (word / words & distance) != 0;
      first[word] = odd ? 16 + word - distance * words : word;
      second[word] = odd ? 16 + word : word + distance * words;
    }
    const __m512i first_index = _mm512_load_si512(first), second_index = _mm512_load_si512(second);
    for (int row = 0; row < tokens; ++row) {
      if ((row & distance) != 0) continue;
      const __m512i a = rows[row], b = rows[row + distance];
      rows[row] = _mm512_permutex2var_epi32(a, first_index, b);
      rows[row + distance] = _mm512_permutex2var_epi32(a, second_index, b);
    }
  }
}

// The place, among the bytes of a tile's block of one row, of what a segment's step multiplies. Nibbles come out as two
// vectors, of the even columns and of the odd ones; other codes in order.
template <int tokens, int segments, bool interleaved>
constexpr int place_of(int segment, int step) {
  constexpr int of_vector = tokens / segments;  // steps of a segment, in each of the two vectors
  if (!interleaved) return (segment * 2 * of_vector + step) * (64 / tokens);
  return step / of_vector * 64 + (segment * of_vector + step % of_vector) * (64 / tokens);
}

template <int tokens>
void prepare_block(const Linear& problem, const Plan& plan, int64_t first_token, int64_t block, char* record) {
  constexpr int words = 16 / tokens;
  const Weight& weight = *problem.weight;
  const Kind kind = kind_of(weight);
  const int64_t there = smaller(tokens, problem.tokens - first_token);
  const int64_t first = block * block_columns;
  alignas(64) uint8_t order[2][64];
  for (int vector = 0; vector < 2; ++vector) {
    for (int byte = 0; byte < 64; ++byte) order[vector][byte] = static_cast<uint8_t>(column_of(kind, vector, byte));
  }
  char* const scales = record + 2 * block_columns * tokens;
  char* const starts = scales + 64;
  char* const sums = starts + 64 * plan.segments;
  __builtin_memset(scales, 0, static_cast<size_t>(64 + 128 * plan.segments));

  __m512i bytes[2][2][tokens];  // vector, high or low
  for (int token = 0; token < tokens; ++token) {
    if (token >= there) {
      for (auto& of_vector : bytes) of_vector[0][token] = of_vector[1][token] = _mm512_setzero_si512();
      continue;
    }
    Split parts;
    split(static_cast<const char*>(problem.x) + (first_token + token) * problem.x_row_bytes, problem.x_type, first,
          weight.columns - first, block_columns, parts);
    for (int vector = 0; vector < 2; ++vector) {
      const __m512i index = _mm512_load_si512(order[vector]);
      bytes[vector][0][token] =
          _mm512_permutex2var_epi8(_mm512_load_si512(parts.high), index, _mm512_load_si512(parts.high + 64));
      bytes[vector][1][token] =
          _mm512_permutex2var_epi8(_mm512_load_si512(parts.low), index, _mm512_load_si512(parts.low + 64));
    }
    for (int word = 0; word < words; ++word) {
      __builtin_memcpy(scales + (token * words + word) * 4, &parts.scale, sizeof parts.scale);
    }
    for (int segment = 0; segment < plan.segments; ++segment) {
      int32_t sum = 0;
      const int64_t vectors = plan.segment_columns / 16;
      for (int64_t i = 0; i < vectors; ++i) sum += parts.sums[segment * vectors + i];
      const int32_t start = -sum * offset_of(weight);
      const float scaled = static_cast<float>(sum) * parts.scale;
      __builtin_memcpy(starts + segment * 64 + token * words * 4, &start, sizeof start);
      __builtin_memcpy(sums + segment * 64 + token * words * 4, &scaled, sizeof scaled);
    }
  }
  const bool interleaved = kind == Kind::nibbles;
  const int of_vector = tokens / plan.segments;
  for (int vector = 0; vector < 2; ++vector) {
    for (int half = 0; half < 2; ++half) {
      transpose<tokens>(bytes[vector][half]);
      for (int i = 0; i < tokens; ++i) {
        const int step = interleaved ? (i / of_vector * 2 + vector) * of_vector + i % of_vector : vector * tokens + i;
        _mm512_store_si512(record + (2 * step + half) * 64, bytes[vector][half][i]);
      }
    }
  }
}

void prepare(const Linear& problem, void* prepared, int64_t first_part, int64_t last_part) {
  const Plan plan(problem);
  const bool all = parts(problem) == 1;
  const int64_t first_block = all ? 0 : first_part * part_blocks;
  const int64_t last_block = all ? plan.blocks : smaller(plan.blocks, last_part * part_blocks);
  char* panel = static_cast<char*>(prepared);
  int tokens = 0;
  for (int64_t token = 0; token < problem.tokens; token += tokens) {
    tokens = Plan::tokens_of(problem.tokens, token);
    for (int64_t block = first_block; block < last_block; ++block) {
      char* const record = panel + block * plan.record_bytes(tokens);
      if (tokens == 16) prepare_block<16>(problem, plan, token, block, record);
      else if (tokens == 8) prepare_block<8>(problem, plan, token, block, record);
      else prepare_block<4>(problem, plan, token, block, record);
    }
    panel += plan.blocks * plan.record_bytes(tokens);
  }
}

// A strip's codes of a chunk, unpacked, and the scales that belong to it.
struct Tile {
  alignas(64) uint8_t codes[most_chunk_blocks * tile_block_bytes];  // [blocks][strip_rows][block_columns]
  float scales[strip_rows][scale_stride];
  float offsets[strip_rows][scale_stride];  // zero points times scales
};

// Unpacks. Rows beyond the last one are the last one again.
template <Kind kind>
void unpack(const Weight& weight, const Plan& plan, int64_t first_row, int64_t first_block, int64_t blocks,
            Tile& tile) {
  const Decoder<kind> decode(weight);
  const int64_t row_code_bytes =
      weight.type == Codes::packed ? (weight.columns * weight.bits + 31) / 32 * 4 : weight.columns;
  for (int64_t r = 0; r < strip_rows; ++r) {
    const int64_t row = smaller(first_row + r, weight.rows - 1);
    const char* const codes = static_cast<const char*>(weight.codes) + row * weight.row_bytes;
    uint8_t* target = tile.codes + r * block_columns;
    for (int64_t block = first_block; block < first_block + blocks; ++block, target += tile_block_bytes) {
      __m512i bytes[2];
      const int64_t position = block * plan.code_bytes, left = row_code_bytes - position;
      if (left >= plan.code_bytes) decode.template operator()<true>(codes + position, left, bytes);
      else decode.template operator()<false>(codes + position, left, bytes);
      _mm512_store_si512(target, bytes[0]);
      _mm512_store_si512(target + 64, bytes[1]);
    }
    const int64_t scale_row = weight.block_rows == 1 ? row : row / weight.block_rows;
    const int64_t first_segment = first_block * plan.segments, segments = blocks * plan.segments;
    for (int64_t segment = 0; segment < segments; segment += 16) {
      const __m512 scale = scales_at(weight, plan.segment_columns, scale_row, first_segment + segment);
      _mm512_storeu_ps(tile.scales[r] + segment, scale);
      if (weight.zero_points == ZeroPoints::none) continue;
      const __m512 stored = offsets_at(weight, plan.segment_columns, scale_row,
                                       first_segment + segment, segments - segment);
      const __m512 zero_points = _mm512_sub_ps(stored, _mm512_set1_ps(static_cast<float>(offset_of(weight))));
      _mm512_storeu_ps(tile.offsets[r] + segment, _mm512_mul_ps(scale, zero_points));
    }
  }
}

void unpack_any(const Weight& weight, const Plan& plan, int64_t first_row, int64_t first_block, int64_t blocks,
                Tile& tile) {
  switch (kind_of(weight)) {
    case Kind::nibbles: return unpack<Kind::nibbles>(weight, plan, first_row, first_block, blocks, tile);
    case Kind::bytes: return unpack<Kind::bytes>(weight, plan, first_row, first_block, blocks, tile);
    default: return unpack<Kind::windows>(weight, plan, first_row, first_block, blocks, tile);
  }
}

// As many codes as a step has columns, for every token.
template <int tokens>
__attribute__((always_inline)) inline __m512i broadcast(const uint8_t* codes) {
  if constexpr (tokens == 4) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  } else if constexpr (tokens == 8) {
    int64_t eight;
    __builtin_memcpy(&eight, codes, sizeof eight);
    return _mm512_set1_epi64(eight);
  } else {
    int32_t four;
    __builtin_memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
  }
}

// What a strip's multiplication asks memory for meanwhile: a line or two of each row a block.
struct Ahead {
  const char* codes = nullptr;  // none
  int64_t rows = 0;             // that there are
  int64_t row_bytes = 0;
};

// A strip times a panel, over the blocks of a chunk. `totals` are [strip_rows][16], from one chunk to the next.
template <int tokens, int segments, bool interleaved>
void multiply(const Plan& plan, const Tile& tile, const char* x, int64_t blocks, bool first_chunk, bool has_zero_points,
              const Ahead& ahead, float* totals) {
  constexpr int steps = 2 * tokens / segments;  // of a segment
  constexpr int steps_at_once = steps < 4 ? steps : 4;
  if (first_chunk) __builtin_memset(totals, 0, 64 * strip_rows);
  const uint8_t* codes = tile.codes;
  for (int64_t block = 0; block < blocks; ++block, codes += tile_block_bytes) {
    for (int64_t r = 0; r < ahead.rows; ++r) {
      const char* const place = ahead.codes + r * ahead.row_bytes + block * plan.code_bytes;
      _mm_prefetch(place, _MM_HINT_T0);
      if (plan.code_bytes > 64) _mm_prefetch(place + 64, _MM_HINT_T0);
    }
    const char* const after = x + 2 * block_columns * tokens;
    const __m512 x_scale = _mm512_load_ps(after);
    for (int segment = 0; segment < segments; ++segment) {
      __m512i high[strip_rows], low[strip_rows];
      const __m512i start = _mm512_load_si512(after + 64 + 64 * segment);
#pragma GCC unroll 8
      for (int r = 0; r < strip_rows; ++r) {
        high[r] = _mm512_setzero_si512();
        low[r] = start;
      }
      for (int first = 0; first < steps; first += steps_at_once) {
#pragma GCC unroll 4
        for (int step = 0; step < steps_at_once; ++step, x += 128) {
          const __m512i x_high = _mm512_load_si512(x), x_low = _mm512_load_si512(x + 64);
          const uint8_t* const of_step = codes + place_of<tokens, segments, interleaved>(segment, first + step);
#pragma GCC unroll 8
          for (int r = 0; r < strip_rows; ++r) {
            const __m512i code = broadcast<tokens>(of_step + r * block_columns);
            high[r] = _mm512_dpbusd_epi32(high[r], code, x_high);
            low[r] = _mm512_dpbusd_epi32(low[r], code, x_low);
          }
        }
      }
      const int64_t number = block * segments + segment;
#pragma GCC unroll 8
      for (int r = 0; r < strip_rows; ++r) {
        const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[r], 8), low[r]);
        const __m512 scale = _mm512_mul_ps(x_scale, _mm512_set1_ps(tile.scales[r][number]));
        _mm512_store_ps(totals + 16 * r,
                        _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_load_ps(totals + 16 * r)));
      }
      if (has_zero_points) {
        const __m512 x_sum = _mm512_load_ps(after + 64 + 64 * (segments + segment));
#pragma GCC unroll 8
        for (int r = 0; r < strip_rows; ++r) {
          const __m512 offset = _mm512_set1_ps(tile.offsets[r][number]);
          _mm512_store_ps(totals + 16 * r, _mm512_fnmadd_ps(x_sum, offset, _mm512_load_ps(totals + 16 * r)));
        }
      }
    }
    x = after + 64 + 128 * segments;
  }
}

template <int tokens>
void multiply_any(const Weight& weight, const Plan& plan, const Tile& tile, const char* x, int64_t blocks,
                  bool first_chunk, const Ahead& ahead, float* totals) {
  const bool nibbles = kind_of(weight) == Kind::nibbles, has_zero_points = weight.zero_points != ZeroPoints::none;
  const auto run = [&](auto function) { function(plan, tile, x, blocks, first_chunk, has_zero_points, ahead, totals); };
  if (plan.segments == 1) run(multiply<tokens, 1, false>);
  else if (plan.segments == 2 && nibbles) run(multiply<tokens, 2, true>);
  else if (plan.segments == 2) run(multiply<tokens, 2, false>);
  else if (nibbles) run(multiply<tokens, 4, true>);
  else run(multiply<tokens, 4, false>);
}

// Eight floats, of which `lanes` are stored.
void store_floats(void* target, Float type, int64_t index, __mmask8 lanes, __m256 values) {
  char* const place = static_cast<char*>(target) + index * float_bytes(type);
  if (type == Float::float16) {
    _mm_mask_storeu_epi16(place, lanes, _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  const __m256i bits = _mm256_castps_si256(values);
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), last);
  rounded = _mm256_mask_mov_epi32(rounded, _mm256_cmp_ps_mask(values, values, _CMP_UNORD_Q),
                                  _mm256_set1_epi32(0x7fc00000));
  _mm_mask_storeu_epi16(place, lanes, _mm256_cvtepi32_epi16(_mm256_srli_epi32(rounded, 16)));
}

// y of a strip and a panel, out of totals. Four rows at a time, each quarter of a vector is transposed, so that it has
// the rows of a column of it: that is a token, or a part of what sums up to one.
template <int tokens>
void store(const Linear& problem, int64_t first_row, int64_t first_token, const float* totals) {
  alignas(64) float sums[most_panel_tokens][strip_rows];
  for (int half = 0; half < 2; ++half) {
    __m512 pairs[4], columns[4];
    for (int i = 0; i < 4; i += 2) {
      const __m512 a = _mm512_load_ps(totals + (4 * half + i) * 16);
      const __m512 b = _mm512_load_ps(totals + (4 * half + i + 1) * 16);
      pairs[i] = _mm512_unpacklo_ps(a, b);
      pairs[i + 1] = _mm512_unpackhi_ps(a, b);
    }
    columns[0] = _mm512_shuffle_ps(pairs[0], pairs[2], _MM_SHUFFLE(1, 0, 1, 0));
    columns[1] = _mm512_shuffle_ps(pairs[0], pairs[2], _MM_SHUFFLE(3, 2, 3, 2));
    columns[2] = _mm512_shuffle_ps(pairs[1], pairs[3], _MM_SHUFFLE(1, 0, 1, 0));
    columns[3] = _mm512_shuffle_ps(pairs[1], pairs[3], _MM_SHUFFLE(3, 2, 3, 2));
    constexpr int of_quarter = tokens / 4;
    for (int i = 0; i < of_quarter; ++i) {
      __m512 sum = columns[i * 4 / of_quarter];
      if constexpr (tokens == 8) sum = _mm512_add_ps(sum, columns[2 * i + 1]);
      if constexpr (tokens == 4) {
        sum = _mm512_add_ps(_mm512_add_ps(sum, columns[1]), _mm512_add_ps(columns[2], columns[3]));
      }
      alignas(64) float quarters[4][4];
      _mm512_store_ps(quarters[0], sum);
      for (int quarter = 0; quarter < 4; ++quarter) {
        __builtin_memcpy(sums[quarter * of_quarter + i] + 4 * half, quarters[quarter], sizeof quarters[quarter]);
      }
    }
  }
  const int64_t rows = smaller(strip_rows, problem.weight->rows - first_row);
  const auto lanes = static_cast<__mmask8>((1u << rows) - 1);
  __m256 bias = _mm256_setzero_ps();
  if (problem.bias != nullptr) {
    bias = _mm512_castps512_ps256(load_floats(problem.bias, problem.bias_type, first_row, rows));
  }
  const int64_t there = smaller(tokens, problem.tokens - first_token);
  for (int64_t token = 0; token < there; ++token) {
    store_floats(problem.y, problem.x_type, (first_token + token) * problem.weight->rows + first_row, lanes,
                 _mm256_add_ps(_mm256_load_ps(sums[token]), bias));
  }
}

// Calls `action` with the room for tokens of each panel, its first token and its number, and where its x begins.
template <typename Action>
void for_panels(const Linear& problem, const Plan& plan, const char* prepared, Action action) {
  int tokens = 0;
  int64_t panel = 0;
  for (int64_t token = 0; token < problem.tokens; token += tokens, ++panel) {
    tokens = Plan::tokens_of(problem.tokens, token);
    action(tokens, token, panel, prepared);
    prepared += plan.blocks * plan.record_bytes(tokens);
  }
}

void run(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  const Plan plan(problem);
  const Weight& weight = *problem.weight;
  const int64_t strips_at_once = plan.panels > 1 ? tile_strips : 1;
  const auto tile_bytes = static_cast<int64_t>(sizeof(Tile)) * strips_at_once;
  const int64_t totals_bytes = group_strips * plan.panels * strip_rows * 64;
  auto* const memory =
      static_cast<char*>(scratch(Scratch::for_this_thread, static_cast<size_t>(tile_bytes + totals_bytes)));
  auto* const tiles = reinterpret_cast<Tile*>(memory);
  auto* const totals = reinterpret_cast<float*>(memory + tile_bytes);  // [strips][panels][strip_rows][16]

  for (int64_t group = first_task; group < last_task; group += group_strips) {
    const int64_t group_end = smaller(last_task, group + group_strips);
    for (int64_t block = 0; block < plan.blocks; block += plan.chunk_blocks) {
      const int64_t blocks = smaller(plan.chunk_blocks, plan.blocks - block);
      for (int64_t strip = group; strip < group_end; strip += strips_at_once) {
        const int64_t strips = smaller(strips_at_once, group_end - strip);
        for (int64_t i = 0; i < strips; ++i) {
          unpack_any(weight, plan, (strip + i) * strip_rows, block, blocks, tiles[i]);
        }
        // What comes next: other rows of the chunk, the next chunk, or the next group.
        int64_t next_strip = strip + strips, next_block = block;
        if (next_strip == group_end && block + blocks < plan.blocks) {
          next_strip = group;
          next_block = block + blocks;
        } else if (next_strip == group_end) {
          next_block = 0;
        }
        for_panels(problem, plan, static_cast<const char*>(prepared), [&](int tokens, int64_t, int64_t panel,
                                                                          const char* x) {
          x += block * plan.record_bytes(tokens);
          for (int64_t i = 0; i < strips; ++i) {
            float* const target = totals + ((strip - group + i) * plan.panels + panel) * strip_rows * 16;
            Ahead ahead;
            const int64_t next_row = (next_strip + i) * strip_rows;
            if (panel == 0 && next_row < weight.rows) {
              ahead.codes =
                  static_cast<const char*>(weight.codes) + next_row * weight.row_bytes + next_block * plan.code_bytes;
              ahead.rows = smaller(strip_rows, weight.rows - next_row);
              ahead.row_bytes = weight.row_bytes;
            }
            const bool first = block == 0;
            if (tokens == 16) multiply_any<16>(weight, plan, tiles[i], x, blocks, first, ahead, target);
            else if (tokens == 8) multiply_any<8>(weight, plan, tiles[i], x, blocks, first, ahead, target);
            else multiply_any<4>(weight, plan, tiles[i], x, blocks, first, ahead, target);
          }
        });
      }
    }
    for_panels(problem, plan, static_cast<const char*>(prepared), [&](int tokens, int64_t token, int64_t panel,
                                                                      const char*) {
      for (int64_t strip = group; strip < group_end; ++strip) {
        const float* const source = totals + ((strip - group) * plan.panels + panel) * strip_rows * 16;
        if (tokens == 16) store<16>(problem, strip * strip_rows, token, source);
        else if (tokens == 8) store<8>(problem, strip * strip_rows, token, source);
        else store<4>(problem, strip * strip_rows, token, source);
      }
    });
  }
}

int64_t tasks(const Linear& problem) { return ceil_div(problem.weight->rows, strip_rows); }

int64_t tasks_per_thread(const Linear& problem) {
  return 1 + products_per_thread / (strip_rows * problem.weight->columns * problem.tokens);
}

}  // namespace

extern const LinearKernel split_panels_avx512;
const LinearKernel split_panels_avx512{takes, prepared_bytes, parts, prepare, tasks, tasks_per_thread, run};

}  // namespace compressed_format
