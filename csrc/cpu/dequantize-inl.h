// SPDX-License-Identifier: Apache-2.0
// W' from the canonical tensors, in the order of rounding that format/qtensor.h fixes. A row goes through the cache in
// parts of kPart columns: codes are unpacked, then turned into indices of levels, then into values. measure-inl.h goes
// the same way.
#pragma once

#include "cpu/kernels.h"
#include "cpu/pack-inl.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int64_t kPart = 1024;  // columns; whole bytes of codes of any width

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

// A row on its way through the cache.
struct RowParts {
  const DequantizeArgs& args;
  const format::OutlierBlocks blocks;
  const int64_t groups, words;
  float levels[256];  // of its own, so that no store to the output can change it
  int64_t n = 0;
  int64_t trellis_block = 0;       // the first that begins in this part or later
  const uint8_t* index = nullptr;  // of the levels of this part's columns
  uint8_t before_codes[2 + kPart], indices[kPart];

  explicit RowParts(const DequantizeArgs& a)
      : args(a),
        blocks(format::outlier_blocks(a.format)),
        groups(format::num_groups(a.format)),
        words(format::num_words(a.format)) {
    std::memcpy(levels, a.levels, sizeof levels);
  }
};

static void begin_row(RowParts* row, int64_t n) {
  row->n = n;
  row->trellis_block = 0;
  row->before_codes[0] = row->before_codes[1] = 0;
}

// The entry's column among [first, first + count), or -1. An index past a short last block is refused when a file is
// read; it points nowhere regardless.
PRECAL_INLINE int64_t outlier_column(const RowParts& row, int64_t block, int64_t entry, int64_t first, int64_t count) {
  const int64_t begin = format::block_begin(row.blocks, block), position = row.args.outlier_index[entry];
  const int64_t column = begin + position - first;
  return position < format::block_end(row.blocks, block) - begin && column >= 0 && column < count ? column : -1;
}

// Calls visit(column, entry) for every entry of an outlier in [first, first + count), in their order.
template <typename Visit>
PRECAL_INLINE void for_outliers(const RowParts& row, int64_t first, int64_t count, const Visit& visit) {
  if (row.args.format.c == 0) return;
  for (int64_t b = format::block_at(row.blocks, first); b < row.blocks.num_blocks; ++b) {
    if (format::block_begin(row.blocks, b) >= first + count) break;
    for (int i = 0; i < row.args.format.c; ++i) {
      const int64_t entry = (row.n * row.blocks.num_blocks + b) * row.args.format.c + i;
      const int64_t column = outlier_column(row, b, entry, first, count);
      if (column >= 0) visit(column, entry);
    }
  }
}

// Bits of the mask of 16 columns from `column` of the row on, a multiple of 8.
PRECAL_INLINE uint32_t salient_bits(const uint8_t* mask, int64_t column) {
  uint16_t bits;
  std::memcpy(&bits, mask + column / 8, sizeof bits);
  return bits;
}

// out = level * scale, or * other where the row's mask says so, of columns from `column` of the row on. kFew: 32 levels
// at most, which are in registers.
template <bool kFew, bool kSplit>
static void scale_levels(const float* levels, const uint8_t* index, const uint8_t* mask, int64_t column, int64_t count,
                         float scale, float other, float* out) {
  int64_t i = 0;
  if (kFew && (!kSplit || column % 8 == 0)) {
    const F32 low = load(levels), high = load(levels + kLanes), a = splat(scale), b = splat(other);
    for (; i + kLanes <= count; i += kLanes) {
      const F32 factor = kSplit ? select(salient_bits(mask, column + i), b, a) : a;
      store(out + i, mul(factor, lookup32(low, high, widen_bytes(index + i))));
    }
  }
  for (; i < count; ++i) {
    const bool salient = kSplit && ((mask[(column + i) / 8] >> ((column + i) % 8)) & 1) != 0;
    out[i] = (salient ? other : scale) * levels[index[i]];
  }
}

// W' of columns [first, first + count) of the row, parts in their order, and their indices of levels.
template <int kBits>
static void next_part(RowParts* row, int64_t first, int64_t count, float* out) {
  const DequantizeArgs& args = row->args;
  const format::WeightFormat& f = args.format;
  uint8_t* const codes = row->before_codes + 2;
  const uint8_t* packed = reinterpret_cast<const uint8_t*>(args.packed + row->n * row->words);
  unpack_row<kBits>(packed + first / 8 * kBits, count, codes);
  row->index = codes;
  if (format::is_trellis(f)) {
    trellis_indices(codes, first, count, row->blocks, &row->trellis_block, row->indices);
    row->index = row->indices;
    std::memmove(codes - 2, codes + count - 2, 2);
  }
  const bool few = (f.grid_size > 0 ? f.grid_size : 1 << f.bits) <= 32;
  const auto values = f.split ? (few ? scale_levels<true, true> : scale_levels<false, true>)
                              : (few ? scale_levels<true, false> : scale_levels<false, false>);
  const uint8_t* mask = f.split ? args.mask + row->n * format::mask_bytes_per_row(f) : nullptr;
  for (int64_t k = first; k < first + count;) {
    const int64_t g = k / f.group_size;
    int64_t end = g + 1 < row->groups ? (g + 1) * f.group_size : f.K;
    if (end > first + count) end = first + count;
    const uint8_t* index = row->index + (k - first);
    const float scale = format::load_scale(args.scale, row->n * row->groups + g, f.scale_type);
    const float other = f.split ? format::load_scale(args.outlier_scale, row->n * row->groups + g, f.scale_type) : 0.0f;
    values(row->levels, index, mask, k, end - k, scale, other, out + (k - first));
    k = end;
  }
  for_outliers(*row, first, count, [&](int64_t column, int64_t entry) {
    out[column] = out[column] + format::kOutlierUnit * format::e4m3_to_float(args.outlier_value[entry]);
  });
  const float row_scale = bf16_to_float(args.row_scale[row->n]);
  for (int64_t k = 0; k < count; ++k) out[k] = row_scale * out[k];
}

template <int kBits>
static void dequantize_rows_of(const DequantizeArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t K = args.format.K;
  RowParts row(args);
  for (int64_t n = row_begin; n < row_end; ++n) {
    begin_row(&row, n);
    for (int64_t first = 0; first < K; first += kPart) {
      next_part<kBits>(&row, first, K - first < kPart ? K - first : kPart, args.out + n * K + first);
    }
  }
}

static void dequantize_rows(const DequantizeArgs& args, int64_t row_begin, int64_t row_end) {
  constexpr decltype(&dequantize_rows_of<2>) kOf[] = {
      dequantize_rows_of<2>, dequantize_rows_of<3>, dequantize_rows_of<4>, dequantize_rows_of<5>,
      dequantize_rows_of<6>, dequantize_rows_of<7>, dequantize_rows_of<8>};
  kOf[args.format.bits - format::kMinBits](args, row_begin, row_end);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
