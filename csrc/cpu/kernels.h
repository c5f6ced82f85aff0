// SPDX-License-Identifier: Apache-2.0
// The kernels that exist once per instruction set. Each works on a range of rows, elements or tiles of one op and knows
// nothing of threads; ops.h checks arguments, cuts the ranges and calls them through the table that select.h chose.
// Promises: pointers are contiguous, aligned to their elements (prepacked bytes to 4) and to no more, and are never
// read or written past the stated shapes.
#pragma once

#include <cstdint>

#include "core/tensor_view.h"
#include "format/prepacked.h"

namespace precal::cpu {

struct SoftThresholdArgs {
  const void* w;  // [count] dtype
  void* out;      // [count] dtype
  DType dtype;    // float32, float16 or bfloat16
  double lam;
};

// Magnitudes as integers: the bits of a weight as it is stored without its sign, which are in the order of |w|.
struct MagnitudesArgs {
  const void* w;
  bool half_words;    // 16 bits each, not 32
  int32_t low, high;  // collected are low < magnitude <= high
};

struct Magnitudes {
  int32_t largest;
  int64_t above;      // number of magnitudes > high
  int64_t collected;  // written to `out`, in order
};

// One digit of the radix selection among magnitudes: the upper 15 of 31 bits, or the lower 16 where the upper ones
// equal `prefix`. Those of 16-bit words are one digit.
struct MagnitudeDigitArgs {
  const void* w;
  bool half_words, low_digit;
  uint32_t prefix;
};

struct HistogramArgs {
  const void* w;  // [N, K] dtype
  DType dtype;
  int64_t K, group_size, num_groups;
  const float* divisor;   // [N, G] or nullptr: 1
  const int64_t* weight;  // [N, G] or nullptr: 1
  int64_t num_bins;
  double lo, hi;
  const uint8_t* label;  // [N, K] below num_labels, or nullptr: 0
  int64_t num_labels;
};

// Neighbours count in different places, so that one need not wait for the other where all weights are alike. Two: what
// there is of them must stay in the first level cache beside the weights (2048 bins: 16 KB; with four a tenth slower).
constexpr int64_t kQuickCounts = 2;

struct QuantizeArgs {
  const void* w;  // [N, K] dtype
  DType dtype;
  format::WeightFormat format;
  const float* levels;  // [2^bits], or [2^(bits+1)] for a trellis; non-decreasing
  bool symmetric;       // min-max on |w|: the top level meets the largest magnitude, scales are positive
  double lam;           // outliers have w^2 > lam
  float search_lo, search_hi;
  uint8_t* codes;          // [N, K]
  void* scale;             // [N, G]
  uint16_t* row_scale;     // [N] bfloat16
  uint8_t* outlier_index;  // [N, B, c]
  uint8_t* outlier_value;  // [N, B, c] e4m3
  const uint8_t* salient;  // split: [N, K] bool
  const int32_t* limit;    // split: or nullptr, and then salient are |w| above limit[n * limit_row + g * limit_group],
  int64_t limit_row, limit_group;  // the bits of a float32, or -1 for all
  uint32_t* packed;                // split: [N, words], and codes is nullptr; or nullptr
  void* outlier_scale;             // split: [N, G]
  uint8_t* mask;                   // split: [N, ceil(K/8)]
};

// Floats that a group takes in scratch: whole vectors, and no more than a row when group_size exceeds K.
PRECAL_INLINE int64_t padded_group(const format::WeightFormat& f) {
  return round_up(f.group_size < f.K ? f.group_size : f.K, 16);
}

constexpr int64_t kTrellisRows = 64;  // rows that are searched together, one a lane

// End of the columns from `begin` on that a trellis search can treat alone: whole blocks and whole groups.
inline int64_t segment_end(const format::WeightFormat& f, const format::OutlierBlocks& blocks, int64_t begin) {
  int64_t block = format::block_at(blocks, begin), end = format::block_end(blocks, block);
  while (end < f.K && end % f.group_size != 0) end = format::block_end(blocks, ++block);
  return end;
}

inline int64_t longest_segment(const format::WeightFormat& f) {
  const format::OutlierBlocks blocks = format::outlier_blocks(f);
  int64_t longest = 0;
  for (int64_t begin = 0; begin < f.K;) {
    const int64_t end = segment_end(f, blocks, begin);
    longest = end - begin > longest ? end - begin : longest;
    begin = end;
  }
  return longest;
}

// Per column of a segment a weight, 64 values of 2 bytes and codes of 1 byte, 8 values more, 4 words of decisions; per
// group 64 of t, reach and multiplier.
inline int64_t trellis_scratch_floats(const format::WeightFormat& f) {
  const int64_t per_column = 1 + kTrellisRows / 2 + kTrellisRows / 4 + 4 + 8;
  return per_column * (longest_segment(f) + 32) + format::num_groups(f) * kTrellisRows * 5 / 2 + 64;
}

// Scratch floats that one call of quantize_rows needs, whatever its range: a row, two numbers a group, and a group or
// what a trellis takes. Of quantize_split_rows: four numbers a group, codes and a mask of a row.
inline int64_t quantize_scratch_floats(const QuantizeArgs& args) {
  const format::WeightFormat& f = args.format;
  if (f.split) return 4 * round_up(format::num_groups(f), 16) + f.K / 4 + f.K / 32 + 64;
  const int64_t one_row = f.K + 2 * format::num_groups(f) + 64;
  return one_row + (format::is_trellis(f) ? trellis_scratch_floats(f) : 2 * padded_group(f) + 16);
}

struct PackArgs {
  const uint8_t* codes;  // [N, K]
  uint32_t* packed;      // [N, words]
  int64_t K;
  int bits;
};

struct UnpackArgs {
  const uint32_t* packed;
  uint8_t* codes;
  int64_t K;
  int bits;
};

struct DequantizeArgs {
  format::WeightFormat format;
  const uint32_t* packed;
  const void* scale;
  const uint16_t* row_scale;
  const float* levels;  // as in QuantizeArgs
  const uint8_t* outlier_index;
  const uint8_t* outlier_value;
  const void* outlier_scale;
  const uint8_t* mask;
  float* out;  // [N, K]
};

struct MeasureArgs {
  DequantizeArgs weight;  // without out
  const void* w;          // [N, K] dtype
  DType dtype;
  int bin_bits;  // 2^bin_bits bins of [-half, half], both powers of two
  double half;
  double* squares;  // [N, 2]: of W, of W - W'
};

// Counts of different codes lie a little more than their bins apart: a load may wait for a store still under way whose
// address has the same low 12 bits.
constexpr int64_t kCountSkew = 128 + 32;
PRECAL_INLINE int64_t count_stride(int bin_bits) { return (int64_t(1) << bin_bits) + kCountSkew; }

// Rows of x as whole numbers times a scale per span: columns of one group, at most kMaxSpan of them. M rows, cut into
// panels of tokens that share a load of decoded weights.
constexpr int64_t kMaxSpan = 128;
struct QuantizedRows {
  int planes;    // bytes of an integer: 1 or 2
  int64_t span;  // columns of a span, a multiple of the chunk; divides the group size
  int64_t num_spans;
  int64_t panel, wide;  // tokens of a panel: `panel` in the first `wide` ones, one less in the others
  int8_t* x;            // [span][panel][step][token of the panel][...4 columns of a step] (activations-inl.h)
  int32_t* start;       // [span][M][planes]: -128 * the sum of x
  float* scale;         // [span][M]
  int64_t lanes;        // 1 (M = 1), 4, 8 or 16: tokens that outliers are added for together
  float* transposed;    // [ceil(M / lanes)][K][lanes]: x; nullptr without outliers
};

// The panel of token m: its first token and how many it has.
struct Panel {
  int64_t first, tokens;
};
PRECAL_INLINE Panel panel_of(const QuantizedRows& q, int64_t m) {
  const int64_t narrow = m - q.wide * q.panel;  // tokens behind the wide panels
  if (narrow < 0) return {m / q.panel * q.panel, q.panel};
  return {m - narrow % (q.panel - 1), q.panel - 1};
}

struct LinearArgs {
  format::WeightFormat format;
  format::TileLayout layout;
  const uint8_t* prepacked;  // prepacked.h
  const float* levels;       // [256]; they repeat, so that the index of a narrow code needs no masking
  const float* x;            // [M, K], for linear_tiles
  const void* x_rows;        // [M, K] x_dtype, for the integer kernels
  DType x_dtype;
  int64_t M;          // at most kLinearMaxRows, kInt8MaxRows with integers
  const float* bias;  // [N] or nullptr
  void* y;            // [M, N] y_dtype, rows y_stride elements apart
  DType y_dtype;
  int64_t y_stride;
  QuantizedRows q;       // for linear_int8_tiles
  const uint32_t* keep;  // [num_chunks]: zero bytes where a block of a trellis begins
};

constexpr int64_t kLinearMaxRows = 64;  // rows of x per pass over the weight: its float32 copy then fits in L2
constexpr int64_t kInt8MaxRows = 128;   // their bytes and sums fit in L2 as well
constexpr int64_t kLinearRowBlock = 4;  // rows that share one load of dequantized weights
constexpr int64_t kLinearChains = 4;    // partial sums per output: 4 rows x 4 chains hide the latency of an FMA

inline int64_t linear_scratch_floats() {
  return format::kBlock * format::kTileRows + kLinearMaxRows * kLinearChains * format::kTileRows;
}

constexpr int64_t kTransposeColumns = 256;  // of one piece of transpose_activations
constexpr int64_t kStripTiles = 256;        // tiles whose sums are kept at once: 2 MB for 128 rows
inline int64_t int8_scratch_floats(int64_t M, int64_t num_tiles) {
  return (num_tiles < kStripTiles ? num_tiles : kStripTiles) * M * format::kTileRows;
}

// `linear` with integer activations; codes in chunks.
struct IntegerKernels {
  void (*linear_tiles)(const LinearArgs&, int64_t tile_begin, int64_t tile_end, float* scratch);  // 64-byte aligned
  void (*quantize_activations)(const LinearArgs&, int64_t row_begin, int64_t row_end);
  void (*transpose_activations)(const LinearArgs&, int64_t piece_begin, int64_t piece_end);
  int few_tokens[2], panel_tokens[2];  // most tokens of an only panel, and of one of several; with 8 and 16 bits
};

struct KernelTable {
  const char* name;
  void (*soft_threshold)(const SoftThresholdArgs&, int64_t begin, int64_t end);
  void (*magnitude_digit)(const MagnitudeDigitArgs&, int64_t begin, int64_t end, int64_t* counts);
  // At most 2^31 of them; `out` has room for them all and 16 words more.
  Magnitudes (*collect_magnitudes)(const MagnitudesArgs&, int64_t begin, int64_t end, int32_t* out);
  // mask[i]: above high. Returns the largest magnitude.
  int32_t (*mask_magnitudes)(const MagnitudesArgs&, int64_t begin, int64_t end, uint8_t* mask);
  // counts [num_labels][num_bins]. What weighs 1 may go to `quick` [num_bins][kQuickCounts] instead (nullptr: none),
  // for fewer than 2^31 weights without labels. Returns false when a label is not below num_labels.
  bool (*histogram)(const HistogramArgs&, int64_t row_begin, int64_t row_end, int64_t* counts, int64_t* outside,
                    uint32_t* quick);
  // Returns the flat index of the first element that is not finite or above kMaxWeight, or -1.
  int64_t (*quantize_rows)(const QuantizeArgs&, int64_t row_begin, int64_t row_end, float* scratch);
  int64_t (*quantize_split_rows)(const QuantizeArgs&, int64_t row_begin, int64_t row_end, float* scratch);
  // Returns false when a code does not fit in `bits`.
  bool (*pack_rows)(const PackArgs&, int64_t row_begin, int64_t row_end);
  void (*unpack_rows)(const UnpackArgs&, int64_t row_begin, int64_t row_end);
  void (*dequantize_rows)(const DequantizeArgs&, int64_t row_begin, int64_t row_end);
  // Adds to counts [grid_size or 1][count_stride], by code with a trellis: of fewer than 2^32 weights.
  void (*measure_rows)(const MeasureArgs&, int64_t row_begin, int64_t row_end, uint32_t* counts);
  void (*linear_tiles)(const LinearArgs&, int64_t tile_begin, int64_t tile_end, float* scratch);
  // The first chunks of 16 rows of codes, as many as this ISA does at once; returns how many.
  int64_t (*interleave_rows)(const format::WeightFormat&, const format::TileLayout&, const uint32_t* rows,
                             uint8_t* codes, int64_t stride);
  IntegerKernels integer;
};

extern const KernelTable k_scalar_kernels;
#if defined(PRECAL_X86)
extern const KernelTable k_avx2_kernels;        // AVX2, FMA
extern const IntegerKernels k_avxvnni_kernels;  // and AVX-VNNI: all else is k_avx2_kernels'
extern const KernelTable k_avx512_kernels;      // AVX-512 F/BW/DQ/VL, VBMI, VNNI, GFNI
#endif

}  // namespace precal::cpu
