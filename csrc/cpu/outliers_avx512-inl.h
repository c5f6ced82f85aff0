// SPDX-License-Identifier: Apache-2.0
// The outliers' part of y for `lanes` tokens of one tile: sum over blocks of U * value * x[index], in float32.
//
//   x stands transposed, [K][lanes], so an entry takes one load for all tokens; 16 rows x `lanes` tokens of sums stay
//   in `lanes` registers, and are turned over at the end. A gather costs 70 cycles on Zen 5, 16 loads and inserts
//   about 12. Every sum adds its entries in the same order, whatever the number of tokens.
#pragma once

#include "cpu/activations-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int64_t kTileLanes = format::kTileRows;

PRECAL_FORCE_INLINE __m512 load_e4m3(const uint8_t* codes) {
  // Sign and seven bits moved to where float32 has them are the value times 2^-120, also below 2^-6.
  const __m512i code = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(int32_t(0x87F00000u)));
  const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
  // Seven ones are NaN, not 480.
  const __m512i ones = _mm512_set1_epi32(0x7F);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(_mm512_and_si512(code, ones), ones);
  return _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
}

PRECAL_FORCE_INLINE __m512 load_scales(const uint8_t* scale, int64_t group, format::ScaleType type) {
  if (type == format::ScaleType::kE4m3) return load_e4m3(scale + group * 16);
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale + group * 32)));
}

// Calls entry(first column of the block, 16 indices inside it, U * value or 0) for every entry of 16 rows.
template <typename Entry>
PRECAL_FORCE_INLINE void for_each_outlier(const LinearArgs& args, const uint8_t* tile, const Entry& entry) {
  const format::OutlierBlocks blocks = format::outlier_blocks(args.format);
  const int64_t c = args.format.c;
  const uint8_t *values = tile + args.layout.outlier_value, *indices = tile + args.layout.outlier_index;
  // The blocks of outlier_blocks.h, without its divisions.
  int64_t begin = 0, segment_end = blocks.segment;
  for (int64_t b = 0; b < blocks.num_blocks; ++b) {
    const int64_t width = segment_end - begin < format::kBlock ? segment_end - begin : format::kBlock;
    const __m128i last = _mm_set1_epi8(char(width - 1));
    for (int64_t i = 0; i < c; ++i, values += kTileLanes, indices += kTileLanes) {
      __m512 value = _mm512_mul_ps(load_e4m3(values), _mm512_set1_ps(format::kOutlierUnit));
      alignas(16) uint8_t clamped[kTileLanes];
      const uint8_t* at = indices;
      if (width < format::kBlock) {
        const __m128i index = _mm_loadu_si128(reinterpret_cast<const __m128i*>(indices));
        const __m128i inside = _mm_min_epu8(index, last);
        value = _mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask(index, inside), value);
        _mm_store_si128(reinterpret_cast<__m128i*>(clamped), inside);
        at = clamped;
      }
      entry(begin, at, value);
    }
    begin += width;
    if (begin == segment_end) segment_end += blocks.segment;
  }
}

template <int kLanesOfTokens>
static void outliers_of_tokens(const LinearArgs& args, const uint8_t* tile, int64_t m0, float* y) {
  constexpr int kRows = 16 / kLanesOfTokens;  // rows of a register of sums
  const float* x = args.q.transposed + m0 * args.format.K;
  __m512 sums[kLanesOfTokens];
#pragma GCC unroll 16
  for (int i = 0; i < kLanesOfTokens; ++i) sums[i] = _mm512_setzero_ps();
  for_each_outlier(args, tile, [&](int64_t begin, const uint8_t* at, __m512 value) __attribute__((always_inline)) {
    alignas(64) float weight[16];
    if (kRows == 1) _mm512_store_ps(weight, value);
    const float* block = x + begin * kLanesOfTokens;
#pragma GCC unroll 16
    for (int i = 0; i < kLanesOfTokens; ++i) {
      __m512 v, w;
      if constexpr (kRows == 1) {
        v = _mm512_loadu_ps(block + size_t(at[i]) * 16);
        w = _mm512_set1_ps(weight[i]);
      } else if constexpr (kRows == 2) {
        const __m256 low = _mm256_loadu_ps(block + size_t(at[2 * i]) * 8);
        v = _mm512_insertf32x8(_mm512_castps256_ps512(low), _mm256_loadu_ps(block + size_t(at[2 * i + 1]) * 8), 1);
        w = _mm512_permutexvar_ps(_mm512_inserti64x4(_mm512_set1_epi32(2 * i), _mm256_set1_epi32(2 * i + 1), 1), value);
      } else {
        v = _mm512_castps128_ps512(_mm_loadu_ps(block + size_t(at[4 * i]) * 4));
        v = _mm512_mask_broadcast_f32x4(v, 0x00F0, _mm_loadu_ps(block + size_t(at[4 * i + 1]) * 4));
        v = _mm512_mask_broadcast_f32x4(v, 0x0F00, _mm_loadu_ps(block + size_t(at[4 * i + 2]) * 4));
        v = _mm512_mask_broadcast_f32x4(v, 0xF000, _mm_loadu_ps(block + size_t(at[4 * i + 3]) * 4));
        const __m512i rows = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        w = _mm512_permutexvar_ps(_mm512_add_epi32(rows, _mm512_set1_epi32(4 * i)), value);
      }
      sums[i] = _mm512_fmadd_ps(w, v, sums[i]);
    }
  });
  const int64_t tokens = args.M - m0 < kLanesOfTokens ? args.M - m0 : kLanesOfTokens;
  if constexpr (kRows == 1) {
    transpose16(sums);
#pragma GCC unroll 16
    for (int m = 0; m < 16; ++m) {
      if (m < tokens) _mm512_store_ps(y + m * kTileLanes, sums[m]);
    }
  } else {
    alignas(64) float rows[16 * kLanesOfTokens];
#pragma GCC unroll 16
    for (int i = 0; i < kLanesOfTokens; ++i) _mm512_store_ps(rows + 16 * i, sums[i]);
    const __m512i stride = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(kLanesOfTokens));
    for (int64_t m = 0; m < tokens; ++m) _mm512_store_ps(y + m * kTileLanes, _mm512_i32gather_ps(stride, rows + m, 4));
  }
}

// y [tokens][16] of the tokens m0 .. m0 + lanes - 1 that there are.
static void outlier_sums(const LinearArgs& args, const uint8_t* tile, int64_t m0, float* y) {
  const int64_t left = args.M - m0, tokens = left < args.q.lanes ? left : args.q.lanes;
  if (args.format.c == 0) {
    for (int64_t m = 0; m < tokens; ++m) _mm512_store_ps(y + m * kTileLanes, _mm512_setzero_ps());
    return;
  }
  switch (args.q.lanes) {
    case 4: return outliers_of_tokens<4>(args, tile, m0, y);
    case 8: return outliers_of_tokens<8>(args, tile, m0, y);
    case 16: return outliers_of_tokens<16>(args, tile, m0, y);
    default: break;
  }
  __m512 sum = _mm512_setzero_ps();
  for_each_outlier(args, tile, [&](int64_t begin, const uint8_t* at, __m512 value) __attribute__((always_inline)) {
    const float* x = args.q.transposed + begin;
    const auto four = [&](int i) __attribute__((always_inline)) {
      return _mm_setr_ps(x[at[i]], x[at[i + 1]], x[at[i + 2]], x[at[i + 3]]);
    };
    __m512 v = _mm512_castps128_ps512(four(0));
    v = _mm512_insertf32x4(v, four(4), 1);
    v = _mm512_insertf32x4(v, four(8), 2);
    v = _mm512_insertf32x4(v, four(12), 3);
    sum = _mm512_fmadd_ps(value, v, sum);
  });
  _mm512_store_ps(y, sum);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
