// SPDX-License-Identifier: Apache-2.0
// Adaptive-LASSO soft threshold and the counting passes of its exact threshold.
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/load-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

PRECAL_INLINE void store_nonzero(void* out, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kBFloat16: static_cast<uint16_t*>(out)[index] = float_to_bf16_nonzero(value); break;
    case DType::kFloat16: static_cast<uint16_t*>(out)[index] = float_to_half_nonzero(value); break;
    default: static_cast<float*>(out)[index] = value;
  }
}

// out = sign(w) * max(|w| - lam / |w|, 0). A weight survives exactly when w * w > lam: the square of a float32 is exact
// in double, so survival has no rounding. The value (w^2 - lam) / |w| avoids cancellation, and a survivor's value is
// never rounded to zero.
static void soft_threshold(const SoftThresholdArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float w = load_element(args.w, args.dtype, i);
    const double square = double(w) * double(w);
    float out = 0.0f;
    if (!(square <= args.lam)) out = double_to_float_nonzero((square - args.lam) / double(w));  // NaN stays NaN
    if (float_bits(w) == 0x7F800000u || float_bits(w) == 0xFF800000u) out = w;
    store_nonzero(args.out, args.dtype, i, out);
  }
}

static void magnitude_digit(const MagnitudeDigitArgs& args, int64_t begin, int64_t end, int64_t* counts) {
  if (args.half_words) {
    const uint16_t* w = static_cast<const uint16_t*>(args.w);
    for (int64_t i = begin; i < end; ++i) ++counts[w[i] & 0x7FFFu];
    return;
  }
  const uint32_t* w = static_cast<const uint32_t*>(args.w);
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t magnitude = w[i] & 0x7FFFFFFFu;
    if (!args.low_digit) {
      ++counts[magnitude >> 16];
    } else if ((magnitude >> 16) == args.prefix) {
      ++counts[magnitude & 0xFFFFu];
    }
  }
}

template <bool kHalf>
static Magnitudes collect_magnitudes_of(const MagnitudesArgs& args, int64_t begin, int64_t end, int32_t* out) {
  const uint16_t* half = static_cast<const uint16_t*>(args.w);
  const int32_t* full = static_cast<const int32_t*>(args.w);
  // low < m <= high as one comparison: m - (low + 1) <= high - (low + 1), unsigned.
  const uint32_t first = uint32_t(args.low) + 1, span = uint32_t(args.high) - first;
  const I32 magnitude = splat_word(kHalf ? 0x7FFF : 0x7FFFFFFF), high = splat_word(args.high);
  const I32 offset = splat_word(int32_t(first)), width = splat_word(int32_t(span));
  I32 largest = zero_words(), above = zero_words();
  Magnitudes found{0, 0, 0};
  // Blocks that fit in the first level cache: first where those are that are wanted, so that nothing waits for memory
  // but the loads; then, from the cache, themselves. Neither has a branch that data decide. Four pages ahead: while a
  // block is collected nothing is asked for, and one page ahead (0.52 cycles a weight, four: 0.41) is not enough then.
  constexpr int64_t kBlock = 1024, kAhead = kHalf ? 8192 : 4096, kFour = 4 * kLanes;
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    uint16_t wanted[kBlock / kLanes];
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      __builtin_prefetch(kHalf ? static_cast<const void*>(half + i + j + kAhead) : full + i + j + kAhead);
      const I32 m = bit_and(kHalf ? widen_words(half + i + j) : load_words(full + i + j), magnitude);
      largest = max_word(largest, m);
      above = count_greater(above, m, high);
      wanted[j / kLanes] = uint16_t(at_most_unsigned(sub_word(m, offset), width));
    }
    if (args.low >= args.high) continue;
    uint64_t fours[kBlock / kFour];
    int list[kBlock / kFour], count = 0;
    std::memcpy(fours, wanted, sizeof fours);
    for (int j = 0; j < kBlock / kFour; ++j) {
      list[count] = j;
      count += fours[j] != 0;
    }
    for (int j = 0; j < count; ++j) {
      uint64_t four = fours[list[j]];
      for (int64_t at = i + list[j] * kFour; at < i + (list[j] + 1) * kFour; at += kLanes, four >>= kLanes) {
        const I32 m = bit_and(kHalf ? widen_words(half + at) : load_words(full + at), magnitude);
        found.collected += append_where(uint32_t(four & 0xFFFFu), m, out + found.collected);
      }
    }
  }
  found.largest = largest_word(largest);
  int32_t counts[kLanes];
  store_words(counts, above);
  for (int32_t count : counts) found.above += count;
  for (; i < end; ++i) {
    const int32_t m = kHalf ? half[i] & 0x7FFF : full[i] & 0x7FFFFFFF;
    if (m > found.largest) found.largest = m;
    if (m > args.high) ++found.above;
    else if (m > args.low) out[found.collected++] = m;
  }
  return found;
}

static Magnitudes collect_magnitudes(const MagnitudesArgs& args, int64_t begin, int64_t end, int32_t* out) {
  return args.half_words ? collect_magnitudes_of<true>(args, begin, end, out)
                         : collect_magnitudes_of<false>(args, begin, end, out);
}

template <typename Word>
static int32_t mask_magnitudes_of(const Word* w, Word magnitude, int32_t high, int64_t begin, int64_t end,
                                  uint8_t* mask) {
  Word largest = 0;
  for (int64_t i = begin; i < end; ++i) {
    const Word m = w[i] & magnitude;
    largest = m > largest ? m : largest;
    mask[i] = int32_t(m) > high;
  }
  return int32_t(largest);
}

static int32_t mask_magnitudes(const MagnitudesArgs& args, int64_t begin, int64_t end, uint8_t* mask) {
  return args.half_words
             ? mask_magnitudes_of<uint16_t>(static_cast<const uint16_t*>(args.w), 0x7FFF, args.high, begin, end, mask)
             : mask_magnitudes_of<uint32_t>(static_cast<const uint32_t*>(args.w), 0x7FFFFFFF, args.high, begin, end,
                                            mask);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
