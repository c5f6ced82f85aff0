// SPDX-License-Identifier: Apache-2.0
// histogram, spread_codes, kl_divergence, fit_grid: everything that is decided on a histogram of the weights.
#include <algorithm>
#include <cmath>
#include <limits>
#include <mutex>
#include <vector>

#include "core/parallel.h"
#include "cpu/ops.h"
#include "cpu/select.h"

namespace precal::cpu {

namespace {

constexpr int64_t kMaxBins = 1 << 24;
constexpr int64_t kQuickBins = 4096;            // two counts of 4 bytes for so many leave room in the first level cache
constexpr int64_t kMaxMass = int64_t(1) << 31;  // of a weight in its bin: 2^32 weights of one bin fit in int64
constexpr double kMaxPosition = 1e100;          // of a bin, in levels: sums of squares and of counts stay finite

Status check_range(const char* op, double lo, double hi) {
  if (!std::isfinite(lo) || !std::isfinite(hi) || !(lo < hi) || !std::isfinite(hi - lo)) {
    return invalid_value(op, ": lo and hi must be finite with lo < hi, got [", lo, ", ", hi, "]");
  }
  return {};
}

// Natural logarithm from +, *, / only: fit_grid's choices must not depend on the machine's libm.
// x = m * 2^e with m in [sqrt(1/2), sqrt(2));  log m = 2 atanh(s), s = (m - 1) / (m + 1), |s| < 0.172: s^23 < 1e-17.
double portable_log(double x) {
  int exponent = 0;
  double m = std::frexp(x, &exponent);
  if (m < 0.70710678118654752) {
    m *= 2.0;
    --exponent;
  }
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double sum = 0.0;
  for (int odd = 21; odd >= 1; odd -= 2) sum = sum * s2 + 1.0 / double(odd);
  return double(exponent) * 0.69314718055994531 + 2.0 * s * sum;
}

// A histogram with the prefix sums that make any cell's cost O(1).
struct Sums {
  int64_t bins, first, last;  // [first, last): hull of the occupied bins
  double lo, width;
  std::vector<double> mass, moment, square, information;  // of bins before b; information = sum p log p

  Sums(const int64_t* counts, int64_t num_bins, double low, double high)
      : bins(num_bins), first(num_bins), last(0), lo(low), width((high - low) / double(num_bins)) {
    const size_t n = size_t(num_bins) + 1;
    for (auto* v : {&mass, &moment, &square, &information}) v->assign(n, 0.0);
    double total = 0.0;
    for (int64_t b = 0; b < bins; ++b) total += double(counts[b]);
    for (int64_t b = 0; b < bins; ++b) {
      const double p = total > 0.0 ? double(counts[b]) / total : 0.0;
      const double x = lo + (double(b) + 0.5) * width;
      mass[size_t(b) + 1] = mass[size_t(b)] + p;
      moment[size_t(b) + 1] = moment[size_t(b)] + p * x;
      square[size_t(b) + 1] = square[size_t(b)] + p * x * x;
      information[size_t(b) + 1] = information[size_t(b)] + (p > 0.0 ? p * portable_log(p) : 0.0);
      if (counts[b] > 0) {
        first = std::min(first, b);
        last = b + 1;
      }
    }
    if (last == 0) first = 0;
  }

  // First bin whose centre lies above x: the first bin of the upper cell when x is a midpoint.
  int64_t bin_above(double x) const {
    const double b = std::floor((x - lo) / width - 0.5) + 1.0;
    return b < 0.0 ? 0 : b > double(bins) ? bins : int64_t(b);
  }

  // Bins [begin, end) of every code's decision cell, cut to the hull.
  std::vector<int64_t> cells(const std::vector<int>& levels) const {
    std::vector<int64_t> edges{first};
    for (size_t i = 0; i + 1 < levels.size(); ++i) {
      const int64_t edge = bin_above(0.5 * double(levels[i] + levels[i + 1]));
      edges.push_back(std::clamp(edge, first, last));
    }
    edges.push_back(last);
    return edges;
  }

  // Relative squared error + mu * KL(P || Q), Q as spread_codes makes it.
  double objective(const std::vector<int>& levels, double mu) const {
    const std::vector<int64_t> edges = cells(levels);
    double error = 0.0, kl = 0.0;
    for (size_t i = 0; i < levels.size(); ++i) {
      const size_t a = size_t(edges[i]), b = size_t(edges[i + 1]);
      const double p = mass[b] - mass[a], level = double(levels[i]);
      error += (square[b] - square[a]) - 2.0 * level * (moment[b] - moment[a]) + level * level * p;
      if (mu > 0.0 && p > 0.0) {
        kl += (information[b] - information[a]) - p * portable_log(p / double(edges[i + 1] - edges[i]));
      }
    }
    const double power = square[size_t(bins)];
    return (power > 0.0 ? error / power : error) + mu * kl;
  }
};

// Bins must be wider than the spacing of doubles at both ends, or no search could tell them apart.
Status check_bins(const char* op, double lo, double hi, int64_t num_bins) {
  const double h = (hi - lo) / double(num_bins);
  if (!(lo + h > lo && hi - h < hi)) {
    return invalid_value(op, ": num_bins must leave bins wider than double can resolve, got ", num_bins, " in [", lo,
                         ", ", hi, "]");
  }
  return {};
}

// The histogram of weights in units of levels, which are at most 127.
Status check_level_range(const char* op, double lo, double hi, int64_t num_bins) {
  PRECAL_RETURN_IF_ERROR(check_range(op, lo, hi));
  if (lo < -kMaxPosition || hi > kMaxPosition) {
    return invalid_value(op, ": lo and hi must lie in [-1e100, 1e100], got [", lo, ", ", hi, "]");
  }
  return check_bins(op, lo, hi, num_bins);
}

// [bins], or [levels, bins]: the histogram of the weights of each code.
Status check_counts(const char* op, const TensorView& counts, const TensorView& grid) {
  PRECAL_RETURN_IF_ERROR(check_dtype(op, "counts", counts, {DType::kInt64}));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, "counts", counts));
  const bool by_code = counts.ndim == 2 && counts.shape[0] == grid.numel();
  if ((counts.ndim != 1 && !by_code) || counts.numel() < 1 || counts.numel() > kMaxBins) {
    return invalid_value(op, ": counts must be [bins] or [levels, bins] with at most 2^24 in all, got ",
                         shape_text(counts));
  }
  return {};
}

int64_t num_bins_of(const TensorView& counts) { return counts.shape[counts.ndim - 1]; }

Status check_not_negative(const char* op, const TensorView& counts) {
  for (int64_t b = 0; b < counts.numel(); ++b) {
    const int64_t count = counts.as<int64_t>()[b];
    if (count < 0) return invalid_value(op, ": counts must be >= 0, got ", count, " at [", b, "]");
  }
  return {};
}

// Levels of a grid [2^bits] or [1, 2^bits], checked.
Status read_grid(const char* op, const TensorView& grid, std::vector<int>* levels) {
  PRECAL_RETURN_IF_ERROR(check_dtype(op, "grid", grid, {DType::kInt8}));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, "grid", grid));
  const int64_t n = grid.numel();
  if (grid.ndim < 1 || n < 2 || n > 256) {
    return invalid_value(op, ": grid must hold 2 to 256 levels, got ", shape_text(grid));
  }
  levels->resize(size_t(n));
  for (int64_t i = 0; i < n; ++i) {
    (*levels)[size_t(i)] = grid.as<int8_t>()[i];
    if ((*levels)[size_t(i)] < -format::kMaxLevel) return invalid_value(op, ": grid must lie in [-127, 127], got -128");
    if (i > 0 && (*levels)[size_t(i)] < (*levels)[size_t(i) - 1]) {
      return invalid_value(op, ": grid must be non-decreasing, got ", (*levels)[size_t(i) - 1], " before ",
                           (*levels)[size_t(i)]);
    }
  }
  return {};
}

int round_level(double x) {
  return int(std::clamp(std::floor(x + 0.5), -double(format::kMaxLevel), double(format::kMaxLevel)));
}

// Sorted, and the largest level stretched to 127 to use all of int8.
std::vector<int> stretched(std::vector<double> centroid) {
  double peak = 0.0;
  for (double c : centroid) peak = std::max(peak, std::fabs(c));
  std::sort(centroid.begin(), centroid.end());
  std::vector<int> levels(centroid.size());
  for (size_t i = 0; i < levels.size(); ++i) {
    levels[i] = round_level(peak > 0.0 ? centroid[i] / peak * double(format::kMaxLevel) : 0.0);
  }
  return levels;
}

// One weighted Lloyd-Max step on the histogram.
std::vector<int> lloyd_step(const Sums& sums, const std::vector<int>& levels) {
  const std::vector<int64_t> edges = sums.cells(levels);
  std::vector<double> centroid(levels.size());
  for (size_t i = 0; i < levels.size(); ++i) {
    const size_t a = size_t(edges[i]), b = size_t(edges[i + 1]);
    const double p = sums.mass[b] - sums.mass[a];
    centroid[i] = p > 0.0 ? (sums.moment[b] - sums.moment[a]) / p : double(levels[i]);
  }
  return stretched(centroid);
}

// The same with the weights of every code known, [levels][bins]. Without any weight the levels stay.
std::vector<int> centroid_step(const int64_t* counts, int64_t bins, double lo, double hi,
                               const std::vector<int>& levels) {
  const double width = (hi - lo) / double(bins);
  std::vector<double> centroid(levels.size());
  bool any = false;
  for (size_t i = 0; i < levels.size(); ++i) {
    double mass = 0.0, moment = 0.0;
    for (int64_t b = 0; b < bins; ++b) {
      const double p = double(counts[int64_t(i) * bins + b]);
      mass += p;
      moment += p * (lo + (double(b) + 0.5) * width);
    }
    centroid[i] = mass > 0.0 ? moment / mass : double(levels[i]);
    any = any || mass > 0.0;
  }
  return any ? stretched(centroid) : levels;
}

// Adds the mass of one code, spread evenly from its first to its last occupied bin.
void spread_code(const int64_t* counts, int64_t bins, double* density) {
  int64_t first = bins, last = -1;
  double total = 0.0;  // exact up to 2^53
  for (int64_t b = 0; b < bins; ++b) {
    if (counts[b] == 0) continue;
    first = std::min(first, b);
    last = b;
    total += double(counts[b]);
  }
  for (int64_t b = first; b <= last; ++b) density[b] += total / double(last - first + 1);
}

// Coordinate descent over the integers: move one level by one while the objective falls. The largest level stays: that
// fixes the unit, since levels times two with scales halved are the same weights. Each accepted move lowers the
// objective, so it ends; kSweeps only bounds the time.
void descend(const Sums& sums, double mu, std::vector<int>* levels) {
  constexpr int kSweeps = 1000;
  const size_t peak = std::abs(levels->front()) > std::abs(levels->back()) ? 0 : levels->size() - 1;
  double best = sums.objective(*levels, mu);
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool moved = false;
    for (size_t i = 0; i < levels->size(); ++i) {
      if (i == peak) continue;
      for (int step : {-1, 1}) {
        const int old = (*levels)[i], low = i > 0 ? (*levels)[i - 1] : -format::kMaxLevel;
        const int high = i + 1 < levels->size() ? (*levels)[i + 1] : format::kMaxLevel;
        if (old + step < low || old + step > high) continue;
        (*levels)[i] = old + step;
        const double cost = sums.objective(*levels, mu);
        if (cost < best) {
          best = cost;
          moved = true;
        } else {
          (*levels)[i] = old;
        }
      }
    }
    if (!moved) return;
  }
}

Status check_mass(const char* name, const TensorView& t) {
  constexpr const char* op = "kl_divergence";
  PRECAL_RETURN_IF_ERROR(check_dtype(op, name, t, {DType::kInt64, DType::kFloat64}));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, name, t));
  if (t.ndim != 1 || t.shape[0] < 1) return invalid_value(op, ": ", name, " must be [bins], got ", shape_text(t));
  return {};
}

// Adds `smoothing` to every bin and divides by the sum, scaled by the largest bin so that no sum overflows. Returns the
// (scaled) sum, 0 for an empty histogram.
double normalize(std::vector<double>* mass, double smoothing) {
  double largest = smoothing, total = 0.0;
  for (double m : *mass) largest = std::max(largest, m);
  if (largest == 0.0) return 0.0;
  for (double& m : *mass) {
    m = m / largest + smoothing / largest;
    total += m;
  }
  for (double& m : *mass) m /= total;
  return total;
}

Status read_mass(const char* name, const TensorView& t, std::vector<double>* out) {
  out->resize(size_t(t.shape[0]));
  for (int64_t i = 0; i < t.shape[0]; ++i) {
    const double m = t.dtype == DType::kInt64 ? double(t.as<int64_t>()[i]) : t.as<double>()[i];
    if (!(m >= 0.0) || std::isinf(m)) {
      return invalid_value("kl_divergence: ", name, " must be finite and >= 0, got ", m, " at [", i, "]");
    }
    (*out)[size_t(i)] = m;
  }
  return {};
}

}  // namespace

Status Histogram::plan(TensorSpec* out) const {
  constexpr const char* op = "histogram";
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_weight(op, w));
  if (num_bins < 1 || num_bins > kMaxBins) {
    return invalid_value(op, ": num_bins must lie in [1, 2^24], got ", num_bins);
  }
  PRECAL_RETURN_IF_ERROR(check_range(op, lo, hi));
  PRECAL_RETURN_IF_ERROR(check_bins(op, lo, hi, num_bins));
  if (group_size < 1) return invalid_value(op, ": group_size must be at least 1, got ", group_size);
  const int64_t groups = ceil_div(w.shape[1], group_size);
  if (divisor.present) {
    PRECAL_RETURN_IF_ERROR(
        check_tensor(op, "divisor", divisor, {DType::kFloat32, {w.shape[0], groups}}, "(N, ceil(K/group_size))"));
  }
  if (weight.present) {
    PRECAL_RETURN_IF_ERROR(
        check_tensor(op, "weight", weight, {DType::kInt64, {w.shape[0], groups}}, "(N, ceil(K/group_size))"));
  }
  if (label.present) {
    PRECAL_RETURN_IF_ERROR(check_tensor(op, "label", label, {DType::kUInt8, {w.shape[0], w.shape[1]}}, "(N, K)"));
    if (num_labels < 1 || num_labels > 256 || num_labels * num_bins > kMaxBins) {
      return invalid_value(op, ": num_labels must lie in [1, 256] with at most 2^24 bins in all, got ", num_labels);
    }
    out[0] = {DType::kInt64, {num_labels, num_bins}};
  } else {
    if (num_labels != 1) return invalid_value(op, ": num_labels must be 1 without label, got ", num_labels);
    out[0] = {DType::kInt64, {num_bins}};
  }
  out[1] = {DType::kInt64, {3}};
  return {};
}

Status Histogram::run(const TensorView* out) const {
  // A larger group is the whole row; begin + group_size must not overflow.
  const int64_t row = std::max<int64_t>(w.shape[1], 1);
  const int64_t columns = divisor.present || weight.present ? std::min(group_size, row) : row;
  HistogramArgs args{w.data,
                     w.dtype,
                     w.shape[1],
                     columns,
                     ceil_div(w.shape[1], columns),
                     divisor.as<float>(),
                     weight.as<int64_t>(),
                     num_bins,
                     lo,
                     hi,
                     label.as<uint8_t>(),
                     num_labels};
  int64_t* counts = out[0].as<int64_t>();
  int64_t* outside = out[1].as<int64_t>();
  const int64_t cells = num_labels * num_bins;
  std::fill(counts, counts + cells, 0);
  std::fill(outside, outside + 3, 0);
  if (w.numel() == 0) return {};
  for (int64_t i = 0; weight.present && i < weight.numel(); ++i) {
    const int64_t mass = weight.as<int64_t>()[i];
    if (mass < 0 || mass > kMaxMass) {
      return invalid_value("histogram: weight must lie in [0, 2^31], got ", mass, " for group ", i);
    }
  }
  const int64_t grain = std::max<int64_t>(1, std::max<int64_t>(1 << 16, cells) / std::max<int64_t>(w.shape[1], 1));
  std::mutex lock;
  bool labelled = true;
  parallel_for(0, w.shape[0], grain, [&](int64_t begin, int64_t end) {
    const bool quick = !label.present && num_bins <= kQuickBins && (end - begin) * args.K < (int64_t(1) << 31);
    std::vector<int64_t> local(size_t(cells) + 3, 0);
    std::vector<uint32_t> ones(quick ? size_t(cells * kQuickCounts) : 0, 0);
    const bool good =
        kernels().histogram(args, begin, end, local.data(), local.data() + cells, quick ? ones.data() : nullptr);
    std::lock_guard<std::mutex> guard(lock);
    labelled = labelled && good;
    for (int64_t i = 0; i < cells; ++i) counts[i] += local[size_t(i)];
    for (size_t i = 0; i < ones.size(); ++i) counts[i / kQuickCounts] += ones[i];
    for (int64_t i = 0; i < 3; ++i) outside[i] += local[size_t(cells + i)];
  });
  if (!labelled) return invalid_value("histogram: label must be below num_labels = ", num_labels, ", got a larger one");
  return {};
}

Status SpreadCodes::plan(TensorSpec* out) const {
  constexpr const char* op = "spread_codes";
  PRECAL_RETURN_IF_ERROR(check_dtype(op, "grid", grid, {DType::kInt8}));
  PRECAL_RETURN_IF_ERROR(check_counts(op, counts, grid));
  PRECAL_RETURN_IF_ERROR(check_level_range(op, lo, hi, num_bins_of(counts)));
  out[0] = {DType::kFloat64, {num_bins_of(counts)}};
  return {};
}

Status SpreadCodes::run(const TensorView* out) const {
  std::vector<int> levels;
  PRECAL_RETURN_IF_ERROR(read_grid("spread_codes", grid, &levels));
  PRECAL_RETURN_IF_ERROR(check_not_negative("spread_codes", counts));
  const int64_t* mass = counts.as<int64_t>();
  const int64_t bins = num_bins_of(counts);
  double* density = out[0].as<double>();
  std::fill(density, density + bins, 0.0);
  if (counts.ndim == 2) {
    for (size_t i = 0; i < levels.size(); ++i) spread_code(mass + int64_t(i) * bins, bins, density);
    return {};
  }
  const Sums sums(mass, bins, lo, hi);
  const std::vector<int64_t> edges = sums.cells(levels);
  for (size_t i = 0; i < levels.size(); ++i) {
    double total = 0.0;
    for (int64_t b = edges[i]; b < edges[i + 1]; ++b) total += double(mass[b]);
    for (int64_t b = edges[i]; b < edges[i + 1]; ++b) density[b] = total / double(edges[i + 1] - edges[i]);
  }
  return {};
}

Status KlDivergence::plan(TensorSpec* out) const {
  PRECAL_RETURN_IF_ERROR(check_mass("p", p));
  PRECAL_RETURN_IF_ERROR(check_mass("q", q));
  PRECAL_RETURN_IF_ERROR(check_shape("kl_divergence", "q", q, p, "(the bins of p)"));
  if (!(smoothing >= 0.0) || std::isinf(smoothing)) {
    return invalid_value("kl_divergence: smoothing must be finite and >= 0, got ", smoothing);
  }
  out[0] = TensorSpec(DType::kFloat64, {});
  return {};
}

// sum_b [ P log(P / Q) - P + Q ] over the normalized histograms: the last two terms add up to zero, and with them every
// term is >= 0, so rounding cannot make the sum negative.
Status KlDivergence::run(const TensorView* out) const {
  std::vector<double> pm, qm;
  PRECAL_RETURN_IF_ERROR(read_mass("p", p, &pm));
  PRECAL_RETURN_IF_ERROR(read_mass("q", q, &qm));
  const double p_total = normalize(&pm, smoothing), q_total = normalize(&qm, smoothing);
  double kl = 0.0;
  if (p_total > 0.0 && q_total > 0.0) {
    for (size_t b = 0; b < pm.size(); ++b) {
      const double pb = pm[b], qb = qm[b];
      if (pb == 0.0) {
        kl += qb;
      } else if (qb == 0.0) {
        kl = std::numeric_limits<double>::infinity();
      } else if (pb > 2.0 * qb || qb > 2.0 * pb) {
        kl += pb * (std::log(pb) - std::log(qb)) - pb + qb;  // far from 0; the quotient may leave the range of double
      } else {
        const double d = (pb - qb) / qb;  // (1 + d) log(1 + d) - d >= 0
        kl += std::max(0.0, qb * ((1.0 + d) * std::log1p(d) - d));
      }
    }
  } else if (p_total > 0.0 || q_total > 0.0) {
    kl = std::numeric_limits<double>::infinity();
  }
  out[0].as<double>()[0] = kl;
  return {};
}

Status FitGrid::plan(TensorSpec* out) const {
  constexpr const char* op = "fit_grid";
  PRECAL_RETURN_IF_ERROR(check_dtype(op, "grid", grid, {DType::kInt8}));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, "grid", grid));
  PRECAL_RETURN_IF_ERROR(check_counts(op, counts, grid));
  PRECAL_RETURN_IF_ERROR(check_level_range(op, lo, hi, num_bins_of(counts)));
  if (!(mu >= 0.0) || std::isinf(mu)) return invalid_value(op, ": mu must be finite and >= 0, got ", mu);
  if (rounds < 0 || rounds > 1000) return invalid_value(op, ": rounds must lie in [0, 1000], got ", rounds);
  out[0] = grid;
  return {};
}

Status FitGrid::run(const TensorView* out) const {
  std::vector<int> levels;
  PRECAL_RETURN_IF_ERROR(read_grid("fit_grid", grid, &levels));
  const int64_t* mass = counts.as<int64_t>();
  PRECAL_RETURN_IF_ERROR(check_not_negative("fit_grid", counts));
  if (counts.ndim == 2) {
    if (rounds > 0) levels = centroid_step(mass, num_bins_of(counts), lo, hi, levels);
    for (size_t i = 0; i < levels.size(); ++i) out[0].as<int8_t>()[i] = int8_t(levels[i]);
    return {};
  }
  const Sums sums(mass, counts.shape[0], lo, hi);
  if (sums.last > sums.first && rounds > 0) {
    std::vector<int> moved = levels;
    for (int64_t round = 0; round < rounds; ++round) moved = lloyd_step(sums, moved);
    descend(sums, mu, &moved);
    // Lloyd-Max looks at the error alone: with a KL term the start may lead to a better end.
    descend(sums, mu, &levels);
    if (sums.objective(moved, mu) < sums.objective(levels, mu)) levels = moved;
  }
  for (size_t i = 0; i < levels.size(); ++i) out[0].as<int8_t>()[i] = int8_t(levels[i]);
  return {};
}

}  // namespace precal::cpu
