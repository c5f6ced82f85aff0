// SPDX-License-Identifier: Apache-2.0
// torch's side of a GPU: its current stream, the guard of the current device, and where ops are registered. Under
// PRECAL_CUDA_ON_CPU (tests/cuda_on_cpu) the same bindings run the kernels on CPU tensors, as
// torch.ops.precal_emulated.
#pragma once

#include "bindings/torch_tensor.h"
#include "cuda/kernels.h"
#include "cuda/linear_config.h"

#if defined(PRECAL_CUDA_ON_CPU)

// PRECAL_NAMESPACE is given by the build
#define PRECAL_CUDA_KEY CPU

namespace precal::bindings {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
inline cudaStream_t current_stream(int32_t) { return nullptr; }
inline bool is_on_gpu(const Tensor& t) { return !t.is_cuda(); }

// Tests have small weights, and slice them all the same.
inline int64_t g_slice_rows = 0;
extern "C" __attribute__((visibility("default"))) void precal_emulated_slice_rows(int64_t rows) { g_slice_rows = rows; }
inline int64_t slice_rows(int64_t N, int64_t K, int64_t element_bytes) {
  return g_slice_rows > 0 ? g_slice_rows : cuda::dense_slice_rows(N, K, element_bytes);
}

}  // namespace precal::bindings

#else

#include <torch/csrc/stable/accelerator.h>

#define PRECAL_NAMESPACE precal
#define PRECAL_CUDA_KEY CUDA

namespace precal::bindings {

using DeviceGuard = torch::stable::accelerator::DeviceGuard;
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
inline bool is_on_gpu(const Tensor& t) { return t.is_cuda(); }
inline int64_t slice_rows(int64_t N, int64_t K, int64_t element_bytes) {
  return cuda::dense_slice_rows(N, K, element_bytes);
}

}  // namespace precal::bindings

#endif

// The macro of torch pastes its arguments; this one looks into them first.
#define PRECAL_TORCH_LIBRARY_IMPL(space, key, m) STABLE_TORCH_LIBRARY_IMPL(space, key, m)
