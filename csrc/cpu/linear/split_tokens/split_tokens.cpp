#include "cpu/linear/linear.h"

namespace compressed_format {

#if COMPRESSED_FORMAT_X86
extern const LinearKernel split_tokens_avx512;
const ByIsa<const LinearKernel> split_tokens{nullptr, nullptr, &split_tokens_avx512, nullptr};
#else
const ByIsa<const LinearKernel> split_tokens{};
#endif

}  // namespace compressed_format
