// SPDX-License-Identifier: Apache-2.0
// CUDA launchers: pointers, sizes and a stream; no torch, no allocation, no synchronisation. Each returns a Status that
// names the CUDA error; errors of the running kernel appear at the stream's next synchronisation, as always.
#pragma once

#include <cuda_runtime.h>

#include "core/tensor_view.h"

namespace precal::cuda {

// `soft_threshold` as csrc/cpu/ops.h defines it, checked by the caller. w and out: `count` elements of `dtype`.
struct SoftThresholdParams {
  const void* w;
  void* out;
  DType dtype;  // float32, float16 or bfloat16
  int64_t count;
  double lam;
};

Status launch_soft_threshold(const SoftThresholdParams& params, cudaStream_t stream);

// OK, or what the launch or runtime said. An old driver is named with the version it must have.
Status check_cuda(const char* op, cudaError_t error);

}  // namespace precal::cuda
