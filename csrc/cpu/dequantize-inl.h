// SPDX-License-Identifier: Apache-2.0
// W' from the canonical tensors, in the order of rounding that format/qtensor.h fixes. A row goes through the cache in
// parts of kPart columns: codes are unpacked, then turned into indices of levels, then into values.
#pragma once

#include "cpu/kernels.h"
#include "cpu/pack-inl.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int64_t kPart = 2048;  // columns; whole bytes of codes of any width

// format::trellis_index of the codes of columns [first, first + count); codes[-2] and codes[-1] are the two before
// them. `block`: the first block that begins at `first` or later; afterwards the first of what follows.
PRECAL_INLINE void trellis_indices(const uint8_t* codes, int64_t first, int64_t count,
                                   const format::OutlierBlocks& blocks, int64_t* block, uint8_t* index) {
  for (int64_t k = 0; k < count; ++k) {
    index[k] = uint8_t(2 * (codes[k] ^ (codes[k - 2] & 1)) + (codes[k - 1] & 1));
  }
  // A block knows nothing of the one before. It begins at a multiple of 32, so its second column is here too.
  static_assert(kPart % 32 == 0);
  for (; *block < blocks.num_blocks; ++*block) {
    const int64_t k = format::block_begin(blocks, *block) - first;
    if (k >= count) break;
    index[k] = uint8_t(2 * codes[k]);
    if (k + 1 < count) index[k + 1] = uint8_t(2 * codes[k + 1] + (codes[k] & 1));
  }
}

// Bit k of a row of the mask chooses between the two scales of a group.
PRECAL_INLINE void split_values(const uint8_t* index, const uint8_t* mask, int64_t k, int64_t end, float scale,
                                float other, const float* levels, float* out) {
  for (; k < end; ++k) out[k] = ((mask[k / 8] >> (k % 8)) & 1 ? other : scale) * levels[*index++];
}

template <int kBits>
static void dequantize_rows_of(const DequantizeArgs& args, int64_t row_begin, int64_t row_end) {
  const format::WeightFormat& f = args.format;
  const int64_t words = format::num_words(f), groups = format::num_groups(f);
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const bool trellis = format::is_trellis(f);
  float levels[256];  // of its own, so that no store to the output can change it
  std::memcpy(levels, args.levels, sizeof levels);
  uint8_t before_codes[2 + kPart], indices[kPart];
  uint8_t* const codes = before_codes + 2;
  for (int64_t n = row_begin; n < row_end; ++n) {
    const uint8_t* row = reinterpret_cast<const uint8_t*>(args.packed + n * words);
    const uint8_t* mask = f.split ? args.mask + n * format::mask_bytes_per_row(f) : nullptr;
    const float row_scale = bf16_to_float(args.row_scale[n]);
    float* out = args.out + n * f.K;
    int64_t block = 0;
    codes[-2] = codes[-1] = 0;
    for (int64_t first = 0; first < f.K; first += kPart) {
      const int64_t count = f.K - first < kPart ? f.K - first : kPart;
      unpack_row<kBits>(row + first / 8 * kBits, count, codes);
      if (trellis) {
        trellis_indices(codes, first, count, blocks, &block, indices);
        codes[-2] = codes[count - 2];
        codes[-1] = codes[count - 1];
      }
      const uint8_t* index = trellis ? indices : codes;
      for (int64_t k = first; k < first + count;) {
        const int64_t g = k / f.group_size;
        int64_t end = g + 1 < groups ? (g + 1) * f.group_size : f.K;
        if (end > first + count) end = first + count;
        const float scale = format::load_scale(args.scale, n * groups + g, f.scale_type);
        if (f.split) {
          const float other = format::load_scale(args.outlier_scale, n * groups + g, f.scale_type);
          split_values(index + (k - first), mask, k, end, scale, other, levels, out);
        } else {
          const uint8_t* from = index + (k - first);
          float* to = out + k;
          for (int64_t i = 0; i < end - k; ++i) to[i] = scale * levels[from[i]];
        }
        k = end;
      }
    }
    for (int64_t b = 0; b < blocks.num_blocks * (f.c > 0); ++b) {
      const int64_t width = format::block_end(blocks, b) - format::block_begin(blocks, b);
      for (int i = 0; i < f.c; ++i) {
        const int64_t entry = (n * blocks.num_blocks + b) * f.c + i;
        const int64_t position = args.outlier_index[entry];
        // An index past a short last block is refused when a file is read; never write outside the row regardless.
        if (position >= width) continue;
        float* target = out + format::block_begin(blocks, b) + position;
        *target = *target + format::kOutlierUnit * format::e4m3_to_float(args.outlier_value[entry]);
      }
    }
    for (int64_t k = 0; k < f.K; ++k) out[k] = row_scale * out[k];
  }
}

static void dequantize_rows(const DequantizeArgs& args, int64_t row_begin, int64_t row_end) {
  constexpr decltype(&dequantize_rows_of<2>) kOf[] = {
      dequantize_rows_of<2>, dequantize_rows_of<3>, dequantize_rows_of<4>, dequantize_rows_of<5>,
      dequantize_rows_of<6>, dequantize_rows_of<7>, dequantize_rows_of<8>};
  kOf[args.format.bits - format::kMinBits](args, row_begin, row_end);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
