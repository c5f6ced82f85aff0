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

static bool histogram(const HistogramArgs& args, int64_t row_begin, int64_t row_end, int64_t* counts,
                      int64_t* outside) {
  const double h = (args.hi - args.lo) / double(args.num_bins);
  for (int64_t n = row_begin; n < row_end; ++n) {
    for (int64_t g = 0; g < args.num_groups; ++g) {
      const int64_t group = n * args.num_groups + g;
      const int64_t mass = args.weight ? args.weight[group] : 1;
      if (mass == 0) continue;
      const float divisor = args.divisor ? args.divisor[group] : 1.0f;
      const int64_t begin = g * args.group_size;
      const int64_t end = begin + args.group_size < args.K ? begin + args.group_size : args.K;
      for (int64_t k = begin; k < end; ++k) {
        const double x = double(load_element(args.w, args.dtype, n * args.K + k) / divisor);
        const int64_t label = args.label ? args.label[n * args.K + k] : 0;
        if (label >= args.num_labels) return false;
        if (x >= args.lo && x <= args.hi) {
          counts[label * args.num_bins + find_bin(x, args.lo, h, args.num_bins)] += mass;
        } else {
          outside[x < args.lo ? 0 : x > args.hi ? 1 : 2] += mass;
        }
      }
    }
  }
  return true;
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
