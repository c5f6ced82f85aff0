// SPDX-License-Identifier: Apache-2.0
// The published split, a row at a time while it is in the first level cache: two symmetric min-max grids per group, one
// for salient weights and one for the rest. The order of every rounding is that of quantize-inl.h, steps 2 to 5, and so
// are the bits; which weights are salient a mask says, or a limit of their magnitude.
//
//   A  one look at the weights: the mask, and per group the largest magnitude of either kind, as integers, in which NaN
//      is above all numbers
//   B  scales of sixteen groups at once
//   C  x = (w / row_scale) * (1 / s), codes a byte each
//   D  bytes to bits, or out as they are
//
// A and C each ask for half of the next row, which then comes while this one is worked on.
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/load-inl.h"
#include "cpu/pack-inl.h"
#include "cpu/quantize-inl.h"
#include "cpu/simd_codes.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

// Float16 of t >= 0, not above the largest finite one, and not zero unless t is. The words are halves in their low
// bits.
PRECAL_INLINE I32 nonzero_half_words(F32 t) {
  t = min(t, splat(kHalfMax));
  const I32 bits = words_of(t), odd = low_bit(shift_right(bits, 13));
  // as float_to_half (core/numeric.h)
  const I32 rounded = sub_word(sub_word(bits, splat_word(0x38000000 - 0xFFF)), sub_word(zero_words(), odd));
  const I32 small = sub_word(words_of(add(t, splat(0.5f))), splat_word(int32_t(float_bits(0.5f))));
  const uint32_t is_small = less(t, splat(6.103515625e-05f));  // 2^-14
  const F32 half = select(is_small, as_floats(small), as_floats(shift_right(rounded, 13)));
  return max_word(words_of(half), below(splat(0.0f), t));
}

// The float of a positive float16.
PRECAL_INLINE F32 float_of_half_words(I32 half) {
  const F32 number = as_numbers(half);
  const I32 normal = sub_word(shift_left(half, 13), splat_word(-(112 << 23)));
  return select(less(number, splat(1024.0f)), mul(number, splat(5.9604644775390625e-8f)), as_floats(normal));
}

struct SplitRow {
  float *dense, *other;                  // [groups, whole vectors]: largest magnitudes
  float *dense_inverse, *other_inverse;  // 1 / s, 0 where s is
  uint8_t* mask;                         // [K / 8 and 8 more]
  uint8_t* codes;                        // [K and 64 more]

  SplitRow(const RowQuantizer& q, float* scratch) {
    const int64_t stride = round_up(q.groups, kLanes);
    dense = scratch;
    other = dense + stride;
    dense_inverse = other + stride;
    other_inverse = dense_inverse + stride;
    codes = reinterpret_cast<uint8_t*>(other_inverse + stride);
    mask = codes + round_up(q.K, 64) + 64;
  }
};

PRECAL_INLINE uint32_t nonzero_bytes_of(const uint8_t* p, int64_t count) {
  if (count >= kLanes) return nonzero_bytes(p);
  uint32_t bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= uint32_t(p[i] != 0) << i;
  return bits;
}

// Sixteen bits at any bit of a row of zeros, and of those behind it; up to 4 bytes are read.
PRECAL_INLINE void put_bits(uint8_t* row, uint64_t at, uint32_t bits) {
  if (at % 8 == 0) {
    const uint16_t all = uint16_t(bits);
    std::memcpy(row + at / 8, &all, sizeof all);
    return;
  }
  uint32_t word;
  std::memcpy(&word, row + at / 8, sizeof word);
  word |= bits << (at % 8);
  std::memcpy(row + at / 8, &word, sizeof word);
}

PRECAL_INLINE uint32_t get_bits(const uint8_t* row, uint64_t at) {
  uint32_t word;
  std::memcpy(&word, row + at / 8, sizeof word);
  return (word >> (at % 8)) & 0xFFFFu;
}

// Weights of a row, and the next row on its way.
template <DType kType>
struct SplitWeights {
  const char *row, *next;

  static constexpr int64_t kBytes = kType == DType::kFloat32 ? 4 : 2;
  SplitWeights(const QuantizeArgs& args, int64_t n) {
    row = static_cast<const char*>(args.w) + n * args.format.K * kBytes;
    next = n + 1 < args.format.N ? row + args.format.K * kBytes : row;
  }
  PRECAL_FORCE_INLINE F32 all(int64_t k) const { return load_weights(row, kType, k); }
  F32 few(int64_t k, int64_t count) const {  // zeros behind them
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = load_element(row, kType, k + i);
    return load(lanes);
  }
  PRECAL_FORCE_INLINE void expect(int64_t k) const { __builtin_prefetch(next + k * kBytes); }
};

// A. Returns whether all weights can be quantized.
template <DType kType, bool kLimit>
static bool split_row(const RowQuantizer& q, int64_t n, const SplitWeights<kType> w, const SplitRow& row) {
  const QuantizeArgs& args = q.args;
  const I32 magnitude = splat_word(0x7FFFFFFF);
  I32 largest = zero_words();
  uint8_t* const mask = row.mask;
  std::memset(mask, 0, size_t(q.K / 8 + 8));
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t begin = q.begin_of(g), end = begin + q.count_of(g);
    const I32 first = splat_word(kLimit ? args.limit[n * args.limit_row + g * args.limit_group] + 1 : 0);
    const uint8_t* const salient = kLimit ? nullptr : args.salient + n * q.K;
    I32 dense = zero_words(), other = zero_words();
    const auto look = [&](F32 value, int64_t k, int few) {
      const I32 m = bit_and(words_of(value), magnitude);
      uint32_t bits = kLimit ? at_most_unsigned(first, m) : nonzero_bytes_of(salient + k, few);
      bits &= 0xFFFFu >> (kLanes - few);
      dense = max_where(~bits & 0xFFFFu, dense, m);
      other = max_where(bits, other, m);
      put_bits(mask, uint64_t(k), bits);
    };
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) {
      w.expect(k / 2);
      look(w.all(k), k, kLanes);
    }
    if (k < end) look(w.few(k, end - k), k, int(end - k));
    row.dense[g] = bits_float(uint32_t(largest_word(dense)));
    row.other[g] = bits_float(uint32_t(largest_word(other)));
    largest = max_word(largest, max_word(dense, other));
  }
  return uint32_t(largest_word(largest)) <= float_bits(kMaxWeight);
}

// B.
static void split_scales(const RowQuantizer& q, int64_t n, const SplitRow& row) {
  const QuantizeArgs& args = q.args;
  const int64_t groups = q.groups;
  const F32 peak = splat(q.peak), zero = splat(0.0f);
  for (int64_t g = groups; g % kLanes != 0; ++g) row.dense[g] = row.other[g] = 0.0f;
  float* amplitude = row.dense_inverse;
  F32 salient = zero;
  for (int64_t g = 0; g < groups; g += kLanes) {
    store(amplitude + g, div(load(row.dense + g), peak));
    salient = max(salient, div(load(row.other + g), peak));
  }
  args.row_scale[n] = float_to_bf16_nonzero(row_base(amplitude, groups, q.f.scale_type, largest_lane(salient), 0.0f));
  const F32 row_scale = splat(bf16_to_float(args.row_scale[n]));
  const bool zeros = args.row_scale[n] == 0;
  const auto scale = [&](const float* largest, float* inverse, void* out) {
    uint16_t* halves = static_cast<uint16_t*>(out) + n * groups;
    for (int64_t g = 0; g < groups; g += kLanes) {
      const I32 half = nonzero_half_words(zeros ? zero : div(div(load(largest + g), row_scale), peak));
      const F32 s = float_of_half_words(half);
      store(inverse + g, select(less(zero, s), div(splat(1.0f), s), zero));
      int32_t words[kLanes];
      store_words(words, half);
      const int64_t here = groups - g < kLanes ? groups - g : kLanes;
      for (int64_t i = 0; i < here; ++i) halves[g + i] = uint16_t(words[i]);
    }
  };
  scale(row.dense, row.dense_inverse, args.scale);
  scale(row.other, row.other_inverse, args.outlier_scale);
}

// C.
template <DType kType, typename Divide>
static void split_codes(const RowQuantizer& q, const SplitWeights<kType> w, const SplitRow& row,
                        const Divide in_row_scale) {
  const float lowest = q.args.levels[0], highest = q.args.levels[q.num_levels - 1];
  uint8_t* const codes = row.codes;
  const uint8_t* const mask = row.mask;
  const int64_t K = q.K;
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t begin = q.begin_of(g), end = begin + q.count_of(g);
    const F32 dense = splat(row.dense_inverse[g]), other = splat(row.other_inverse[g]);
    const auto code = [=](F32 value, int64_t k) {
      const F32 inverse = select(get_bits(mask, uint64_t(k)), other, dense);
      store_nearest(codes + k, mul(in_row_scale(value), inverse), lowest, highest);
    };
    int64_t k = begin;
    for (; k + kLanes <= end; k += kLanes) {
      w.expect((K + k) / 2);
      code(w.all(k), k);
    }
    if (k < end) code(w.few(k, end - k), k);
  }
}

template <DType kType>
static int64_t split_rows_of(const RowQuantizer& q, int64_t row_begin, int64_t row_end, float* scratch) {
  const QuantizeArgs& args = q.args;
  const SplitRow row(q, scratch);
  const int64_t mask_bytes = format::mask_bytes_per_row(q.f), words = format::words_per_row(q.K, q.f.bits);
  for (int64_t n = row_begin; n < row_end; ++n) {
    const SplitWeights<kType> w(args, n);
    if (!(args.limit != nullptr ? split_row<kType, true> : split_row<kType, false>)(q, n, w, row)) {
      int64_t k = 0;
      while (abs_float(load_element(w.row, kType, k)) <= kMaxWeight) ++k;
      return n * q.K + k;
    }
    split_scales(q, n, row);
    const float row_scale = bf16_to_float(args.row_scale[n]);
    const F32 d = splat(row_scale), r = splat(row_scale > 0.0f ? 1.0f / row_scale : 0.0f);
    if (row_scale >= 8.673617379884035e-19f && row_scale <= 1.152921504606847e18f) {  // 2^-60, 2^60
      split_codes(q, w, row, [=](F32 value) { return quotient(value, d, r); });
    } else {
      split_codes(q, w, row, [=](F32 value) { return row_scale > 0.0f ? div(value, d) : splat(0.0f); });
    }
    std::memcpy(args.mask + n * mask_bytes, row.mask, size_t(mask_bytes));
    if (args.packed == nullptr) {
      std::memcpy(args.codes + n * q.K, row.codes, size_t(q.K));
    } else {
      pack_codes(row.codes, q.K, q.f.bits, args.packed + n * words);
    }
  }
  return -1;
}

static int64_t quantize_split_rows(const QuantizeArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
  const RowQuantizer q(args);
  switch (args.dtype) {
    case DType::kBFloat16: return split_rows_of<DType::kBFloat16>(q, row_begin, row_end, scratch);
    case DType::kFloat16: return split_rows_of<DType::kFloat16>(q, row_begin, row_end, scratch);
    default: return split_rows_of<DType::kFloat32>(q, row_begin, row_end, scratch);
  }
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
