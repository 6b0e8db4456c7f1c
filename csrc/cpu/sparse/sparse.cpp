#include "cpu/sparse/sparse.h"

#include <bit>

namespace compressed_format {

// The bits of eight values are written as bytes of words, in the order that they have in the file.
static_assert(std::endian::native == std::endian::little, "a big-endian machine has to run the reference");

extern const SparseKernel sparse_portable;
#if COMPRESSED_FORMAT_X86
extern const SparseKernel sparse_avx512;
// Without instructions that close gaps, wider vectors gain nothing: AVX2 has none.
const ByIsa<const SparseKernel> sparse_kernel{&sparse_portable, nullptr, &sparse_avx512, nullptr};
#else
const ByIsa<const SparseKernel> sparse_kernel{&sparse_portable, nullptr, nullptr, nullptr};
#endif

}  // namespace compressed_format
