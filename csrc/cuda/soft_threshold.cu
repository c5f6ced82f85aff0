// SPDX-License-Identifier: Apache-2.0
// out = sign(w) * max(|w| - lam / |w|, 0), survivors decided by w * w > lam in double (exact for float32 w), as in
// csrc/cpu/salience-inl.h; the same bits.
//
//   w, out  [count] float32, float16 or bfloat16
// Work    a grid-stride loop, one element per thread and step; elementwise, so memory-bound: 8 bytes per float32.
// Limits  any count. Not tuned: vector loads come with the other CUDA kernels.
#include "core/numeric.h"
#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256;

template <DType kType>
__global__ void __launch_bounds__(kThreads) soft_threshold_kernel(SoftThresholdParams p) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.count; i += stride) {
    const float w = load_element<kType>(p.w, i);
    const double square = double(w) * double(w);
    float out = 0.0f;
    if (!(square <= p.lam)) out = double_to_float_nonzero((square - p.lam) / double(w));  // NaN stays NaN
    if ((float_bits(w) & 0x7FFFFFFFu) == 0x7F800000u) out = w;
    store_nonzero<kType>(p.out, i, out);
  }
}

}  // namespace

Status check_cuda(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return {};
  std::string hint;
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    hint = concat("; the driver supports CUDA ", driver / 1000, ".", driver % 1000 / 10, ", precal was built with ",
                  CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10,
                  ": update the driver (>= 580 for CUDA 13) or rebuild precal with an older toolkit");
  }
  return {StatusCode::kUnavailable, concat(op, ": CUDA says ", cudaGetErrorString(error), hint)};
}

Status launch_soft_threshold(const SoftThresholdParams& p, cudaStream_t stream) {
  if (p.count == 0) return {};
  const dim3 grid = blocks_for(p.count, kThreads);
  constexpr const char* op = "soft_threshold";
  switch (p.dtype) {
    case DType::kFloat32: return launch(op, &soft_threshold_kernel<DType::kFloat32>, grid, kThreads, 0, stream, p);
    case DType::kFloat16: return launch(op, &soft_threshold_kernel<DType::kFloat16>, grid, kThreads, 0, stream, p);
    case DType::kBFloat16: return launch(op, &soft_threshold_kernel<DType::kBFloat16>, grid, kThreads, 0, stream, p);
    default:
      return invalid_type("soft_threshold: w must have dtype float32, float16 or bfloat16, got ", dtype_name(p.dtype));
  }
}

}  // namespace precal::cuda
