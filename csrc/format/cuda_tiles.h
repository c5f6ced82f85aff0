// SPDX-License-Identifier: Apache-2.0
// A GPU's order of a weight: one buffer, made at load, never saved, exactly invertible.
//
//   header         64 bytes, PrepackedHeader with its own magic
//   grid           256 bytes: int8 levels, zero padded (absent grid: all zero)
//   row_scale, codes, scale, outliers, outlier_scale, mask    each 256-byte aligned; CudaLayout has the offsets
//
// Widths of 3 and 4 bits with groups of a multiple of 32 are tiled; everything else keeps the canonical tensors, row
// by row, for kernels that are right and slow.
//
// Tiled: 16 rows make a row tile, 64 columns a chunk, 4 chunks a panel. The 16 x 64 codes of a chunk are four fragments
// of mma.m16n8k16: lane 4 g + t owns 16 codes of row g and the same 16 of row g + 8. It does not matter to a sum which
// 16 columns are multiplied together, so a lane takes neighbours, in runs of 16, or of 8 where a group is 32 columns:
//
//     runs of 16 (group_size % 64 == 0)      lane t: columns 16 t ... 16 t + 15
//     runs of 8                              lane t: columns 8 t ... 8 t + 7 and 32 + 8 t ... 32 + 8 t + 7
//
// Its codes i = 0..15 are stored in pairs, least significant bit first, the low bit b of each code last (q: the
// others):
//
//     4 bits   | q0 q0 q0 | q1 q1 q1 | b0 | b1 |      3 bits   | q0 q0 | q1 q1 | b0 | b1 |
//
// so a pair and the two low bits before it, all that a trellis needs, are 10 (8) neighbouring bits: an index into a
// table of pairs of levels. Pairs of row g come first, then those of row g + 8: 32 codes are `bits` words, and a panel
// is 4 * bits words a lane, stored as `bits` pieces of 16 bytes:
//
//     codes          [row tiles][panels][bits][32 lanes][16 bytes]      columns past K have code 0
//     scale          [row tiles][panels][8][S][2]  element (g, ., h) is row g + 8 h, here and below; S units make a
//                    panel: of 128 columns if that is the group, of 64, or of 32 where runs are 8; all of a unit's
//                    columns have its scale, so longer groups repeat theirs
//     outliers       [row tiles][blocks][c][8][2]  uint16: value << 8 | index
//     row_scale      [row tiles * 16]              rows past N are zero everywhere
#pragma once

#include "format/prepacked.h"

namespace precal::format {

constexpr uint32_t kCudaMagic = 0x31474350u;  // "PCG1"
constexpr int64_t kRowTile = 16, kChunkColumns = 64, kPanelColumns = 256;
constexpr int64_t kCudaAlign = 256;

struct CudaLayout {
  bool tiled;
  int run;                // neighbouring columns of a lane: 16 or 8
  int64_t scale_columns;  // of a unit
  int64_t row_tiles, panels;
  int64_t row_scale, codes, scale, outliers, outlier_value, outlier_scale, mask;  // byte offsets
  int64_t total_bytes;
};

constexpr int64_t kCudaGridOffset = 64;

PRECAL_INLINE bool is_cuda_tiled(const WeightFormat& f) {
  return (f.bits == 3 || f.bits == 4) && f.group_size % 32 == 0 && !f.split;
}

PRECAL_INLINE CudaLayout cuda_layout(const WeightFormat& f) {
  CudaLayout t;
  t.tiled = is_cuda_tiled(f);
  t.run = f.group_size % 64 == 0 ? 16 : 8;
  t.row_tiles = ceil_div(f.N, kRowTile);
  t.panels = ceil_div(f.K, kPanelColumns);
  t.scale_columns = t.run == 8 ? 32 : f.group_size == 128 ? 128 : 64;
  const int64_t rows = t.tiled ? t.row_tiles * kRowTile : f.N;
  const int64_t units = t.tiled ? t.panels * (kPanelColumns / t.scale_columns) : num_groups(f);
  const int64_t scales = rows * units * scale_bytes(f.scale_type);
  const int64_t entries = rows * num_blocks(f) * f.c;
  int64_t at = kCudaAlign + kCudaAlign;  // header and grid
  t.row_scale = at;
  at = round_up(at + rows * 2, kCudaAlign);
  t.codes = at;
  at = round_up(at + (t.tiled ? t.row_tiles * t.panels * f.bits * 512 : f.N * num_words(f) * 4), kCudaAlign);
  t.scale = at;
  at = round_up(at + scales, kCudaAlign);
  t.outliers = at;  // not tiled: the indices
  at = round_up(at + entries * (t.tiled ? 2 : 1), kCudaAlign);
  t.outlier_value = at;  // not tiled
  at = round_up(at + (t.tiled ? 0 : entries), kCudaAlign);
  t.outlier_scale = at;
  at = round_up(at + (f.split ? scales : 0), kCudaAlign);
  t.mask = at;
  at = round_up(at + (f.split ? f.N * mask_bytes_per_row(f) : 0), kCudaAlign);
  t.total_bytes = at;
  return t;
}

PRECAL_INLINE PrepackedHeader cuda_header(const WeightFormat& f) {
  PrepackedHeader h = {};
  h.magic = kCudaMagic;
  h.version = kPrepackedVersion;
  h.bits = uint8_t(f.bits);
  h.flags = prepacked_flags(f);
  h.N = f.N;
  h.K = f.K;
  h.group_size = f.group_size;
  h.c = f.c;
  h.grid_size = uint32_t(f.grid_size);
  h.total_bytes = cuda_layout(f).total_bytes;
  h.segment = outlier_blocks(f).segment;
  return h;
}

// ---- where things lie in a tiled weight ----------------------------------------------------------------------------

// Column of code i of lane t of four, within its chunk.
PRECAL_INLINE int chunk_column(int run, int t, int i) { return run == 16 ? 16 * t + i : 32 * (i / 8) + 8 * t + i % 8; }

// Code i of a row's 16: the bit at which its upper bits begin, and its low bit, among the row's 16 * bits.
PRECAL_INLINE int code_upper_bit(int bits, int i) { return i / 2 * 2 * bits + i % 2 * (bits - 1); }
PRECAL_INLINE int code_low_bit(int bits, int i) { return i / 2 * 2 * bits + 2 * (bits - 1) + i % 2; }

// Position of row n within anything stored [8][2].
PRECAL_INLINE int row_slot(int64_t n) { return int(n % 8 * 2 + n / 8 % 2); }

// Position of the scale of row n and unit `unit` of a tiled weight; column k is in unit k / scale_columns.
PRECAL_INLINE int64_t scale_slot(const CudaLayout& t, int64_t n, int64_t unit) {
  const int64_t of_panel = kPanelColumns / t.scale_columns;
  const int64_t panel = n / kRowTile * t.panels + unit / of_panel;
  return ((panel * 8 + n % 8) * of_panel + unit % of_panel) * 2 + n / 8 % 2;
}

// The word w (0 to bits - 1) of chunk j (0 to 3) of a lane: piece and word of the piece.
PRECAL_INLINE int64_t panel_word(int bits, int chunk, int lane, int w) {
  const int at = chunk * bits + w;
  return int64_t(at / 4) * 128 + lane * 4 + at % 4;
}

// Code (n, k) of a tiled weight.
PRECAL_INLINE uint32_t cuda_code_at(const uint32_t* codes, const WeightFormat& f, const CudaLayout& layout, int64_t n,
                                    int64_t k) {
  const uint32_t* panel = codes + ((n / kRowTile) * layout.panels + k / kPanelColumns) * f.bits * 128;
  const int chunk = int(k / kChunkColumns % 4), column = int(k % kChunkColumns);
  const int t = layout.run == 16 ? column / 16 : column % 32 / 8;
  const int i = layout.run == 16 ? column % 16 : column / 32 * 8 + column % 8;
  const int lane = int(n % 8) * 4 + t, row_bit = int(n / 8 % 2) * 16 * f.bits;
  uint32_t code = 0;
  for (int b = 0; b < f.bits; ++b) {
    const int bit = row_bit + (b == 0 ? code_low_bit(f.bits, i) : code_upper_bit(f.bits, i) + b - 1);
    code |= ((panel[panel_word(f.bits, chunk, lane, bit / 32)] >> (bit % 32)) & 1u) << b;
  }
  return code;
}

}  // namespace precal::format
