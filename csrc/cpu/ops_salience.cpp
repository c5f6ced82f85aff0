// SPDX-License-Identifier: Apache-2.0
// soft_threshold, salience_threshold, salience_mask.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "core/parallel.h"
#include "cpu/ops.h"
#include "cpu/select.h"

namespace precal::cpu {

namespace {

constexpr int64_t kElementGrain = 1 << 15;

Status parse_scope(const char* op, const std::string& text, Scope* scope) {
  if (text == "tensor") *scope = Scope::kTensor;
  else if (text == "row") *scope = Scope::kRow;
  else if (text == "group") *scope = Scope::kGroup;
  else return invalid_value(op, ": scope must be tensor, row or group, got ", quoted(text));
  return {};
}

Status parse_normalize(const char* op, const std::string& text, Normalize* normalize) {
  if (text == "none") *normalize = Normalize::kNone;
  else if (text == "row") *normalize = Normalize::kRow;
  else if (text == "group") *normalize = Normalize::kGroup;
  else return invalid_value(op, ": normalize must be none, row or group, got ", quoted(text));
  return {};
}

Status check_group_size(const char* op, int64_t group_size) {
  if (group_size < 1) return invalid_value(op, ": group_size must be at least 1, got ", group_size);
  return {};
}

float element(const TensorView& w, int64_t i) {
  if (w.dtype == DType::kBFloat16) return bf16_to_float(w.as<uint16_t>()[i]);
  if (w.dtype == DType::kFloat16) return half_to_float(w.as<uint16_t>()[i]);
  return w.as<float>()[i];
}

TensorSpec lam_spec(const TensorView& w, Scope scope, int64_t group_size) {
  if (scope == Scope::kTensor) return {DType::kFloat64, {1}};
  if (scope == Scope::kRow) return {DType::kFloat64, {w.shape[0]}};
  return {DType::kFloat64, {w.shape[0], ceil_div(w.shape[1], group_size)}};
}

bool is_half(const TensorView& w) { return w.dtype != DType::kFloat32; }

int32_t magnitude_bits(const TensorView& w, int64_t i) {
  return is_half(w) ? w.as<uint16_t>()[i] & 0x7FFF : w.as<int32_t>()[i] & 0x7FFFFFFF;
}

float magnitude_of(const TensorView& w, int32_t bits) {
  if (w.dtype == DType::kBFloat16) return bf16_to_float(uint16_t(bits));
  if (w.dtype == DType::kFloat16) return half_to_float(uint16_t(bits));
  return bits_float(uint32_t(bits));
}

// Of the first infinity; NaN is above.
int32_t infinite_bits(const TensorView& w) {
  return w.dtype == DType::kBFloat16 ? 0x7F80 : w.dtype == DType::kFloat16 ? 0x7C00 : 0x7F800000;
}

Status nonfinite(const char* op, const TensorView& w) {
  int64_t first = 0;
  while (magnitude_bits(w, first) < infinite_bits(w)) ++first;
  const int64_t K = w.shape[1];
  return invalid_value(op, ": w must be finite, got ", element(w, first), " at [", first / K, ", ", first % K, "]");
}

// Magnitudes in a buffer that is not cleared first: a fresh page costs as much as a thousand weights.
struct Values {
  std::unique_ptr<int32_t[]> data;
  int64_t count = 0, room = 0;

  void make_room(int64_t more) {
    if (room - count >= more) return;
    room = 2 * count + more;
    std::unique_ptr<int32_t[]> larger(new int32_t[size_t(room)]);
    std::copy(data.get(), data.get() + count, larger.get());
    data = std::move(larger);
  }
  const int32_t* begin() const { return data.get(); }
  const int32_t* end() const { return data.get() + count; }
};

struct Collected {
  int32_t largest = 0;
  int64_t above = 0, count = 0;  // collected
  std::vector<Values> parts;
  bool complete = true;  // false: too many to keep
};

// One pass over w: the largest magnitude, how many are above `high`, and those in (low, high], a share of about
// `share`.
Collected collect(const TensorView& w, int32_t low, int32_t high, double share) {
  constexpr int64_t kPiece = 1 << 13, kRoom = kPiece + 16;
  const MagnitudesArgs args{w.data, is_half(w), low, high};
  const int64_t most = w.numel() / 8 + kPiece;  // of all threads together
  Collected all;
  std::mutex lock;
  std::atomic<int64_t> kept{0};
  parallel_for(0, w.numel(), 1 << 18, [&](int64_t begin, int64_t end) {
    int32_t largest = 0;
    int64_t above = 0;
    Values values;
    values.make_room(kRoom + std::min(most, int64_t(1.2 * share * double(end - begin))));
    for (int64_t i = begin; i < end; i += kPiece) {
      if (kept > most) values.count = 0;  // nobody will use them
      values.make_room(kRoom);
      const Magnitudes found =
          kernels().collect_magnitudes(args, i, std::min(end, i + kPiece), values.data.get() + values.count);
      largest = std::max(largest, found.largest);
      above += found.above;
      values.count += found.collected;
      kept += found.collected;
    }
    std::lock_guard<std::mutex> guard(lock);
    all.largest = std::max(all.largest, largest);
    all.above += above;
    all.count += values.count;
    all.parts.push_back(std::move(values));
  });
  all.complete = kept <= most;
  return all;
}

Status check_finite(const char* op, const TensorView& w) {
  constexpr int32_t kNothing = 0x7FFFFFFF;
  return collect(w, kNothing, kNothing, 0.0).largest < infinite_bits(w) ? Status() : nonfinite(op, w);
}

// (w - mean) / std of the unit the weight belongs to, in double, rounded once to float32; 0 where std is 0.
void normalize_units(const TensorView& w, int64_t unit, float* out) {
  const int64_t N = w.shape[0], K = w.shape[1];
  parallel_for(0, N, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t first = 0; first < K; first += unit) {
        const int64_t count = std::min(unit, K - first), base = n * K + first;
        double sum = 0.0, squares = 0.0;
        for (int64_t i = 0; i < count; ++i) sum += double(element(w, base + i));
        const double mean = sum / double(count);
        for (int64_t i = 0; i < count; ++i) {
          const double d = double(element(w, base + i)) - mean;
          squares += d * d;
        }
        const double deviation = std::sqrt(squares / double(count));
        for (int64_t i = 0; i < count; ++i) {
          out[base + i] = deviation > 0.0 ? float((double(element(w, base + i)) - mean) / deviation) : 0.0f;
        }
      }
    }
  });
}

// The tensor the threshold looks at: w itself, or its normalized copy kept in `buffer`.
TensorView normalized(const TensorView& w, Normalize normalize, int64_t group_size, std::vector<float>* buffer) {
  if (normalize == Normalize::kNone) return w;
  buffer->resize(size_t(w.numel()));
  const int64_t row = std::max<int64_t>(w.shape[1], 1);
  normalize_units(w, normalize == Normalize::kRow ? row : std::min(group_size, row), buffer->data());
  TensorView z = w;
  z.dtype = DType::kFloat32;
  z.data = buffer->data();
  return z;
}

int64_t wanted(double alpha, int64_t count) {
  return std::min(count, int64_t(std::floor(alpha * double(count) + 0.5)));
}

// lam for a k-th largest magnitude v: the square of the float32 just below v, so that v and its equals survive.
double lam_below(float v) {
  if (v == 0.0f) return 0.0;  // zeros never survive
  const double t = double(bits_float(float_bits(v) - 1));
  return t * t;
}

// Moves `rank` (from 1) from all counts to the bin it falls in, counted from the last, and returns that bin.
size_t bin_of_rank(const std::vector<int64_t>& counts, int64_t* rank) {
  size_t bin = counts.size() - 1;
  for (; bin > 0 && *rank > counts[bin]; --bin) *rank -= counts[bin];
  return bin;
}

std::vector<int64_t> count_digit(const TensorView& w, bool low_digit, uint32_t prefix) {
  const size_t bins = low_digit ? 65536 : 32768;
  const MagnitudeDigitArgs args{w.data, is_half(w), low_digit, prefix};
  std::vector<int64_t> total(bins, 0);
  std::mutex lock;
  parallel_for(0, w.numel(), 1 << 18, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> counts(bins, 0);
    kernels().magnitude_digit(args, begin, end, counts.data());
    std::lock_guard<std::mutex> guard(lock);
    for (size_t i = 0; i < bins; ++i) total[i] += counts[i];
  });
  return total;
}

// The largest values of ranks `first` <= `second` (from 1) of those in (low, high]: one counting pass, then what the
// bins from the one to the other hold.
void select_among(const std::vector<Values>& parts, int32_t low, int32_t high, int64_t first, int64_t second,
                  int32_t* first_value, int32_t* second_value) {
  int shift = 0;
  while (((int64_t(high) - low) >> shift) >= 4096) ++shift;
  const auto bin_of = [=](int32_t v) { return (uint32_t(v) - uint32_t(low)) >> shift; };
  std::vector<int64_t> counts(4096, 0);
  for (const Values& part : parts) {
    for (int32_t v : part) ++counts[bin_of(v)];
  }
  const int64_t between = second - first;
  const uint32_t last = uint32_t(bin_of_rank(counts, &first)), begin = uint32_t(bin_of_rank(counts, &second));
  if (shift == 0) {  // all of a bin are equal
    *first_value = low + int32_t(last);
    *second_value = low + int32_t(begin);
    return;
  }
  std::vector<int32_t> few;
  for (const Values& part : parts) {
    for (int32_t v : part) {
      if (bin_of(v) - begin <= last - begin) few.push_back(v);
    }
  }
  const auto place = few.begin() + (first - 1);
  const auto largest = std::greater<int32_t>();
  std::nth_element(few.begin(), place, few.end(), largest);
  *first_value = *place;
  if (between > 0) std::nth_element(place + 1, place + between, few.end(), largest);
  *second_value = *(place + between);
}

struct Bracket {
  int32_t low, high;
  double share;  // of the weights that are in (low, high]
};

// Bounds that hold the rank-th largest unless luck is bad: order statistics of an even sample, four deviations apart.
Bracket sample_bracket(const TensorView& w, int64_t rank) {
  // Sixteens beside each other are one cache miss. Steps of an odd length: rows are often a power of two long, and a
  // sample of a few columns is none.
  constexpr int64_t kAhead = 32;
  const int64_t count = w.numel(), runs = std::clamp<int64_t>(count / 4096, 1, 1 << 12);
  const int64_t run = std::min<int64_t>(count, 16), size = run * runs, bytes = dtype_bytes(w.dtype);
  const int64_t step = std::max<int64_t>(run, count / runs) | 1;
  std::vector<Values> sample(1);
  sample[0].make_room(size);
  sample[0].count = size;
  int32_t* out = sample[0].data.get();
  for (int64_t i = 0, at = 0; i < runs; ++i, at = (at + step) % count, out += run) {
    __builtin_prefetch(w.as<char>() + (at + kAhead * step) % count * bytes);
    const int64_t first = std::min(at / run * run, count - run);
    for (int64_t j = 0; j < run; ++j) out[j] = magnitude_bits(w, first + j);
  }
  const double share = double(rank) / double(count), expected = share * double(size);
  const double apart = 4.0 * std::sqrt(expected * (1.0 - share)) + 1.0;
  const double first = std::max(expected - apart, 0.0),
               second = std::min(expected + apart, double(size - 1));  // from 0
  Bracket b{-1, 0x7FFFFFFF, (second - first) / double(size)};
  select_among(sample, -1, is_half(w) ? 0x7FFF : 0x7FFFFFFF, int64_t(first) + 1, int64_t(second) + 1, &b.high, &b.low);
  if (expected - apart < 0.0) b.high = 0x7FFFFFFF;
  b.low = expected + apart > double(size - 1) ? -1 : b.low - 1;
  return b;
}

// The magnitude bits of the rank-th largest |w|, and those of the largest. One pass in which a sample's bracket is
// collected; where that fails, as on weights of few different values, two counting passes.
int32_t select_magnitude(const TensorView& w, int64_t rank, int32_t* largest) {
  const Bracket b = sample_bracket(w, rank);
  const Collected found = collect(w, b.low, b.high, b.share);
  *largest = found.largest;
  const int64_t inside = rank - found.above;
  if (found.complete && inside >= 1 && inside <= found.count) {
    int32_t value;
    select_among(found.parts, b.low, std::min(b.high, *largest), inside, inside, &value, &value);
    return value;
  }
  const size_t upper = bin_of_rank(count_digit(w, false, 0), &rank);
  if (is_half(w)) return int32_t(upper);
  return int32_t(upper << 16 | bin_of_rank(count_digit(w, true, uint32_t(upper)), &rank));
}

// The largest magnitude bits whose square is not above lam: survivors are above it.
int32_t last_below(const TensorView& w, double lam) {
  int32_t low = -1, high = infinite_bits(w);  // low survives not, high counts as if it did
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const double value = double(magnitude_of(w, middle));
    (value * value > lam ? high : low) = middle;
  }
  return low;
}

}  // namespace

Status check_lam(const char* op, const TensorView& w, const TensorView& lam, const std::string& scope,
                 int64_t group_size) {
  Scope s;
  PRECAL_RETURN_IF_ERROR(parse_scope(op, scope, &s));
  return check_tensor(op, "lam", lam, lam_spec(w, s, group_size), "(one per unit of scope)");
}

int32_t salience_limit(const TensorView& w, double lam) {
  const int32_t bits = last_below(w, lam);
  return bits < 0 ? bits : int32_t(float_bits(magnitude_of(w, bits)));
}

Status SoftThreshold::plan(TensorSpec* out) const {
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_dtype("soft_threshold", "w", w, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}));
  PRECAL_RETURN_IF_ERROR(check_contiguous("soft_threshold", "w", w));
  if (!(lam >= 0.0) || std::isinf(lam)) {
    return invalid_value("soft_threshold: lam must be finite and >= 0, got ", lam);
  }
  out[0] = w;
  return {};
}

Status SoftThreshold::run(const TensorView* out) const {
  const SoftThresholdArgs args{w.data, out[0].data, w.dtype, lam};
  parallel_for(0, w.numel(), kElementGrain,
               [&](int64_t begin, int64_t end) { kernels().soft_threshold(args, begin, end); });
  return {};
}

Status SalienceThreshold::plan(TensorSpec* out) const {
  constexpr const char* op = "salience_threshold";
  Scope s;
  Normalize z;
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_weight(op, w));
  PRECAL_RETURN_IF_ERROR(parse_scope(op, scope, &s));
  PRECAL_RETURN_IF_ERROR(parse_normalize(op, normalize, &z));
  PRECAL_RETURN_IF_ERROR(check_group_size(op, group_size));
  if (!(alpha >= 0.0 && alpha <= 1.0)) return invalid_value(op, ": alpha must lie in [0, 1], got ", alpha);
  out[0] = lam_spec(w, s, group_size);
  return {};
}

Status SalienceThreshold::run(const TensorView* out) const {
  Scope s;
  Normalize mode;
  PRECAL_RETURN_IF_ERROR(parse_scope("", scope, &s));
  PRECAL_RETURN_IF_ERROR(parse_normalize("", normalize, &mode));
  double* lam = out[0].as<double>();
  const int64_t N = w.shape[0], K = w.shape[1];
  if (w.numel() == 0) {
    std::fill(lam, lam + out[0].numel(), 0.0);
    return {};
  }
  // With neither rows nor means to look at, the one pass over w also sees whether it is finite.
  if (s != Scope::kTensor || mode != Normalize::kNone) PRECAL_RETURN_IF_ERROR(check_finite("salience_threshold", w));
  std::vector<float> buffer;
  const TensorView z = normalized(w, mode, group_size, &buffer);
  if (s == Scope::kTensor) {
    const int64_t k = wanted(alpha, N * K);
    int32_t largest = 0;
    const float kth = magnitude_of(z, select_magnitude(z, std::max<int64_t>(k, 1), &largest));
    if (largest >= infinite_bits(z)) return nonfinite("salience_threshold", w);
    lam[0] = k == 0 ? double(kth) * double(kth) : lam_below(kth);
    return {};
  }
  const int64_t unit = s == Scope::kRow ? K : std::min(group_size, K);
  const int64_t units = s == Scope::kRow ? 1 : ceil_div(K, group_size);
  parallel_for(0, N, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> magnitudes(static_cast<size_t>(std::min(unit, K)));
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t u = 0; u < units; ++u) {
        const int64_t first = u * unit, count = std::min(unit, K - first);
        for (int64_t i = 0; i < count; ++i) magnitudes[size_t(i)] = std::fabs(element(z, n * K + first + i));
        const int64_t k = wanted(alpha, count);
        const auto at = magnitudes.begin() + std::max<int64_t>(k - 1, 0);
        std::nth_element(magnitudes.begin(), at, magnitudes.begin() + count, std::greater<float>());
        lam[n * units + u] = k == 0 ? double(*at) * double(*at) : lam_below(*at);
      }
    }
  });
  return {};
}

Status SalienceMask::plan(TensorSpec* out) const {
  constexpr const char* op = "salience_mask";
  Scope s;
  Normalize z;
  PRECAL_RETURN_IF_ERROR(check_weight(op, w));
  PRECAL_RETURN_IF_ERROR(parse_scope(op, scope, &s));
  PRECAL_RETURN_IF_ERROR(parse_normalize(op, normalize, &z));
  PRECAL_RETURN_IF_ERROR(check_group_size(op, group_size));
  PRECAL_RETURN_IF_ERROR(check_lam(op, w, lam, scope, group_size));
  out[0] = {DType::kBool, {w.shape[0], w.shape[1]}};
  return {};
}

Status SalienceMask::run(const TensorView* out) const {
  Scope s;
  Normalize mode;
  PRECAL_RETURN_IF_ERROR(parse_scope("", scope, &s));
  PRECAL_RETURN_IF_ERROR(parse_normalize("", normalize, &mode));
  if (w.numel() == 0) return {};
  if (mode != Normalize::kNone) PRECAL_RETURN_IF_ERROR(check_finite("salience_mask", w));
  std::vector<float> buffer;
  const TensorView z = normalized(w, mode, group_size, &buffer);
  const int64_t N = w.shape[0], K = w.shape[1];
  const int64_t groups = ceil_div(K, group_size);
  const double* limits = lam.as<double>();
  std::atomic<bool> finite{true};
  uint8_t* mask = out[0].as<uint8_t>();
  parallel_for(0, N, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
    const int64_t units = s == Scope::kGroup ? groups : 1, columns = s == Scope::kGroup ? std::min(group_size, K) : K;
    MagnitudesArgs args{z.data, is_half(z), 0, s == Scope::kTensor ? last_below(z, limits[0]) : 0};
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t u = 0; u < units; ++u) {
        if (s != Scope::kTensor) args.high = last_below(z, limits[n * units + u]);
        const int64_t first = n * K + u * columns, last = n * K + std::min(K, (u + 1) * columns);
        if (kernels().mask_magnitudes(args, first, last, mask) >= infinite_bits(z)) finite = false;
      }
    }
  });
  return finite ? Status() : nonfinite("salience_mask", w);
}

}  // namespace precal::cpu
