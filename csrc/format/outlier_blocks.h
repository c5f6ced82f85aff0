// SPDX-License-Identifier: Apache-2.0
// Outliers live in blocks of columns, each with the same capacity c, so that the tensors are rectangular and a
// tensor-parallel shard is a slice. A block is 256 columns wide (a position fits in a byte) and the count restarts at
// each eighth of K, so that up to 8 shards each own whole blocks:
//
//   K = 11008, K % 256 == 0:  segment = K/8 = 1376 columns = 5 blocks of 256 + one of 96;  8 segments = 48 blocks
//   K < 2048 or K % 256 != 0: one segment of K columns, the last block short
//
// A shard of a longer row has that row's segments: they are then given, not taken from its own K.
#pragma once

#include "core/numeric.h"

namespace precal::format {

constexpr int64_t kBlock = 256;
constexpr int64_t kSegments = 8;

struct OutlierBlocks {
  int64_t segment, blocks_per_segment, num_blocks;
};

// `segment`: 0, or as segment_fits() has it.
PRECAL_INLINE OutlierBlocks outlier_blocks(int64_t K, int64_t segment = 0) {
  OutlierBlocks b;
  b.segment = segment > 0 ? segment : (K >= kSegments * kBlock && K % kBlock == 0) ? K / kSegments : K;
  b.blocks_per_segment = b.segment > 0 ? ceil_div(b.segment, kBlock) : 1;
  b.num_blocks = b.segment > 0 ? (K / b.segment) * b.blocks_per_segment : 0;
  return b;
}

// Kernels restart a trellis at multiples of 32 columns only.
PRECAL_INLINE bool segment_fits(int64_t segment, int64_t K) {
  return segment == 0 || segment == K || (segment > 0 && segment % 32 == 0 && K % segment == 0);
}

PRECAL_INLINE int64_t block_begin(const OutlierBlocks& b, int64_t block) {
  return (block / b.blocks_per_segment) * b.segment + (block % b.blocks_per_segment) * kBlock;
}

PRECAL_INLINE int64_t block_end(const OutlierBlocks& b, int64_t block) {
  const int64_t segment_end = (block / b.blocks_per_segment + 1) * b.segment;
  const int64_t full = block_begin(b, block) + kBlock;
  return full < segment_end ? full : segment_end;
}

// The block that column k < K lies in, and its first column.
PRECAL_INLINE int64_t block_at(const OutlierBlocks& b, int64_t k) {
  return k / b.segment * b.blocks_per_segment + k % b.segment / kBlock;
}
PRECAL_INLINE int64_t block_begin_at(const OutlierBlocks& b, int64_t k) {
  const int64_t segment = k / b.segment * b.segment;
  return segment + (k - segment) / kBlock * kBlock;
}

}  // namespace precal::format
