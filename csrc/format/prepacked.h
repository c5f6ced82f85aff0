// SPDX-License-Identifier: Apache-2.0
// The CPU's tile order of a weight: one buffer, made at load, never saved, exactly invertible. Sixteen rows make a
// tile; inside it the r-th lane of a vector belongs to row r, so one 512-bit load brings one int32 word of codes of
// each row.
//
//   header   64 bytes, below
//   grid     256 bytes: int8 levels, zero padded (absent grid: all zero)
//   ceil(N/16) tiles; each a run of sections, every one 64-byte aligned, in the order in which a CPU reads them:
//     row_scale      [16]               bfloat16
//     outlier_value  [blocks][c][16]    e4m3
//     outlier_index  [blocks][c][16]    uint8
//     scale          [groups][16]       e4m3 or float16
//     outlier_scale  [groups][16]       as scale; split only
//     mask           [ceil(K/8)][16]    uint8; split only
//     codes          [chunks][...]      3, 4 and uniform 8 bits: interleave.h
//       or           [words][16]        other widths, odd group sizes, split: int32, the bit stream word by word
//   Rows past N are zero everywhere, so they contribute nothing.
//
// Tiles whose codes are chunks lie in pairs, chunk by chunk: kernels that read two at once then read one stream, which
// DRAM serves faster than two. The head of a tile is what stands before its codes.
//
//   head 0 | head 1 | chunk 0 of 0 | chunk 0 of 1 | chunk 1 of 0 | chunk 1 of 1 | ...     2 * tile_bytes
//   head 2 | head 3 | ...
//   head 4 | chunk 0 of 4 | chunk 1 of 4 | ...                                           tile_bytes: the odd one out
#pragma once

#include "format/interleave.h"
#include "format/qtensor.h"

namespace precal::format {

constexpr int64_t kTileRows = 16;
constexpr uint32_t kPrepackedMagic = 0x304C4350u;  // "PCL0"
// Of this order and the GPU's, which may change while files stay as they are: a change of either raises it, because
// exported programs hold such buffers.
constexpr uint16_t kPrepackedVersion = 2;

struct PrepackedHeader {
  uint32_t magic;
  uint16_t version;
  uint8_t bits;
  uint8_t flags;  // bit 0 split, bit 1 float16 scales
  int64_t N, K, group_size;
  int32_t c;
  uint32_t grid_size;
  int64_t total_bytes;
  int64_t segment;  // columns after which blocks start anew, never 0 unless K is
  uint8_t reserved[8];
};
static_assert(sizeof(PrepackedHeader) == 64, "the header is one cache line");

constexpr int64_t kPrepackedGridOffset = 64;
constexpr int64_t kPrepackedTilesOffset = kPrepackedGridOffset + 256;

struct TileLayout {
  int64_t chunk, num_chunks, chunk_bytes;                            // chunk 0: codes are words
  int64_t outlier_value, outlier_index, scale, outlier_scale, mask;  // byte offsets inside a head
  int64_t head_bytes;
  int64_t tile_bytes, num_tiles, total_bytes;
};

PRECAL_INLINE TileLayout tile_layout(const WeightFormat& f) {
  TileLayout t;
  int64_t offset = 64;  // row_scale: 32 bytes, padded to a line
  const int64_t entries = num_blocks(f) * f.c * kTileRows;
  t.outlier_value = offset;
  offset = round_up(offset + entries, 64);
  t.outlier_index = offset;
  offset = round_up(offset + entries, 64);
  t.scale = offset;
  const int64_t scales = num_groups(f) * kTileRows * scale_bytes(f.scale_type);
  offset = round_up(offset + scales, 64);
  t.outlier_scale = offset;
  if (f.split) offset = round_up(offset + scales, 64);
  t.mask = offset;
  if (f.split) offset = round_up(offset + mask_bytes_per_row(f) * kTileRows, 64);
  t.head_bytes = offset;
  t.chunk = f.split ? 0 : chunk_columns(f.bits, is_uniform(f), f.group_size);
  t.num_chunks = t.chunk > 0 ? ceil_div(f.K, t.chunk) : 0;
  t.chunk_bytes = chunk_bytes(f.bits, t.chunk);
  offset = round_up(offset + (t.chunk > 0 ? t.num_chunks * t.chunk_bytes : num_words(f) * kTileRows * 4), 64);
  t.tile_bytes = offset;
  t.num_tiles = ceil_div(f.N, kTileRows);
  t.total_bytes = kPrepackedTilesOffset + t.num_tiles * t.tile_bytes;
  return t;
}

// Where a tile lies, in bytes from the begin of the buffer: its head, its first chunk (or word), and how far its chunks
// are apart.
struct TilePlace {
  int64_t head, codes, stride;
};

PRECAL_INLINE TilePlace tile_place(const TileLayout& t, int64_t tile) {
  const int64_t first = kPrepackedTilesOffset + (tile & ~int64_t(1)) * t.tile_bytes, odd = tile & 1;
  if (t.chunk == 0) return {first + odd * t.tile_bytes, first + odd * t.tile_bytes + t.head_bytes, 0};
  if ((tile | 1) >= t.num_tiles) return {first, first + t.head_bytes, t.chunk_bytes};
  return {first + odd * t.head_bytes, first + 2 * t.head_bytes + odd * t.chunk_bytes, 2 * t.chunk_bytes};
}

PRECAL_INLINE uint8_t prepacked_flags(const WeightFormat& f) {
  return uint8_t((f.split ? 1 : 0) | (f.scale_type == ScaleType::kFloat16 ? 2 : 0));
}

}  // namespace precal::format
