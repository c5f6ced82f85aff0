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

// table[window][kCopies], by the whole block of `warps` warps: a lane computes a window, all store its copies.
template <int kBits, bool kHalf, int kCopies>
__device__ __forceinline__ void build_table(uint32_t* table, const uint8_t* prepacked, int grid_size, int warps) {
  constexpr int kWindows = 4 << (2 * kBits), kAtOnce = 32 / kCopies;
  static_assert(kWindows % 32 == 0, "every lane has a window");
  const int8_t* grid = reinterpret_cast<const int8_t*>(prepacked + format::kCudaGridOffset);
  const int lane = int(threadIdx.x) % 32;
  for (int first = int(threadIdx.x) / 32 * 32; first < kWindows; first += warps * 32) {
    const uint32_t pair = pair_of_window<kBits, kHalf>(uint32_t(first + lane), grid, grid_size);
#pragma unroll 8
    for (int i = 0; i < kCopies; ++i) {
      table[first * kCopies + i * 32 + lane] = __shfl_sync(0xFFFFFFFFu, pair, i * kAtOnce + lane / kCopies);
    }
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

// A lane's words of a chunk, of the pieces of its panel.
template <int kBits, int kChunk>
__device__ __forceinline__ void chunk_words(const uint4 (&codes)[kBits], uint32_t (&words)[kBits]) {
#pragma unroll
  for (int w = 0; w < kBits; ++w) {
    const uint4& piece = codes[(kChunk * kBits + w) / 4];
    const int part = (kChunk * kBits + w) % 4;
    words[w] = part == 0 ? piece.x : part == 1 ? piece.y : part == 2 ? piece.z : piece.w;
  }
}

// History: a code needs the low bits of the two before it, which at the beginning of a run are in another lane: lane
// t - 1, or for t = 0 lane 3's run before, of the unit before. Units are what has four runs: 64 columns, or 32. Four
// units are a quad, whose history is one word, two bits a run, in the upper half of each byte:
//
//   byte      3             2             1             0
//   row     g + 8           g           g + 8           g
//         | u2 | u3 |     | u2 | u3 |     | u0 | u1 |     | u0 | u1 |      bits 7-6 and 5-4 of the byte
constexpr uint32_t kEvenUnits = 0xC0C0C0C0u, kOddUnits = 0x30303030u;
PRECAL_INLINE constexpr int history_bit(int unit, int row) { return unit / 2 * 16 + row * 8 + (unit % 2 == 0 ? 6 : 4); }

// The byte of a lane's 16 codes of a row whose upper two bits are the low bits of codes last - 1 and last.
template <int kBits, int kRow, int kLast>
__device__ __forceinline__ uint32_t word_of_end(const uint4 (&codes)[kBits], int chunk, int* byte) {
  constexpr int kBit = kRow * 16 * kBits + (kLast + 1) * kBits - 8;
  static_assert(kBit % 8 == 0, "low bits end a byte");
  const int at = chunk * kBits + kBit / 32;
  const uint4& piece = codes[at / 4];
  *byte = kBit % 32 / 8;
  return at % 4 == 0 ? piece.x : at % 4 == 1 ? piece.y : at % 4 == 2 ? piece.z : piece.w;
}

// Of both rows, in the lower half: the byte at the end of unit `unit` of a panel.
template <int kBits, int kRun>
__device__ __forceinline__ uint32_t ends_of_unit(const uint4 (&codes)[kBits], int unit) {
  int byte[2];
  uint32_t word[2];
  if (kRun == 16 || unit % 2 == 1) {
    const int chunk = kRun == 16 ? unit : unit / 2;
    word[0] = word_of_end<kBits, 0, 15>(codes, chunk, &byte[0]);
    word[1] = word_of_end<kBits, 1, 15>(codes, chunk, &byte[1]);
  } else {
    word[0] = word_of_end<kBits, 0, 7>(codes, unit / 2, &byte[0]);
    word[1] = word_of_end<kBits, 1, 7>(codes, unit / 2, &byte[1]);
  }
  return __byte_perm(word[0], word[1], uint32_t(byte[0] | (4 + byte[1]) << 4));
}

// What this lane's runs of a quad of a panel leave to the runs after them.
template <int kBits, int kRun>
__device__ __forceinline__ uint32_t last_low_bits(const uint4 (&codes)[kBits], int quad) {
  uint32_t ends[4];
#pragma unroll
  for (int u = 0; u < 4; ++u) ends[u] = ends_of_unit<kBits, kRun>(codes, 4 * quad + u);
  const uint32_t even = __byte_perm(ends[0], ends[2], 0x5410), odd = __byte_perm(ends[1], ends[3], 0x5410);
  return (even & kEvenUnits) | ((odd >> 2) & kOddUnits);
}

// The same of the lane that owns the columns before each run. `mine`: of this quad, `before`: of the quad before it.
__device__ __forceinline__ uint32_t history_of(uint32_t mine, uint32_t before) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t later = ((mine >> 2) & kOddUnits) | (__funnelshift_l(before, mine, 18) & kEvenUnits);  // by a unit
  return __shfl_sync(0xFFFFFFFFu, lane % 4 == 3 ? later : mine, (lane & ~3) | ((lane + 3) & 3));
}

// Zero where a block of the trellis begins with a run of lane t, in the quad of units at `column`.
template <int kRun>
__device__ __forceinline__ uint32_t history_that_counts(const format::OutlierBlocks& blocks, int64_t column, int t,
                                                        int64_t K) {
  uint32_t mask = 0;
  for (int u = 0; u < 4; ++u) {
    const int64_t k = column + (4 * u + t) * kRun;
    const bool begins = k < K && format::block_begin_at(blocks, k) == k;
    if (!begins) mask |= (3u << history_bit(u, 0)) | (3u << history_bit(u, 1));
  }
  return mask;
}

// The window of pair kPair of row g + 8 * kRow at bit kAt, so that it is the offset of its entry. Where a run begins,
// bits kField and kField + 1 of `history` are what came before; elsewhere (kInWords) that is in the words.
constexpr int kInWords = -1;
template <int kPair, int kRow, int kAt, int kField, int kBits>
__device__ __forceinline__ uint32_t window_of(const uint32_t (&words)[kBits], uint32_t history) {
  constexpr int kFirst = kRow * 16 * kBits + kPair * 2 * kBits;
  if constexpr (kField != kInWords) {
    const uint32_t placed = kField >= kAt ? history >> ((kField - kAt) & 31) : history << ((kAt - kField) & 31);
    return bits_of<kFirst, 2 * kBits, kAt + 2>(words) | (placed & (3u << kAt));
  } else {
    return bits_of<kFirst - 2, 2 * kBits + 2, kAt>(words);
  }
}

// Entry of table[window][kCopies]: `copy_of_table` is the lane's column of it, `window` is at bit log2(4 * kCopies).
__device__ __forceinline__ uint32_t look_up(const uint32_t* copy_of_table, uint32_t window) {
  return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const uint8_t*>(copy_of_table) + window);
}

// Where the scale of row g and column k of a row tile is, as format::scale_slot() has it; that of row g + 8 follows.
__device__ __forceinline__ int scale_shift(const format::CudaLayout& t) {
  return t.run == 8 ? 3 : t.scale_columns == 128 ? 1 : 2;
}
__device__ __forceinline__ int64_t scale_at(const format::CudaLayout& t, int64_t tile, int g, int k) {
  const int shift = scale_shift(t);
  const int64_t run = (tile * t.panels + (k >> 8)) * 8 + g;
  return ((run << shift) + ((k & 255) >> (8 - shift))) * 2;
}

// Block of a column, carried along: a division by a run-time number costs as much as a dozen weights.
struct Cursor {
  int block, begin, end, segment_end;  // of outliers and of the trellis

  __device__ __forceinline__ void place(const format::OutlierBlocks& blocks, int k) {
    const int segment = int(blocks.segment), in_segment = k / segment;
    segment_end = (in_segment + 1) * segment;
    block = in_segment * int(blocks.blocks_per_segment) + (k - in_segment * segment) / int(format::kBlock);
    begin = in_segment * segment + (k - in_segment * segment) / int(format::kBlock) * int(format::kBlock);
    end = begin + int(format::kBlock) < segment_end ? begin + int(format::kBlock) : segment_end;
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

  // Whether a block begins at columns 0 (bit 0) and 32 (bit 1) of the chunk at `column`, which lies in this block.
  __device__ __forceinline__ uint32_t restarts(int column, int K) const {
    return (begin == column ? 1u : 0u) | (end == column + 32 && end < K ? 2u : 0u);
  }
};

}  // namespace precal::cuda
