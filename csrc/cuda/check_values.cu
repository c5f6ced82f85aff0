// SPDX-License-Identifier: Apache-2.0
// Whether a tensor breaks a rule that the CPU's op would refuse. One word comes back; what was wrong, the CPU's op says
// (csrc/bindings/cuda_ops.cpp).
//
// Work    a thread an element, a store by those that find something.
#include "cuda/elements.cuh"
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256;

struct CheckParams {
  ValueCheck check;
  uint32_t* flag;
};

__device__ __forceinline__ bool is_bad_float(double value, ValueRule rule) {
  if (rule == ValueRule::kNotNan) return value != value;
  const bool finite = value - value == 0.0;
  return rule == ValueRule::kFinite ? !finite : !(finite && value >= 0.0);
}

__device__ __forceinline__ bool is_bad(const ValueCheck& c, int64_t i) {
  switch (c.dtype) {
    case DType::kInt64: {
      const int64_t value = static_cast<const int64_t*>(c.data)[i];
      return value < 0 || (c.rule == ValueRule::kBelow && value >= c.limit);
    }
    case DType::kUInt8: return int64_t(static_cast<const uint8_t*>(c.data)[i]) >= c.limit;
    case DType::kInt8: {
      const int8_t* level = static_cast<const int8_t*>(c.data);
      if (level[i] == -128 || (i > 0 && level[i] < level[i - 1])) return true;
      return i == 0 && ((level[0] == 0 && level[c.count - 1] == 0) || (c.limit == 1 && level[c.count - 1] <= 0));
    }
    case DType::kFloat64: return is_bad_float(static_cast<const double*>(c.data)[i], c.rule);
    default: return is_bad_float(double(load_element(c.data, c.dtype, i)), c.rule);
  }
}

__global__ void __launch_bounds__(kThreads) check_kernel(CheckParams p) {
  bool bad = false;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.check.count;
       i += int64_t(gridDim.x) * kThreads) {
    bad = bad || is_bad(p.check, i);
  }
  if (bad) atomicOr(p.flag, 1u);
}

}  // namespace

Status launch_check_values(const char* op, const ValueCheck& check, uint32_t* flag, cudaStream_t stream) {
  if (check.count == 0) return {};
  return launch(op, &check_kernel, blocks_for(check.count, kThreads), kThreads, 0, stream, CheckParams{check, flag});
}

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &status) == cudaSuccess) return status != cudaStreamCaptureStatusNone;
  (void)cudaGetLastError();  // the default stream while another one is capturing
  return true;
}

}  // namespace precal::cuda
