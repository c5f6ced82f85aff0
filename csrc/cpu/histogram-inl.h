// SPDX-License-Identifier: Apache-2.0
// Integer histogram of w / divisor. Bin b holds lo + b * h <= x < lo + (b + 1) * h, h = (hi - lo) / num_bins, the last
// bin also hi; below, above and NaN are counted apart. Integer sums: any split over threads gives the same counts.
#pragma once

#include "cpu/kernels.h"
#include "cpu/load-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

// The quotient finds the bin up to its rounding; the edges themselves decide.
PRECAL_INLINE int64_t find_bin(double x, double lo, double h, int64_t num_bins) {
  int64_t bin = int64_t((x - lo) / h);
  if (bin > num_bins - 1) bin = num_bins - 1;
  while (bin > 0 && x < lo + double(bin) * h) --bin;
  while (bin < num_bins - 1 && x >= lo + double(bin + 1) * h) ++bin;
  return bin;
}

// Where the quotient in float32 tells the bin: its error, of lo, the difference, the product and the quotient itself,
// is below `margin` bins. Elsewhere, and where margin would be large, find_bin decides.
// Where bins are a power of two wide and 0 is an edge, as in all of precal's own histograms, floor(w / width) is exact.
struct QuickBins {
  float lo, per_bin, margin;
  bool usable, exact;
  int32_t first;  // exact: lo / width
};

static QuickBins quick_bins(const HistogramArgs& args) {
  const double range = args.hi - args.lo, bins = double(args.num_bins);
  const double reach = args.hi > -args.lo ? args.hi : -args.lo;
  const double margin = bins * 6e-8 * (reach / range + 4.0);
  const double per_bin = bins / range;
  const double first = args.lo * per_bin, limit = 1 << 30;
  const bool representable = per_bin > 1e-30 && per_bin < 1e30;
  const bool power = representable && per_bin >= 1.0 && (float_bits(float(per_bin)) & 0x7FFFFFu) == 0 &&
                     double(float(per_bin)) == per_bin;
  const bool whole = first > -limit && first < limit && double(int32_t(first)) == first;
  return {float(args.lo), float(per_bin),
          float(margin),  representable && (margin < 0.06 || (power && whole)),
          power && whole, whole ? int32_t(first) : 0};
}

PRECAL_INLINE void count_weight(const HistogramArgs& args, double h, float quotient, int64_t mass, int64_t* counts,
                                int64_t* outside) {
  const double x = double(quotient);
  if (x >= args.lo && x <= args.hi) {
    counts[find_bin(x, args.lo, h, args.num_bins)] += mass;
  } else {
    outside[x < args.lo ? 0 : x > args.hi ? 1 : 2] += mass;
  }
}

// Bins of whole vectors of weights with one divisor; those outside have none. inside [count / 16]: masks over lanes.
template <bool kExact, DType kType, bool kDivide>
static void find_bins_of(const HistogramArgs& args, const QuickBins& quick, int64_t first, int64_t count, float divisor,
                         int64_t mass, int32_t* bins, uint16_t* inside, int64_t* outside) {
  const double h = (args.hi - args.lo) / double(args.num_bins);
  const F32 lo = splat(quick.lo), per_bin = splat(quick.per_bin), half = splat(0.5f), near = splat(0.5f - quick.margin);
  const I32 last = splat_word(int32_t(args.num_bins - 1)), first_bin = splat_word(quick.first);
  constexpr int64_t kWidth = kType == DType::kFloat32 ? 4 : 2;
  const char* w = static_cast<const char*>(args.w) + first * kWidth;
  for (int64_t i = 0; i < count; i += kLanes) {
    __builtin_prefetch(w + i * kWidth + 8192);  // none are read while bins are counted
    F32 quotient = load_weights(w, kType, i);
    if (kDivide) quotient = div(quotient, splat(divisor));
    const F32 place = mul(kExact ? quotient : sub(quotient, lo), per_bin);
    I32 bin = kExact ? sub_word(floor_words(place), first_bin) : truncate_words(place);
    uint32_t found = 0xFFFFu;
    if (!kExact) {
      // Far from both edges of its bin. A place below 0 is truncated upwards and lies below its bin.
      found = less(abs(sub(sub(place, as_numbers(bin)), half)), near);
    }
    found &= at_most_unsigned(bin, last);
    store_words(bins + i, bin);
    if (found != 0xFFFFu) {
      float lanes[kLanes];
      store(lanes, quotient);
      for (uint32_t unsure = found ^ 0xFFFFu; unsure != 0; unsure &= unsure - 1) {
        const int j = __builtin_ctz(unsure);
        const double x = double(lanes[j]);
        if (x >= args.lo && x <= args.hi) {
          bins[i + j] = int32_t(find_bin(x, args.lo, h, args.num_bins));
          found |= 1u << j;
        } else {
          outside[x < args.lo ? 0 : x > args.hi ? 1 : 2] += mass;
        }
      }
    }
    inside[i / kLanes] = uint16_t(found);
  }
}

template <bool kExact>
static void find_bins(const HistogramArgs& args, const QuickBins& quick, int64_t first, int64_t count, float divisor,
                      int64_t mass, int32_t* bins, uint16_t* inside, int64_t* outside) {
  const bool divide = divisor != 1.0f;
  const auto find =
      args.dtype == DType::kBFloat16
          ? divide ? find_bins_of<kExact, DType::kBFloat16, true> : find_bins_of<kExact, DType::kBFloat16, false>
      : args.dtype == DType::kFloat16
          ? divide ? find_bins_of<kExact, DType::kFloat16, true> : find_bins_of<kExact, DType::kFloat16, false>
      : divide ? find_bins_of<kExact, DType::kFloat32, true>
               : find_bins_of<kExact, DType::kFloat32, false>;
  find(args, quick, first, count, divisor, mass, bins, inside, outside);
}

template <typename Add>
PRECAL_INLINE void for_inside(int64_t count, const uint16_t* inside, const Add& add) {
  for (int64_t i = 0; i < count; i += kLanes) {
    if (inside[i / kLanes] == 0xFFFFu) {
      for (int j = 0; j < kLanes; ++j) add(i + j);
    } else {
      for (uint32_t bits = inside[i / kLanes]; bits != 0; bits &= bits - 1) add(i + __builtin_ctz(bits));
    }
  }
}

// Whole vectors of a run of weights with one divisor and one mass; returns how many weights that were. Bins are found
// well before they are counted: a narrow load right after the wide store it reads from would wait.
static int64_t count_run(const HistogramArgs& args, const QuickBins& quick, int64_t first, int64_t count, float divisor,
                         int64_t mass, int64_t* counts, int64_t* outside, uint32_t* ones) {
  constexpr int64_t kAtOnce = 512;
  int32_t bins[kAtOnce];
  uint16_t inside[kAtOnce / kLanes];
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kAtOnce) {
    const int64_t n = whole - i < kAtOnce ? whole - i : kAtOnce;
    const auto find = quick.exact ? find_bins<true> : find_bins<false>;
    find(args, quick, first + i, n, divisor, mass, bins, inside, outside);
    if (args.label) {
      const uint8_t* label = args.label + first + i;
      for_inside(n, inside, [&](int64_t j) { counts[label[j] * args.num_bins + bins[j]] += mass; });
    } else if (ones != nullptr && mass == 1) {
      for_inside(n, inside, [&](int64_t j) { ++ones[bins[j] * kQuickCounts + j % kQuickCounts]; });
    } else {
      for_inside(n, inside, [&](int64_t j) { counts[bins[j]] += mass; });
    }
  }
  return whole;
}

static bool histogram(const HistogramArgs& args, int64_t row_begin, int64_t row_end, int64_t* counts, int64_t* outside,
                      uint32_t* ones) {
  const double h = (args.hi - args.lo) / double(args.num_bins);
  const QuickBins quick = quick_bins(args);
  for (int64_t n = row_begin; n < row_end; ++n) {
    for (int64_t g = 0; g < args.num_groups; ++g) {
      const int64_t group = n * args.num_groups + g;
      const int64_t begin = g * args.group_size, first = n * args.K + begin;
      const int64_t count = begin + args.group_size < args.K ? args.group_size : args.K - begin;
      const int64_t mass = args.weight ? args.weight[group] : 1;
      if (mass == 0) continue;
      if (args.label) {
        int highest = 0;
        for (int64_t i = 0; i < count; ++i) highest = args.label[first + i] > highest ? args.label[first + i] : highest;
        if (highest >= args.num_labels) return false;
      }
      const float divisor = args.divisor ? args.divisor[group] : 1.0f;
      int64_t i = quick.usable ? count_run(args, quick, first, count, divisor, mass, counts, outside, ones) : 0;
      for (; i < count; ++i) {
        count_weight(args, h, load_element(args.w, args.dtype, first + i) / divisor, mass,
                     counts + (args.label ? args.label[first + i] : 0) * args.num_bins, outside);
      }
    }
  }
  return true;
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
