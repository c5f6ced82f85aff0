// SPDX-License-Identifier: Apache-2.0
// linear: the choice of a kernel (linear_config.h) and its launch.
#include "cuda/launch.h"
#include "cuda/linear_config.h"

namespace precal::cuda {

Status launch_linear_any(const LinearParams& params, cudaStream_t stream);
Status launch_linear_small(const LinearParams& params, const LinearConfig& config, cudaStream_t stream);
Status launch_linear_large(const LinearParams& params, const LinearConfig& config, cudaStream_t stream);

namespace {

Status choose(const format::WeightFormat& format, int64_t M, DType x_dtype, LinearConfig* config) {
  DeviceLimits device;
  PRECAL_RETURN_IF_ERROR(device_limits("linear", &device));
  *config = linear_config(format, M, x_dtype == DType::kFloat32, device.multiprocessors, device.shared_bytes);
  return {};
}

}  // namespace

Status compute_capability(const char* op, int* capability) {
  int device = 0, major = 0, minor = 0;
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaGetDevice(&device)));
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)));
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device)));
  *capability = major * 10 + minor;
  return {};
}

Status linear_workspace(const format::WeightFormat& format, int64_t M, DType x_dtype, int64_t* bytes) {
  LinearConfig config;
  PRECAL_RETURN_IF_ERROR(choose(format, M, x_dtype, &config));
  *bytes = config.workspace_bytes;
  return {};
}

Status launch_linear(const LinearParams& p, cudaStream_t stream) {
  if (p.M == 0 || p.format.N == 0) return {};
  LinearConfig config;
  PRECAL_RETURN_IF_ERROR(choose(p.format, p.M, p.x_dtype, &config));
  if (config.kernel == LinearKernel::kAny) return launch_linear_any(p, stream);
  return config.kernel == LinearKernel::kSmall ? launch_linear_small(p, config, stream)
                                               : launch_linear_large(p, config, stream);
}

}  // namespace precal::cuda
