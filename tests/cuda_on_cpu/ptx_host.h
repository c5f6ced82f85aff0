// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/ptx.cuh on the CPU. Sums of mma are made in double and rounded once; a GPU rounds otherwise, and less well.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/numeric.h"
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

inline uint4 load_once(const uint4* from) { return *from; }

inline void ldmatrix_x4(uint32_t (&out)[4], const void* row, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  struct Row {
    const void* address;
    unsigned char bytes[16];
  } mine{row, {}};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) shim::fail("ldmatrix of a row that is not aligned", file, line);
  shim::note_read(row, 16);
  shim::copy_unseen(mine.bytes, row, 16);
  const shim::Slots& rows = shim::collect(0xFFFFFFFFu, &mine, sizeof(mine), "ldmatrix", file, line);
  const int lane = shim::lane_index(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    Row of_lane;
    std::memcpy(static_cast<void*>(&of_lane), rows.lane[8 * i + g], sizeof(Row));
    std::memcpy(&out[i], of_lane.bytes + 4 * t, 4);
  }
}

// Element (row, k) of a lies in lane 4 * (row % 8) + (k % 8) / 2, register (row / 8) + 2 * (k / 8), half k % 2;
// element (k, column) of b in lane 4 * column + (k % 8) / 2, register k / 8, half k % 2;
// lane 4 g + t has of c the elements (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
template <typename ToFloat>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const ToFloat& to_float,
                  const char* what, const char* file, int line) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const shim::Slots& slots = shim::collect(0xFFFFFFFFu, &mine, sizeof(mine), what, file, line);
  const int lane = shim::lane_index(), g = lane / 4, t = lane % 4;
  const auto of_lane = [&](int l) {
    Fragments f;
    std::memcpy(static_cast<void*>(&f), slots.lane[l], sizeof(f));
    return f;
  };
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = double(c[i]);
    for (int k = 0; k < 16; ++k) {
      const uint32_t x = of_lane(4 * (row % 8) + (k % 8) / 2).a[row / 8 + 2 * (k / 8)];
      const uint32_t y = of_lane(4 * column + (k % 8) / 2).b[k / 8];
      sum += double(to_float(uint16_t(x >> (16 * (k % 2))))) * double(to_float(uint16_t(y >> (16 * (k % 2)))));
    }
    c[i] = float(sum);
  }
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
                     int line = __builtin_LINE()) {
  mma_m16n8k16(c, a, b, [](uint16_t h) { return bf16_to_float(h); }, "mma", file, line);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
                    int line = __builtin_LINE()) {
  mma_m16n8k16(c, a, b, [](uint16_t h) { return half_to_float(h); }, "mma", file, line);
}

inline uint32_t pack_bf16(float low, float high) {
  return uint32_t(float_to_bf16(low)) | uint32_t(float_to_bf16(high)) << 16;
}
inline uint32_t pack_f16(float low, float high) {
  return uint32_t(float_to_half(low)) | uint32_t(float_to_half(high)) << 16;
}
inline float unpack_f16(uint16_t h) { return half_to_float(h); }

}  // namespace precal::cuda::ptx
