// SPDX-License-Identifier: Apache-2.0
// One element of a weight in the GPU's order, of any format: right and slow.
#pragma once

#include "cuda/launch.h"

namespace precal::cuda {

struct PrepackedView {
  const format::WeightFormat& format;
  const format::CudaLayout& layout;
  const uint8_t* prepacked;
  int64_t groups;  // of a row
};

// All levels as floats, by the whole block; a barrier follows in the caller.
__device__ __forceinline__ void load_levels(const format::WeightFormat& f, const uint8_t* prepacked, float* levels,
                                            int threads) {
  const int8_t* grid = reinterpret_cast<const int8_t*>(prepacked + format::kCudaGridOffset);
  for (int u = int(threadIdx.x); u < 256; u += threads) {
    levels[u] = f.grid_size == 0 ? float(u - (1 << (f.bits - 1))) : u < f.grid_size ? float(grid[u]) : 0.0f;
  }
}

__device__ __forceinline__ uint32_t code(const PrepackedView& w, int64_t n, int64_t k) {
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(w.prepacked + w.layout.codes);
  return w.layout.tiled ? format::cuda_code_at(codes, w.format, w.layout, n, k)
                        : format::code_at(codes + n * format::num_words(w.format), k, w.format.bits);
}

// Element j of row n of a section with `count` elements a row.
__device__ __forceinline__ int64_t element_of(const PrepackedView& w, int64_t n, int64_t count, int64_t j) {
  return w.layout.tiled ? (n / format::kRowTile * count + j) * format::kRowTile + format::row_slot(n) : n * count + j;
}

// scale * level + U * outlier of column k.
__device__ __forceinline__ float dense_weight(const PrepackedView& w, const format::OutlierBlocks& blocks,
                                              const float* levels, int64_t n, int64_t k) {
  const format::WeightFormat& f = w.format;
  const uint8_t* base = w.prepacked;
  const int64_t begin = format::block_begin_at(blocks, k);
  uint32_t index = code(w, n, k);
  if (format::is_trellis(f)) {
    format::TrellisState state;
    for (int64_t i = k - 2 < begin ? begin : k - 2; i < k; ++i) format::trellis_index(&state, code(w, n, i));
    index = format::trellis_index(&state, index);
  }
  const uint8_t* mask = base + w.layout.mask + n * format::mask_bytes_per_row(f);
  const bool salient = f.split && ((mask[k / 8] >> (k % 8)) & 1) != 0;
  const int64_t group = k / f.group_size;
  const float scale = format::load_scale(
      base + (salient ? w.layout.outlier_scale : w.layout.scale),
      w.layout.tiled ? format::scale_slot(w.layout, n, k / w.layout.scale_columns) : n * w.groups + group,
      f.scale_type);
  float value = scale * levels[index];
  const int64_t block = begin / blocks.segment * blocks.blocks_per_segment + begin % blocks.segment / format::kBlock;
  for (int i = 0; i < f.c; ++i) {
    const int64_t at = element_of(w, n, blocks.num_blocks * f.c, block * f.c + i);
    const uint8_t* index_at = base + w.layout.outliers + (w.layout.tiled ? 2 * at : at);
    const uint8_t* value_at = w.layout.tiled ? index_at + 1 : base + w.layout.outlier_value + at;
    if (begin + *index_at == k) value = value + format::kOutlierUnit * format::e4m3_to_float(*value_at);
  }
  return value;
}

}  // namespace precal::cuda
