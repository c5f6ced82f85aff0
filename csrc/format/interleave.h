// SPDX-License-Identifier: Apache-2.0
// Codes of 3, 4 and (uniform) 8 bits in the order in which a CPU eats them: 64 bytes are 16 rows x 4 columns, ready for
// a dot product of four bytes, and the bits that a trellis code needs of its predecessors lie at the same byte of the
// register before.
//
// A row is cut into chunks of 64, 32 or 16 columns, the largest that divides the group size. A chunk has T = chunk / 4
// steps; at step t, byte 4 r + j of a register stands for row r and column chunk_begin + j T + t, j = 0..3:
//
//   chunk of 64     t = 0: columns 0 16 32 48     t = 1: 1 17 33 49    ...    t = 15: 15 31 47 63
//
// So the code before (r, j, t) is the same byte one step earlier; at t = 0 it is byte j - 1 of the chunk's last step,
// or byte 3 of the chunk before.
//
//   8 bits: a register holds one step.
//
//   4 bits: a register holds two steps.        bit  7 6 5 4   3 2 1 0
//                                                  | t + 1  |   t    |
//
//   3 bits: three registers hold eight steps; b the low bit of a code, pq the other two (q above p).
//             bit      7  6    5  4    3  2    1  0
//     register 0     | pq 2 | pq 3 | pq 0 | pq 4 |
//     register 1     | pq 7 | pq 6 | pq 1 | pq 5 |
//     register 2     | b7 | b6 | b5 | b4 | b3 | b2 | b1 | b0 |
//   Step s of the eight needs its pq and b_s, b_{s-1}, b_{s-2}: places are chosen so that one bit select puts the five
//   into the low six bits of a byte, for a lookup in 64 bytes.
//
// Columns past K have code 0.
#pragma once

#include "core/numeric.h"

namespace precal::format {

constexpr int64_t kRegisterBytes = 64;

// Columns of a chunk, or 0 when codes of this width and group size stay words (prepacked.h).
PRECAL_INLINE int64_t chunk_columns(int bits, bool uniform, int64_t group_size) {
  if (bits != 3 && bits != 4 && !(bits == 8 && uniform)) return 0;
  if (group_size % 64 == 0) return 64;
  if (group_size % 32 == 0) return 32;
  return bits != 3 && group_size % 16 == 0 ? 16 : 0;
}

// Bytes of one chunk of 16 rows.
PRECAL_INLINE int64_t chunk_bytes(int bits, int64_t chunk) { return chunk * 16 * bits / 8; }

// Where the two upper bits of step s of eight lie (3 bits): register and shift.
PRECAL_INLINE int pair_register(int s) { return (0xE2 >> s) & 1; }  // 1, 5, 6, 7
PRECAL_INLINE int pair_shift(int s) { return int((0x64004622u >> (4 * s)) & 15u); }

}  // namespace precal::format
