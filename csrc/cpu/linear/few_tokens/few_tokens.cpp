#include "cpu/linear/linear.h"

namespace compressed_format {

#if COMPRESSED_FORMAT_X86
extern const LinearKernel few_tokens_avx512;
const ByIsa<const LinearKernel> few_tokens{nullptr, nullptr, &few_tokens_avx512, nullptr};
#else
const ByIsa<const LinearKernel> few_tokens{};
#endif

}  // namespace compressed_format
