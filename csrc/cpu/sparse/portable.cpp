#include <cstdint>
#include <cstring>

namespace compressed_format {
namespace {

inline int64_t count_bits(uint64_t bits) {
  bits -= bits >> 1 & 0x5555555555555555u;
  bits = (bits & 0x3333333333333333u) + (bits >> 2 & 0x3333333333333333u);
  return static_cast<int64_t>(((bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu) * 0x0101010101010101u >> 56);
}

template <int bytes>
struct ElementOf;
template <>
struct ElementOf<1> {
  using Type = uint8_t;
};
template <>
struct ElementOf<2> {
  using Type = uint16_t;
};
template <>
struct ElementOf<4> {
  using Type = uint32_t;
};

template <int bytes>
struct Block {
  static constexpr int64_t lanes = 8;
  using Element = typename ElementOf<bytes>::Type;

  Element v[lanes];

  static Block load(const void* source, int count = lanes) {
    Block block = {};
    std::memcpy(block.v, source, static_cast<size_t>(count * bytes));
    return block;
  }
  void store(void* target, int count = lanes) const { std::memcpy(target, v, static_cast<size_t>(count * bytes)); }

  uint64_t nonzero(uint32_t sign) const {
    uint64_t bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= uint64_t{(v[i] & ~sign) != 0} << i;
    return bits;
  }
  uint64_t next_is_larger(uint32_t sign, uint32_t infinity) const { return larger(1, sign, infinity); }
  uint64_t next_but_one_is_larger(uint32_t sign, uint32_t infinity) const { return larger(2, sign, infinity); }

  Block keep(uint64_t bits) const {
    Block block = {};
    int kept = 0;
    for (int i = 0; i < lanes; ++i) {
      block.v[kept] = v[i];
      kept += static_cast<int>(bits >> i & 1);
    }
    return block;
  }
  Block zero_unless(uint64_t bits) const {
    Block block = {};
    for (int i = 0; i < lanes; ++i) block.v[i] = bits >> i & 1 ? v[i] : Element{0};
    return block;
  }

 private:
  uint64_t larger(int distance, uint32_t sign, uint32_t infinity) const {
    uint32_t magnitude[lanes];
    for (int i = 0; i < lanes; ++i) {
      magnitude[i] = v[i] & ~sign;
      // Whatever is not a number is larger than all others, and equal among itself.
      if (magnitude[i] > infinity) magnitude[i] = infinity + 1;
    }
    uint64_t bits = 0;
    for (int i = 0; i < lanes; ++i) {
      const int other = i / 4 * 4 + (i + distance) % 4;
      const bool is_larger = other < i ? magnitude[other] >= magnitude[i] : magnitude[other] > magnitude[i];
      bits |= uint64_t{is_larger} << i;
    }
    return bits;
  }
};

}  // namespace
}  // namespace compressed_format

#include "cpu/sparse/sparse.inl"

namespace compressed_format {

extern const SparseKernel sparse_portable;
const SparseKernel sparse_portable = {prune_2_of_4, compress_2_of_4, find_values, keep_values};

}  // namespace compressed_format
