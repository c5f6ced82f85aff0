// SPDX-License-Identifier: Apache-2.0
// Integer histogram of w / divisor: the bins, and so the counts, of the CPU (csrc/cpu/histogram-inl.h).
//
//   w, dtype [N, K]; divisor, weight [N, G] or nullptr; label [N, K] or nullptr
//   counts [num_labels, num_bins], outside [3] = below, above, NaN; int64
// Work    blocks take rows, in pieces; a block counts in shared memory and adds it up at the end, or in global memory
// directly
//         where the cells do not fit. Integers: any order gives the same counts.
// Limits  a label that is not below num_labels counts nowhere (the CPU refuses it).
#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostCells = 4096;   // of 8 bytes, in shared memory
constexpr int64_t kPiece = 4096;       // columns that a block counts before it looks for more
constexpr int64_t kMostBlocks = 2048;  // each clears and adds up its cells

using Count = unsigned long long;  // atomicAdd has no int64; the bits are the same

// The quotient finds the bin up to its rounding; the edges themselves decide.
__device__ __forceinline__ int64_t find_bin(double x, double lo, double h, int64_t num_bins) {
  int64_t bin = int64_t((x - lo) / h);
  if (bin > num_bins - 1) bin = num_bins - 1;
  while (bin > 0 && x < lo + double(bin) * h) --bin;
  while (bin < num_bins - 1 && x >= lo + double(bin + 1) * h) ++bin;
  return bin;
}

template <bool kShared>
__global__ void __launch_bounds__(kThreads) histogram_kernel(HistogramParams p) {
  Count* local = dynamic_shared<Count>();
  const int64_t cells = p.num_labels * p.num_bins;
  Count* counts = kShared ? local : reinterpret_cast<Count*>(p.counts);
  if (kShared) {
    for (int64_t i = threadIdx.x; i < cells; i += kThreads) local[i] = 0;
    __syncthreads();
  }
  const double h = (p.hi - p.lo) / double(p.num_bins);
  const int64_t pieces = ceil_div(p.K, kPiece);
  const bool grouped = p.divisor != nullptr || p.weight != nullptr;
  const bool narrow = p.K < (int64_t(1) << 32);  // a division of 32 bits costs a quarter
  for (int64_t item = blockIdx.x; item < p.N * pieces; item += gridDim.x) {
    const int64_t n = item / pieces, begin = item % pieces * kPiece;
    const int64_t end = begin + kPiece < p.K ? begin + kPiece : p.K;
    for (int64_t k = begin + threadIdx.x; k < end; k += kThreads) {
      const int64_t i = n * p.K + k;
      int64_t group = 0;
      if (grouped) group = n * p.groups + (narrow ? uint32_t(k) / uint32_t(p.group_size) : k / p.group_size);
      const int64_t mass = p.weight != nullptr ? p.weight[group] : 1;
      const int64_t label = p.label != nullptr ? p.label[i] : 0;
      if (mass == 0 || label >= p.num_labels) continue;
      const double x = double(load_element(p.w, p.dtype, i) / (p.divisor != nullptr ? p.divisor[group] : 1.0f));
      if (x >= p.lo && x <= p.hi) {
        atomicAdd(&counts[label * p.num_bins + find_bin(x, p.lo, h, p.num_bins)], Count(mass));
      } else {
        atomicAdd(reinterpret_cast<Count*>(p.outside) + (x < p.lo ? 0 : x > p.hi ? 1 : 2), Count(mass));
      }
    }
  }
  if (kShared) __syncthreads();
  if (!kShared) return;
  for (int64_t i = threadIdx.x; i < cells; i += kThreads) {
    if (local[i] != 0) atomicAdd(reinterpret_cast<Count*>(p.counts) + i, local[i]);
  }
}

}  // namespace

Status launch_histogram(const HistogramParams& p, cudaStream_t stream) {
  constexpr const char* op = "histogram";
  const int64_t cells = p.num_labels * p.num_bins, work = p.N * p.K;
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaMemsetAsync(p.counts, 0, size_t(cells * 8), stream)));
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaMemsetAsync(p.outside, 0, 3 * 8, stream)));
  if (work == 0) return {};
  const int64_t items = p.N * ceil_div(p.K, kPiece);
  const dim3 grid(unsigned(items < kMostBlocks ? items : kMostBlocks));
  return cells <= kMostCells ? launch(op, &histogram_kernel<true>, grid, kThreads, cells * 8, stream, p)
                             : launch(op, &histogram_kernel<false>, grid, kThreads, 0, stream, p);
}

}  // namespace precal::cuda
