// The kernels of sparse.h on blocks of elements. Whoever includes this has defined `Block<bytes>`, of elements of so
// many bytes, with
//   `lanes`, a multiple of eight: how many there are;
//   `load(const void*)`, the same with a count: elements beyond that are zero;
//   `nonzero(uint32_t sign)`: a bit for each element that has bits besides those of `sign`;
//   `next_is_larger(uint32_t sign, uint32_t infinity)`: a bit for each element whose magnitude is exceeded by that of
//   the next one of its four (the first follows the last), whereof the left one of two equals counts as larger;
//   `next_but_one_is_larger(...)`: the same for the one after that, in the bits of the first two of each four;
//   `keep(uint64_t bits)`: the elements at these bits, one after the other, and then anything;
//   `zero_unless(uint64_t bits)`: the elements at these bits where they are, and zeros;
//   `store(void*)`, the same with a count: only so many are written;
// and `count_bits(uint64_t)`.

#include "cpu/sparse/sparse.h"

namespace compressed_format {
namespace {

// One bit for each four.
constexpr uint64_t each_four = 0x1111111111111111u;

inline uint64_t first_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// Calls body(block, place, count) for a row, `count` being the number of lanes but for the last.
template <int bytes, typename Body>
inline void by_blocks(const char* row, int64_t columns, Body body) {
  constexpr int64_t lanes = Block<bytes>::lanes;
  int64_t i = 0;
  for (; i + lanes <= columns; i += lanes) body(Block<bytes>::load(row + i * bytes), i, lanes);
  if (i < columns) body(Block<bytes>::load(row + i * bytes, static_cast<int>(columns - i)), i, columns - i);
}

template <int64_t lanes, typename Block>
inline void store(void* target, const Block& block, int64_t count) {
  count == lanes ? block.store(target) : block.store(target, static_cast<int>(count));
}

inline void store_bits(uint8_t* bitmask, uint64_t bits, int64_t count) {
  __builtin_memcpy(bitmask, &bits, static_cast<unsigned>(count + 7) / 8);
}

// What an element's bits say, by type.
struct Pattern {
  uint32_t sign;
  uint32_t infinity;
};

inline Pattern pattern_of(Codes type) {
  switch (type) {
    case Codes::bfloat16: return {0x8000u, 0x7f80u};
    case Codes::float16: return {0x8000u, 0x7c00u};
    case Codes::float32: return {0x80000000u, 0x7f800000u};
    case Codes::float8: return {0x80u, 0};  // not pruned
    default: return {0, 0};
  }
}

template <int bytes>
void prune_rows(const Sparse& problem, void* pruned, int64_t first, int64_t last) {
  const Pattern pattern = pattern_of(problem.type);
  for (int64_t row = first; row < last; ++row) {
    const auto* const x = static_cast<const char*>(problem.values) + row * problem.row_bytes;
    char* const y = static_cast<char*>(pruned) + row * problem.columns * bytes;
    by_blocks<bytes>(x, problem.columns, [&](Block<bytes> block, int64_t i, int64_t count) {
      // Of two elements, exactly one is the larger: three comparisons of each with the others of its four come from
      // one and a half. What two others exceed is dropped.
      const uint64_t one = block.next_is_larger(pattern.sign, pattern.infinity);
      const uint64_t low = block.next_but_one_is_larger(pattern.sign, pattern.infinity) & each_four * 3;
      const uint64_t two = low | (~low & each_four * 3) << 2;
      const uint64_t three = ~((one << 1 & each_four * 14) | (one >> 3 & each_four));
      const uint64_t dropped = (one & two) | (one & three) | (two & three);
      store<Block<bytes>::lanes>(y + i * bytes, block.zero_unless(~dropped), count);
    });
  }
}

// Two bits of each four: of those that are set, the first two; which others, only where there are fewer, is what the
// writer of the files that exist happens to do.
struct Choice {
  uint64_t bits;
  uint64_t crowded;  // a bit for each four that has more than two
};

inline Choice two_of_four(uint64_t set) {
  const uint64_t count = (set & each_four) + (set >> 1 & each_four) + (set >> 2 & each_four) + (set >> 3 & each_four);
  const uint64_t odd = count & each_four, two = count >> 1 & each_four, four = count >> 2 & each_four;
  const uint64_t some = odd | two | four, single = odd & ~two, crowded = four | (odd & two);
  // Taking one from four bits that have some clears the lowest.
  const uint64_t but_first = set & (set - some);
  const uint64_t but_two = but_first & (but_first - (two | four));
  const uint64_t alone = set & single * 15;
  const uint64_t beside = (alone & each_four * 3) << 2 | (alone & each_four * 4) << 1 | (alone & each_four * 8) >> 1;
  return {(set & ~but_two) | beside | (~some & each_four) * 12, crowded};
}

template <int bytes>
int64_t compress_rows(const Sparse& problem, void* compressed, uint8_t* bitmask, int64_t first, int64_t last) {
  const Pattern pattern = pattern_of(problem.type);
  const int64_t kept = problem.columns / 2;
  int64_t found = -1;
  for (int64_t row = first; row < last; ++row) {
    const auto* const x = static_cast<const char*>(problem.values) + row * problem.row_bytes;
    char* const y = static_cast<char*>(compressed) + row * kept * bytes;
    uint8_t* const bits = bitmask + row * mask_bytes(problem.columns);
    by_blocks<bytes>(x, problem.columns, [&](Block<bytes> block, int64_t i, int64_t count) {
      const Choice choice = two_of_four(block.nonzero(pattern.sign));
      const uint64_t chosen = choice.bits & first_bits(count);
      if (choice.crowded != 0 && found < 0) {
        found = row * problem.columns + i + __builtin_ctzll(choice.crowded);
      }
      store_bits(bits + i / 8, chosen, count);
      block.keep(chosen).store(y + i / 2 * bytes, static_cast<int>(count / 2));
    });
  }
  return found;
}

template <int bytes>
void find_in_rows(const Sparse& problem, uint8_t* bitmask, int64_t* counts, int64_t first, int64_t last) {
  const Pattern pattern = pattern_of(problem.type);
  for (int64_t row = first; row < last; ++row) {
    const auto* const x = static_cast<const char*>(problem.values) + row * problem.row_bytes;
    uint8_t* const bits = bitmask + row * mask_bytes(problem.columns);
    int64_t found = 0;
    by_blocks<bytes>(x, problem.columns, [&](Block<bytes> block, int64_t i, int64_t count) {
      const uint64_t set = block.nonzero(pattern.sign);
      found += count_bits(set);
      store_bits(bits + i / 8, set, count);
    });
    counts[row] = found;
  }
}

template <int bytes>
void keep_in_rows(const Sparse& problem, const uint8_t* bitmask, const int64_t* starts, void* compressed,
                  int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const auto* const x = static_cast<const char*>(problem.values) + row * problem.row_bytes;
    const uint8_t* const bits = bitmask + row * mask_bytes(problem.columns);
    char* y = static_cast<char*>(compressed) + starts[row] * bytes;
    by_blocks<bytes>(x, problem.columns, [&](Block<bytes> block, int64_t i, int64_t count) {
      uint64_t set = 0;
      __builtin_memcpy(&set, bits + i / 8, static_cast<unsigned>(count + 7) / 8);
      const auto kept = static_cast<int>(count_bits(set));
      // Never more than are kept: what follows may be another thread's.
      block.keep(set).store(y, kept);
      y += kept * bytes;
    });
  }
}

void prune_2_of_4(const Sparse& problem, void* pruned, int64_t first, int64_t last) {
  element_bytes(problem.type) == 4 ? prune_rows<4>(problem, pruned, first, last)
                                   : prune_rows<2>(problem, pruned, first, last);
}

int64_t compress_2_of_4(const Sparse& problem, void* compressed, uint8_t* bitmask, int64_t first, int64_t last) {
  switch (element_bytes(problem.type)) {
    case 1: return compress_rows<1>(problem, compressed, bitmask, first, last);
    case 2: return compress_rows<2>(problem, compressed, bitmask, first, last);
    default: return compress_rows<4>(problem, compressed, bitmask, first, last);
  }
}

void find_values(const Sparse& problem, uint8_t* bitmask, int64_t* counts, int64_t first, int64_t last) {
  switch (element_bytes(problem.type)) {
    case 1: return find_in_rows<1>(problem, bitmask, counts, first, last);
    case 2: return find_in_rows<2>(problem, bitmask, counts, first, last);
    default: return find_in_rows<4>(problem, bitmask, counts, first, last);
  }
}

void keep_values(const Sparse& problem, const uint8_t* bitmask, const int64_t* starts, void* compressed,
                 int64_t first, int64_t last) {
  switch (element_bytes(problem.type)) {
    case 1: return keep_in_rows<1>(problem, bitmask, starts, compressed, first, last);
    case 2: return keep_in_rows<2>(problem, bitmask, starts, compressed, first, last);
    default: return keep_in_rows<4>(problem, bitmask, starts, compressed, first, last);
  }
}

}  // namespace
}  // namespace compressed_format
