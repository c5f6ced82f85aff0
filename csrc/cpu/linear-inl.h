// SPDX-License-Identifier: Apache-2.0
// y[M, N] = x[M, K] @ W'[N, K]^T + bias, on the tile order of format/prepacked.h.
//
//   Work   a thread owns tiles of 16 rows of W'. Per block of up to 256 columns it dequantizes the tile once into a
//          float32 panel [columns][16] (scale * level + U * outlier; L1-resident, 16 KB), then every row of x uses it.
//          The row scale comes last. K is never split over threads: results do not depend on their number.
//   Sums   each output is 4 chains (columns k % 4), added as (0 + 1) + (2 + 3); the same for every M.
//   Limits M <= kLinearMaxRows per call; any K, N, bits, group_size, c.
#pragma once

#include "cpu/kernels.h"
#include "cpu/load-inl.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int64_t kTile = format::kTileRows;

// The codes of 16 rows in one column of chunks (format/interleave.h); bits above the code are not zero.
template <int kBits>
PRECAL_INLINE I32 codes_of_column(const format::TileLayout& layout, const uint8_t* codes, int64_t stride, int64_t k) {
  // Chunks have 16, 32 or 64 columns, so these are shifts and masks, not divisions.
  const int log_chunk = layout.chunk == 64 ? 6 : layout.chunk == 32 ? 5 : 4;
  const int inside = int(k & (layout.chunk - 1)), t = inside & int(layout.chunk / 4 - 1);
  const int byte = (inside >> (log_chunk - 2)) * 8;
  const int32_t* chunk = reinterpret_cast<const int32_t*>(codes + (k >> log_chunk) * stride);
  if (kBits == 8) return shift_right(load_words(chunk + t * kTile), byte);
  if (kBits == 4) return shift_right(load_words(chunk + (t / 2) * kTile), byte + 4 * int(t % 2));
  const int32_t* eight = chunk + (t / 8) * 3 * kTile;
  const int s = int(t % 8);
  const I32 pair = shift_right(load_words(eight + format::pair_register(s) * kTile), byte + format::pair_shift(s));
  const I32 low = low_bit(shift_right(load_words(eight + 2 * kTile), byte + s));
  return bit_or(shift_left(pair, 1), low);
}

// scale * level of columns [begin, end) of one tile into panel[(k - begin) * 16 + lane].
template <int kBits, bool kTrellis>
static void dequantize_panel(const LinearArgs& args, int64_t t, int64_t begin, int64_t end, float* panel) {
  const format::WeightFormat& f = args.format;
  const format::TilePlace place = format::tile_place(args.layout, t);
  const uint8_t *tile = args.prepacked + place.head, *chunks = args.prepacked + place.codes;
  const int32_t* words = reinterpret_cast<const int32_t*>(chunks);
  const F32 table = load(args.levels), table_high = load(args.levels + kTile);
  const I32 none = zero_words();
  I32 previous = none, before = none;  // codes of the two columns before; a block starts without
  int64_t group = -1;
  float scales[kTile], others[kTile];
  for (int64_t k = begin; k < end; ++k) {
    if (k / f.group_size != group) {
      group = k / f.group_size;
      for (int64_t r = 0; r < kTile; ++r) {
        scales[r] = format::load_scale(tile + args.layout.scale, group * kTile + r, f.scale_type);
        others[r] =
            f.split ? format::load_scale(tile + args.layout.outlier_scale, group * kTile + r, f.scale_type) : 0.0f;
      }
    }
    I32 codes;
    if ((kBits == 3 || kBits == 4 || kBits == 8) && args.layout.chunk > 0) {
      codes = codes_of_column<kBits>(args.layout, chunks, place.stride, k);
    } else {
      const int64_t bit = k * kBits;
      const int64_t word = bit >> 5;
      const int shift = int(bit & 31);
      codes = shift_right(load_words(words + word * kTile), shift);
      if (shift + kBits > 32) codes = bit_or(codes, shift_left(load_words(words + (word + 1) * kTile), 32 - shift));
    }
    F32 level;
    if (kTrellis) {
      const I32 index = bit_or(shift_left(bit_xor(codes, low_bit(before)), 1), low_bit(previous));
      before = previous;
      previous = codes;
      codes = index;
    }
    constexpr int kIndexBits = kBits + kTrellis;
    if (kIndexBits <= 4) {
      level = lookup16(table, codes);  // looks at 4 bits; smaller tables repeat, so higher bits do no harm
    } else if (kIndexBits == 5) {
      level = lookup32(table, table_high, codes);
    } else {
      int32_t index[kTile];
      float lanes[kTile];
      store_words(index, codes);
      for (int64_t r = 0; r < kTile; ++r) lanes[r] = args.levels[index[r] & ((1 << kIndexBits) - 1)];
      level = load(lanes);
    }
    F32 scale = load(scales);
    if (f.split) {
      const uint8_t* mask = tile + args.layout.mask + (k / 8) * kTile;
      float lanes[kTile];
      for (int64_t r = 0; r < kTile; ++r) lanes[r] = ((mask[r] >> (k % 8)) & 1) ? others[r] : scales[r];
      scale = load(lanes);
    }
    store(panel + (k - begin) * kTile, mul(scale, level));
  }
}

using PanelDequantizer = void (*)(const LinearArgs&, int64_t tile, int64_t begin, int64_t end, float* panel);

static PanelDequantizer panel_dequantizer(const format::WeightFormat& f) {
  const bool trellis = format::is_trellis(f);
  switch (f.bits) {
    case 2: return trellis ? dequantize_panel<2, true> : dequantize_panel<2, false>;
    case 3: return trellis ? dequantize_panel<3, true> : dequantize_panel<3, false>;
    case 4: return trellis ? dequantize_panel<4, true> : dequantize_panel<4, false>;
    case 5: return trellis ? dequantize_panel<5, true> : dequantize_panel<5, false>;
    case 6: return trellis ? dequantize_panel<6, true> : dequantize_panel<6, false>;
    case 7: return trellis ? dequantize_panel<7, true> : dequantize_panel<7, false>;
    default: return dequantize_panel<8, false>;
  }
}

PRECAL_INLINE void add_outliers(const LinearArgs& args, const uint8_t* tile, int64_t block, int64_t width,
                                float* panel) {
  const int c = args.format.c;
  const uint8_t* values = tile + args.layout.outlier_value + block * c * kTile;
  const uint8_t* indices = tile + args.layout.outlier_index + block * c * kTile;
  for (int64_t i = 0; i < c * kTile; ++i) {
    if (indices[i] >= width) continue;
    float* target = panel + indices[i] * kTile + i % kTile;
    *target = *target + format::kOutlierUnit * format::e4m3_to_float(values[i]);
  }
}

// sums[row][chain][lane] += x[row][k] * panel[k][lane] for kRows rows
template <int kRows>
static void accumulate(const float* x, int64_t x_stride, const float* panel, int64_t width, float* sums) {
  F32 acc[kRows][kLinearChains];
  for (int m = 0; m < kRows; ++m) {
    for (int p = 0; p < kLinearChains; ++p) acc[m][p] = load(sums + (m * kLinearChains + p) * kTile);
  }
  int64_t k = 0;
  for (; k + kLinearChains <= width; k += kLinearChains) {
    for (int p = 0; p < kLinearChains; ++p) {
      const F32 weights = load(panel + (k + p) * kTile);
      for (int m = 0; m < kRows; ++m) acc[m][p] = fma(splat(x[m * x_stride + k + p]), weights, acc[m][p]);
    }
  }
  for (int p = 0; k + p < width; ++p) {
    const F32 weights = load(panel + (k + p) * kTile);
    for (int m = 0; m < kRows; ++m) acc[m][p] = fma(splat(x[m * x_stride + k + p]), weights, acc[m][p]);
  }
  for (int m = 0; m < kRows; ++m) {
    for (int p = 0; p < kLinearChains; ++p) store(sums + (m * kLinearChains + p) * kTile, acc[m][p]);
  }
}

static void linear_tiles(const LinearArgs& args, int64_t tile_begin, int64_t tile_end, float* scratch) {
  const format::WeightFormat& f = args.format;
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const auto dequantize = panel_dequantizer(f);
  float* panel = scratch;
  float* sums = scratch + format::kBlock * kTile;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const uint8_t* tile = args.prepacked + format::tile_place(args.layout, t).head;
    for (int64_t i = 0; i < args.M * kLinearChains * kTile; ++i) sums[i] = 0.0f;

    for (int64_t b = 0; b < blocks.num_blocks; ++b) {
      const int64_t begin = format::block_begin(blocks, b), end = format::block_end(blocks, b);
      dequantize(args, t, begin, end, panel);
      if (f.c > 0) add_outliers(args, tile, b, end - begin, panel);
      int64_t m = 0;
      for (; m + kLinearRowBlock <= args.M; m += kLinearRowBlock) {
        accumulate<kLinearRowBlock>(args.x + m * f.K + begin, f.K, panel, end - begin,
                                    sums + m * kLinearChains * kTile);
      }
      for (; m < args.M; ++m) {
        accumulate<1>(args.x + m * f.K + begin, f.K, panel, end - begin, sums + m * kLinearChains * kTile);
      }
    }

    const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(tile);
    const int64_t rows = f.N - t * kTile < kTile ? f.N - t * kTile : kTile;
    for (int64_t m = 0; m < args.M; ++m) {
      const float* s = sums + m * kLinearChains * kTile;
      for (int64_t r = 0; r < rows; ++r) {
        const float total = (s[r] + s[kTile + r]) + (s[2 * kTile + r] + s[3 * kTile + r]);
        float y = bf16_to_float(row_scale[r]) * total;
        if (args.bias != nullptr) y = y + args.bias[t * kTile + r];
        store_element(args.y, args.y_dtype, m * args.y_stride + t * kTile + r, y);
      }
    }
  }
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
