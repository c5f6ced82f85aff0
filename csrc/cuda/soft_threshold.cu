// SPDX-License-Identifier: Apache-2.0
// out = sign(w) * max(|w| - lam / |w|, 0), survivors decided by w * w > lam in double (exact for float32 w), as in
// csrc/cpu/salience-inl.h; the same bits.
//
//   w, out  [count] float32, float16 or bfloat16
// Work    a grid-stride loop, one element per thread and step; elementwise, so memory-bound: 8 bytes per float32.
// Limits  any count. Not tuned: vector loads come with the other CUDA kernels.
#include "core/numeric.h"
#include "cuda/kernels.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

template <DType kType>
__device__ float load(const void* w, int64_t i) {
  if constexpr (kType == DType::kBFloat16) return bf16_to_float(static_cast<const uint16_t*>(w)[i]);
  if constexpr (kType == DType::kFloat16) return half_to_float(static_cast<const uint16_t*>(w)[i]);
  return static_cast<const float*>(w)[i];
}

template <DType kType>
__device__ void store(void* out, int64_t i, float value) {
  if constexpr (kType == DType::kBFloat16) {
    static_cast<uint16_t*>(out)[i] = float_to_bf16_nonzero(value);
  } else if constexpr (kType == DType::kFloat16) {
    static_cast<uint16_t*>(out)[i] = float_to_half_nonzero(value);
  } else {
    static_cast<float*>(out)[i] = value;
  }
}

template <DType kType>
__global__ void __launch_bounds__(kThreads) soft_threshold_kernel(SoftThresholdParams p) {
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.count; i += stride) {
    const float w = load<kType>(p.w, i);
    const double square = double(w) * double(w);
    float out = 0.0f;
    if (!(square <= p.lam)) out = double_to_float_nonzero((square - p.lam) / double(w));  // NaN stays NaN
    if ((float_bits(w) & 0x7FFFFFFFu) == 0x7F800000u) out = w;
    store<kType>(p.out, i, out);
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
  const int64_t wanted = ceil_div(p.count, kThreads);
  const dim3 grid(unsigned(wanted < kMaxBlocks ? wanted : kMaxBlocks));
  switch (p.dtype) {
    case DType::kFloat32: soft_threshold_kernel<DType::kFloat32><<<grid, kThreads, 0, stream>>>(p); break;
    case DType::kFloat16: soft_threshold_kernel<DType::kFloat16><<<grid, kThreads, 0, stream>>>(p); break;
    case DType::kBFloat16: soft_threshold_kernel<DType::kBFloat16><<<grid, kThreads, 0, stream>>>(p); break;
    default:
      return invalid_type("soft_threshold: w must have dtype float32, float16 or bfloat16, got ", dtype_name(p.dtype));
  }
  return check_cuda("soft_threshold", cudaGetLastError());
}

}  // namespace precal::cuda
