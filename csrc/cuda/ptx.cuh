// SPDX-License-Identifier: Apache-2.0
// One function per instruction that C++ cannot say. The only file with inline assembly; every function has a body for
// the CPU in tests/cuda_on_cpu/ptx_host.h, where the maps of fragments to lanes are written out.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

#if defined(PRECAL_CUDA_ON_CPU)

#include "ptx_host.h"

#else

namespace precal::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return uint32_t(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory without a register; those from valid_bytes on become zero and are not read.
__device__ __forceinline__ void cp_async16(void* to, const void* from, int valid_bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid_bytes)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kLeft of this thread's newest groups are still in flight.
template <int kLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// v & mask, which no compiler exchanges with the shift that follows.
__device__ __forceinline__ uint32_t bits_in_place(uint32_t v, uint32_t mask) {
  uint32_t d;
  asm("and.b32 %0, %1, %2;" : "=r"(d) : "r"(v), "r"(mask));
  return d;
}

// Weights are read once: past L1, which holds what is read again.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Four 8 x 8 matrices of 16 bits. Lane 8 i + r gives the address of row r of matrix i (16 bytes) and receives in out[i]
// the elements 2 t, 2 t + 1 of row g, its lane being 4 g + t.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c[16][8] += a[16][16] b[16][8]; fragments as in ptx_host.h. A pair of elements has the lower index in the low half.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Two floats rounded to nearest even, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// Two e4m3 as float16, exactly. The instruction came with sm_89; before it the bits are moved: two places to the left
// of where float16 has them they are a 256th of the value.
__device__ __forceinline__ uint32_t unpack_e4m3x2(uint16_t codes) {
  uint32_t d;
#if __CUDA_ARCH__ >= 890
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(codes));
#else
  const uint32_t apart = __byte_perm(codes, 0, 0x1404);  // each in the upper byte of a half
  const uint32_t bits = (apart & 0x80008000u) | ((apart >> 1) & 0x3F803F80u);
  asm("mul.f16x2 %0, %1, %2;" : "=r"(d) : "r"(bits), "r"(0x5C005C00u));  // by 256
#endif
  return d;
}
// One instruction where half_to_float takes ten.
__device__ __forceinline__ float unpack_f16(uint16_t h) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(h));
  return d;
}

}  // namespace precal::cuda::ptx

#endif
