// SPDX-License-Identifier: Apache-2.0
// Codes <-> little-endian bit stream (format/bitstream.h). One thread a word, or four codes; memory-bound.
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pack_kernel(PackParams p) {
  const int64_t words = format::words_per_row(p.K, p.bits), all = p.N * words;
  const uint32_t mask = (1u << p.bits) - 1u;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const uint8_t* codes = p.codes + i / words * p.K;
    const int64_t first_bit = i % words * 32;
    uint32_t word = 0;
    // The first code may have begun in the word before.
    for (int64_t k = first_bit / p.bits; k < p.K && k * p.bits < first_bit + 32; ++k) {
      const int shift = int(k * p.bits - first_bit);
      const uint32_t code = codes[k] & mask;
      word |= shift >= 0 ? code << shift : code >> -shift;
    }
    p.packed[i] = word;
  }
}

__global__ void __launch_bounds__(kThreads) unpack_kernel(PackParams p) {
  const int64_t words = format::words_per_row(p.K, p.bits), all = p.N * p.K;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    p.codes[i] = uint8_t(format::code_at(p.packed + i / p.K * words, i % p.K, p.bits));
  }
}

}  // namespace

Status launch_pack(const PackParams& p, cudaStream_t stream) {
  const int64_t work = p.N * format::words_per_row(p.K, p.bits);
  if (work == 0) return {};
  return launch("pack", &pack_kernel, blocks_for(work, kThreads), kThreads, 0, stream, p);
}

Status launch_unpack(const PackParams& p, cudaStream_t stream) {
  if (p.N * p.K == 0) return {};
  return launch("unpack", &unpack_kernel, blocks_for(p.N * p.K, kThreads), kThreads, 0, stream, p);
}

}  // namespace precal::cuda
