#include "cpu/linear/linear.h"

namespace compressed_format {

extern const LinearKernel few_tokens_portable;
#if COMPRESSED_FORMAT_X86
extern const LinearKernel few_tokens_avx2, few_tokens_avx512;
const ByIsa<const LinearKernel> few_tokens{&few_tokens_portable, &few_tokens_avx2, &few_tokens_avx512, nullptr};
#else
const ByIsa<const LinearKernel> few_tokens{&few_tokens_portable, nullptr, nullptr, nullptr};
#endif

}  // namespace compressed_format
