// SPDX-License-Identifier: Apache-2.0
// Codes of one row are one little-endian bit stream: code k occupies bits [k*bits, (k+1)*bits) of the stream, bit b of
// the stream is bit b % 32 of int32 word b / 32, and words are stored little-endian. A row fills
// ceil(K * bits / 32) words; unused bits at its end are zero.
//
//   bits = 4, word 0      31                            0
//                        | k7 | k6 | k5 | k4 | k3 | k2 | k1 | k0 |
//
//   bits = 3, words 0-1   31 29                                            0       63 61         34   32
//                        |k10:|k9  | k8 | k7 | k6 | k5 | k4 | k3 |k2 |k1|k0 |     ... | k12 | k11 |:k10|
//                         k10 straddles: its low 2 bits are bits 30-31 of word 0, its high bit is bit 0 of word 1.
//
// Example: bits = 3, codes 1,2,3,4,5,6,7,0 -> stream 0x1F58D1 -> bytes D1 58 1F.
// This is the order of compressed-tensors >= 0.18 `pack-quantized` for every width.
#pragma once

#include "core/numeric.h"

namespace precal::format {

constexpr int kMinBits = 2, kMaxBits = 8;

PRECAL_INLINE int64_t words_per_row(int64_t K, int bits) { return ceil_div(K * bits, 32); }

// Code at position k of a row's words.
PRECAL_INLINE uint32_t code_at(const uint32_t* words, int64_t k, int bits) {
  const int64_t bit = k * bits;
  const int64_t word = bit >> 5;
  const int shift = int(bit & 31);
  uint32_t code = words[word] >> shift;
  if (shift + bits > 32) code |= words[word + 1] << (32 - shift);
  return code & ((1u << bits) - 1u);
}

}  // namespace precal::format
