#include "cpu/linear/many_tokens/many_tokens.h"

namespace compressed_format {

#if COMPRESSED_FORMAT_X86
const ByIsa<const LinearKernel> many_tokens{&many_tokens_portable, &many_tokens_avx2, &many_tokens_avx512,
                                            &many_tokens_amx};
#else
const ByIsa<const LinearKernel> many_tokens{&many_tokens_portable, nullptr, nullptr, nullptr};
#endif

}  // namespace compressed_format
