// SPDX-License-Identifier: Apache-2.0
// What the kernels of quantize_groups and quantize_split share. The arithmetic is that of csrc/cpu/quantize-inl.h and
// trellis-inl.h, whose step numbers are used here: the same codes and scales, bit for bit.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace precal::cuda {

// A row with a weight that is not finite, or above kMaxWeight, gets this row scale; the CPU refuses it.
constexpr uint16_t kRefusedRow = 0x7FC0;

// Scratch between the kernels.
struct QuantizeScratch {
  float* target;       // [N, G]: extreme weight of a group, then t
  float* reach;        // [N, G]: trellis, largest dense |w| in units of the row scale
  float* salient;      // [N, G]: split, the same of the salient weights
  uint32_t* dense;     // [N, ceil(K/32)]: bit set for weights that count in the search
  uint8_t* end_state;  // [N, blocks]: trellis, state after the last column of a block
};

struct QuantizeKernelParams {
  QuantizeParams q;
  QuantizeScratch scratch;
  format::OutlierBlocks blocks;
  int64_t groups, group_size, mask_words;  // group_size at most K
};

struct LevelTable {
  float level[256];
  float mid[256];  // mid[i] between levels i and i + 1
  int count;
  float peak;
};

// By the whole block; a barrier follows in the caller.
__device__ __forceinline__ void load_levels(const QuantizeParams& q, LevelTable* t) {
  const format::WeightFormat& f = q.format;
  const int all = f.grid_size > 0 ? f.grid_size : 1 << f.bits;
  const auto level = [&](int i) { return f.grid_size > 0 ? float(q.grid[i]) : float(i - all / 2); };
  for (int i = int(threadIdx.x); i < all; i += int(blockDim.x)) {
    t->level[i] = level(i);
    if (i + 1 < all) t->mid[i] = (level(i) + level(i + 1)) * 0.5f;
  }
  if (threadIdx.x == 0) {
    t->count = all;
    const float low = level(0), top = level(all - 1);
    t->peak = (!q.symmetric && abs_float(low) > abs_float(top)) ? low : top;
  }
}

// Step 5: the number of midpoints below x.
__device__ __forceinline__ int nearest(const LevelTable& t, float x) {
  int index = 0;
  for (int i = 0; i + 1 < t.count; ++i) index += x > t.mid[i] ? 1 : 0;
  return index;
}

__device__ __forceinline__ bool is_dense(const QuantizeKernelParams& p, int64_t n, int64_t k) {
  return ((p.scratch.dense[n * p.mask_words + k / 32] >> (k % 32)) & 1u) != 0;
}

__device__ __forceinline__ float scaled_weight(const QuantizeKernelParams& p, int64_t n, int64_t k, float row_scale) {
  return row_scale > 0.0f ? load_element(p.q.w, p.q.dtype, n * p.q.format.K + k) / row_scale : 0.0f;
}

// Step 4: the first and last candidate of a group, magnitudes of e4m3.
__device__ __forceinline__ void candidates(const QuantizeParams& q, float t, int* first, int* last) {
  const float magnitude = abs_float(t);
  *first = magnitude > 0.0f ? format::float_to_e4m3(magnitude * q.search_lo) : 0;
  *last = magnitude > 0.0f ? format::float_to_e4m3(magnitude * q.search_hi) : 0;
  if (magnitude > 0.0f && *first < 1) *first = 1;
  if (*last < *first) *last = *first;
}

__device__ __forceinline__ uint8_t signed_code(float t, int magnitude) {
  return uint8_t(magnitude | (t < 0.0f && magnitude != 0 ? 0x80 : 0));
}

__device__ __forceinline__ uint16_t nonzero_half(float t) {
  constexpr float kHalfMax = 65504.0f;
  if (t == 0.0f) return 0;
  const uint16_t h = float_to_half(t < -kHalfMax ? -kHalfMax : t > kHalfMax ? kHalfMax : t);
  return (h & 0x7FFFu) == 0 ? uint16_t(h | 1u) : h;
}

__device__ __forceinline__ float inverse_of(float scale) { return scale != 0.0f ? 1.0f / scale : 0.0f; }

Status launch_quantize_plain(const QuantizeKernelParams& params, cudaStream_t stream);
Status launch_quantize_trellis(const QuantizeKernelParams& params, cudaStream_t stream);

}  // namespace precal::cuda
