// What the drivers share: tensors without a byte to spare, threads, and the kernels of every level there is.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/weight.h"

namespace driver {

using namespace compressed_format;

inline std::mt19937 generator(1);

inline int64_t random_below(int64_t bound) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(bound)); }

// Bytes at an odd address, and none behind them: reading or writing one too far is seen.
class Tensor {
 public:
  explicit Tensor(int64_t size = 0) : size_(size), bytes_(new unsigned char[static_cast<size_t>(size) + 1]) {
    for (int64_t i = 0; i < size; ++i) data()[i] = static_cast<unsigned char>(generator());
  }
  unsigned char* data() { return bytes_.get() + 1; }
  const unsigned char* data() const { return bytes_.get() + 1; }
  int64_t size() const { return size_; }
  void clear() {
    for (int64_t i = 0; i < size_; ++i) data()[i] = 0;
  }
  bool operator==(const Tensor& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), static_cast<size_t>(size_)) == 0;
  }

 private:
  int64_t size_;
  std::unique_ptr<unsigned char[]> bytes_;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float as_bfloat16(float value) { return float_of(static_cast<uint32_t>(to_bfloat16(value)) << 16); }

inline float from_float16(uint16_t half) {
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  float value = static_cast<float>(exponent == 0 ? fraction : fraction + 1024);
  for (int i = exponent == 0 ? 1 : exponent; i < 25; ++i) value /= 2;
  for (int i = 25; i < exponent; ++i) value *= 2;
  return half >> 15 ? -value : value;
}

inline float from_float8(unsigned char code) {
  const int exponent = code >> 3 & 15, fraction = code & 7;
  float value = static_cast<float>(exponent == 0 ? fraction : fraction + 8) / 512;
  for (int i = 1; i < exponent; ++i) value *= 2;
  return code >> 7 ? -value : value;
}

inline float get(const void* values, Float type, int64_t index) {
  const auto* const at = static_cast<const unsigned char*>(values) + index * float_bytes(type);
  if (type == Float::float32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  return type == Float::float16 ? from_float16(half) : float_of(static_cast<uint32_t>(half) << 16);
}

inline void set(void* values, Float type, int64_t index, float value) {
  auto* const at = static_cast<unsigned char*>(values) + index * float_bytes(type);
  if (type == Float::float32) {
    std::memcpy(at, &value, sizeof value);
    return;
  }
  // Of float16, only multiples of 2**-10 below 2 that are exact are asked for here: the pattern counts such steps.
  const uint32_t bits = bits_of(value);
  uint16_t half = to_bfloat16(value);
  if (type == Float::float16) {
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t moved = magnitude == 0 ? 0 : (magnitude - 0x38000000u) >> 13;
    half = static_cast<uint16_t>((bits >> 16 & 0x8000u) | moved);
  }
  std::memcpy(at, &half, sizeof half);
}

// `count` values within -2 to 2, some of them zero, that every type holds exactly but for the last bits of bfloat16.
inline Tensor random_values(int64_t count, Float type) {
  Tensor values(count * float_bytes(type));
  for (int64_t i = 0; i < count; ++i) {
    const auto steps = static_cast<float>(random_below(4001) - 2000);
    set(values.data(), type, i, random_below(16) == 0 ? 0.0f : steps / 1024);
  }
  return values;
}

// body(first, last) for all of `count` pieces, in three threads of unequal shares.
template <typename Body>
void in_threads(int64_t count, Body body) {
  const int64_t cuts[] = {0, count / 4, count / 4 + count / 3, count};
  std::vector<std::thread> threads;
  for (int part = 0; part < 3; ++part) {
    if (cuts[part] < cuts[part + 1]) threads.emplace_back([=] { body(cuts[part], cuts[part + 1]); });
  }
  for (std::thread& thread : threads) thread.join();
}

// A kernel of each level that may run here, the lowest first.
template <typename Function>
std::vector<Function*> levels(const ByIsa<Function>& kernel) {
  const std::pair<Isa, Function*> all[] = {{Isa::portable, kernel.portable},
                                           {Isa::avx2, kernel.avx2},
                                           {Isa::avx512, kernel.avx512},
                                           {Isa::amx, kernel.amx}};
  std::vector<Function*> found;
  for (const auto& [level, function] : all) {
    if (function != nullptr && level <= isa()) found.push_back(function);
  }
  return found;
}

}  // namespace driver
