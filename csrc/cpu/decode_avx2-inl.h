// SPDX-License-Identifier: Apache-2.0
// Interleaved codes (format/interleave.h) -> levels, signed bytes, 32 (8 rows x 4 columns) at a time.
//
//   AVX2    4 bits: per 32 bytes of two steps 13 instructions. The codes' lowest bits are crossed with the history by
//   one
//           xor; two tables of 16, of even and odd levels, are blended by the bit of the code before.
//           3 bits: per 96 bytes of eight steps 21 instructions of history, then 6 a step; one table of 16.
//           8 bits (uniform): 1 instruction.
//   AVX-VNNI  the same, plus 128.
//   scalar  code by code, the specification.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

// Levels of a grid. 4 bits: even and odd ones; 3 bits: all, by pq, b ^ before, previous. A grid without a trellis looks
// at no history: `cross` is 0 and the tables repeat.
// AVX-VNNI wants levels + 128, unsigned.
#if defined(__AVXVNNI__)
constexpr int kLevelBias = 128;
#else
constexpr int kLevelBias = 0;
#endif

struct LevelTables {
  alignas(32) int8_t table[2][32];
  uint8_t cross;
};

static void make_tables(const LinearArgs& args, LevelTables* out) {
  const bool trellis = format::is_trellis(args.format);
  out->cross = trellis ? 0xFF : 0;
  if (args.format.bits == 8) return;  // uniform: level = code - 128
  for (int t = 0; t < 2; ++t) {
    for (int i = 0; i < 32; ++i) {
      const int index = i % 16;
      const int level = args.format.bits == 3 ? (trellis ? index : index / 2) : (trellis ? 2 * index + t : index);
      out->table[t][i] = int8_t(kLevelBias + int(args.levels[level]));
    }
  }
}

// Decodes the chunks of a tile in order; keeps the history that the next one needs.
#if defined(__AVX2__)

struct ChunkDecoder {
  const LevelTables& tables;
  __m256i before[2];  // of each half: the last register that holds low bits

  explicit ChunkDecoder(const LevelTables& t) : tables(t), before{_mm256_setzero_si256(), _mm256_setzero_si256()} {}

  static __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m256i low_bits(__m256i a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi8(char(mask))); }

  // emit(step, step % 2 where that is a constant, half, levels). `keep` has zero bytes where a block of the trellis
  // begins.
  template <int kBits, typename Emit>
  __attribute__((always_inline)) inline void decode(const uint8_t* codes, int registers, uint32_t keep,
                                                    const Emit& emit) {
    const __m256i even = load256(tables.table[0]), odd = load256(tables.table[1]);
    const __m256i cross = _mm256_set1_epi8(char(tables.cross));
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const uint8_t* from = codes + half * 32;
      if constexpr (kBits == 8) {
        for (int s = 0; s < registers; ++s) {
          emit(s, 0, half, _mm256_xor_si256(load256(from + s * 64), _mm256_set1_epi8(char(0x80 - kLevelBias))));
        }
        continue;
      }
      const __m256i last = load256(from + (registers - 1) * 64);
      __m256i h = _mm256_or_si256(_mm256_slli_epi32(last, 8), _mm256_srli_epi32(before[half], 24));
      h = _mm256_and_si256(_mm256_and_si256(h, _mm256_set1_epi32(int32_t(keep))), cross);
      before[half] = last;
      if constexpr (kBits == 4) {
        const __m256i crossed = low_bits(cross, 0x11);
        for (int s = 0; s < registers; ++s) {
          const __m256i w = load256(from + s * 64);
          const __m256i v = _mm256_xor_si256(w, _mm256_and_si256(h, crossed));
          const __m256i first = low_bits(v, 0x0F), second = low_bits(_mm256_srli_epi16(v, 4), 0x0F);
          emit(2 * s, 0, half,
               _mm256_blendv_epi8(_mm256_shuffle_epi8(even, first), _mm256_shuffle_epi8(odd, first),
                                  _mm256_slli_epi16(h, 3)));
          emit(2 * s + 1, 1, half,
               _mm256_blendv_epi8(_mm256_shuffle_epi8(even, second), _mm256_shuffle_epi8(odd, second),
                                  _mm256_slli_epi16(w, 7)));
          h = w;
        }
      } else {
        // Four bits a b c d -> 0 a 0 b 0 c 0 d and a 0 b 0 c 0 d 0.
        const __m256i spread =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 16, 17, 20, 21, 64, 65, 68, 69, 80, 81, 84, 85));
        for (int s = 0, t = 0; s < registers; s += 3, t += 8) {
          const __m256i w0 = load256(from + s * 64), w1 = load256(from + s * 64 + 64), b = load256(from + s * 64 + 128);
          const __m256i once = _mm256_add_epi8(b, b), twice = _mm256_add_epi8(once, once);
          const __m256i older = _mm256_and_si256(_mm256_or_si256(twice, low_bits(_mm256_srli_epi16(h, 6), 0x03)),
                                                 cross);  // b_{s-2} at bit s
          const __m256i x = _mm256_xor_si256(b, older);
          const __m256i p = _mm256_or_si256(once, low_bits(_mm256_srli_epi16(h, 7), 0x01));  // b_{s-1}
          // x_s p_s at bits 2 s', steps 0-3 and 4-7
          const auto both = [&](__m256i upper, __m256i lower) {
            const __m256i u = _mm256_shuffle_epi8(spread, low_bits(upper, 0x0F));
            return _mm256_or_si256(_mm256_add_epi8(u, u), _mm256_shuffle_epi8(spread, low_bits(lower, 0x0F)));
          };
          const __m256i xp[2] = {both(x, p), both(_mm256_srli_epi16(x, 4), _mm256_srli_epi16(p, 4))};
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) {
            const int shift = format::pair_shift(i);
            const __m256i w = format::pair_register(i) == 0 ? w0 : w1;
            const __m256i pair = shift == 0 ? _mm256_slli_epi16(w, 2) : _mm256_srli_epi16(w, shift - 2);
            const __m256i index =
                _mm256_or_si256(low_bits(pair, 0x0C), low_bits(_mm256_srli_epi16(xp[i / 4], i % 4 * 2), 0x03));
            emit(t + i, i % 2, half, _mm256_shuffle_epi8(even, index));
          }
          h = b;
        }
      }
    }
  }
};

#else

struct ChunkDecoder {
  const LevelTables& tables;
  uint8_t before[2][format::kRegisterBytes] = {};  // low bits of the last step and the one before it

  explicit ChunkDecoder(const LevelTables& t) : tables(t) {}

  // levels [step][64]
  template <int kBits>
  void decode(const uint8_t* codes, int registers, uint32_t keep, int8_t* levels) {
    constexpr int kBytes = int(format::kRegisterBytes);
    const int steps = registers * 8 / kBits;
    const auto code_at = [&](int t, int i) -> uint32_t {
      if (kBits == 8) return codes[t * kBytes + i];
      if (kBits == 4) return (codes[t / 2 * kBytes + i] >> (t % 2 * 4)) & 15u;
      const uint8_t* eight = codes + t / 8 * 3 * kBytes + i;
      const int s = t % 8;
      const uint32_t pair = eight[format::pair_register(s) * kBytes] >> format::pair_shift(s);
      return (pair & 3u) << 1 | ((eight[2 * kBytes] >> s) & 1u);
    };
    for (int i = 0; i < kBytes; ++i) {
      // What precedes the first step stands one byte lower at the last one, or in the chunk before.
      format::TrellisState state;
      if (((keep >> (8 * (i % 4))) & 1u) != 0u) {
        state.previous = i % 4 > 0 ? code_at(steps - 1, i - 1) & 1u : before[0][i + 3];
        state.before = i % 4 > 0 ? code_at(steps - 2, i - 1) & 1u : before[1][i + 3];
      }
      for (int t = 0; t < steps; ++t) {
        const uint32_t code = code_at(t, i);
        if (kBits == 8) {
          levels[t * kBytes + i] = int8_t(int(code) - 128);
          continue;
        }
        const uint32_t index = tables.cross != 0 ? format::trellis_index(&state, code) : code;
        levels[t * kBytes + i] =
            kBits == 3 ? tables.table[0][tables.cross != 0 ? index : 2 * index]
                       : tables.table[tables.cross != 0 ? index % 2 : 0][tables.cross != 0 ? index / 2 : index];
      }
    }
    for (int i = 0; i < kBytes; ++i) {
      before[0][i] = code_at(steps - 1, i) & 1u;
      before[1][i] = code_at(steps - 2, i) & 1u;
    }
  }
};

#endif

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
