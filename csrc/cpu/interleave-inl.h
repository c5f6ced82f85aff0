// SPDX-License-Identifier: Apache-2.0
// Canonical codes -> chunks (format/interleave.h), 16 rows x 64 columns at a time: AVX-512 VBMI.
//
//   4, 8 bits  64 bytes of a row, permuted, are 16 words: a byte of each of the four byte lanes; then
//            16 x 16 words are turned over. About 10 instructions per 64 bytes.
//   3 bits   24 bytes of a row are eight times eight codes. Each eight goes to a quarter of a lane; a choice of 8 bits
//   of
//            it and a move of sign bits to a mask give one byte for each eight: low bits, and the two bytes of pairs.
// What is left of a row, and other instruction sets: interleave.cpp, byte by byte.
#pragma once

#include "cpu/activations-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

#if defined(PRECAL_INT8_AVX512)

// `lane`: bytes of a byte lane of a chunk, which is as many registers; chunks are `stride` bytes apart.
static void interleave_bytes(const uint8_t* rows, int64_t row_bytes, int64_t lane, int64_t pieces, uint8_t* codes,
                             int64_t stride) {
  alignas(64) uint8_t order[64];
  for (int64_t i = 0; i < 64; ++i) {
    const int64_t step = i / 4;  // of two codes or one
    order[i] = uint8_t(step / lane * 4 * lane + i % 4 * lane + step % lane);
  }
  const __m512i permutation = load512(order);
  int64_t at[16];  // of the registers of a piece, which is whole chunks
  for (int64_t i = 0; i < 16; ++i) at[i] = i / lane * stride + i % lane * 64;
  for (int64_t n = 0; n < pieces; ++n, codes += 16 / lane * stride) {
    __m512 r[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      r[i] = _mm512_castsi512_ps(_mm512_permutexvar_epi8(permutation, load512(rows + i * row_bytes + n * 64)));
    }
    transpose16(r);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(reinterpret_cast<float*>(codes + at[i]), r[i]);
  }
}

static void interleave_three(const uint8_t* rows, int64_t row_bytes, int64_t chunk, int64_t pieces, uint8_t* codes,
                             int64_t stride) {
  // Three bytes of eight codes into each 64 bits, in the order [eight of a byte lane][byte lane].
  alignas(64) uint8_t order[64];
  for (int64_t q = 0; q < 8; ++q) {
    const int64_t from = chunk == 64 ? q % 4 * 6 + q / 4 * 3 : q * 3;
    for (int64_t i = 0; i < 8; ++i) order[8 * q + i] = uint8_t(from + (i < 3 ? i : 0));
  }
  // Byte i of a choice begins seven bits below the bit that is wanted at bit i.
  alignas(64) uint8_t choice[3][64];
  for (int64_t i = 0; i < 64; i += 8) {
    for (int s = 0; s < 8; ++s) {
      uint8_t* pair = choice[format::pair_register(s)] + i + format::pair_shift(s);
      pair[0] = uint8_t((3 * s + 1 - 7) & 63);
      pair[1] = uint8_t((3 * s + 2 - 7) & 63);
      choice[2][i + s] = uint8_t((3 * s - 7) & 63);
    }
  }
  const __m512i permutation = load512(order), pick[3] = {load512(choice[0]), load512(choice[1]), load512(choice[2])};
  const int64_t second = chunk == 64 ? 3 * 64 : stride;  // of the two times 32 columns of a piece
  for (int64_t n = 0; n < pieces; ++n) {
    uint8_t* to = codes + n * (64 / chunk) * stride;
    for (int64_t r = 0; r < 16; ++r, to += 4) {
      const __m512i bytes = _mm512_maskz_loadu_epi8((uint64_t(1) << 24) - 1, rows + r * row_bytes + n * 24);
      const __m512i eights = _mm512_permutexvar_epi8(permutation, bytes);
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
        const uint64_t bits = _mm512_movepi8_mask(_mm512_multishift_epi64_epi8(pick[k], eights));
        const uint32_t low = uint32_t(bits), high = uint32_t(bits >> 32);
        __builtin_memcpy(to + k * 64, &low, 4);
        __builtin_memcpy(to + second + k * 64, &high, 4);
      }
    }
  }
}

// As many chunks of sixteen rows as whole pieces hold; returns how many.
static int64_t interleave_rows(const format::WeightFormat& f, const format::TileLayout& t, const uint32_t* rows,
                               uint8_t* codes, int64_t stride) {
  const int64_t columns = f.bits == 4 ? 128 : 64, pieces = f.K / columns, row_bytes = format::num_words(f) * 4;
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(rows);
  if (f.bits == 3) {
    interleave_three(bytes, row_bytes, t.chunk, pieces, codes, stride);
  } else {
    interleave_bytes(bytes, row_bytes, t.chunk * f.bits / 32, pieces, codes, stride);
  }
  return pieces * columns / t.chunk;
}

#else

static int64_t interleave_rows(const format::WeightFormat&, const format::TileLayout&, const uint32_t*, uint8_t*,
                               int64_t) {
  return 0;
}

#endif

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
