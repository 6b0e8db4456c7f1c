#include "cpu/linear/linear.h"

namespace compressed_format {

#if COMPRESSED_FORMAT_X86
extern const LinearKernel split_panels_avx512;
const ByIsa<const LinearKernel> split_panels{nullptr, nullptr, &split_panels_avx512, nullptr};
#else
const ByIsa<const LinearKernel> split_panels{};
#endif

}  // namespace compressed_format
