#include "cpu/linear/linear.h"

namespace compressed_format {

#if COMPRESSED_FORMAT_X86
extern const LinearKernel plain_values_avx512;
const ByIsa<const LinearKernel> plain_values{nullptr, nullptr, &plain_values_avx512, nullptr};
#else
const ByIsa<const LinearKernel> plain_values{};
#endif

}  // namespace compressed_format
