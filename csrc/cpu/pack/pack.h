// Packing of codes into int32 words: the layout that compressed_format/bitpack.py defines.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace compressed_format {

// How many words a row of `size` codes takes. Sizes are those of memory: eight times them is no overflow.
constexpr int64_t packed_words(int64_t size, int bits) { return (size * bits + 31) / 32; }

// How many codes fill whole words at any width: rows may be cut there and packed in parts.
constexpr int64_t codes_per_cut = 32;

// Packs `count` codes of 1 to 8 bits into the bytes of a row, of which there are `bytes`, no less than the codes take;
// those beyond them become zero. Pointers may have any alignment. Bits of a code beyond its width are dropped.
using PackRow = void(const int8_t* codes, int64_t count, int bits, void* packed, int64_t bytes);

extern const ByIsa<PackRow> pack_row;

}  // namespace compressed_format
