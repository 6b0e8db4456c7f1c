// compressed_format::pack_codes on the CPU.

#include "cpu/pack/pack.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu/large_memory.h"
#include "ops/tensors.h"

namespace compressed_format {
namespace {

// Below this much work, waking the other threads takes longer than what they would save. A multiple of codes_per_cut:
// long rows are cut into parts of this many codes.
constexpr int64_t codes_per_thread = 65536;

Tensor pack_codes(const Tensor& codes, int64_t bits) {
  // Type and dimensions were checked in Python; read memory by them only where that is certain.
  const bool well_formed = codes.scalar_type() == ScalarType::Char && codes.dim() > 0 && bits >= 1 && bits <= 8;
  if (!well_formed) return call_op<Tensor>("compressed_format::pack_codes_reference", codes, bits);
  const auto sizes = codes.sizes();
  std::vector<int64_t> packed_sizes(sizes.begin(), sizes.end());
  const int64_t size = packed_sizes.back();
  const int width = static_cast<int>(bits);
  const int64_t row_bytes = packed_words(size, width) * 4;
  packed_sizes.back() = row_bytes / 4;

  const Tensor rows = torch::stable::contiguous(codes);
  Tensor packed = torch::stable::new_empty(rows, packed_sizes, ScalarType::Int);
  if (packed.numel() == 0) return packed;
  const auto* const source = static_cast<const int8_t*>(rows.const_data_ptr());
  auto* const target = static_cast<char*>(packed.mutable_data_ptr());
  expect_writes(target, static_cast<size_t>(packed.numel()) * 4);
  PackRow* const pack = pack_row.get();
  const int64_t parts = (size + codes_per_thread - 1) / codes_per_thread;
  const int64_t parts_per_thread = std::max<int64_t>(codes_per_thread / size, 1);
  torch::stable::parallel_for(0, rows.numel() / size * parts, parts_per_thread, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / parts, begin = i % parts * codes_per_thread;
      const int64_t end = std::min(begin + codes_per_thread, size);
      const int64_t from = begin / 8 * bits;
      const int64_t to = end == size ? row_bytes : end / 8 * bits;
      pack(source + row * size + begin, end - begin, width, target + row * row_bytes + from, to - from);
    }
  });
  return packed;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) { library.impl("pack_codes", TORCH_BOX(&pack_codes)); }

}  // namespace
}  // namespace compressed_format
