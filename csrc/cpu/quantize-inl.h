// SPDX-License-Identifier: Apache-2.0
// One row: outliers -> row scale -> per group a scale searched over 8-bit codes -> codes -> outlier residuals.
//
// The arithmetic is part of the format's promise that codes and scales are the same bits everywhere. Per row:
//   1. outliers: in every block the c largest |w| with w^2 > lam; equal magnitudes, the lower column first
//   2. extreme[g]: the dense weight of largest magnitude, positive on a tie (`symmetric`: its magnitude)
//   3. base = mean_g |extreme[g]| / |peak| in double, group by group, not below what keeps every scale and outlier
//      representable; row_scale = bf16(base); v = w / row_scale
//   4. t = (extreme[g] / row_scale) / peak; candidate scales are all e4m3 codes from e4m3(lo |t|) to e4m3(hi |t|),
//      ascending, with the sign of t; error = sum over lanes i % 16 of (v - s * level)^2, then the tree of hsum; the
//      first smallest wins
//   5. x = v * (1 / s); code = number of midpoints of neighbouring levels below x
//   6. outlier value = e4m3((v - s * level) / U), so dropping the outliers leaves clipped weights, not holes
// With a trellis, 4 and 5 are one search: trellis-inl.h. With salient weights under scales of their own, which do not
// enter the mean of 3, steps 2 to 5 are in split-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/load-inl.h"
#include "cpu/simd_codes.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr float kHalfMax = 65504.0f;

// Levels as the search wants them: the first level, then midpoints and steps.
struct LevelSteps {
  int count;
  float first;
  float mids[255];
  float steps[255];
};

// Of levels[0], levels[stride], ...
static void make_level_steps(const float* levels, int stride, int count, LevelSteps* out) {
  out->count = count;
  out->first = levels[0];
  for (int i = 0; i + 1 < count; ++i) {
    const float low = levels[i * stride], high = levels[(i + 1) * stride];
    out->mids[i] = (low + high) * 0.5f;  // exact: levels are integers
    out->steps[i] = high - low;
  }
}

// The same cells with their numbers for levels.
static void make_index_steps(const LevelSteps& levels, LevelSteps* out) {
  *out = levels;
  out->first = 0.0f;
  for (int i = 0; i + 1 < levels.count; ++i) out->steps[i] = 1.0f;
}

PRECAL_INLINE F32 nearest_level(const LevelSteps& l, F32 x) {
  F32 level = splat(l.first);
  for (int i = 0; i + 1 < l.count; ++i) level = add_if_above(level, x, splat(l.mids[i]), splat(l.steps[i]));
  return level;
}

// Sum of mask * (v - s * level)^2 over a padded group.
static float group_error(const LevelSteps& l, const float* v, const float* mask, int64_t padded, float s) {
  const F32 scale = splat(s), inverse = splat(1.0f / s);
  F32 sum = splat(0.0f);
  for (int64_t i = 0; i < padded; i += kLanes) {
    const F32 value = load(v + i);
    const F32 level = nearest_level(l, mul(value, inverse));
    const F32 error = mul(load(mask + i), sub(value, mul(scale, level)));
    sum = add(sum, mul(error, error));
  }
  return hsum(sum);
}

static uint8_t search_e4m3(const LevelSteps& l, const QuantizeArgs& args, const float* v, const float* mask,
                           int64_t padded, float t) {
  if (t == 0.0f) return 0;
  const uint8_t sign = t < 0.0f ? 0x80 : 0;
  const float magnitude = abs_float(t);
  int first = format::float_to_e4m3(magnitude * args.search_lo);
  int last = format::float_to_e4m3(magnitude * args.search_hi);
  if (first < 1) first = 1;
  if (last < first) last = first;
  if (first == last) return uint8_t(sign | first);
  int best = first;
  float best_error = 0.0f;
  for (int code = first; code <= last; ++code) {
    const float error = group_error(l, v, mask, padded, format::e4m3_to_float(uint8_t(sign | code)));
    if (code == first || error < best_error) {
      best = code;
      best_error = error;
    }
  }
  return uint8_t(sign | best);
}

static uint16_t nonzero_half(float t) {
  if (t == 0.0f) return 0;
  const uint16_t h = float_to_half(t < -kHalfMax ? -kHalfMax : t > kHalfMax ? kHalfMax : t);
  return (h & 0x7FFFu) == 0 ? uint16_t(h | 1u) : h;
}

// Stores the scale code of a group and returns its value.
PRECAL_INLINE float store_scale(void* scale, int64_t index, format::ScaleType type, uint16_t code) {
  if (type == format::ScaleType::kE4m3) {
    static_cast<uint8_t*>(scale)[index] = uint8_t(code);
    return format::e4m3_to_float(uint8_t(code));
  }
  static_cast<uint16_t*>(scale)[index] = code;
  return half_to_float(code);
}

// Largest |w|. As bits, in which NaN is above all numbers.
PRECAL_INLINE uint32_t largest_bits(const float* w, int64_t count) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < count; ++k) {
    const uint32_t bits = float_bits(w[k]) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}
PRECAL_INLINE float largest_magnitude(const float* w, int64_t count) { return bits_float(largest_bits(w, count)); }

// The c largest |w| of a block with w^2 > lam, as ascending positions, and set to zero; returns how many there are.
// `largest` is that of the block.
static int take_outliers(float* w, int64_t width, int c, double lam, float largest, int* positions) {
  int found = 0;
  while (found<c&& double(largest) * double(largest)> lam) {
    int64_t k = 0;  // the lowest column of that magnitude
    const F32 wanted = splat(largest);
    uint32_t here = 0;
    for (; k + kLanes <= width && here == 0; k += kLanes) here = equal(abs(load(w + k)), wanted);
    if (here != 0) k += __builtin_ctz(here) - kLanes;
    else
      while (abs_float(w[k]) != largest) ++k;
    w[k] = 0.0f;
    int i = found++;
    for (; i > 0 && positions[i - 1] > int(k); --i) positions[i] = positions[i - 1];
    positions[i] = int(k);
    if (found < c) largest = largest_magnitude(w, width);
  }
  return found;
}

static float row_base(const float* amplitude, int64_t groups, format::ScaleType type, float largest,
                      float largest_outlier) {
  double sum = 0.0;
  for (int64_t g = 0; g < groups; ++g) {
    sum += double(amplitude[g]);
    if (amplitude[g] > largest) largest = amplitude[g];
  }
  float base = groups > 0 ? float(sum / double(groups)) : 0.0f;
  // The largest scale times 1.1 (the search) and bf16 rounding must stay below 448 (e4m3) or 65504 (float16); the
  // largest outlier below 448 U.
  const float least = largest / (type == format::ScaleType::kE4m3 ? 400.0f : 32768.0f);
  if (base < least) base = least;
  const float least_outlier = largest_outlier / (format::kOutlierUnit * 400.0f);
  return base < least_outlier ? least_outlier : base;
}

// The parts of a quantization that all rows share.
struct RowQuantizer {
  const QuantizeArgs& args;
  const format::WeightFormat& f;
  int64_t K, group_size, groups, stride;
  format::OutlierBlocks blocks;
  int num_levels;
  float peak;

  explicit RowQuantizer(const QuantizeArgs& a)
      : args(a),
        f(a.format),
        K(f.K),
        group_size(f.group_size),
        groups(format::num_groups(f)),
        stride(padded_group(f)),
        blocks(format::outlier_blocks(f)),
        num_levels(f.grid_size > 0 ? f.grid_size : 1 << f.bits) {
    const float low = args.levels[0], top = args.levels[num_levels - 1];
    peak = (!args.symmetric && abs_float(low) > abs_float(top)) ? low : top;
  }

  int64_t begin_of(int64_t g) const { return g * group_size; }
  int64_t count_of(int64_t g) const { return begin_of(g) + group_size < K ? group_size : K - begin_of(g); }
};

// Scratch of one row.
struct RowBuffers {
  float* w;        // [K + 16]; outliers are 0
  float* extreme;  // [groups]
  float* amplitude;
  float* end;

  RowBuffers(const RowQuantizer& q, float* scratch)
      : w(scratch), extreme(w + q.K + kLanes), amplitude(extreme + q.groups), end(amplitude + q.groups) {}
};

struct Extremes {
  float highest, lowest;  // at least 0, at most 0
};

// Of the weights of a group.
static Extremes find_extremes(const float* w, int64_t count) {
  const F32 zero = splat(0.0f);
  F32 high = zero, low = zero;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const F32 value = load(w + i);
    high = max(high, value);
    low = min(low, value);
  }
  Extremes e{largest_lane(high), -largest_lane(sub(zero, low))};
  for (; i < count; ++i) {
    if (w[i] > e.highest) e.highest = w[i];
    if (w[i] < e.lowest) e.lowest = w[i];
  }
  return e;
}

// Steps 1 to 3. Returns the flat index of a weight that is refused, or -1.
static int64_t prepare_row(const RowQuantizer& q, int64_t n, const RowBuffers& row) {
  const QuantizeArgs& args = q.args;
  const format::WeightFormat& f = q.f;
  const int64_t K = q.K, groups = q.groups;
  float* w = row.w;
  load_elements(args.w, args.dtype, n * K, K, w);

  // 1. outliers
  float largest_outlier = 0.0f;
  for (int64_t b = 0; b < q.blocks.num_blocks; ++b) {
    const int64_t begin = format::block_begin(q.blocks, b), width = format::block_end(q.blocks, b) - begin;
    const float largest = largest_magnitude(w + begin, width);
    if (!(largest <= kMaxWeight)) {
      int64_t k = begin;
      while (abs_float(w[k]) <= kMaxWeight) ++k;
      return n * K + k;
    }
    if (f.c == 0) continue;
    int positions[format::kMaxCapacity];
    const int found = take_outliers(w + begin, width, f.c, args.lam, largest, positions);
    uint8_t* indices = args.outlier_index + (n * q.blocks.num_blocks + b) * f.c;
    uint8_t* values = args.outlier_value + (n * q.blocks.num_blocks + b) * f.c;
    for (int i = 0; i < f.c; ++i) {
      indices[i] = i < found ? uint8_t(positions[i]) : 0;
      values[i] = i < found;  // a mark, replaced by the residual
    }
    if (found > 0 && largest > largest_outlier) largest_outlier = largest;
  }

  // 2. extremes
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = q.begin_of(g);
    const Extremes e = find_extremes(w + begin, q.count_of(g));
    row.extreme[g] = e.highest >= -e.lowest ? e.highest : e.lowest;
    if (args.symmetric) row.extreme[g] = abs_float(row.extreme[g]);
    row.amplitude[g] = abs_float(row.extreme[g]) / abs_float(q.peak);
  }

  // 3. row scale
  args.row_scale[n] = float_to_bf16_nonzero(row_base(row.amplitude, groups, f.scale_type, 0.0f, largest_outlier));
  return -1;
}

// w / row_scale; 0 in a row without scale.
PRECAL_INLINE F32 in_row_scales(F32 w, float row_scale) {
  return row_scale > 0.0f ? div(w, splat(row_scale)) : splat(0.0f);
}

// The scale at which the largest of a group meets the peak, in units of the row scale.
PRECAL_INLINE float target_scale(const RowQuantizer& q, int64_t n, float extreme) {
  const float row_scale = bf16_to_float(q.args.row_scale[n]);
  return row_scale > 0.0f ? (extreme / row_scale) / q.peak : 0.0f;
}

// body(k) for the columns of [begin, end) that are outliers of row n; not after step 6.
template <typename Body>
static void for_outliers(const RowQuantizer& q, int64_t n, int64_t begin, int64_t end, const Body& body) {
  if (q.f.c == 0 || begin >= end) return;
  for (int64_t b = format::block_at(q.blocks, begin); b < q.blocks.num_blocks; ++b) {
    const int64_t first = format::block_begin(q.blocks, b), entry = (n * q.blocks.num_blocks + b) * q.f.c;
    if (first >= end) return;
    for (int i = 0; i < q.f.c && q.args.outlier_value[entry + i] != 0; ++i) {
      const int64_t k = first + q.args.outlier_index[entry + i];
      if (k >= begin && k < end) body(k);
    }
  }
}

// Step 6; an entry that rounds to nothing is dropped, so used entries strictly increase. residual(k) = v - s * level.
template <typename Residual>
static void store_outliers(const RowQuantizer& q, int64_t n, const Residual& residual) {
  const int c = q.f.c;
  for (int64_t b = 0; b < q.blocks.num_blocks * (c > 0); ++b) {
    uint8_t* indices = q.args.outlier_index + (n * q.blocks.num_blocks + b) * c;
    uint8_t* values = q.args.outlier_value + (n * q.blocks.num_blocks + b) * c;
    int used = 0;
    for (int i = 0; i < c && values[i] != 0; ++i) {
      const int64_t k = format::block_begin(q.blocks, b) + indices[i];
      const uint8_t code = format::float_to_e4m3(residual(k) * (1.0f / format::kOutlierUnit));
      if ((code & 0x7Fu) == 0) continue;
      indices[used] = indices[i];
      values[used++] = code;
    }
    for (int i = used; i < c; ++i) {
      indices[i] = 0;
      values[i] = 0;
    }
  }
}

// Codes of one group; x_of(i) are sixteen weights in units of their scale.
template <typename Nearest, typename Position>
static void store_group_codes(int64_t count, uint8_t* codes, const Nearest& nearest, const Position& x_of) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_bytes(codes + i, nearest(x_of(i)));
  if (i == count) return;
  uint8_t last[kLanes];
  store_bytes(last, nearest(x_of(i)));
  for (int64_t j = i; j < count; ++j) codes[j] = last[j - i];
}

// Steps 4 and 5 of every group of a row, of which row.w has the weights, outliers too.
template <typename Nearest>
static void quantize_groups_of(const RowQuantizer& q, int64_t n, const RowBuffers& row, const LevelSteps& levels,
                               const Nearest& nearest) {
  const QuantizeArgs& args = q.args;
  const format::WeightFormat& f = q.f;
  const float row_scale = bf16_to_float(args.row_scale[n]);
  float *v = row.end, *dense = v + q.stride;
  for (int64_t g = 0; g < q.groups; ++g) {
    const int64_t begin = q.begin_of(g), count = q.count_of(g), index = n * q.groups + g;
    const float* w = row.w + begin;
    const float t = target_scale(q, n, row.extreme[g]);
    uint16_t code = 0;
    if (f.scale_type == format::ScaleType::kFloat16) {
      code = nonzero_half(t);
    } else {
      for (int64_t i = 0; i < count; i += kLanes) store(v + i, in_row_scales(load(w + i), row_scale));
      for (int64_t i = 0; i < count; ++i) dense[i] = 1.0f;
      for (int64_t i = count; i < q.stride; ++i) v[i] = dense[i] = 0.0f;
      for_outliers(q, n, begin, begin + count, [&](int64_t k) { dense[k - begin] = 0.0f; });
      code = search_e4m3(levels, args, v, dense, q.stride, t);
    }
    const float scale = store_scale(args.scale, index, f.scale_type, code);
    const F32 inverse = splat(scale != 0.0f ? 1.0f / scale : 0.0f);
    uint8_t* codes = args.codes + n * q.K + begin;
    store_group_codes(count, codes, nearest,
                      [&](int64_t i) { return mul(in_row_scales(load(w + i), row_scale), inverse); });
  }
}

static int64_t quantize_plain_rows(const RowQuantizer& q, int64_t row_begin, int64_t row_end, float* scratch) {
  const QuantizeArgs& args = q.args;
  LevelSteps levels, index_steps;
  make_level_steps(args.levels, 1, q.num_levels, &levels);
  make_index_steps(levels, &index_steps);
  const RowBuffers row(q, scratch);
  for (int64_t n = row_begin; n < row_end; ++n) {
    const int64_t bad = prepare_row(q, n, row);
    if (bad >= 0) return bad;
    for_outliers(q, n, 0, q.K, [&](int64_t k) { row.w[k] = load_element(args.w, args.dtype, n * q.K + k); });
    if (format::is_uniform(q.f)) {
      const F32 lowest = splat(levels.first), highest = splat(levels.first + float(levels.count - 1));
      quantize_groups_of(q, n, row, levels, [&](F32 x) { return nearest_integer(x, lowest, highest); });
    } else {
      quantize_groups_of(q, n, row, levels, [&](F32 x) { return nearest_level(index_steps, x); });
    }
    const float row_scale = bf16_to_float(args.row_scale[n]);
    store_outliers(q, n, [&](int64_t k) {
      const float scale = format::load_scale(args.scale, n * q.groups + k / q.group_size, q.f.scale_type);
      return row.w[k] / row_scale - scale * args.levels[args.codes[n * q.K + k]];
    });
  }
  return -1;
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
