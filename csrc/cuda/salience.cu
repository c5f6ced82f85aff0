// SPDX-License-Identifier: Apache-2.0
// salience_threshold and salience_mask: the exact order statistic of |w| (docs/method.md, section 1) by counting the
// bits of |w| in three passes of 11, 10 and 10; the CPU's bits.
//
// Work    tensor scope: blocks count a digit in shared memory and add up, one block picks the digit, three times. Row
// and
//         group scope: a block a unit, all three passes in shared memory. normalize: one thread a unit, because its
//         sums have an order; slow where a unit is a long row.
// Limits  a weight that is not finite gives lam = NaN for its unit (the CPU refuses it); the mask of NaN is false.
#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256, kPasses = 3, kBins = 2048;
using Count = unsigned long long;

__device__ __forceinline__ int digit_shift(int pass) { return pass == 0 ? 20 : pass == 1 ? 10 : 0; }
__device__ __forceinline__ int digit_bins(int pass) { return pass == 0 ? 2048 : 1024; }

struct Selection {
  Count rank;       // from the largest, from 1; within the prefix
  uint32_t prefix;  // the upper digits found so far
  uint32_t refused;
};

struct KernelParams {
  SalienceParams s;
  const float* z;        // normalized weights, or nullptr: w itself
  Selection* selection;  // tensor scope
  Count* counts;         // [kPasses][kBins]
};

__device__ __forceinline__ float element(const KernelParams& p, int64_t i) {
  return p.z != nullptr ? p.z[i] : load_element(p.s.w, p.s.dtype, i);
}

__device__ __forceinline__ int64_t wanted(double alpha, int64_t count) {
  const int64_t k = int64_t(floor(alpha * double(count) + 0.5));
  return k < count ? k : count;
}

// lam for the k-th largest magnitude v: the square of the float32 just below v, so that v and its equals survive. Where
// none shall survive, the square of the largest.
__device__ __forceinline__ double lam_of(float v, bool none, bool refused) {
  if (refused) return double(bits_float(0x7FC00000u));
  const double t = none || v == 0.0f ? double(v) : double(bits_float(float_bits(v) - 1));
  return t * t;
}

// Whether |w| has the upper digits of `prefix`; its digit of this pass.
__device__ __forceinline__ bool digit_of(float w, int pass, uint32_t prefix, int* digit) {
  const uint32_t magnitude = float_bits(w) & 0x7FFFFFFFu;
  *digit = int((magnitude >> digit_shift(pass)) & uint32_t(digit_bins(pass) - 1));
  return pass == 0 || magnitude >> digit_shift(pass - 1) == prefix;
}

// By one thread: the digit of the rank-th largest; rank becomes the rank among its equals.
template <typename T>
__device__ __forceinline__ uint32_t pick_digit(const T* counts, int pass, Count* rank) {
  for (int digit = digit_bins(pass) - 1; digit > 0; --digit) {
    if (*rank <= counts[digit]) return uint32_t(digit);
    *rank -= counts[digit];
  }
  return 0;
}

__device__ __forceinline__ void extend(uint32_t* prefix, int pass, uint32_t digit) {
  *prefix = pass == 0 ? digit : *prefix << 10 | digit;
}

// ---- normalize -----------------------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kThreads) normalize_kernel(KernelParams p) {
  const SalienceParams& s = p.s;
  const int64_t units = ceil_div(s.K, s.normalize_unit), all = s.N * units;
  float* out = const_cast<float*>(p.z);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t first = i % units * s.normalize_unit, base = i / units * s.K + first;
    const int64_t count = s.normalize_unit < s.K - first ? s.normalize_unit : s.K - first;
    double sum = 0.0, squares = 0.0;
    for (int64_t j = 0; j < count; ++j) sum += double(load_element(s.w, s.dtype, base + j));
    const double mean = sum / double(count);
    for (int64_t j = 0; j < count; ++j) {
      const double d = double(load_element(s.w, s.dtype, base + j)) - mean;
      squares += d * d;
    }
    const double deviation = sqrt(squares / double(count));
    for (int64_t j = 0; j < count; ++j) {
      const double d = double(load_element(s.w, s.dtype, base + j)) - mean;
      out[base + j] = deviation > 0.0 ? float(d / deviation) : 0.0f;
    }
  }
}

// ---- tensor scope --------------------------------------------------------------------------------------------------
struct Digits {
  uint32_t counts[kBins];
};

template <int kPass>
__global__ void __launch_bounds__(kThreads) count_kernel(KernelParams p) {
  PRECAL_SHARED(Digits, local);
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) local.counts[i] = 0;
  __syncthreads();
  const uint32_t prefix = p.selection->prefix;
  const int64_t all = p.s.N * p.s.K;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    if (kPass == 0 && !is_finite(load_element(p.s.w, p.s.dtype, i))) atomicOr(&p.selection->refused, 1u);
    int digit;
    if (digit_of(element(p, i), kPass, prefix, &digit)) atomicAdd(&local.counts[digit], 1u);
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < kBins; i += kThreads) {
    if (local.counts[i] != 0) atomicAdd(&p.counts[kPass * kBins + i], Count(local.counts[i]));
  }
}

template <int kPass>
__global__ void pick_kernel(KernelParams p) {
  const int64_t k = wanted(p.s.alpha, p.s.N * p.s.K);
  if (kPass == 0) p.selection->rank = k == 0 ? 1 : Count(k);
  extend(&p.selection->prefix, kPass, pick_digit(p.counts + kPass * kBins, kPass, &p.selection->rank));
  if (kPass == kPasses - 1) p.s.lam[0] = lam_of(bits_float(p.selection->prefix), k == 0, p.selection->refused != 0);
}

// ---- row and group scope -------------------------------------------------------------------------------------------
struct Unit {
  uint32_t counts[kBins];
  uint32_t prefix, refused;
  Count rank;
};

__global__ void __launch_bounds__(kThreads) units_kernel(KernelParams p) {
  PRECAL_SHARED(Unit, u);
  const SalienceParams& s = p.s;
  const int64_t units = ceil_div(s.K, s.unit), all = s.N * units;
  for (int64_t i = blockIdx.x; i < all; i += gridDim.x) {
    const int64_t first = i % units * s.unit, base = i / units * s.K + first;
    const int64_t count = s.unit < s.K - first ? s.unit : s.K - first, k = wanted(s.alpha, count);
    if (threadIdx.x == 0) {
      u.prefix = u.refused = 0;
      u.rank = k == 0 ? 1 : Count(k);
    }
    for (int pass = 0; pass < kPasses; ++pass) {
      for (int j = int(threadIdx.x); j < kBins; j += kThreads) u.counts[j] = 0;
      __syncthreads();
      for (int64_t j = threadIdx.x; j < count; j += kThreads) {
        if (!is_finite(load_element(s.w, s.dtype, base + j))) atomicOr(&u.refused, 1u);
        int digit;
        if (digit_of(element(p, base + j), pass, u.prefix, &digit)) atomicAdd(&u.counts[digit], 1u);
      }
      __syncthreads();
      if (threadIdx.x == 0) extend(&u.prefix, pass, pick_digit(u.counts, pass, &u.rank));
      __syncthreads();
    }
    if (threadIdx.x == 0) s.lam[i] = lam_of(bits_float(u.prefix), k == 0, u.refused != 0);
  }
}

__global__ void __launch_bounds__(kThreads) mask_kernel(KernelParams p) {
  const SalienceParams& s = p.s;
  const int64_t all = s.N * s.K, units = s.unit > 0 ? ceil_div(s.K, s.unit) : 1;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t unit = s.unit > 0 ? i / s.K * units + i % s.K / s.unit : 0;
    const double value = double(element(p, i));
    s.mask[i] = value * value > s.lam[unit];
  }
}

constexpr int64_t kStateBytes = 64 + kPasses * kBins * 8;

// The normalized weights, if any, after the state of the tensor scope.
Status normalized(const char* op, const SalienceParams& s, KernelParams* p, cudaStream_t stream) {
  p->s = s;
  p->selection = static_cast<Selection*>(s.workspace);
  p->counts = reinterpret_cast<Count*>(static_cast<uint8_t*>(s.workspace) + 64);
  if (s.normalize_unit == 0) return {};
  p->z = reinterpret_cast<const float*>(static_cast<uint8_t*>(s.workspace) + kStateBytes);
  const int64_t work = s.N * ceil_div(s.K, s.normalize_unit);
  return launch(op, &normalize_kernel, blocks_for(work, kThreads), kThreads, 0, stream, *p);
}

}  // namespace

int64_t salience_workspace(int64_t count, bool normalize) { return kStateBytes + (normalize ? count * 4 : 0); }

Status launch_salience_threshold(const SalienceParams& s, cudaStream_t stream) {
  constexpr const char* op = "salience_threshold";
  const int64_t all = s.N * s.K;
  if (all == 0) {
    return s.num_lam == 0 ? Status() : check_cuda(op, cudaMemsetAsync(s.lam, 0, size_t(s.num_lam * 8), stream));
  }
  KernelParams p{};
  PRECAL_RETURN_IF_ERROR(normalized(op, s, &p, stream));
  if (s.unit > 0) return launch(op, &units_kernel, blocks_for(s.num_lam, 1), kThreads, 0, stream, p);
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaMemsetAsync(s.workspace, 0, size_t(kStateBytes), stream)));
  const dim3 grid = blocks_for(ceil_div(all, 32), kThreads);
  PRECAL_RETURN_IF_ERROR(launch(op, &count_kernel<0>, grid, kThreads, 0, stream, p));
  PRECAL_RETURN_IF_ERROR(launch(op, &pick_kernel<0>, dim3(1), 1, 0, stream, p));
  PRECAL_RETURN_IF_ERROR(launch(op, &count_kernel<1>, grid, kThreads, 0, stream, p));
  PRECAL_RETURN_IF_ERROR(launch(op, &pick_kernel<1>, dim3(1), 1, 0, stream, p));
  PRECAL_RETURN_IF_ERROR(launch(op, &count_kernel<2>, grid, kThreads, 0, stream, p));
  return launch(op, &pick_kernel<2>, dim3(1), 1, 0, stream, p);
}

Status launch_salience_mask(const SalienceParams& s, cudaStream_t stream) {
  constexpr const char* op = "salience_mask";
  if (s.N * s.K == 0) return {};
  KernelParams p{};
  PRECAL_RETURN_IF_ERROR(normalized(op, s, &p, stream));
  return launch(op, &mask_kernel, blocks_for(s.N * s.K, kThreads), kThreads, 0, stream, p);
}

}  // namespace precal::cuda
