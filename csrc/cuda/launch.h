// SPDX-License-Identifier: Apache-2.0
// Launches and shared memory in words that nvcc and the CPU both understand: tests/cuda_on_cpu compiles the same .cu
// files with g++ and runs them. Included by .cu files only.
#pragma once

#include "cuda/kernels.h"

namespace precal::cuda {

// What a launch wants to know of the device. Cheap: attributes are cached by the runtime.
struct DeviceLimits {
  int multiprocessors = 1, shared_bytes = 48 << 10;
};

inline Status device_limits(const char* op, DeviceLimits* limits) {
  int device = 0;
  PRECAL_RETURN_IF_ERROR(check_cuda(op, cudaGetDevice(&device)));
  PRECAL_RETURN_IF_ERROR(
      check_cuda(op, cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device)));
  return check_cuda(op, cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

// Blocks of a grid-stride loop over `work` items: enough to fill any GPU.
inline dim3 blocks_for(int64_t work, int threads) {
  constexpr int64_t kMostBlocks = 1 << 14;
  const int64_t wanted = ceil_div(work, threads);
  return dim3(unsigned(wanted < 1 ? 1 : wanted < kMostBlocks ? wanted : kMostBlocks));
}

#if defined(PRECAL_CUDA_ON_CPU)

#define PRECAL_SHARED(type, name)   \
  static const char name##_tag = 0; \
  type& name = *static_cast<type*>(::cuda_on_cpu::static_shared(&name##_tag, sizeof(type), alignof(type)))

template <typename T>
T* dynamic_shared() {
  return static_cast<T*>(::cuda_on_cpu::dynamic_shared());
}

template <typename Params>
Status launch(const char* op, void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t,
              const Params& params) {
  ::cuda_on_cpu::run(op, {grid.x, grid.y, grid.z}, {unsigned(threads), 1, 1}, size_t(shared_bytes),
                     [&] { kernel(params); });
  return {};
}

#else

#define PRECAL_SHARED(type, name) __shared__ type name

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char precal_dynamic_shared[];
  return reinterpret_cast<T*>(precal_dynamic_shared);
}

// `kernel` takes one plain struct by value. Its last error is looked at, so that a launch that was refused is named.
template <typename Params>
Status launch(const char* op, void (*kernel)(Params), dim3 grid, int threads, int64_t shared_bytes, cudaStream_t stream,
              const Params& params) {
  if (shared_bytes > (48 << 10)) {  // more must be asked for
    PRECAL_RETURN_IF_ERROR(
        check_cuda(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes))));
  }
  // clang-format off
  kernel<<<grid, unsigned(threads), size_t(shared_bytes), stream>>>(params);
  // clang-format on
  return check_cuda(op, cudaGetLastError());
}

#endif

}  // namespace precal::cuda
