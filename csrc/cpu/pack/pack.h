// Packing of codes into int32 words: the layout that compressed_format/bitpack.py defines.
#pragma once

#include <cstdint>

namespace compressed_format {

enum class PackKernel {
  none,       // nothing here packs this: the reference has to
  four_bits,  // eight codes a word, none of which straddles two
};

// Which kernel packs codes of this width. Nothing but the problem decides.
PackKernel select_pack_kernel(int64_t bits);

// How many words a row of `size` codes takes at four bits.
constexpr int64_t four_bit_words(int64_t size) { return size / 8 + (size % 8 != 0); }

// Packs words [first, last) of a matrix with rows of `size` codes each; words are counted through all rows, so that
// callers may split the work anywhere, in one long row as well as in many short ones. `codes` and `words` point to the
// beginning of the whole matrix and may have any alignment. A code's bits beyond the low four are dropped.
void pack_four_bits(const int8_t* codes, int64_t size, void* words, int64_t first, int64_t last);

}  // namespace compressed_format
