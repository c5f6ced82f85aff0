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
// With a trellis, 4 and 5 are one search: trellis-inl.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/load-inl.h"
#include "cpu/simd.h"

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

// The c largest |w| of a block, as ascending positions; returns how many there are.
static int select_outliers(const float* w, int64_t width, int c, double lam, int* positions) {
  int found = 0;
  for (int64_t k = 0; k < width; ++k) {
    const float magnitude = abs_float(w[k]);
    if (!(double(magnitude) * double(magnitude) > lam)) continue;
    if (found == c && !(magnitude > abs_float(w[positions[c - 1]]))) continue;
    int i = found < c ? found : c - 1;  // positions are kept by falling magnitude
    for (; i > 0 && magnitude > abs_float(w[positions[i - 1]]); --i) positions[i] = positions[i - 1];
    positions[i] = int(k);
    if (found < c) ++found;
  }
  for (int i = 1; i < found; ++i) {  // ascending by column
    const int position = positions[i];
    int j = i;
    for (; j > 0 && positions[j - 1] > position; --j) positions[j] = positions[j - 1];
    positions[j] = position;
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
        blocks(format::outlier_blocks(f.K)),
        num_levels(f.grid_size > 0 ? f.grid_size : 1 << f.bits) {
    const float low = args.levels[0], top = args.levels[num_levels - 1];
    peak = (!args.symmetric && abs_float(low) > abs_float(top)) ? low : top;
  }

  int64_t begin_of(int64_t g) const { return g * group_size; }
  int64_t count_of(int64_t g) const { return begin_of(g) + group_size < K ? group_size : K - begin_of(g); }
};

// Scratch of one row.
struct RowBuffers {
  float* w;        // [K]
  float* v;        // [groups][stride], zero padded
  float* dense;    // [groups][stride], 1 for weights that count in the search
  float* extreme;  // [groups]
  float* other;    // [groups]; split: largest salient magnitude
  float* amplitude;
  float* end;

  RowBuffers(const RowQuantizer& q, float* scratch)
      : w(scratch),
        v(w + q.K),
        dense(v + q.groups * q.stride),
        extreme(dense + q.groups * q.stride),
        other(extreme + q.groups),
        amplitude(other + q.groups),
        end(amplitude + q.groups) {}
};

// Steps 1 to 3. Returns the flat index of a weight that is refused, or -1.
static int64_t prepare_row(const RowQuantizer& q, int64_t n, const RowBuffers& row) {
  const QuantizeArgs& args = q.args;
  const format::WeightFormat& f = q.f;
  const int64_t K = q.K, g_size = q.group_size, groups = q.groups, stride = q.stride;
  float *w = row.w, *v = row.v, *dense = row.dense;
  load_elements(args.w, args.dtype, n * K, K, w);
  for (int64_t k = 0; k < K; ++k) {
    if (!(abs_float(w[k]) <= kMaxWeight)) return n * K + k;
  }
  for (int64_t i = 0; i < groups * stride; ++i) dense[i] = v[i] = 0.0f;
  for (int64_t k = 0; k < K; ++k) dense[(k / g_size) * stride + k % g_size] = 1.0f;

  // 1. outliers
  float largest_outlier = 0.0f;
  if (f.c > 0) {
    int positions[format::kMaxCapacity];
    for (int64_t b = 0; b < q.blocks.num_blocks; ++b) {
      const int64_t begin = format::block_begin(q.blocks, b), width = format::block_end(q.blocks, b) - begin;
      const int found = select_outliers(w + begin, width, f.c, args.lam, positions);
      uint8_t* indices = args.outlier_index + (n * q.blocks.num_blocks + b) * f.c;
      uint8_t* values = args.outlier_value + (n * q.blocks.num_blocks + b) * f.c;
      for (int i = 0; i < f.c; ++i) {
        indices[i] = i < found ? uint8_t(positions[i]) : 0;
        values[i] = i < found;  // a mark, replaced by the residual
        if (i >= found) continue;
        const int64_t k = begin + positions[i];
        dense[(k / g_size) * stride + k % g_size] = 0.0f;
        if (abs_float(w[k]) > largest_outlier) largest_outlier = abs_float(w[k]);
      }
    }
  }
  if (f.split) {
    uint8_t* mask = args.mask + n * format::mask_bytes_per_row(f);
    for (int64_t i = 0; i < format::mask_bytes_per_row(f); ++i) mask[i] = 0;
    for (int64_t k = 0; k < K; ++k) {
      if (!args.salient[n * K + k]) continue;
      mask[k / 8] = uint8_t(mask[k / 8] | (1u << (k % 8)));
      dense[(k / g_size) * stride + k % g_size] = 0.0f;
    }
  }

  // 2. extremes
  float largest_scale = 0.0f;  // of the salient weights in split mode, which do not enter the mean
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t begin = q.begin_of(g), count = q.count_of(g);
    float highest = 0.0f, lowest = 0.0f, salient = 0.0f;
    for (int64_t i = 0; i < count; ++i) {
      const float value = w[begin + i];
      if (dense[g * stride + i] == 0.0f) {
        if (abs_float(value) > salient) salient = abs_float(value);
        continue;
      }
      if (value > highest) highest = value;
      if (value < lowest) lowest = value;
    }
    row.extreme[g] = highest >= -lowest ? highest : lowest;
    if (args.symmetric) row.extreme[g] = abs_float(row.extreme[g]);
    row.other[g] = salient;
    row.amplitude[g] = abs_float(row.extreme[g]) / abs_float(q.peak);
    if (f.split && salient / abs_float(q.peak) > largest_scale) largest_scale = salient / abs_float(q.peak);
  }

  // 3. row scale
  const uint16_t row_code =
      float_to_bf16_nonzero(row_base(row.amplitude, groups, f.scale_type, largest_scale, largest_outlier));
  const float row_scale = bf16_to_float(row_code);
  args.row_scale[n] = row_code;
  if (row_scale > 0.0f) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = q.begin_of(g), count = q.count_of(g);
      for (int64_t i = 0; i < count; ++i) v[g * stride + i] = w[begin + i] / row_scale;
    }
  }
  return -1;
}

// The scale at which the largest of a group meets the peak, in units of the row scale.
PRECAL_INLINE float target_scale(const RowQuantizer& q, int64_t n, float extreme) {
  const float row_scale = bf16_to_float(q.args.row_scale[n]);
  return row_scale > 0.0f ? (extreme / row_scale) / q.peak : 0.0f;
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

static int64_t quantize_plain_rows(const RowQuantizer& q, int64_t row_begin, int64_t row_end, float* scratch) {
  const QuantizeArgs& args = q.args;
  const format::WeightFormat& f = q.f;
  const int64_t K = q.K, groups = q.groups, stride = q.stride;
  LevelSteps levels, index_steps;
  make_level_steps(args.levels, 1, q.num_levels, &levels);
  make_index_steps(levels, &index_steps);
  const RowBuffers row(q, scratch);

  for (int64_t n = row_begin; n < row_end; ++n) {
    const int64_t bad = prepare_row(q, n, row);
    if (bad >= 0) return bad;
    for (int64_t g = 0; g < groups; ++g) {
      // 4. scales
      const float *v = row.v + g * stride, *dense = row.dense + g * stride;
      const float t = target_scale(q, n, row.extreme[g]);
      const uint16_t code =
          f.scale_type == format::ScaleType::kE4m3 ? search_e4m3(levels, args, v, dense, stride, t) : nonzero_half(t);
      const float scale = store_scale(args.scale, n * groups + g, f.scale_type, code);
      const float inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
      float salient_inverse = 0.0f;
      if (f.split) {
        const float salient_scale = store_scale(args.outlier_scale, n * groups + g, f.scale_type,
                                                nonzero_half(target_scale(q, n, row.other[g])));
        salient_inverse = salient_scale != 0.0f ? 1.0f / salient_scale : 0.0f;
      }
      // 5. codes
      const int64_t count = q.count_of(g);
      uint8_t* codes = args.codes + n * K + q.begin_of(g);
      for (int64_t i = 0; i < count; i += kLanes) {
        float lanes[kLanes];
        F32 x = mul(load(v + i), splat(inverse));
        if (f.split) {
          store(lanes, x);
          for (int64_t j = 0; j < kLanes && i + j < count; ++j) {
            if (dense[i + j] == 0.0f) lanes[j] = v[i + j] * salient_inverse;
          }
          x = load(lanes);
        }
        store(lanes, nearest_level(index_steps, x));
        for (int64_t j = 0; j < kLanes && i + j < count; ++j) codes[i + j] = uint8_t(lanes[j]);
      }
    }
    store_outliers(q, n, [&](int64_t k) {
      const float scale = format::load_scale(args.scale, n * groups + k / q.group_size, f.scale_type);
      return row.v[(k / q.group_size) * stride + k % q.group_size] - scale * args.levels[args.codes[n * K + k]];
    });
  }
  return -1;
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
