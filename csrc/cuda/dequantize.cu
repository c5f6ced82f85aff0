// SPDX-License-Identifier: Apache-2.0
// W' from the canonical tensors, in the order of rounding that format/qtensor.h fixes: the bits of the CPU.
//
//   tensors as in WeightPointers; out [N, K] float32
// Work    a thread makes four neighbours of a row; with a trellis it reads the two codes before them as well.
// Limits  any format. The output is 4 bytes a weight and bounds the time; not used by linear.
#include "cuda/canonical.cuh"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256, kColumns = 4;

__global__ void __launch_bounds__(kThreads) dequantize_kernel(DequantizeParams p) {
  PRECAL_SHARED(Levels, levels);
  const format::WeightFormat& f = p.format;
  load_levels(f, p.weight.grid, &levels, kThreads);
  __syncthreads();
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const int64_t pieces = ceil_div(f.K, kColumns), all = f.N * pieces;
  const bool trellis = format::is_trellis(f);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t n = i / pieces, begin = i % pieces * kColumns;
    const int64_t end = begin + kColumns < f.K ? begin + kColumns : f.K;
    const uint32_t* row = p.weight.packed + n * format::num_words(f);
    const float row_scale = bf16_to_float(p.weight.row_scale[n]);
    // Blocks begin at multiples of four columns, so these four lie in one.
    const Block block = block_of(blocks, begin);
    format::TrellisState state;
    if (trellis && begin > block.begin) {
      format::trellis_index(&state, format::code_at(row, begin - 2, f.bits));
      format::trellis_index(&state, format::code_at(row, begin - 1, f.bits));
    }
    for (int64_t k = begin; k < end; ++k) {
      uint32_t index = format::code_at(row, k, f.bits);
      if (trellis) index = format::trellis_index(&state, index);
      p.out[n * f.K + k] = row_scale * element_at(f, p.weight, blocks, block, levels, index, n, k).value;
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
