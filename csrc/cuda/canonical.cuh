// SPDX-License-Identifier: Apache-2.0
// One element of a weight in its canonical tensors (format/qtensor.h), of any format.
#pragma once

#include "cuda/launch.h"

namespace precal::cuda {

struct Levels {
  float of[256];
};

// By the whole block; a barrier follows in the caller.
__device__ __forceinline__ void load_levels(const format::WeightFormat& f, const int8_t* grid, Levels* levels,
                                            int threads) {
  for (int u = int(threadIdx.x); u < 256; u += threads) {
    levels->of[u] = f.grid_size == 0 ? float(u - (1 << (f.bits - 1))) : u < f.grid_size ? float(grid[u]) : 0.0f;
  }
}

// What is the same for all columns of a block of outliers.
struct Block {
  int64_t number, begin, width;
};

__device__ __forceinline__ Block block_of(const format::OutlierBlocks& blocks, int64_t k) {
  Block block;
  block.begin = format::block_begin_at(blocks, k);
  block.number =
      block.begin / blocks.segment * blocks.blocks_per_segment + block.begin % blocks.segment / format::kBlock;
  block.width = format::block_end(blocks, block.number) - block.begin;
  return block;
}

struct Element {
  float scale, value;  // value = scale * level + U * outlier
  bool outlier;        // an entry stands for it
};

__device__ __forceinline__ Element element_at(const format::WeightFormat& f, const WeightPointers& w,
                                              const format::OutlierBlocks& blocks, const Block& block,
                                              const Levels& levels, uint32_t index, int64_t n, int64_t k) {
  const uint8_t* mask = w.mask + n * format::mask_bytes_per_row(f);
  const bool salient = f.split && ((mask[k / 8] >> (k % 8)) & 1) != 0;
  Element e;
  e.scale = format::load_scale(salient ? w.outlier_scale : w.scale, n * format::num_groups(f) + k / f.group_size,
                               f.scale_type);
  e.value = e.scale * levels.of[index];
  e.outlier = false;
  for (int j = 0; j < f.c; ++j) {
    const int64_t entry = (n * blocks.num_blocks + block.number) * f.c + j;
    const int64_t position = w.outlier_index[entry];
    if (position != k - block.begin || position >= block.width) continue;
    const uint8_t value = w.outlier_value[entry];
    e.value = e.value + format::kOutlierUnit * format::e4m3_to_float(value);
    e.outlier = e.outlier || (value & 0x7F) != 0;
  }
  return e;
}

// Index of the level of column k, from its code and, with a trellis, the two before it.
__device__ __forceinline__ uint32_t level_index_at(const format::WeightFormat& f, const uint32_t* row,
                                                   const Block& block, int64_t k) {
  const uint32_t code = format::code_at(row, k, f.bits);
  if (!format::is_trellis(f)) return code;
  format::TrellisState state;
  for (int64_t i = k - 2 < block.begin ? block.begin : k - 2; i < k; ++i) {
    format::trellis_index(&state, format::code_at(row, i, f.bits));
  }
  return format::trellis_index(&state, code);
}

}  // namespace precal::cuda
