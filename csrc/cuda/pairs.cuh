// SPDX-License-Identifier: Apache-2.0
// Tiled codes (format/cuda_tiles.h) -> pairs of levels, by a table in shared memory.
#pragma once

#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace precal::cuda {

// Levels of the two codes of a window as 16-bit floats, the first in the low half. Exact: levels have 7 bits.
//
//   bit   2 bits + 1   2 bits   ...bits+1   ...2     1        0
//       |    b1     |   b0    |  q1   |  q0  | b_{k-1} | b_{k-2} |
template <int kBits, bool kHalf>
__device__ __forceinline__ uint32_t pair_of_window(uint32_t window, const int8_t* grid, int grid_size) {
  constexpr uint32_t kUpper = (1u << (kBits - 1)) - 1u;
  const uint32_t b0 = (window >> (2 * kBits)) & 1u, b1 = (window >> (2 * kBits + 1)) & 1u;
  uint32_t first = ((window >> 2) & kUpper) << 1 | b0, second = ((window >> (kBits + 1)) & kUpper) << 1 | b1;
  if (grid_size == 2 << kBits) {
    format::TrellisState state;
    state.before = window & 1u;
    state.previous = (window >> 1) & 1u;
    first = format::trellis_index(&state, first);
    second = format::trellis_index(&state, second);
  }
  const float low = grid_size == 0 ? float(int(first) - (1 << (kBits - 1))) : float(grid[first]);
  const float high = grid_size == 0 ? float(int(second) - (1 << (kBits - 1))) : float(grid[second]);
  return kHalf ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
}

// table[window][kCopies], by the whole block.
template <int kBits, bool kHalf, int kCopies>
__device__ __forceinline__ void build_table(uint32_t* table, const uint8_t* prepacked, int grid_size, int threads) {
  const int8_t* grid = reinterpret_cast<const int8_t*>(prepacked + format::kCudaGridOffset);
  for (int i = int(threadIdx.x); i < (4 << (2 * kBits)) * kCopies; i += threads) {
    table[i] = pair_of_window<kBits, kHalf>(uint32_t(i / kCopies), grid, grid_size);
  }
}

// Bits [kFirst, kFirst + kCount) of a lane's words of a chunk, put at bit kAt; all known when compiled: a mask and a
// shift, in this order, so that the shift and the addition of an address are one instruction (LEA).
template <int kFirst, int kCount, int kAt, int kBits>
__device__ __forceinline__ uint32_t bits_of(const uint32_t (&words)[kBits]) {
  constexpr int kWord = kFirst / 32, kShift = kFirst % 32;
  constexpr uint32_t kMask = ((1u << kCount) - 1u) << kAt;
  if constexpr (kShift + kCount > 32) {
    static_assert(kShift >= kAt, "what crosses words begins far up");
    return __funnelshift_r(words[kWord], words[kWord + 1], kShift - kAt) & kMask;
  } else if constexpr (kShift >= kAt) {
    return ptx::bits_in_place(words[kWord], kMask << (kShift - kAt)) >> (kShift - kAt);
  } else {
    return ptx::bits_in_place(words[kWord], kMask >> (kAt - kShift)) << (kAt - kShift);
  }
}

// The low bits of the last two codes of the first kPairs pairs: of row g in bits 0-1, of row g + 8 in bits 2-3.
template <int kPairs, int kBits>
__device__ __forceinline__ uint32_t last_low_bits(const uint32_t (&words)[kBits]) {
  constexpr int kEnd = kPairs * 2 * kBits - 2;
  return bits_of<kEnd, 2, 0>(words) | bits_of<16 * kBits + kEnd, 2, 2>(words);
}

// The window of pair kPair of row g + 8 * kRow at bit kAt, so that it is the offset of its entry. Where a run begins,
// `history` has the two bits before it of both rows; else they are in the words.
template <int kPair, int kRow, int kAt, bool kRunBegins, int kBits>
__device__ __forceinline__ uint32_t window_of(const uint32_t (&words)[kBits], uint32_t history) {
  constexpr int kFirst = kRow * 16 * kBits + kPair * 2 * kBits;
  if constexpr (kRunBegins) {
    return bits_of<kFirst, 2 * kBits, kAt + 2>(words) | ((history >> (2 * kRow)) & 3u) << kAt;
  } else {
    return bits_of<kFirst - 2, 2 * kBits + 2, kAt>(words);
  }
}

// Entry of table[window][kCopies]: `copy_of_table` is the lane's column of it, `window` is at bit log2(4 * kCopies).
__device__ __forceinline__ uint32_t look_up(const uint32_t* copy_of_table, uint32_t window) {
  return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint8_t*>(copy_of_table) + window);
}

// History of a lane's run: the last low bits of the lane that owns the columns before. `mine`: what this lane has for
// its right neighbour, `wrap`: what lane t = 3 has for t = 0, whose run comes after it.
__device__ __forceinline__ uint32_t history_of_run(uint32_t mine, uint32_t wrap, bool restarts) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t offered = lane % 4 == 3 ? wrap : mine;
  const uint32_t got = __shfl_sync(0xFFFFFFFFu, offered, (lane & ~3) | ((lane + 3) & 3));
  return restarts ? 0u : got;
}

// Whether a block of the trellis begins at columns 0 (bit 0) and 32 (bit 1) of the chunk at `column`.
__device__ __forceinline__ uint32_t chunk_restarts(const format::OutlierBlocks& blocks, int64_t column, int64_t K) {
  uint32_t restarts = 0;
  if (column < K && format::block_begin_at(blocks, column) == column) restarts |= 1u;
  if (column + 32 < K && format::block_begin_at(blocks, column + 32) == column + 32) restarts |= 2u;
  return restarts;
}

// Group and block of a column, carried along: a division by a run-time number costs as much as a dozen weights.
struct Cursor {
  int group, left;                     // columns of the group from here on
  int block, begin, end, segment_end;  // of outliers and of the trellis

  __device__ __forceinline__ void place(const format::WeightFormat& f, const format::OutlierBlocks& blocks, int k) {
    const int size = int(f.group_size), segment = int(blocks.segment), in_segment = k / segment;
    group = k / size;
    left = size - k % size;
    segment_end = (in_segment + 1) * segment;
    block = in_segment * int(blocks.blocks_per_segment) + (k - in_segment * segment) / int(format::kBlock);
    begin = in_segment * segment + (k - in_segment * segment) / int(format::kBlock) * int(format::kBlock);
    end = begin + int(format::kBlock) < segment_end ? begin + int(format::kBlock) : segment_end;
  }

  // By `columns` that a group is a multiple of.
  __device__ __forceinline__ void next_columns(int columns, int group_size) {
    left -= columns;
    if (left > 0) return;
    ++group;
    left = group_size;
  }

  __device__ __forceinline__ void next_block(int segment) {
    ++block;
    begin = end;
    if (begin == segment_end) segment_end += segment;
    end = begin + int(format::kBlock) < segment_end ? begin + int(format::kBlock) : segment_end;
  }

  // To the block of column k, or the last one.
  __device__ __forceinline__ void go_to(int k, int segment, int K) {
    while (end <= k && end < K) next_block(segment);
  }

  // As chunk_restarts, of the chunk at `column`, which lies in this block.
  __device__ __forceinline__ uint32_t restarts(int column, int K) const {
    return (begin == column ? 1u : 0u) | (end == column + 32 && end < K ? 2u : 0u);
  }
};

// e4m3 as a 256th of its value, exactly: the same bits, two places further left, are a float16 of that size.
constexpr float kScaleUnit = 256.0f;
__device__ __forceinline__ float small_e4m3(uint32_t code) {
  return ptx::unpack_f16(uint16_t((code & 0x80u) << 8 | (code & 0x7Fu) << 7));
}

}  // namespace precal::cuda
