// y = x @ dense(weight).T + bias for few tokens, in floats: for processors that have no better way. The file that
// includes this one has included the vectors of cpu/simd, and defines what is declared first. Everything is in an
// anonymous namespace, and nothing of the standard library is called: csrc/CMakeLists.txt says why.
//
// Each byte of the weight is read once, in chunks of columns that are decoded in registers and multiplied at once. A
// packed code is not moved to the lowest bits of its lane: it is converted where it lies, as a whole number that is a
// power of two too large, and x is prepared with the inverse of that factor. So a code costs a mask and a conversion.
// Codes are summed as they are stored, from zero up; what is to be subtracted from each of them is subtracted from the
// sum, times the sum of x. A group's sum is scaled, in float32: that has fewer roundings than dense weights have.

#include "cpu/linear/linear.h"
#include "cpu/numbers.h"
#include "cpu/zero_point.h"

namespace compressed_format {
namespace {

static_assert(lanes == 8);

// Weights are decoded once for this many tokens; with more of them, tiles that stay in the cache save that work.
constexpr int64_t most_tokens = 4;
constexpr int64_t task_rows = 4;
// Codes are prefetched this far ahead, which is in the next row where rows are short.
constexpr int64_t ahead = 4096;
// Less than this much weight is read faster than another thread wakes up.
constexpr int64_t bytes_per_thread = 32 * 1024;
constexpr int64_t most_columns = 64;

// A decoder makes `vectors` vectors of a chunk of columns, and reads `chunk_bytes` for that, `reach` if it reads more.
// Lane i of vector v holds column_of(v, i), 2^shift_of(v, i) times too large.

// Codes of four bits: a lane is a word, and each vector has one code of every word. The upper half of a word is moved
// down, so that four masks do for all of it, which leaves them in registers; and no code is taken for a sign.
struct Nibbles {
  static constexpr int vectors = 8;
  static constexpr int chunk_columns = lanes * vectors;
  static constexpr int64_t chunk_bytes = 32, reach = 32;

  explicit Nibbles(const Weight&) {}
  static int column_of(int vector, int lane) { return 8 * lane + vector; }
  static int shift_of(int vector, int) { return 4 * (vector % 4); }
  void operator()(const char* source, F32 (&values)[vectors]) const;
};

// Decoders whose columns stay in order.
struct InOrder {
  static constexpr int vectors = 4;
  static constexpr int chunk_columns = lanes * vectors;
  static int column_of(int vector, int lane) { return lanes * vector + lane; }
  static int shift_of(int, int) { return 0; }
};

// Packed codes of other widths, eight at a time.
struct Fields : InOrder {
  int64_t chunk_bytes, reach;
  int bits;

  explicit Fields(const Weight& weight)
      : chunk_bytes(vectors * weight.bits), reach((vectors - 1) * weight.bits + 8), bits(weight.bits) {
    prepare();
  }
  void prepare();
  int shift_of(int vector, int lane) const;
  void operator()(const char* source, F32 (&values)[vectors]) const;

  alignas(32) int32_t masks[lanes];
  alignas(32) unsigned char places[4 * lanes];
};

enum class Byte { unsigned_integer, signed_integer, float8 };

// Codes of one byte.
template <Byte kind>
struct Bytes : InOrder {
  static constexpr int64_t chunk_bytes = chunk_columns, reach = chunk_columns;
  explicit Bytes(const Weight&) {}
  // The bits of a float8 are those of a float16 that is so much smaller.
  static int shift_of(int, int) { return kind == Byte::float8 ? -8 : 0; }
  void operator()(const char* source, F32 (&values)[vectors]) const;
};

// Plain values.
template <Float type>
struct Plain : InOrder {
  static constexpr int64_t chunk_bytes = chunk_columns * float_bytes(type), reach = chunk_bytes;
  explicit Plain(const Weight&) {}
  __attribute__((always_inline)) void operator()(const char* source, F32 (&values)[vectors]) const {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const char* const place = source + v * lanes * float_bytes(type);
      if constexpr (type == Float::bfloat16) values[v] = load_bfloat16(place);
      else if constexpr (type == Float::float16) values[v] = load_float16(place);
      else values[v] = load_float32(place);
    }
  }
};

// Half the lanes each.
F32 two_halves(float first, float second);

inline F32 load_floats(const char* source, Float type, int count) {
  if (count == 0) return zero();
  const bool whole = count == lanes;
  switch (type) {
    case Float::bfloat16: return whole ? load_bfloat16(source) : load_bfloat16(source, count);
    case Float::float16: return whole ? load_float16(source) : load_float16(source, count);
    case Float::float32: return whole ? load_float32(source) : load_float32(source, count);
  }
  return zero();
}

inline float load_float(const void* source, Float type, int64_t index) {
  const char* const place = static_cast<const char*>(source) + index * float_bytes(type);
  if (type == Float::float32) {
    float value;
    __builtin_memcpy(&value, place, sizeof value);
    return value;
  }
  uint16_t half;
  __builtin_memcpy(&half, place, sizeof half);
  return type == Float::bfloat16 ? bfloat16_to_float(half) : float16_to_float(half);
}

inline void store_float(void* target, Float type, int64_t index, float value) {
  char* const place = static_cast<char*>(target) + index * float_bytes(type);
  if (type == Float::float32) {
    __builtin_memcpy(place, &value, sizeof value);
    return;
  }
  const uint16_t half = type == Float::bfloat16 ? float_to_bfloat16(value) : float_to_float16(value);
  __builtin_memcpy(place, &half, sizeof half);
}

// What `action` makes of the decoder of a weight, which is given as a type.
template <typename Decoder>
struct Kind {
  using Type = Decoder;
};
template <typename Action>
inline auto with_decoder(const Weight& weight, Action action) {
  switch (weight.type) {
    case Codes::packed:
      if (weight.bits == 4) return action(Kind<Nibbles>{});
      if (weight.bits == 8) return action(Kind<Bytes<Byte::unsigned_integer>>{});
      return action(Kind<Fields>{});
    case Codes::int8: return action(Kind<Bytes<Byte::signed_integer>>{});
    case Codes::float8: return action(Kind<Bytes<Byte::float8>>{});
    case Codes::bfloat16: return action(Kind<Plain<Float::bfloat16>>{});
    case Codes::float16: return action(Kind<Plain<Float::float16>>{});
    case Codes::float32: break;
  }
  return action(Kind<Plain<Float::float32>>{});
}

bool is_plain(const Weight& weight) {
  return weight.type == Codes::bfloat16 || weight.type == Codes::float16 || weight.type == Codes::float32;
}

int64_t bits_of_codes(const Weight& weight) {
  switch (weight.type) {
    case Codes::packed: return weight.bits;
    case Codes::float32: return 32;
    case Codes::bfloat16: case Codes::float16: return 16;
    default: return 8;
  }
}

// Groups of columns that a row has, and how long they are.
int64_t groups_of(const Weight& weight) { return weight.scale == nullptr ? 1 : weight.scale_columns; }
int64_t columns_of_group(const Weight& weight) {
  return groups_of(weight) == 1 ? weight.columns : weight.block_columns;
}

// Whether a chunk holds two groups; only that of Nibbles is so long.
template <typename Decoder>
bool has_halves(const Weight& weight) {
  return Decoder::chunk_columns == 64 && groups_of(weight) > 1 && weight.block_columns == 32;
}

// What is subtracted from codes besides their zero point.
float stored_offset(const Weight& weight) {
  return weight.type == Codes::packed ? static_cast<float>(1 << (weight.bits - 1)) : 0.0f;
}
bool has_offsets(const Weight& weight) {
  return weight.type == Codes::packed || weight.zero_points != ZeroPoints::none;
}

bool takes(const Linear& problem) {
  const Weight& weight = *problem.weight;
  if (weight.bitmask != nullptr || weight.g_idx != nullptr) return false;
  if (is_plain(weight) != (weight.scale == nullptr)) return false;
  if (weight.type == Codes::float8 && weight.zero_points != ZeroPoints::none) return false;
  if (problem.tokens > most_tokens || weight.columns == 0) return false;
  if (groups_of(weight) == 1) return true;
  const int64_t whole = weight.type == Codes::packed && weight.bits == 4 ? 64 : 32;
  return weight.block_columns % whole == 0 || weight.block_columns == 32;
}

// What prepare leaves for all threads: x as [chunks][tokens][values of a chunk], then the sums of x over the values
// that meet in each lane, [groups][tokens][lanes]; of two groups that share a chunk, each has half the lanes.

template <typename Decoder>
int64_t chunks_of(const Weight& weight) {
  return ceil_div(weight.columns, Decoder::chunk_columns);
}
template <typename Decoder>
int64_t chunks_of_group(const Weight& weight) {
  return ceil_div(columns_of_group(weight), Decoder::chunk_columns);
}
template <typename Decoder>
int64_t sums_offset(const Linear& problem) {
  return chunks_of<Decoder>(*problem.weight) * problem.tokens * Decoder::chunk_columns;
}

size_t prepared_bytes(const Linear& problem) {
  return with_decoder(*problem.weight, [&](auto kind) {
    using Decoder = typename decltype(kind)::Type;
    const int64_t steps = ceil_div(chunks_of<Decoder>(*problem.weight), chunks_of_group<Decoder>(*problem.weight));
    return static_cast<size_t>((sums_offset<Decoder>(problem) + steps * problem.tokens * lanes) * 4);
  });
}

int64_t parts(const Linear&) { return 1; }

template <typename Decoder>
void prepare_token(const Linear& problem, float* prepared, int64_t token) {
  const Weight& weight = *problem.weight;
  const Decoder decode(weight);
  constexpr int columns = Decoder::chunk_columns;
  int order[columns];
  float factors[columns];
  for (int i = 0; i < columns; ++i) {
    order[i] = Decoder::column_of(i / lanes, i % lanes);
    factors[i] = float_of(static_cast<uint32_t>(127 - decode.shift_of(i / lanes, i % lanes)) << 23);
  }
  const char* const x = static_cast<const char*>(problem.x) + token * problem.x_row_bytes;
  const int64_t chunks = chunks_of<Decoder>(weight), in_group = chunks_of_group<Decoder>(weight);
  float* const sums = prepared + sums_offset<Decoder>(problem) + token * lanes;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * columns;
    alignas(32) float values[most_columns];
    for (int i = 0; i < columns; i += lanes) {
      const int64_t left = weight.columns - first - i;
      const int count = static_cast<int>(left < 0 ? 0 : smaller(left, lanes));
      const char* const source = x + (count == 0 ? 0 : first + i) * float_bytes(problem.x_type);
      store_float32(values + i, load_floats(source, problem.x_type, count));
    }
    float* const target = prepared + (chunk * problem.tokens + token) * columns;
    F32 sum = zero();
    for (int i = 0; i < columns; i += lanes) {
      alignas(32) float ordered[lanes];
      for (int lane = 0; lane < lanes; ++lane) ordered[lane] = values[order[i + lane]];
      const F32 part = load_float32(ordered);
      sum = sum + part;
      store_float32(target + i, part * load_float32(factors + i));
    }
    float* const place = sums + chunk / in_group * problem.tokens * lanes;
    store_float32(place, chunk % in_group == 0 ? sum : load_float32(place) + sum);
  }
}

void prepare(const Linear& problem, void* prepared, int64_t, int64_t) {
  with_decoder(*problem.weight, [&](auto kind) {
    for (int64_t token = 0; token < problem.tokens; ++token) {
      prepare_token<typename decltype(kind)::Type>(problem, static_cast<float*>(prepared), token);
    }
  });
}

// What is the same for all rows.
template <typename Decoder>
struct Plan {
  explicit Plan(const Linear& problem) : weight(*problem.weight) {
    stored_bytes = weight.type == Codes::packed ? ceil_div(weight.columns * weight.bits, 32) * 4
                                                : weight.columns * bits_of_codes(weight) / 8;
    chunks = chunks_of<Decoder>(weight);
    in_group = chunks_of_group<Decoder>(weight);
    halves = has_halves<Decoder>(weight);
    offsets = has_offsets(weight);
    sums = sums_offset<Decoder>(problem);
  }
  const Weight& weight;
  int64_t stored_bytes, chunks, in_group, sums;
  bool halves, offsets;
};

// Scales are made floats so many at a time, and what is subtracted from the codes of their groups with them.
constexpr int64_t most_groups = 64;
struct Groups {
  alignas(32) float scales[most_groups];
  alignas(32) float minus[most_groups];

  inline void load(const Weight& weight, int64_t scale_row, int64_t first, int64_t count) {
    const float stored = -stored_offset(weight);
    if (weight.scale == nullptr) {
      scales[0] = 1.0f;
      return;
    }
    const int64_t index = scale_row * weight.scale_columns + first;
    const char* const source = static_cast<const char*>(weight.scale) + index * float_bytes(weight.scale_type);
    for (int64_t i = 0; i < count; i += lanes) {
      const int part = static_cast<int>(smaller(lanes, count - i));
      store_float32(scales + i, load_floats(source + i * float_bytes(weight.scale_type), weight.scale_type, part));
      store_float32(minus + i, broadcast(stored));
    }
    if (weight.zero_points == ZeroPoints::none) return;
    for (int64_t i = 0; i < count; ++i) {
      minus[i] = stored - static_cast<float>(zero_point_at(weight, scale_row, first + i));
    }
  }
};

// Rows that share loads of x, and as many sums for each of them as hide how long an addition takes. With fewer tokens,
// memory is read faster row by row.
template <int tokens>
constexpr int shared_rows = tokens <= 2 ? 1 : 2;
template <int tokens>
constexpr int ways = tokens == 1 ? 4 : tokens == 2 ? 2 : 1;

template <typename Decoder, int rows, int tokens>
__attribute__((always_inline)) inline void multiply_chunk(const Decoder& decode, const char* const (&source)[rows],
                                                          int64_t offset, const float* x,
                                                          F32 (&sum)[rows][tokens][ways<tokens>]) {
  F32 values[rows][Decoder::vectors];
#pragma GCC unroll 2
  for (int r = 0; r < rows; ++r) decode(source[r] + offset, values[r]);
#pragma GCC unroll 8
  for (int v = 0; v < Decoder::vectors; ++v) {
#pragma GCC unroll 4
    for (int t = 0; t < tokens; ++t) {
      const F32 token = load_float32(x + t * Decoder::chunk_columns + v * lanes);
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) {
        F32& target = sum[r][t][v % ways<tokens>];
        target = multiply_add(values[r][v], token, target);
      }
    }
  }
}

// A few rows times all tokens. A row's sums are made in the same order whatever it is computed with.
template <typename Decoder, int rows, int tokens>
void multiply_rows(const Linear& problem, const Plan<Decoder>& plan, const float* x, const Decoder& decode,
                   int64_t row) {
  constexpr int x_step = tokens * Decoder::chunk_columns;
  constexpr int count = ways<tokens>;
  const Weight& weight = plan.weight;
  // Behind a row is another one, except behind the last.
  const int64_t readable = row + rows < weight.rows ? weight.row_bytes + plan.stored_bytes : plan.stored_bytes;
  const int64_t last_whole = smaller(readable - decode.reach, plan.stored_bytes - decode.chunk_bytes);
  const int64_t whole_chunks = last_whole < 0 ? 0 : last_whole / decode.chunk_bytes + 1;
  const int64_t groups = groups_of(weight);
  const int halves = plan.halves ? 2 : 1;
  const float* x_sums = x + plan.sums;

  const char* source[rows];
  int64_t scale_row[rows];
  F32 total[rows][tokens];
  for (int r = 0; r < rows; ++r) {
    source[r] = static_cast<const char*>(weight.codes) + (row + r) * weight.row_bytes;
    scale_row[r] = weight.block_rows == 1 ? row + r : (row + r) / weight.block_rows;
    for (int t = 0; t < tokens; ++t) total[r][t] = zero();
  }
  Groups known[rows];
  int64_t group = 0, first_known = 0, last_known = 0;
  for (int64_t chunk = 0; chunk < plan.chunks; group += halves) {
    if (group >= last_known) {
      first_known = group;
      last_known = smaller(groups, group + most_groups);
      for (int r = 0; r < rows; ++r) known[r].load(weight, scale_row[r], first_known, last_known - first_known);
    }
    F32 sum[rows][tokens][count];
#pragma GCC unroll 8
    for (int i = 0; i < rows * tokens * count; ++i) sum[i / count / tokens][i / count % tokens][i % count] = zero();
    const int64_t last = smaller(plan.chunks, chunk + plan.in_group);
    for (const int64_t whole = smaller(last, whole_chunks); chunk < whole; ++chunk, x += x_step) {
      const int64_t offset = chunk * decode.chunk_bytes;
#pragma GCC unroll 2
      for (int r = 0; r < rows; ++r) __builtin_prefetch(source[r] + offset + ahead);
      multiply_chunk<Decoder, rows, tokens>(decode, source, offset, x, sum);
    }
    for (; chunk < last; ++chunk, x += x_step) {
      char copies[rows][most_columns * 4] = {};
      const char* copied[rows];
      const int64_t offset = chunk * decode.chunk_bytes;
      const int64_t left = smaller(plan.stored_bytes - offset, decode.chunk_bytes);
      for (int r = 0; r < rows; ++r) {
        __builtin_memcpy(copies[r], source[r] + offset, static_cast<uint64_t>(left));
        copied[r] = copies[r];
      }
      multiply_chunk<Decoder, rows, tokens>(decode, copied, 0, x, sum);
    }
    const int64_t place = group - first_known;
#pragma GCC unroll 2
    for (int r = 0; r < rows; ++r) {
      F32 scale = broadcast(known[r].scales[place]), minus = broadcast(known[r].minus[place]);
      if (Decoder::chunk_columns == 64 && plan.halves && group + 1 < groups) {
        scale = two_halves(known[r].scales[place], known[r].scales[place + 1]);
        minus = two_halves(known[r].minus[place], known[r].minus[place + 1]);
      }
#pragma GCC unroll 4
      for (int t = 0; t < tokens; ++t) {
        F32 of_group = sum[r][t][0];
        if constexpr (count == 2) of_group = of_group + sum[r][t][1];
        if constexpr (count == 4) of_group = (of_group + sum[r][t][1]) + (sum[r][t][2] + sum[r][t][3]);
        if (plan.offsets) of_group = multiply_add(minus, load_float32(x_sums + t * lanes), of_group);
        total[r][t] = multiply_add(scale, of_group, total[r][t]);
      }
    }
    x_sums += tokens * lanes;
  }
  for (int r = 0; r < rows; ++r) {
    const float bias = problem.bias == nullptr ? 0.0f : load_float(problem.bias, problem.bias_type, row + r);
    for (int t = 0; t < tokens; ++t) {
      store_float(problem.y, problem.x_type, t * weight.rows + row + r, sum(total[r][t]) + bias);
    }
  }
}

int64_t tasks(const Linear& problem) { return ceil_div(problem.weight->rows, task_rows); }

int64_t tasks_per_thread(const Linear& problem) {
  const int64_t task_bytes = task_rows * problem.weight->columns * bits_of_codes(*problem.weight) / 8;
  return 1 + bytes_per_thread / (task_bytes * problem.tokens + 1);
}

template <typename Decoder, int tokens>
void run_rows(const Linear& problem, const float* prepared, int64_t first, int64_t last) {
  constexpr int rows = shared_rows<tokens>;
  const Decoder decode(*problem.weight);
  const Plan<Decoder> plan(problem);
  int64_t row = first;
  for (; row + rows <= last; row += rows) multiply_rows<Decoder, rows, tokens>(problem, plan, prepared, decode, row);
  for (; row < last; ++row) multiply_rows<Decoder, 1, tokens>(problem, plan, prepared, decode, row);
}

void run(const Linear& problem, const void* prepared, int64_t first_task, int64_t last_task) {
  const auto* const x = static_cast<const float*>(prepared);
  const int64_t first = first_task * task_rows;
  const int64_t last = smaller(problem.weight->rows, last_task * task_rows);
  with_decoder(*problem.weight, [&](auto kind) {
    using Decoder = typename decltype(kind)::Type;
    switch (problem.tokens) {
      case 1: return run_rows<Decoder, 1>(problem, x, first, last);
      case 2: return run_rows<Decoder, 2>(problem, x, first, last);
      case 3: return run_rows<Decoder, 3>(problem, x, first, last);
      default: return run_rows<Decoder, 4>(problem, x, first, last);
    }
  });
}

}  // namespace
}  // namespace compressed_format
