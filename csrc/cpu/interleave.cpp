// SPDX-License-Identifier: Apache-2.0
// Eight codes that follow each other lie in one byte lane of a chunk, so they move together. 4 and 8 bits: a canonical
// byte is two codes or one, as is a byte of a register, so bytes are only moved. 3 bits: three canonical bytes are
// eight codes; their low bits become one byte, the pairs of upper bits two.
#include "cpu/interleave.h"

#include <algorithm>
#include <cstring>

namespace precal::cpu {

namespace {

using format::kRegisterBytes;
using format::kTileRows;
using format::TileLayout;
using format::WeightFormat;

// Eight codes of three bits at bits 0, 3, ... of `v` <-> the three bytes of their lane.
uint32_t low_bits(uint32_t v) {
  uint32_t b = 0;
  for (int s = 0; s < 8; ++s) b |= ((v >> (3 * s)) & 1u) << s;
  return b;
}

uint32_t pairs(uint32_t v, int which) {
  uint32_t p = 0;
  for (int s = 0; s < 8; ++s) {
    if (format::pair_register(s) == which) p |= ((v >> (3 * s + 1)) & 3u) << format::pair_shift(s);
  }
  return p;
}

uint32_t eight_codes(uint32_t pairs0, uint32_t pairs1, uint32_t b) {
  uint32_t v = 0;
  for (int s = 0; s < 8; ++s) {
    const uint32_t pair = (format::pair_register(s) == 0 ? pairs0 : pairs1) >> format::pair_shift(s);
    v |= ((pair & 3u) << 1 | ((b >> s) & 1u)) << (3 * s);
  }
  return v;
}

}  // namespace

void words_to_chunks(const WeightFormat& f, const TileLayout& t, const uint32_t* words, int64_t first_row,
                     int64_t first_chunk, uint8_t* codes, int64_t stride) {
  const int64_t rows = std::min(kTileRows, f.N - first_row), row_bytes = format::num_words(f) * 4;
  const int64_t lane_bytes = t.chunk * f.bits / 32;  // canonical bytes of one byte lane of a chunk
  uint8_t padded[64];                                // a row's chunk: at most 64 codes of 8 bits
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = reinterpret_cast<const uint8_t*>(words + (first_row + r) * format::num_words(f));
    for (int64_t n = first_chunk; n < t.num_chunks; ++n) {
      const int64_t at = n * 4 * lane_bytes;
      const uint8_t* from = row + at;
      if (at + 4 * lane_bytes > row_bytes) {
        std::memset(padded, 0, sizeof(padded));
        std::memcpy(padded, from, size_t(row_bytes - at));
        from = padded;
      }
      uint8_t* to = codes + n * stride + 4 * r;
      if (f.bits != 3) {
        for (int64_t s = 0; s < lane_bytes; ++s) {
          for (int64_t j = 0; j < 4; ++j) to[s * kRegisterBytes + j] = from[j * lane_bytes + s];
        }
        continue;
      }
      for (int64_t e = 0; e < lane_bytes; e += 3) {
        for (int64_t j = 0; j < 4; ++j) {
          const uint8_t* three = from + j * lane_bytes + e;
          const uint32_t v = uint32_t(three[0]) | uint32_t(three[1]) << 8 | uint32_t(three[2]) << 16;
          to[e * kRegisterBytes + j] = uint8_t(pairs(v, 0));
          to[(e + 1) * kRegisterBytes + j] = uint8_t(pairs(v, 1));
          to[(e + 2) * kRegisterBytes + j] = uint8_t(low_bits(v));
        }
      }
    }
  }
}

void chunks_to_words(const WeightFormat& f, const TileLayout& t, const uint8_t* codes, int64_t stride,
                     int64_t first_row, uint32_t* words) {
  const int64_t rows = std::min(kTileRows, f.N - first_row), row_bytes = format::num_words(f) * 4;
  const int64_t lane_bytes = t.chunk * f.bits / 32;
  uint8_t whole[64];
  for (int64_t r = 0; r < rows; ++r) {
    uint8_t* row = reinterpret_cast<uint8_t*>(words + (first_row + r) * format::num_words(f));
    for (int64_t n = 0; n < t.num_chunks; ++n) {
      const uint8_t* from = codes + n * stride + 4 * r;
      if (f.bits != 3) {
        for (int64_t s = 0; s < lane_bytes; ++s) {
          for (int64_t j = 0; j < 4; ++j) whole[j * lane_bytes + s] = from[s * kRegisterBytes + j];
        }
      } else {
        for (int64_t e = 0; e < lane_bytes; e += 3) {
          for (int64_t j = 0; j < 4; ++j) {
            const uint32_t v = eight_codes(from[e * kRegisterBytes + j], from[(e + 1) * kRegisterBytes + j],
                                           from[(e + 2) * kRegisterBytes + j]);
            for (int64_t i = 0; i < 3; ++i) whole[j * lane_bytes + e + i] = uint8_t(v >> (8 * i));
          }
        }
      }
      const int64_t at = n * 4 * lane_bytes;
      std::memcpy(row + at, whole, size_t(std::min(4 * lane_bytes, row_bytes - at)));
    }
  }
}

}  // namespace precal::cpu
