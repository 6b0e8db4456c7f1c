#include "cpu/linear/linear.h"

namespace compressed_format {

const ByIsa<const LinearKernel> few_tokens{};
const ByIsa<const LinearKernel> many_tokens{};

}  // namespace compressed_format
