// Tiles: sixteen rows of 64 bytes, of which AMX multiplies two and adds the product to a third.
#pragma once

#include "cpu/simd/avx512.h"

namespace compressed_format {
namespace {

constexpr int tile_rows = 16;

// The compiler does not know which memory the instructions on tiles read, and must not put off what is written there.
inline void write_out() { asm volatile("" ::: "memory"); }

struct TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfiguration) == 64);

// All eight tiles of this thread in their full size. _tile_release() gives them back: then there is less to save when
// the thread is interrupted.
inline void take_tiles() {
  TileConfiguration configuration;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.row_bytes[tile] = 64;
    configuration.rows[tile] = tile_rows;
  }
  asm volatile("ldtilecfg %0" ::"m"(configuration));
}

}  // namespace
}  // namespace compressed_format
