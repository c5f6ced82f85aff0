// SPDX-License-Identifier: Apache-2.0
// What quantization did to the rows of a weight, in one pass: squares of W and of W - W', and the histogram of W in
// units of its levels, outliers left out, by code where a trellis decides. The bins are those of histogram-inl.h.
//
// A row's squares are summed in double, column k in lane k % 16, in the order of columns; hsum adds the lanes.
#pragma once

#include "cpu/dequantize-inl.h"
#include "cpu/histogram-inl.h"
#include "cpu/kernels.h"
#include "cpu/load-inl.h"
#include "cpu/simd_squares.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

// Bins of a power of two, with an edge at 0.
struct Bins {
  float per_bin, width, half, below_half;
  I32 first, last;
};

PRECAL_INLINE Bins make_bins(const MeasureArgs& args) {
  const float half = float(args.half), num = float(int64_t(1) << args.bin_bits);
  return {num / (2.0f * half),
          2.0f * half / num,
          half,
          bits_float(float_bits(half) - 1),
          splat_word(-(1 << args.bin_bits) / 2),
          splat_word((1 << args.bin_bits) - 1)};
}

// Bins of sixteen quotients, and which of them lie in range. Nothing is rounded but a quotient too small to count in
// bins, which is compared with its bin's edge as it was.
PRECAL_INLINE uint32_t find_bins(const Bins& bins, F32 quotient, I32* bin) {
  const uint32_t at_end = equal(quotient, splat(bins.half));  // the last bin has both of its edges
  if (__builtin_expect(at_end != 0, 0)) quotient = select(at_end, splat(bins.below_half), quotient);
  const I32 place = truncate_words(mul(quotient, splat(bins.per_bin)));  // upwards below 0
  const I32 down = below(quotient, mul(as_numbers(place), splat(bins.width)));
  *bin = sub_word(sub_word(place, bins.first), down);
  return at_most_unsigned(*bin, bins.last);
}

// index * count_stride
PRECAL_INLINE I32 first_cell(I32 index, int bin_bits) {
  static_assert(kCountSkew == (1 << 7) + (1 << 5));
  return add_word(shift_left(index, bin_bits), add_word(shift_left(index, 7), shift_left(index, 5)));
}

// A part of a row, padded to whole vectors with what counts nowhere. Cells are found for all of it before they are
// counted: a narrow load right after the wide store it reads from would wait.
struct MeasuredPart {
  float w[kPart], quantized[kPart], divisor[kPart];
  int32_t cell[kPart];
  uint16_t outlier[kPart / kLanes], counted[kPart / kLanes];  // a bit each
};

static void find_outliers(const RowParts& row, int64_t first, int64_t count, uint16_t* outlier) {
  std::memset(outlier, 0, kPart / kLanes * sizeof *outlier);
  for_outliers(row, first, count, [&](int64_t column, int64_t entry) {
    const bool used = (row.args.outlier_value[entry] & 0x7F) != 0;
    outlier[column / kLanes] = uint16_t(outlier[column / kLanes] | int(used) << (column % kLanes));
  });
}

// What one level is worth, row_scale * scale, column by column.
static void find_divisors(const RowParts& row, int64_t first, int64_t count, float* divisor) {
  const format::WeightFormat& f = row.args.format;
  const float row_scale = bf16_to_float(row.args.row_scale[row.n]);
  for (int64_t k = first, g = first / f.group_size; k < first + count; ++g) {
    const int64_t group = row.n * row.groups + g;
    int64_t end = g + 1 < row.groups ? (g + 1) * f.group_size : f.K;
    if (end > first + count) end = first + count;
    const float plain = row_scale * format::load_scale(row.args.scale, group, f.scale_type);
    float* const of_group = divisor + (k - first);
    for (int64_t i = 0; i < end - k; ++i) of_group[i] = plain;
    if (f.split) {
      const float other = row_scale * format::load_scale(row.args.outlier_scale, group, f.scale_type);
      const uint8_t* mask = row.args.mask + row.n * format::mask_bytes_per_row(f);
      int64_t i = 0;
      for (; k % 8 == 0 && i + kLanes <= end - k; i += kLanes) {
        store(of_group + i, select(salient_bits(mask, k + i), splat(other), splat(plain)));
      }
      for (; i < end - k; ++i) {
        if ((mask[(k + i) / 8] >> ((k + i) % 8)) & 1) of_group[i] = other;
      }
    }
    k = end;
  }
}

template <int kBits>
static void measure_rows_of(const MeasureArgs& args, int64_t row_begin, int64_t row_end, uint32_t* counts) {
  const format::WeightFormat& f = args.weight.format;
  const Bins bins = make_bins(args);
  const bool by_code = format::is_trellis(f);
  RowParts row(args.weight);
  MeasuredPart part;
  for (int64_t n = row_begin; n < row_end; ++n) {
    begin_row(&row, n);
    Squares power = zero_squares(), noise = zero_squares();
    for (int64_t first = 0; first < f.K; first += kPart) {
      const int64_t count = f.K - first < kPart ? f.K - first : kPart, padded = round_up(count, kLanes);
      load_elements(args.w, args.dtype, n * f.K + first, count, part.w);
      next_part<kBits>(&row, first, count, part.quantized);
      find_outliers(row, first, count, part.outlier);
      find_divisors(row, first, count, part.divisor);
      for (int64_t i = count; i < padded; ++i) part.w[i] = part.quantized[i] = part.divisor[i] = 0.0f;
      for (int64_t i = 0; i < padded; i += kLanes) {
        const F32 w = load(part.w + i);
        power = add_square(power, w);
        noise = add_square(noise, sub(load(part.quantized + i), w));
        I32 cell;
        const uint32_t inside = find_bins(bins, div(w, load(part.divisor + i)), &cell);  // not those of a scale of 0
        if (by_code) cell = add_word(cell, first_cell(widen_bytes(row.index + i), args.bin_bits));
        store_words(part.cell + i, cell);
        part.counted[i / kLanes] = uint16_t(inside & ~uint32_t(part.outlier[i / kLanes]));
      }
      for_inside(padded, part.counted, [&](int64_t i) { ++counts[part.cell[i]]; });
    }
    args.squares[2 * n] = hsum(power);
    args.squares[2 * n + 1] = hsum(noise);
  }
}

static void measure_rows(const MeasureArgs& args, int64_t row_begin, int64_t row_end, uint32_t* counts) {
  constexpr decltype(&measure_rows_of<2>) kOf[] = {measure_rows_of<2>, measure_rows_of<3>, measure_rows_of<4>,
                                                   measure_rows_of<5>, measure_rows_of<6>, measure_rows_of<7>,
                                                   measure_rows_of<8>};
  kOf[args.weight.format.bits - format::kMinBits](args, row_begin, row_end, counts);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
