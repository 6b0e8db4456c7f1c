#include "cpu/pack/pack.h"

#include <bit>

namespace compressed_format {

// Bytes are written in the order of the bits in them. That makes the little-endian words of the layout on a
// little-endian machine only.
static_assert(std::endian::native == std::endian::little, "a big-endian machine has to run the reference");

PackRow pack_row_portable;
#if COMPRESSED_FORMAT_X86
PackRow pack_row_avx2, pack_row_avx512;
#endif

const ByIsa<PackRow> pack_row = COMPRESSED_FORMAT_BY_ISA(pack_row);

}  // namespace compressed_format
