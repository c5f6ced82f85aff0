// SPDX-License-Identifier: Apache-2.0
// Which kernel computes y = x W'^T + bias, and how the work is cut: plain numbers, tested with no GPU.
//
//   any     weights that are not tiled (format/cuda_tiles.h), or tables that do not fit: right and slow
//   small   up to 16 columns of mma: each weight is read once, K is cut into slices and the last to arrive adds them up
//   large   tiles of 128 rows of W and 64 or 128 tokens; weights are dequantized into shared memory
#pragma once

#include "format/cuda_tiles.h"

namespace precal::cuda {

enum class LinearKernel { kAny, kSmall, kLarge };

struct LinearConfig {
  LinearKernel kernel = LinearKernel::kAny;
  int64_t rows = 0;     // tokens of one launch; the launcher loops
  int planes = 1;       // small: bfloat16 terms of an element of x; 3 for float32, which they make up exactly
  int octets = 1;       // small: groups of 8 columns of mma, one a token and plane
  int64_t slices = 1;   // small: of K
  int64_t panels = 1;   // small: per slice
  int64_t blocks = 1;   // small: per slice
  int tile_tokens = 0;  // large
  int64_t shared_bytes = 0;
  int64_t workspace_bytes = 0;
};

// A multiprocessor has one block, its table being large: 12 warps leave 170 registers a thread, and keep 24 KB in
// flight.
constexpr int kSmallWarps = 12;
constexpr int kTableCopies = 32;       // one a lane: a lookup has no bank conflict
constexpr int64_t kSmallColumns = 16;  // of mma
constexpr int64_t kCountersAlign = 256;

// Windows of a pair of codes and the two low bits before it.
PRECAL_INLINE int window_bits(int bits) { return 2 * bits + 2; }
PRECAL_INLINE int64_t table_bytes(int bits) { return (int64_t(4) << window_bits(bits)) * kTableCopies; }
// x of a panel, and where blocks of the trellis begin in it.
PRECAL_INLINE int64_t panel_bytes(int octets) { return 256 * 8 * 2 * int64_t(octets) + 32; }
// The table, x, and 16 bytes of which one element is zero.
PRECAL_INLINE int64_t small_bytes(int bits, int octets, int64_t panels) {
  return table_bytes(bits) + panels * panel_bytes(octets) + 16;
}

constexpr int kLargeRows = 128, kLargeColumns = 64;  // of W
constexpr int kLargeCopies = 8;                      // of its table: a quarter of the lanes share one
// Two stages of W and three of x, swizzled rows of 128 bytes, and the table.
PRECAL_INLINE int64_t large_bytes(int bits, int tile_tokens) {
  return 2 * kLargeRows * 128 + 3 * int64_t(tile_tokens) * 128 + (int64_t(4) << window_bits(bits)) * kLargeCopies;
}

constexpr int64_t kLargeMostTokens = 65535 * 64;  // a launch has 65535 tiles of tokens at most

PRECAL_INLINE LinearConfig linear_config(const format::WeightFormat& f, int64_t M, bool x_is_float32, int sms,
                                         int64_t shared_bytes) {
  LinearConfig c;
  c.rows = M;
  if (!format::is_cuda_tiled(f)) return c;
  const format::CudaLayout layout = format::cuda_layout(f);
  const int64_t most_panels = (shared_bytes - small_bytes(f.bits, 2, 0)) / panel_bytes(2);
  const bool small_fits = most_panels >= 1;
  if (!x_is_float32 && (M > kSmallColumns || !small_fits) && shared_bytes >= large_bytes(f.bits, 64)) {
    c.kernel = LinearKernel::kLarge;
    c.tile_tokens = M > 64 && shared_bytes >= large_bytes(f.bits, 128) ? 128 : 64;
    c.shared_bytes = large_bytes(f.bits, c.tile_tokens);
    if (c.rows > kLargeMostTokens) c.rows = kLargeMostTokens;
    // K is cut where the tiles alone would leave multiprocessors idle, but not below four panels.
    const int64_t tiles = ceil_div(f.N, kLargeRows) * ceil_div(c.rows, c.tile_tokens);
    const int64_t panels = layout.panels > 0 ? layout.panels : 1;
    int64_t wanted = tiles > 0 ? int64_t(sms) / tiles : 1;
    if (wanted > panels / 4) wanted = panels / 4;
    if (wanted < 1) wanted = 1;
    c.panels = ceil_div(panels, wanted);
    c.slices = ceil_div(panels, c.panels);
    if (c.slices > 1) c.workspace_bytes = round_up(tiles * 4, kCountersAlign) + c.slices * c.rows * f.N * 4;
    return c;
  }
  if (!small_fits) return c;
  c.kernel = LinearKernel::kSmall;
  c.planes = x_is_float32 ? 3 : 1;
  if (c.rows > kSmallColumns / c.planes) c.rows = kSmallColumns / c.planes;
  c.octets = c.rows * c.planes > 8 ? 2 : 1;
  // A row of y does not depend on how many there are: slices follow from the weight and the device alone.
  const int64_t units = int64_t(sms) * kSmallWarps, panels = layout.panels > 0 ? layout.panels : 1;
  int64_t wanted = layout.row_tiles > 0 ? ceil_div(units, layout.row_tiles) : 1;
  if (wanted > panels) wanted = panels;
  c.panels = ceil_div(panels, wanted);
  if (c.panels > most_panels) c.panels = most_panels;
  c.slices = ceil_div(panels, c.panels);
  const int64_t enough = ceil_div(layout.row_tiles, kSmallWarps);
  c.blocks = int64_t(sms) / c.slices;
  if (c.blocks > enough) c.blocks = enough;
  if (c.blocks < 1) c.blocks = 1;
  c.shared_bytes = small_bytes(f.bits, c.octets, c.panels);
  if (c.slices > 1 || c.planes > 1) {
    c.workspace_bytes = round_up(layout.row_tiles * 4, kCountersAlign) +
                        c.slices * c.rows * c.planes * layout.row_tiles * format::kRowTile * 4;
  }
  return c;
}

// ---- dequantize, then a matrix product of dense matrices (csrc/bindings/dense_linear.h) -----------------------------
// Chosen where it was measured to be faster: it is the library's product, and the weight's way through memory is short
// beside it for many tokens. Nothing was measured yet, so it runs only where PRECAL_LINEAR=dequantize asks for it.
constexpr bool kDenseMeasured = false;

// Tokens from which it is expected to be faster (docs/cuda.md has the estimate); 0: never.
PRECAL_INLINE int64_t dense_tokens(const format::WeightFormat& f, int capability, bool x_is_float32) {
  if (f.N == 0 || f.K == 0) return 0;
  if (!format::is_cuda_tiled(f)) return 16;  // the other kernel is the slow one
  if (x_is_float32) return 64;               // the other reads the weight once for five tokens
  return capability / 10 == 9 ? 384 : 0;     // mma.sync reaches about 0.6 of wgmma; where it is all there is, stay
}

PRECAL_INLINE bool dense_is_chosen(const format::WeightFormat& f, int64_t M, bool x_is_float32, int capability,
                                   bool measured) {
  const int64_t from = dense_tokens(f, capability, x_is_float32);
  return measured && from > 0 && M >= from;
}

// Rows of a slice: 32 MiB, which the caches of large GPUs keep until the product has read them.
PRECAL_INLINE int64_t dense_slice_rows(int64_t N, int64_t K, int64_t element_bytes) {
  constexpr int64_t kBytes = int64_t(32) << 20, kTile = 128;
  int64_t most = kBytes / (element_bytes * (K > 0 ? K : 1)) / kTile * kTile;
  if (most < kTile) most = kTile;
  const int64_t slices = N > most ? ceil_div(N, most) : 1;
  return round_up(ceil_div(N > 0 ? N : 1, slices), kTile);
}

}  // namespace precal::cuda
