// SPDX-License-Identifier: Apache-2.0
// Interleaved codes (format/interleave.h) -> levels + 128, unsigned bytes, 64 at a time: AVX-512 VBMI, GFNI.
//
//   4 bits   per register of 128 codes: 1 bit permutation, 2 selects, 2 byte lookups
//   3 bits   per 3 registers of 512 codes: 1 bit permutation, 2 shifts, 9 selects, 8 byte lookups
//   8 bits   (uniform) the code is level + 128
//   A chunk adds 5 to 6 instructions: the history of its first step.
//   A trellis code's two bits of history lie in the same byte of the register before, so it costs no more than a plain
//   one: the tables alone differ.
#pragma once

#include "cpu/kernels.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__GFNI__)
#define PRECAL_INT8_AVX512 1

#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

PRECAL_FORCE_INLINE __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
PRECAL_FORCE_INLINE __m512i select_bits(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);
}

// Tables of a grid: level + 128 of every value of the six bits that the selects bring together.
struct LevelTables {
  alignas(64) uint8_t table[8][64];
};

static uint8_t level_byte(const LinearArgs& args, bool trellis, uint32_t code, uint32_t previous, uint32_t before) {
  const uint32_t index = trellis ? 2u * (code ^ before) + previous : code;
  return uint8_t(int(args.levels[index]) + 128);
}

static void make_tables(const LinearArgs& args, LevelTables* out) {
  const bool trellis = format::is_trellis(args.format);
  if (args.format.bits == 8) return;
  for (uint32_t i = 0; i < 64; ++i) {
    const auto bit = [i](int b) { return (i >> b) & 1u; };
    if (args.format.bits == 4) {
      out->table[0][i] = level_byte(args, trellis, i & 15u, bit(4), bit(5));
      out->table[1][i] = level_byte(args, trellis, i & 15u, bit(5), bit(4));
      continue;
    }
    // Per step: where its b and pq, and the b of the two steps before, have been put.
    static const int kPlaces[8][4] = {{0, 2, 5, 4}, {1, 2, 0, 5}, {2, 4, 1, 0}, {3, 4, 2, 1},
                                      {4, 0, 3, 2}, {5, 0, 4, 3}, {2, 4, 1, 0}, {3, 4, 2, 1}};
    for (int s = 0; s < 8; ++s) {
      const int* p = kPlaces[s];
      const uint32_t code = ((i >> p[1]) & 3u) << 1 | bit(p[0]);
      out->table[s][i] = level_byte(args, trellis, code, bit(p[2]), bit(p[3]));
    }
  }
}

// Rows of gf2p8affineqb: byte 7 - i tells the bits of the input whose sum is output bit i.
constexpr uint64_t bit_rows(int b0, int b1, int b2, int b3, int b4, int b5) {
  return (uint64_t(1) << b0) << 56 | (uint64_t(1) << b1) << 48 | (uint64_t(1) << b2) << 40 | (uint64_t(1) << b3) << 32 |
         (uint64_t(1) << b4) << 24 | (uint64_t(1) << b5) << 16;
}

// Decodes the chunks of kTiles tiles in order, side by side; keeps the bits that the next chunk needs.
template <int kBits, int kTiles>
struct ChunkDecoder {
  static constexpr int kTables = kBits == 8 ? 0 : kBits == 4 ? 2 : 8;
  __m512i tables[kTables > 0 ? kTables : 1];
  __m512i before[kTiles];  // of the last register of the chunk before

  PRECAL_FORCE_INLINE explicit ChunkDecoder(const LevelTables& t) {
#pragma GCC unroll 8
    for (int i = 0; i < kTables; ++i) tables[i] = load512(t.table[i]);
#pragma GCC unroll 2
    for (int j = 0; j < kTiles; ++j) before[j] = _mm512_setzero_si512();
  }

  // 4 bits: the upper code, its low bit again, the low bit of the lower one. 3 bits: b4..b7, b6 and b7 again.
  PRECAL_FORCE_INLINE static __m512i history(__m512i w) {
    return kBits == 4 ? _mm512_gf2p8affine_epi64_epi8(w, _mm512_set1_epi64(int64_t(bit_rows(4, 5, 6, 7, 4, 0))), 0)
                      : _mm512_gf2p8affine_epi64_epi8(w, _mm512_set1_epi64(int64_t(bit_rows(4, 5, 6, 7, 6, 7))), 0);
  }

  // emit(t, i, w[kTiles]): levels + 128 of step t, t = i mod 4 (4 bits) or i mod 8 (3 bits) with i a constant.
  // Chunks of tiles side by side are `apart` bytes apart. `registers` of a chunk: a multiple of 2 (4 bits), 3 or 4 (8
  // bits). `keep` has zero bytes where a block of the trellis begins.
  template <typename Emit>
  PRECAL_FORCE_INLINE void decode(const uint8_t* codes, int64_t apart, int registers, uint32_t keep, const Emit& emit) {
    if constexpr (kBits == 8) {
      for (int s = 0; s < registers; s += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __m512i w[kTiles];
#pragma GCC unroll 2
          for (int j = 0; j < kTiles; ++j) w[j] = load512(codes + j * apart + (s + i) * 64);
          emit(s + i, i, w);
        }
      }
      return;
    }
    __m512i h[kTiles];
    const __m512i kept = _mm512_set1_epi32(int32_t(keep));
#pragma GCC unroll 2
    for (int j = 0; j < kTiles; ++j) {
      const __m512i last = history(load512(codes + j * apart + (registers - 1) * 64));
      h[j] = _mm512_and_si512(_mm512_or_si512(_mm512_slli_epi32(last, 8), _mm512_srli_epi32(before[j], 24)), kept);
      before[j] = last;
    }
    if constexpr (kBits == 4) {
      const __m512i low = _mm512_set1_epi8(0x0F), all_but_4 = _mm512_set1_epi8(char(0xEF));
      for (int s = 0; s < registers; s += 2) {
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          __m512i first[kTiles], second[kTiles];
#pragma GCC unroll 2
          for (int j = 0; j < kTiles; ++j) {
            const __m512i w = load512(codes + j * apart + (s + i) * 64), next = history(w);
            first[j] = _mm512_permutexvar_epi8(select_bits(low, w, h[j]), tables[0]);
            second[j] = _mm512_permutexvar_epi8(select_bits(all_but_4, next, h[j]), tables[1]);
            h[j] = next;
          }
          emit(2 * s + 2 * i, 2 * i, first);
          emit(2 * s + 2 * i + 1, 2 * i + 1, second);
        }
      }
    } else {
      const __m512i low4 = _mm512_set1_epi8(0x0F), at0 = _mm512_set1_epi8(0x03), at2 = _mm512_set1_epi8(0x0C),
                    at4 = _mm512_set1_epi8(0x30);
      int t = 0;
      for (int s = 0; s < registers; s += 3, t += 8) {
        __m512i w0[kTiles], w1[kTiles], b[kTiles], first[kTiles], next[kTiles], level[kTiles];
#pragma GCC unroll 2
        for (int j = 0; j < kTiles; ++j) {
          const uint8_t* from = codes + j * apart + s * 64;
          w0[j] = load512(from);
          w1[j] = load512(from + 64);
          b[j] = load512(from + 128);
          next[j] = history(b[j]);
          first[j] = select_bits(low4, b[j], h[j]);
          h[j] = next[j];
        }
        const auto step = [&](int i, __m512i mask, const __m512i* pairs, int shift, const __m512i* bits)
                              __attribute__((always_inline)) {
#pragma GCC unroll 2
                                for (int j = 0; j < kTiles; ++j) {
                                  const __m512i p = shift > 0 ? _mm512_srli_epi16(pairs[j], 2) : pairs[j];
                                  level[j] = _mm512_permutexvar_epi8(select_bits(mask, p, bits[j]), tables[i]);
                                }
                                emit(t + i, i, level);
                              };
        step(0, at2, w0, 0, first);
        step(1, at2, w1, 0, first);
        step(2, at4, w0, 2, first);
        step(3, at4, w0, 0, first);
        step(4, at0, w0, 0, b);
        step(5, at0, w1, 0, b);
        step(6, at4, w1, 0, next);
        step(7, at4, w1, 2, next);
      }
    }
  }
};

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE

#endif
