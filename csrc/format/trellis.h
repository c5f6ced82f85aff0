// SPDX-License-Identifier: Apache-2.0
// Trellis-coded levels: twice the levels for the same bits. Of 2^(bits+1) levels a code chooses among 2^bits; which
// ones, the low bits of the two codes before it say.
//
//   b_k   lowest bit of code u_k; 0 before the first column of a block of columns (outlier_blocks.h)
//   level = grid[ 2 * (u_k ^ b_{k-2}) + b_{k-1} ]
//
//   levels     0   1   2   3   4   5   6   7   8 ...      four subsets, level mod 4
//              D0  D1  D2  D3  D0  D1  D2  D3  D0
//
//   state (b_{k-1}, b_{k-2})    u_k even    u_k odd       A state sees every other level; two paths that part meet
//          00                      D0          D2         again after three codes at the earliest, so they differ by
//          01                      D2          D0         at least 2, 1 and 2 levels: squared distance 9, where codes
//          10                      D1          D3         without memory have 4. (Ungerboeck's four-state code;
//          11                      D3          D1         Marcellin and Fischer, IEEE Trans. Commun. 38(1), 1990.)
//
// Decoding needs no state machine: a code, one bit of its neighbour and one of the next. The encoder is a Viterbi
// search (cpu/trellis-inl.h). Blocks start afresh, so a shard that owns whole blocks decodes alone.
//
// Example: bits = 3, codes 5 2 7 1 at the start of a block: b = 1 0 1 1, levels
//   2*(5^0)+0 = 10,  2*(2^0)+1 = 5,  2*(7^1)+0 = 12,  2*(1^0)+1 = 3.
#pragma once

#include "core/macros.h"

#include <cstdint>

namespace precal::format {

// The two bits of history that a code needs.
struct TrellisState {
  uint32_t previous = 0, before = 0;  // b_{k-1}, b_{k-2}
};

// Index of the next code's level among the 2^(bits+1).
PRECAL_INLINE uint32_t trellis_index(TrellisState* state, uint32_t code) {
  const uint32_t index = 2u * (code ^ state->before) + state->previous;
  state->before = state->previous;
  state->previous = code & 1u;
  return index;
}

}  // namespace precal::format
