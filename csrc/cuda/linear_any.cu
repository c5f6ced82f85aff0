// SPDX-License-Identifier: Apache-2.0
// y[M, N] = x[M, K] W'[N, K]^T + bias for weights that are not tiled (format/cuda_tiles.h): other widths, odd groups,
// the published recipe; and for devices with too little shared memory. Right and slow.
//
// Work    a block owns a row of W' and up to 8 tokens; threads stride over K, dequantize and add, then a tree.
// Limits  any format, any M.
#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 128, kTokens = 8;

struct Shared {
  float levels[256];
  float sums[kTokens][kThreads];
};

__device__ __forceinline__ uint32_t code(const LinearParams& p, int64_t n, int64_t k) {
  const uint32_t* codes = reinterpret_cast<const uint32_t*>(p.prepacked + p.layout.codes);
  return p.layout.tiled ? format::cuda_code_at(codes, p.format, p.layout, n, k)
                        : format::code_at(codes + n * format::num_words(p.format), k, p.format.bits);
}

// Element j of row n of a section with `count` elements a row.
__device__ __forceinline__ int64_t element_of(const LinearParams& p, int64_t n, int64_t count, int64_t j) {
  return p.layout.tiled ? (n / format::kRowTile * count + j) * format::kRowTile + format::row_slot(n) : n * count + j;
}

// scale * level + U * outlier of column k.
__device__ __forceinline__ float dense_weight(const LinearParams& p, const format::OutlierBlocks& blocks,
                                              const float* levels, int64_t n, int64_t k) {
  const format::WeightFormat& f = p.format;
  const uint8_t* base = p.prepacked;
  const int64_t begin = format::block_begin_at(blocks, k);
  uint32_t index = code(p, n, k);
  if (format::is_trellis(f)) {
    format::TrellisState state;
    for (int64_t i = k - 2 < begin ? begin : k - 2; i < k; ++i) format::trellis_index(&state, code(p, n, i));
    index = format::trellis_index(&state, index);
  }
  const uint8_t* mask = base + p.layout.mask + n * format::mask_bytes_per_row(f);
  const bool salient = f.split && ((mask[k / 8] >> (k % 8)) & 1) != 0;
  const float scale = format::load_scale(base + (salient ? p.layout.outlier_scale : p.layout.scale),
                                         element_of(p, n, p.groups, k / f.group_size), f.scale_type);
  float value = scale * levels[index];
  const int64_t block = begin / blocks.segment * blocks.blocks_per_segment + begin % blocks.segment / format::kBlock;
  for (int i = 0; i < f.c; ++i) {
    const int64_t at = element_of(p, n, blocks.num_blocks * f.c, block * f.c + i);
    const uint8_t* index_at = base + p.layout.outliers + (p.layout.tiled ? 2 * at : at);
    const uint8_t* value_at = p.layout.tiled ? index_at + 1 : base + p.layout.outlier_value + at;
    if (begin + *index_at == k) value = value + format::kOutlierUnit * format::e4m3_to_float(*value_at);
  }
  return value;
}

__global__ void __launch_bounds__(kThreads) linear_any_kernel(LinearParams p) {
  PRECAL_SHARED(Shared, s);
  const format::WeightFormat& f = p.format;
  const int8_t* grid = reinterpret_cast<const int8_t*>(p.prepacked + format::kCudaGridOffset);
  for (int u = int(threadIdx.x); u < 256; u += kThreads) {
    s.levels[u] = f.grid_size == 0 ? float(u - (1 << (f.bits - 1))) : u < f.grid_size ? float(grid[u]) : 0.0f;
  }
  __syncthreads();
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const int64_t n = blockIdx.x, first = int64_t(blockIdx.y) * kTokens;
  const int tokens = int(p.M - first < kTokens ? p.M - first : kTokens);
  float sums[kTokens] = {};
  for (int64_t k = threadIdx.x; k < f.K; k += kThreads) {
    const float w = dense_weight(p, blocks, s.levels, n, k);
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
