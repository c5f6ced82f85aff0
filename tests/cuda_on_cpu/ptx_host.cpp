// SPDX-License-Identifier: Apache-2.0
#include "cuda_runtime.h"

#include "ptx_host.h"

namespace precal::cuda::ptx {

void ldmatrix_x4(uint32_t (&out)[4], const void* row, const char* file, int line) {
  struct Row {
    unsigned char bytes[16];
  } mine{};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) shim::fail("ldmatrix of a row that is not aligned", file, line);
  shim::note_read(row, 16);
  shim::copy_unseen(mine.bytes, row, 16);
  const shim::Slots& rows = shim::collect(0xFFFFFFFFu, &mine, sizeof(mine), "ldmatrix", file, line);
  const int lane = shim::lane_index(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) std::memcpy(&out[i], rows.lane[8 * i + g] + 4 * t, 4);
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool half, const char* file,
                  int line) {
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const shim::Slots& slots = shim::collect(0xFFFFFFFFu, mine, sizeof(mine), "mma", file, line);
  const int lane = shim::lane_index(), g = lane / 4, t = lane % 4;
  // Half k % 2 of word `word` of what a lane handed in.
  const auto element = [&](int of_lane, int word, int k) {
    uint16_t h;
    std::memcpy(&h, slots.lane[of_lane] + word * 4 + k % 2 * 2, 2);
    return double(half ? half_to_float(h) : bf16_to_float(h));
  };
  double row[2][16], column[2][16];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 2; ++i) {
      row[i][k] = element(4 * g + k % 8 / 2, i + 2 * (k / 8), k);  // of a: row g + 8 i
      column[i][k] = element(4 * (2 * t + i) + k % 8 / 2, 4 + k / 8, k);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = double(c[i]);
    for (int k = 0; k < 16; ++k) sum += row[i / 2][k] * column[i % 2][k];
    c[i] = float(sum);
  }
}

}  // namespace precal::cuda::ptx
