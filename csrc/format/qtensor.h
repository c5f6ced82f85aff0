// SPDX-License-Identifier: Apache-2.0
// What a quantized weight is (format version 1, frozen: docs/format.md):
//
//   W'[n, k] = row_scale[n] * ( scale[n, k / group_size] * level(u[n, k]) + U * outlier(n, k) )
//
//   u          unsigned code of `bits` bits                       (bitstream.h)
//   level(u)   int8 levels, non-decreasing: grid[u] of 2^bits, or of 2^(bits+1) through a trellis (trellis.h); or
//              u - 2^(bits-1) when there is no grid ("uniform")
//   scale      [N, ceil(K/group_size)]  signed e4m3 (e4m3.h), or float16 for the baseline recipes
//   row_scale  [N]  bfloat16
//   outlier    sum of the entries of this block (outlier_blocks.h) that point at k; e4m3, added, no mask
//   U          128: row_scale is the mean group amplitude over the largest level (127), so U * row_scale is about one
//              group amplitude and outliers of 1/64 to 400 amplitudes keep 4 significant bits
//
// `split` (the published recipe) has instead a bitmap of salient positions whose codes use a second scale:
//
//   W'[n, k] = row_scale[n] * (mask(n, k) ? outlier_scale : scale)[n, k / group_size] * level(u[n, k])
//   mask     bit k % 8 of byte k / 8 of row n
//
// scale * level is exact in float32 (4 or 11 significant bits times 7), U * outlier is exact, so W' has two roundings:
// the sum and the product by row_scale. Every implementation computes it in that order.
#pragma once

#include "format/bitstream.h"
#include "format/e4m3.h"
#include "format/outlier_blocks.h"
#include "format/trellis.h"

namespace precal::format {

constexpr int kFormatVersion = 1;       // of files
constexpr float kOutlierUnit = 128.0f;  // U
constexpr int kMaxLevel = 127;          // levels lie in [-127, 127]
constexpr int kMaxCapacity = 16;        // c, outliers per block

enum class ScaleType : int32_t { kE4m3 = 0, kFloat16 = 1 };

PRECAL_INLINE int64_t scale_bytes(ScaleType type) { return type == ScaleType::kE4m3 ? 1 : 2; }

// The integers that give the shapes of every tensor of a weight.
struct WeightFormat {
  int64_t N = 0, K = 0;
  int bits = 4;
  int64_t group_size = 64;
  int c = 0;
  int grid_size = 0;   // levels: 0 (uniform), 2^bits, or 2^(bits+1) (trellis)
  bool split = false;  // outlier_scale and mask instead of outlier entries
  ScaleType scale_type = ScaleType::kE4m3;
  int64_t segment = 0;  // columns after which blocks start anew; 0: as K says (outlier_blocks.h)
};

PRECAL_INLINE bool is_uniform(const WeightFormat& f) { return f.grid_size == 0; }
PRECAL_INLINE bool is_trellis(const WeightFormat& f) { return f.grid_size == 2 << f.bits; }
PRECAL_INLINE bool grid_size_fits(int64_t size, int bits) {
  return size == 0 || size == (1 << bits) || (size == (2 << bits) && size <= 256);
}
PRECAL_INLINE int64_t num_groups(const WeightFormat& f) { return ceil_div(f.K, f.group_size); }
PRECAL_INLINE int64_t num_words(const WeightFormat& f) { return words_per_row(f.K, f.bits); }
PRECAL_INLINE OutlierBlocks outlier_blocks(const WeightFormat& f) { return outlier_blocks(f.K, f.segment); }
PRECAL_INLINE int64_t num_blocks(const WeightFormat& f) { return outlier_blocks(f).num_blocks; }
PRECAL_INLINE int64_t mask_bytes_per_row(const WeightFormat& f) { return ceil_div(f.K, 8); }

PRECAL_INLINE float load_scale(const void* scale, int64_t index, ScaleType type) {
  return type == ScaleType::kE4m3 ? e4m3_to_float(static_cast<const uint8_t*>(scale)[index])
                                  : half_to_float(static_cast<const uint16_t*>(scale)[index]);
}

}  // namespace precal::format
