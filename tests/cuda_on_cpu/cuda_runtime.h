// SPDX-License-Identifier: Apache-2.0
// What csrc/cuda needs of the CUDA runtime and of the language, for g++: the same .cu files run on the CPU (README.md).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "shim.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __restrict__ __restrict
#define __launch_bounds__(...)

using uint3 = cuda_on_cpu::Index3;
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (::cuda_on_cpu::thread_index())
#define blockIdx (::cuda_on_cpu::block_index())
#define blockDim (::cuda_on_cpu::block_size())
#define gridDim (::cuda_on_cpu::grid_size())

// ---- synchronisation: every call knows its line, so that a hang or a divergence can be reported --------------------
#define PRECAL_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(PRECAL_HERE) { cuda_on_cpu::block_barrier(0, file, line); }
inline int __syncthreads_or(int predicate, PRECAL_HERE) {
  return cuda_on_cpu::block_barrier(predicate != 0, file, line) != 0;
}
inline int __syncthreads_count(int predicate, PRECAL_HERE) {
  return cuda_on_cpu::block_barrier(predicate != 0, file, line);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, PRECAL_HERE) { cuda_on_cpu::warp_barrier(mask, file, line); }
inline void __threadfence() { cuda_on_cpu::fence(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, PRECAL_HERE) {
  const int lane = cuda_on_cpu::lane_index();
  return cuda_on_cpu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), "__shfl_sync", file, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, PRECAL_HERE) {
  const int lane = cuda_on_cpu::lane_index(), source = lane ^ lanes;
  const bool inside = (source & ~(width - 1)) <= (lane & ~(width - 1));
  return cuda_on_cpu::shuffle(mask, value, inside ? source : lane, "__shfl_xor_sync", file, line);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, PRECAL_HERE) {
  const int lane = cuda_on_cpu::lane_index(), source = lane - int(delta);
  return cuda_on_cpu::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, "__shfl_up_sync", file,
                              line);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, PRECAL_HERE) {
  const int lane = cuda_on_cpu::lane_index(), source = lane + int(delta);
  return cuda_on_cpu::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane, "__shfl_down_sync", file,
                              line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, PRECAL_HERE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, "__ballot_sync", file, line);
}
inline int __any_sync(unsigned mask, int predicate, PRECAL_HERE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, "__any_sync", file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, PRECAL_HERE) {
  return cuda_on_cpu::ballot(mask, predicate != 0, "__all_sync", file, line) == mask;
}

// ---- atomics and bit functions -------------------------------------------------------------------------------------
template <typename T, typename U>
T atomicAdd(T* address, U value) {
  cuda_on_cpu::note_atomic(address, sizeof(T));
  const T old = cuda_on_cpu::load_unseen(address);
  cuda_on_cpu::store_unseen(address, T(old + T(value)));
  return old;
}
template <typename T, typename U>
T atomicMin(T* address, U value) {
  cuda_on_cpu::note_atomic(address, sizeof(T));
  const T old = cuda_on_cpu::load_unseen(address);
  if (T(value) < old) cuda_on_cpu::store_unseen(address, T(value));
  return old;
}
template <typename T, typename U>
T atomicMax(T* address, U value) {
  cuda_on_cpu::note_atomic(address, sizeof(T));
  const T old = cuda_on_cpu::load_unseen(address);
  if (old < T(value)) cuda_on_cpu::store_unseen(address, T(value));
  return old;
}
template <typename T, typename U>
T atomicOr(T* address, U value) {
  cuda_on_cpu::note_atomic(address, sizeof(T));
  const T old = cuda_on_cpu::load_unseen(address);
  cuda_on_cpu::store_unseen(address, T(old | T(value)));
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
// Byte i of the result is byte (selector >> 4 i) & 7 of y:x.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = (uint64_t(y) << 32) | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= uint32_t((bytes >> (8 * ((selector >> (4 * i)) & 7u))) & 0xFFu) << (8 * i);
  return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
// The 32 bits from bit `shift` % 32 on of hi:lo.
inline uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t shift) {
  return uint32_t(((uint64_t(hi) << 32) | lo) >> (shift & 31u));
}
inline uint32_t __funnelshift_l(uint32_t lo, uint32_t hi, uint32_t shift) {
  return uint32_t((((uint64_t(hi) << 32) | lo) << (shift & 31u)) >> 32);
}

// ---- the runtime ---------------------------------------------------------------------------------------------------
#define CUDART_VERSION 13000
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInsufficientDriver = 35 };
using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "an error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 0, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = cuda_on_cpu::device().multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = cuda_on_cpu::device().shared_bytes; break;
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToHost = 2 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cuda_on_cpu::synchronize(), cudaSuccess; }
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1 };
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cuda_on_cpu::device().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
