#include "cpu/activations/activations.h"

namespace compressed_format {

extern const ActivationKernel activations_portable;
#if COMPRESSED_FORMAT_X86
extern const ActivationKernel activations_avx2;
extern const ActivationKernel activations_avx512;
#endif

namespace {

// Written so that what is not a number stays.
float lesser(float a, float b) { return a < b || a != a ? a : b; }
float greater(float a, float b) { return a > b || a != a ? a : b; }

}  // namespace

const ByIsa<const ActivationKernel> activation_kernels = [] {
  ByIsa<const ActivationKernel> kernels;
  kernels.portable = &activations_portable;
#if COMPRESSED_FORMAT_X86
  kernels.avx2 = &activations_avx2;
  kernels.avx512 = &activations_avx512;
#endif
  return kernels;
}();

Range merge(const Range* ranges, int64_t count) {
  Range merged = ranges[0];
  for (int64_t i = 1; i < count; ++i) {
    merged.least = lesser(merged.least, ranges[i].least);
    merged.greatest = greater(merged.greatest, ranges[i].greatest);
  }
  return merged;
}

}  // namespace compressed_format
