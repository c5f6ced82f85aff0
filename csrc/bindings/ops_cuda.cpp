// SPDX-License-Identifier: Apache-2.0
// torch.ops.precal on CUDA devices. Loaded by precal_ext only where torch itself has CUDA.
#include <cmath>

#include "bindings/torch_tensor.h"
#include "cuda/kernels.h"

#include <torch/csrc/stable/accelerator.h>

namespace precal::bindings {
namespace {

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

Tensor soft_threshold(const Tensor& w, double lam) {
  const torch::stable::accelerator::DeviceGuard guard(w.get_device_index());
  const Call call{"soft_threshold"};
  const TensorView v = call.view("w", w);
  check(check_dtype(call.op, "w", v, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}));
  check(check_contiguous(call.op, "w", v));
  if (!(lam >= 0.0) || std::isinf(lam)) {
    check(invalid_value("soft_threshold: lam must be finite and >= 0, got ", lam));
  }
  const Tensor out = torch::stable::empty_like(w);
  check(cuda::launch_soft_threshold({v.data, out.data_ptr(), v.dtype, v.numel(), lam}, current_stream(w)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precal, CUDA, m) { m.impl("soft_threshold", TORCH_BOX(&soft_threshold)); }

}  // namespace precal::bindings
