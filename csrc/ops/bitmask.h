// What bitmasks of sparse weights say. They may come from anybody's file.
#pragma once

#include <cstdint>

namespace compressed_format {

// How many of a row's bits are set. Bits beyond the last column mean nothing.
int64_t count_bits(const uint8_t* mask, int64_t columns);

// The first four columns of a row, of which there is a multiple of four, that have not exactly two bits; -1 if none.
int64_t find_uneven_quad(const uint8_t* mask, int64_t columns);

}  // namespace compressed_format
