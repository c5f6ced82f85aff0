// SPDX-License-Identifier: Apache-2.0
// y[M, N] = x[M, K] W'[N, K]^T + bias for weights that are not tiled (format/cuda_tiles.h): other widths, odd groups,
// the published recipe; and for devices with too little shared memory. Right and slow.
//
// Work    a block owns a row of W' and up to 8 tokens; threads stride over K, dequantize and add, then a tree.
// Limits  any format, any M.
#include "cuda/any_weight.cuh"
#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 128, kTokens = 8;

struct Shared {
  float levels[256];
  float sums[kTokens][kThreads];
};

__global__ void __launch_bounds__(kThreads) linear_any_kernel(LinearParams p) {
  PRECAL_SHARED(Shared, s);
  const format::WeightFormat& f = p.format;
  load_levels(f, p.prepacked, s.levels, kThreads);
  __syncthreads();
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const PrepackedView weight{p.format, p.layout, p.prepacked, p.groups};
  const int64_t n = blockIdx.x, first = int64_t(blockIdx.y) * kTokens;
  const int tokens = int(p.M - first < kTokens ? p.M - first : kTokens);
  float sums[kTokens] = {};
  for (int64_t k = threadIdx.x; k < f.K; k += kThreads) {
    const float w = dense_weight(weight, blocks, s.levels, n, k);
#pragma unroll
    for (int m = 0; m < kTokens; ++m) {
      if (m < tokens) sums[m] = fmaf(w, load_element(p.x, p.x_dtype, (first + m) * f.K + k), sums[m]);
    }
  }
#pragma unroll
  for (int m = 0; m < kTokens; ++m) s.sums[m][threadIdx.x] = sums[m];
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (int(threadIdx.x) >= width) continue;
    for (int m = 0; m < tokens; ++m) s.sums[m][threadIdx.x] += s.sums[m][threadIdx.x + width];
  }
  __syncthreads();
  if (int(threadIdx.x) >= tokens) return;
  const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(p.prepacked + p.layout.row_scale);
  float y = bf16_to_float(row_scale[n]) * s.sums[threadIdx.x][0];
  if (p.bias != nullptr) y = y + load_element(p.bias, p.bias_dtype, n);
  store_element(p.y, p.x_dtype, (first + threadIdx.x) * f.N + n, y);
}

}  // namespace

Status launch_linear_any(const LinearParams& all, cudaStream_t stream) {
  constexpr int64_t kMostTokens = 65535 * kTokens;  // of one launch
  LinearParams p = all;
  for (int64_t m = 0; m < all.M; m += kMostTokens) {
    p.M = all.M - m < kMostTokens ? all.M - m : kMostTokens;
    p.x = static_cast<const uint8_t*>(all.x) + m * all.format.K * dtype_bytes(all.x_dtype);
    p.y = static_cast<uint8_t*>(all.y) + m * all.format.N * dtype_bytes(all.x_dtype);
    const dim3 grid(unsigned(p.format.N), unsigned(ceil_div(p.M, kTokens)));
    PRECAL_RETURN_IF_ERROR(launch("linear", &linear_any_kernel, grid, kThreads, 0, stream, p));
  }
  return {};
}

}  // namespace precal::cuda
