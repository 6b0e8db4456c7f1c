#include "cpu/quantize/quantize.h"

namespace compressed_format {

extern const QuantizeKernel quantize_portable;
#if COMPRESSED_FORMAT_X86
extern const QuantizeKernel quantize_avx2, quantize_avx512;
const ByIsa<const QuantizeKernel> quantize_kernel{&quantize_portable, &quantize_avx2, &quantize_avx512, nullptr};
#else
const ByIsa<const QuantizeKernel> quantize_kernel{&quantize_portable, nullptr, nullptr, nullptr};
#endif

}  // namespace compressed_format
