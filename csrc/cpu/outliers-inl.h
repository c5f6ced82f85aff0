// SPDX-License-Identifier: Apache-2.0
// The outliers' part of y for `lanes` tokens of one tile, with AVX2 or scalar code: as outliers_avx512-inl.h.
#pragma once

#include "cpu/activations-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int64_t kTileLanes = format::kTileRows;

// As fma() of simd.h: scalar code rounds twice.
PRECAL_INLINE float fma1(float a, float b, float c) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// U * value of every outlier code.
static const float* outlier_values() {
  struct Table {
    float of[256];
    Table() {
      for (int code = 0; code < 256; ++code) of[code] = format::kOutlierUnit * format::e4m3_to_float(uint8_t(code));
    }
  };
  static const Table table;
  return table.of;
}

// y [tokens][16] of the tokens m0 .. m0 + lanes - 1 that there are: sum over blocks of U * value * x[index].
template <int kTokens>
static void outliers_of_tokens(const LinearArgs& args, const uint8_t* tile, int64_t m0, float* y) {
  const format::WeightFormat& f = args.format;
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const float* x = args.q.transposed + m0 * f.K;
  float sums[kTileLanes][kTokens] = {};
  const float* value_of = outlier_values();
  const uint8_t *values = tile + args.layout.outlier_value, *indices = tile + args.layout.outlier_index;
  // The blocks of outlier_blocks.h, without its divisions.
  int64_t begin = 0, segment_end = blocks.segment;
  for (int64_t b = 0; b < blocks.num_blocks; ++b) {
    const int64_t width = segment_end - begin < format::kBlock ? segment_end - begin : format::kBlock;
    for (int64_t i = 0; i < f.c; ++i, values += kTileLanes, indices += kTileLanes) {
      for (int64_t r = 0; r < kTileLanes; ++r) {
        if (indices[r] >= width) continue;
        const float value = value_of[values[r]];
        const float* from = x + (begin + indices[r]) * kTokens;
        for (int m = 0; m < kTokens; ++m) sums[r][m] = fma1(value, from[m], sums[r][m]);
      }
    }
    begin += width;
    if (begin == segment_end) segment_end += blocks.segment;
  }
  for (int64_t m = 0; m < kTokens && m0 + m < args.M; ++m) {
    for (int64_t r = 0; r < kTileLanes; ++r) y[m * kTileLanes + r] = sums[r][m];
  }
}

static void outlier_sums(const LinearArgs& args, const uint8_t* tile, int64_t m0, float* y) {
  const int64_t left = args.M - m0, tokens = left < args.q.lanes ? left : args.q.lanes;
  if (args.format.c == 0) {
    for (int64_t i = 0; i < tokens * kTileLanes; ++i) y[i] = 0.0f;
    return;
  }
  switch (args.q.lanes) {
    case 1: return outliers_of_tokens<1>(args, tile, m0, y);
    case 4: return outliers_of_tokens<4>(args, tile, m0, y);
    case 8: return outliers_of_tokens<8>(args, tile, m0, y);
    default: return outliers_of_tokens<16>(args, tile, m0, y);
  }
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
