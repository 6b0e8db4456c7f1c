// The CPU library's only file that knows torch: takes tensors apart for the kernels and registers the ops, through the
// stable C++ interface alone. Schemas, fakes, checks and autograd formulas are in compressed_format/ops; by the time a
// function here runs, the checks have passed.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <vector>

#include "cpu/pack.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Below this much work, waking the other threads takes longer than what they would save.
constexpr int64_t words_per_thread = 16384;

Tensor pack_codes_reference(const Tensor& codes, int64_t bits) {
  std::array<StableIValue, 2> stack{from(codes), from(bits)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("compressed_format::pack_codes_reference", "", stack.data(), TORCH_ABI_VERSION));
  return to<Tensor>(stack[0]);
}

Tensor pack_codes(const Tensor& codes, int64_t bits) {
  using namespace compressed_format;
  // Type and dimensions were checked in Python; read memory by them only where that is certain.
  const bool well_formed = codes.scalar_type() == ScalarType::Char && codes.dim() > 0;
  if (!well_formed || select_pack_kernel(bits) == PackKernel::none) {
    return pack_codes_reference(codes, bits);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(compressed_format, CPU, library) { library.impl("pack_codes", TORCH_BOX(&pack_codes)); }

// What this library holds, for backend_info(): one kernel a line, the op's name before the colon.
#if defined(_WIN32)
#define COMPRESSED_FORMAT_EXPORT extern "C" __declspec(dllexport)
#else
#define COMPRESSED_FORMAT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

COMPRESSED_FORMAT_EXPORT const char* compressed_format_kernels() { return "pack_codes: int8 codes of 4 bits"; }
