// SPDX-License-Identifier: Apache-2.0
// quantize_groups without a trellis, and quantize_split: scales and codes of every group (steps 4 and 5 of
// csrc/cpu/quantize-inl.h).
//
// Work    a warp owns a group. Its halves try two candidate scales at a time; lane i % 16 sums the errors of columns i,
//         i + 16, ..., and the halves are added as a tree: the order that the arithmetic fixes.
// Limits  any group size, c and levels up to 256. One compare per level and candidate: bound by arithmetic.
#include "cuda/quantize.cuh"

namespace precal::cuda {

namespace {

constexpr int kThreads = 128;

// Sum of dense * (v - s * level)^2 over a group, by half a warp.
__device__ __forceinline__ float group_error(const QuantizeKernelParams& p, const LevelTable& levels, int64_t n,
                                             int64_t begin, int64_t end, float row_scale, float scale) {
  const float inverse = 1.0f / scale;
  float sum = 0.0f;
  for (int64_t k = begin + int(threadIdx.x) % 16; k < end; k += 16) {
    const float v = scaled_weight(p, n, k, row_scale);
    const float level = levels.level[nearest(levels, v * inverse)];
    const float error = (is_dense(p, n, k) ? 1.0f : 0.0f) * (v - scale * level);
    sum = sum + error * error;
  }
  for (int d = 8; d > 0; d /= 2) sum = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, d);
  return sum;
}

__device__ __forceinline__ uint8_t search_scale(const QuantizeKernelParams& p, const LevelTable& levels, int64_t n,
                                                int64_t begin, int64_t end, float row_scale, float t) {
  int first, last;
  candidates(p.q, t, &first, &last);
  if (first == last) return signed_code(t, first);
  const int half = int(threadIdx.x) % 32 / 16;
  int best = first;
  float best_error = 0.0f;
  for (int at = first; at <= last; at += 2) {
    const int mine = at + half <= last ? at + half : last;
    const float error = group_error(p, levels, n, begin, end, row_scale, format::e4m3_to_float(signed_code(t, mine)));
    const float of_first = __shfl_sync(0xFFFFFFFFu, error, 0), of_second = __shfl_sync(0xFFFFFFFFu, error, 16);
    if (at == first || of_first < best_error) {
      best = at;
      best_error = of_first;
    }
    if (at < last && of_second < best_error) {
      best = at + 1;
      best_error = of_second;
    }
  }
  return signed_code(t, best);
}

__global__ void __launch_bounds__(kThreads) quantize_plain_kernel(QuantizeKernelParams p) {
  PRECAL_SHARED(LevelTable, levels);
  const QuantizeParams& q = p.q;
  load_levels(q, &levels);
  __syncthreads();
  const int lane = int(threadIdx.x) % 32;
  const int64_t all = q.format.N * p.groups, warps = int64_t(gridDim.x) * (kThreads / 32);
  for (int64_t i = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < all; i += warps) {
    const int64_t n = i / p.groups, begin = i % p.groups * p.group_size;
    const int64_t end = begin + p.group_size < q.format.K ? begin + p.group_size : q.format.K;
    const float row_scale = bf16_to_float(q.row_scale[n]), t = p.scratch.target[i];
    float scale;
    if (q.format.scale_type == format::ScaleType::kE4m3) {
      const uint8_t code = search_scale(p, levels, n, begin, end, row_scale, t);
      if (lane == 0) static_cast<uint8_t*>(q.scale)[i] = code;
      scale = format::e4m3_to_float(code);
    } else {
      const uint16_t code = nonzero_half(t);
      if (lane == 0) static_cast<uint16_t*>(q.scale)[i] = code;
      scale = half_to_float(code);
    }
    const float inverse = inverse_of(scale);
    const float salient =
        q.format.split ? inverse_of(half_to_float(static_cast<const uint16_t*>(q.outlier_scale)[i])) : inverse;
    for (int64_t k = begin + lane; k < end; k += 32) {
      const float v = scaled_weight(p, n, k, row_scale);
      const float x = v * (q.format.split && !is_dense(p, n, k) ? salient : inverse);
      q.codes[n * q.format.K + k] = uint8_t(nearest(levels, x));
    }
  }
}

}  // namespace

Status launch_quantize_plain(const QuantizeKernelParams& p, cudaStream_t stream) {
  const char* op = p.q.format.split ? "quantize_split" : "quantize_groups";
  const dim3 grid = blocks_for(p.q.format.N * p.groups * 32, kThreads);
  return launch(op, &quantize_plain_kernel, grid, kThreads, 0, stream, p);
}

}  // namespace precal::cuda
