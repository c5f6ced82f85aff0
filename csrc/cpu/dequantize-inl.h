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

// The blocks of a row one after the other: no division on the way, of which block_begin() has two.
struct BlockCursor {
  int64_t number, begin, end, segment_end;
};

PRECAL_INLINE BlockCursor first_block(const format::OutlierBlocks& blocks) {
  return {0, 0, blocks.segment < format::kBlock ? blocks.segment : format::kBlock, blocks.segment};
}

PRECAL_INLINE void next_block(const format::OutlierBlocks& blocks, BlockCursor* block) {
  ++block->number;
  block->begin = block->end;
  if (block->begin == block->segment_end) block->segment_end += blocks.segment;
  const int64_t full = block->begin + format::kBlock;
  block->end = full < block->segment_end ? full : block->segment_end;
}

// format::trellis_index of the codes of columns [first, first + count); codes[-2] and codes[-1] are the two before
// them. `block`: the one that column `first` lies in.
PRECAL_INLINE void trellis_indices(const uint8_t* codes, int64_t first, int64_t count,
                                   const format::OutlierBlocks& blocks, BlockCursor block, uint8_t* index) {
  for (int64_t k = 0; k < count; ++k) {
    index[k] = uint8_t(2 * (codes[k] ^ (codes[k - 2] & 1)) + (codes[k - 1] & 1));
  }
  // A block knows nothing of the one before. It begins at a multiple of 32, so its second column is here too.
  static_assert(kPart % 32 == 0);
  if (block.begin < first) next_block(blocks, &block);
  for (; block.number < blocks.num_blocks && block.begin < first + count; next_block(blocks, &block)) {
    const int64_t k = block.begin - first;
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
  BlockCursor block{};             // the one that this part's first column lies in
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
  row->block = first_block(row->blocks);
  row->before_codes[0] = row->before_codes[1] = 0;
}

// Calls visit(column, entry) for every entry of an outlier in the part of columns [first, first + count), in their
// order. An index past a short last block is refused when a file is read; it points nowhere regardless.
template <typename Visit>
PRECAL_INLINE void for_outliers(const RowParts& row, int64_t first, int64_t count, const Visit& visit) {
  const int c = row.args.format.c;
  BlockCursor block = row.block;
  for (; c > 0 && block.number < row.blocks.num_blocks && block.begin < first + count; next_block(row.blocks, &block)) {
    for (int i = 0; i < c; ++i) {
      const int64_t entry = (row.n * row.blocks.num_blocks + block.number) * c + i;
      const int64_t position = row.args.outlier_index[entry], column = block.begin + position - first;
      if (position < block.end - block.begin && column >= 0 && column < count) visit(column, entry);
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
  while (row->block.end <= first) next_block(row->blocks, &row->block);
  if (format::is_trellis(f)) {
    trellis_indices(codes, first, count, row->blocks, row->block, row->indices);
    row->index = row->indices;
    std::memmove(codes - 2, codes + count - 2, 2);
  }
  const bool few = (f.grid_size > 0 ? f.grid_size : 1 << f.bits) <= 32;
  const auto values = f.split ? (few ? scale_levels<true, true> : scale_levels<false, true>)
                              : (few ? scale_levels<true, false> : scale_levels<false, false>);
  const uint8_t* mask = f.split ? args.mask + row->n * format::mask_bytes_per_row(f) : nullptr;
  for (int64_t k = first, g = first / f.group_size; k < first + count; ++g) {
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
