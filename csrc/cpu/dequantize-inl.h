// SPDX-License-Identifier: Apache-2.0
// W' from the canonical tensors, in the order of rounding that format/qtensor.h fixes.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

static void dequantize_rows(const DequantizeArgs& args, int64_t row_begin, int64_t row_end) {
  const format::WeightFormat& f = args.format;
  const int64_t words = format::num_words(f), groups = format::num_groups(f);
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  const bool trellis = format::is_trellis(f);
  for (int64_t n = row_begin; n < row_end; ++n) {
    const uint32_t* row = args.packed + n * words;
    const float row_scale = bf16_to_float(args.row_scale[n]);
    float* out = args.out + n * f.K;
    format::TrellisState state;
    int64_t block = 0, restart = 0;  // the column at which the trellis starts afresh
    for (int64_t g = 0; g < groups; ++g) {
      const float scale = format::load_scale(args.scale, n * groups + g, f.scale_type);
      const float other = f.split ? format::load_scale(args.outlier_scale, n * groups + g, f.scale_type) : 0.0f;
      const int64_t begin = g * f.group_size;
      const int64_t end = begin + f.group_size < f.K ? begin + f.group_size : f.K;
      for (int64_t k = begin; k < end; ++k) {
        float s = scale;
        if (f.split && ((args.mask[n * format::mask_bytes_per_row(f) + k / 8] >> (k % 8)) & 1)) s = other;
        uint32_t index = format::code_at(row, k, f.bits);
        if (trellis) {
          if (k == restart) {
            state = {};
            restart = ++block < blocks.num_blocks ? format::block_begin(blocks, block) : f.K;
          }
          index = format::trellis_index(&state, index);
        }
        out[k] = s * args.levels[index];
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

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
