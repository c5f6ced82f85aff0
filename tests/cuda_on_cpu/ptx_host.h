// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/ptx.cuh on the CPU. Sums of mma are made in double and rounded once; a GPU rounds otherwise, and less well.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/numeric.h"
#include "format/e4m3.h"
#include "shim.h"

namespace precal::cuda::ptx {

namespace shim = ::cuda_on_cpu;

inline void cp_async16(void* to, const void* from, int valid_bytes) {
  shim::async_copy(to, from, 16, size_t(valid_bytes));
}
inline void cp_async_commit() { shim::async_commit(); }
template <int kLeft>
void cp_async_wait() {
  shim::async_wait(kLeft);
}

inline uint32_t bits_in_place(uint32_t v, uint32_t mask) { return v & mask; }

inline uint4 load_once(const uint4* from) { return *from; }

void ldmatrix_x4(uint32_t (&out)[4], const void* row, const char* file = __builtin_FILE(), int line = __builtin_LINE());

// Element (row, k) of a lies in lane 4 * (row % 8) + (k % 8) / 2, register (row / 8) + 2 * (k / 8), half k % 2;
// element (k, column) of b in lane 4 * column + (k % 8) / 2, register k / 8, half k % 2;
// lane 4 g + t has of c the elements (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half, const char* file, int line);

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) {
  mma_m16n8k16(c, a, b, false, file, line);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  mma_m16n8k16(c, a, b, true, file, line);
}

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t(float_to_bf16(low)) | uint32_t(float_to_bf16(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return uint32_t(float_to_half(low)) | uint32_t(float_to_half(high)) << 16;
}
inline uint32_t unpack_e4m3x2(uint16_t codes) {
  return pack_f16(format::e4m3_to_float(uint8_t(codes)), format::e4m3_to_float(uint8_t(codes >> 8)));
}
inline float unpack_f16(uint16_t h) { return half_to_float(h); }

}  // namespace precal::cuda::ptx
