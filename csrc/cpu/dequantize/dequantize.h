// Compressed weights made dense: (code - zero point) * scale, rounded as compressed_format/blocks.py says.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/weight.h"

namespace compressed_format {

// Whether dequantize_rows takes the weight: all but what no format stores, namely plain values that have scales, float8
// codes that have zero points, and g_idx where blocks of rows share scales.
bool can_dequantize(const Weight& weight);

// Rows [first_row, last_row) x columns [first_column, last_column) into `out`, of any alignment, whose rows lie
// out_row_bytes apart. A value is rounded to the type of the scale, then to out_type, each to nearest, ties to even;
// values that are not a number may have any bits that say so. Nothing but the part is written, and nothing outside the
// weight's tensors is read, whatever they hold (but for g_idx, see weight.h). Columns may begin anywhere; multiples of
// 64 are the fastest. Uses no scratch memory.
void dequantize_rows(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_column,
                     int64_t last_column, void* out, int64_t out_row_bytes, Float out_type);

// Values or codes of `value_bytes` bytes each, of a weight with a bitmask and row_offsets, as they are: rows
// [first_row, last_row) into `out`, which is given from its first row and is contiguous, with zeros between them.
void expand_rows(const Weight& weight, int value_bytes, int64_t first_row, int64_t last_row, void* out);

// The codes of rows [first_row, last_row), `size` of `bits` bits to a row of little-endian words in the dense layout.
// Both matrices are contiguous, of any alignment, and given from their beginning.
void unpack_rows(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row, int8_t* codes);

// The same for the word-aligned layout (compressed_format/bitpack.py), in which no code straddles two words.
void unpack_word_aligned_rows(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row,
                              int8_t* codes);

// What each instruction set has of its own.
using DequantizeRows = void(const Weight& weight, int64_t first_row, int64_t last_row, int64_t first_column,
                            int64_t last_column, void* out, int64_t out_row_bytes, Float out_type);
using ExpandRows = void(const Weight& weight, int value_bytes, int64_t first_row, int64_t last_row, void* out);
using UnpackRows = void(const void* words, int bits, int64_t size, int64_t first_row, int64_t last_row, int8_t* codes);

DequantizeRows dequantize_rows_portable, dequantize_rows_avx2, dequantize_rows_avx512;
ExpandRows expand_rows_portable, expand_rows_avx2, expand_rows_avx512;
UnpackRows unpack_rows_portable, unpack_rows_avx2, unpack_rows_avx512;

}  // namespace compressed_format
