// compressed_format::pack_codes on the CPU.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "cpu/pack/pack.h"
#include "ops/tensors.h"

namespace compressed_format {
namespace {

// Below this much work, waking the other threads takes longer than what they would save.
constexpr int64_t words_per_thread = 16384;

Tensor pack_codes(const Tensor& codes, int64_t bits) {
  // Type and dimensions were checked in Python; read memory by them only where that is certain.
  const bool well_formed = codes.scalar_type() == ScalarType::Char && codes.dim() > 0;
  if (!well_formed || select_pack_kernel(bits) == PackKernel::none) {
    return call_op<Tensor>("compressed_format::pack_codes_reference", codes, bits);
  }
  const auto sizes = codes.sizes();
  std::vector<int64_t> packed_sizes(sizes.begin(), sizes.end());
  const int64_t size = packed_sizes.back();
  packed_sizes.back() = four_bit_words(size);

  const Tensor rows = torch::stable::contiguous(codes);
  Tensor packed = torch::stable::new_empty(rows, packed_sizes, ScalarType::Int);
  const auto* const source = static_cast<const int8_t*>(rows.const_data_ptr());
  void* const destination = packed.mutable_data_ptr();
  torch::stable::parallel_for(0, packed.numel(), words_per_thread, [=](int64_t first, int64_t last) {
    pack_four_bits(source, size, destination, first, last);
  });
  return packed;
}

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) { library.impl("pack_codes", TORCH_BOX(&pack_codes)); }

}  // namespace
}  // namespace compressed_format
