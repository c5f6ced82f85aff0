// SPDX-License-Identifier: Apache-2.0
// W' from the canonical tensors, in the order of rounding that format/qtensor.h fixes: the bits of the CPU.
//
//   tensors as in WeightPointers; out [N, K] float32
// Work    a thread makes four neighbours of a row; with a trellis it reads the two codes before them as well.
// Limits  any format. The output is 4 bytes a weight and bounds the time; not used by linear.
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256, kColumns = 4;

struct Levels {
  float of[256];
};

__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeParams p) {
  PRECAL_SHARED(Levels, levels);
  const format::WeightFormat& f = p.format;
  const WeightPointers& w = p.weight;
  for (int u = int(threadIdx.x); u < 256; u += kThreads) {
    levels.of[u] = f.grid_size == 0 ? float(u - (1 << (f.bits - 1))) : u < f.grid_size ? float(w.grid[u]) : 0.0f;
  }
  __syncthreads();
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const int64_t words = format::num_words(f), groups = format::num_groups(f),
                mask_bytes = format::mask_bytes_per_row(f);
  const int64_t pieces = ceil_div(f.K, kColumns), all = f.N * pieces;
  const bool trellis = format::is_trellis(f);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t n = i / pieces, begin = i % pieces * kColumns;
    const int64_t end = begin + kColumns < f.K ? begin + kColumns : f.K;
    const uint32_t* row = w.packed + n * words;
    const float row_scale = bf16_to_float(w.row_scale[n]);
    // Blocks begin at multiples of four columns, so these four lie in one.
    const int64_t block_begin = format::block_begin_at(blocks, begin);
    const int64_t block =
        (block_begin / blocks.segment) * blocks.blocks_per_segment + block_begin % blocks.segment / format::kBlock;
    const int64_t width = format::block_end(blocks, block) - block_begin;
    format::TrellisState state;
    if (trellis && begin > block_begin) {
      format::trellis_index(&state, format::code_at(row, begin - 2, f.bits));
      format::trellis_index(&state, format::code_at(row, begin - 1, f.bits));
    }
    for (int64_t k = begin; k < end; ++k) {
      uint32_t index = format::code_at(row, k, f.bits);
      if (trellis) index = format::trellis_index(&state, index);
      const bool salient = f.split && ((w.mask[n * mask_bytes + k / 8] >> (k % 8)) & 1) != 0;
      const float scale =
          format::load_scale(salient ? w.outlier_scale : w.scale, n * groups + k / f.group_size, f.scale_type);
      float value = scale * levels.of[index];
      for (int j = 0; j < f.c; ++j) {
        const int64_t entry = (n * blocks.num_blocks + block) * f.c + j;
        const int64_t position = w.outlier_index[entry];
        if (position != k - block_begin || position >= width) continue;
        value = value + format::kOutlierUnit * format::e4m3_to_float(w.outlier_value[entry]);
      }
      p.out[n * f.K + k] = row_scale * value;
    }
  }
}

}  // namespace

Status launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  const int64_t work = p.format.N * ceil_div(p.format.K, kColumns);
  if (work == 0) return {};
  return launch("dequantize", &dequantize_kernel, blocks_for(work, kThreads), kThreads, 0, stream, p);
}

}  // namespace precal::cuda
