#include "cpu/linear/linear.h"

namespace compressed_format {

#if COMPRESSED_FORMAT_X86
extern const LinearKernel indexed_groups_avx512;
const ByIsa<const LinearKernel> indexed_groups{nullptr, nullptr, &indexed_groups_avx512, nullptr};
#else
const ByIsa<const LinearKernel> indexed_groups{};
#endif

}  // namespace compressed_format
