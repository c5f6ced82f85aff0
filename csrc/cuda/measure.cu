// SPDX-License-Identifier: Apache-2.0
// What quantization did to a weight: squares and the histogram in units of levels, the bits of the CPU
// (csrc/cpu/measure-inl.h).
//
//   w, dtype [N, K]; the weight as in WeightPointers; counts [labels, bins] int64; squares [N, 2] float64
// Work    sixteen threads take a row: thread j the columns k with k % 16 == j, as the CPU's lanes do, so that the sums
//         have its order. Counts go to shared memory where they fit, and to global memory with a trellis.
// Limits  any format. Few rows leave most of the GPU idle; global atomics bound a trellis.
#include "cuda/canonical.cuh"
#include "cuda/elements.cuh"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256, kRowThreads = 16;
constexpr int64_t kMostCells = 4096;  // of 8 bytes, in shared memory
constexpr int64_t kMostBlocks = 2048;

using Count = unsigned long long;  // atomicAdd has no int64; the bits are the same

// The lanes' sums as hsum of the CPU adds them; the same in every lane.
__device__ __forceinline__ double sum_of_row(double sum) {
  for (int d = kRowThreads / 2; d > 0; d /= 2) sum = sum + __shfl_xor_sync(0xFFFFFFFFu, sum, d);
  return sum;
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads) measure_kernel(MeasureParams p) {
  PRECAL_SHARED(Levels, levels);
  Count* local = dynamic_shared<Count>();
  const format::WeightFormat& f = p.format;
  const int64_t cells = p.labels * p.num_bins;
  Count* counts = kShared ? local : reinterpret_cast<Count*>(p.counts);
  if (kShared) {
    for (int64_t i = threadIdx.x; i < cells; i += kThreads) local[i] = 0;
  }
  load_levels(f, p.weight.grid, &levels, kThreads);
  __syncthreads();
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const float per_bin = float(double(p.num_bins) / (2.0 * p.half)), width = float(2.0 * p.half / double(p.num_bins));
  const float half = float(p.half);
  constexpr int kRows = kThreads / kRowThreads;
  for (int64_t first = int64_t(blockIdx.x) * kRows; first < f.N; first += int64_t(gridDim.x) * kRows) {
    const int64_t n = first + int(threadIdx.x) / kRowThreads;
    double power = 0.0, noise = 0.0;
    for (int64_t k = int(threadIdx.x) % kRowThreads; n < f.N && k < f.K; k += kRowThreads) {
      const Block block = block_of(blocks, k);
      const uint32_t index = level_index_at(f, p.weight.packed + n * format::num_words(f), block, k);
      const Element e = element_at(f, p.weight, blocks, block, levels, index, n, k);
      const float row_scale = bf16_to_float(p.weight.row_scale[n]);
      const float w = load_element(p.w, p.dtype, n * f.K + k), change = row_scale * e.value - w;
      power = power + double(w) * double(w);
      noise = noise + double(change) * double(change);
      const float quotient = w / (row_scale * e.scale);  // infinite or NaN, and outside, where the scale is 0
      if (e.outlier || !(quotient >= -half && quotient <= half)) continue;
      int64_t bin = int64_t(quotient * per_bin);  // upwards below 0
      if (quotient < float(bin) * width) --bin;
      bin += p.num_bins / 2;
      if (bin == p.num_bins) --bin;  // the last bin has both of its edges
      atomicAdd(&counts[(p.labels > 1 ? index : 0) * p.num_bins + bin], Count(1));
    }
    power = sum_of_row(power);
    noise = sum_of_row(noise);
    if (n < f.N && threadIdx.x % kRowThreads == 0) {
      p.squares[2 * n] = power;
      p.squares[2 * n + 1] = noise;
    }
  }
  if (kShared) {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < cells; i += kThreads) {
      if (local[i] != 0) atomicAdd(reinterpret_cast<Count*>(p.counts) + i, local[i]);
    }
  }
}

}  // namespace

Status launch_measure(const MeasureParams& p, cudaStream_t stream) {
  constexpr const char* op = "measure";
  const int64_t cells = p.labels * p.num_bins;
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaMemsetAsync(p.counts, 0, size_t(cells * 8), stream)));
  if (p.format.N == 0) return {};
  const int64_t rows = ceil_div(p.format.N, kThreads / kRowThreads);
  const dim3 grid(unsigned(rows < kMostBlocks ? rows : kMostBlocks));
  return cells <= kMostCells ? launch(op, &measure_kernel<true>, grid, kThreads, cells * 8, stream, p)
                             : launch(op, &measure_kernel<false>, grid, kThreads, 0, stream, p);
}

}  // namespace precal::cuda
