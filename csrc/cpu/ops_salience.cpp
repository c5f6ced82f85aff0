// SPDX-License-Identifier: Apache-2.0
// soft_threshold, salience_threshold, salience_mask.
#include <algorithm>
#include <cmath>
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

Status first_nonfinite(const char* op, const TensorView& w) {
  const int64_t count = w.numel(), K = w.shape[1];
  std::mutex lock;
  int64_t first = count;
  parallel_for(0, count, kElementGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (is_finite(element(w, i))) continue;
      std::lock_guard<std::mutex> guard(lock);
      first = std::min(first, i);
      return;
    }
  });
  if (first == count) return {};
  return invalid_value(op, ": w must be finite, got ", element(w, first), " at [", first / K, ", ", first % K, "]");
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

uint32_t largest_first(const std::vector<int64_t>& counts, int64_t* rank) {
  for (int64_t digit = int64_t(counts.size()) - 1; digit >= 0; --digit) {
    if (*rank <= counts[size_t(digit)]) return uint32_t(digit);
    *rank -= counts[size_t(digit)];
  }
  return 0;
}

std::vector<int64_t> count_digit(const TensorView& w, bool low_digit, uint32_t prefix) {
  const size_t bins = low_digit ? 65536 : 32768;
  const MagnitudeDigitArgs args{w.data, w.dtype, low_digit, prefix};
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

// The rank-th largest |w| of the whole tensor (rank from 1): two counting passes over the float32 bits.
float select_magnitude(const TensorView& w, int64_t rank) {
  const uint32_t high = largest_first(count_digit(w, false, 0), &rank);
  const uint32_t low = largest_first(count_digit(w, true, high), &rank);
  return bits_float((high << 16) | low);
}

}  // namespace

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
  PRECAL_RETURN_IF_ERROR(first_nonfinite("salience_threshold", w));
  std::vector<float> buffer;
  const TensorView z = normalized(w, mode, group_size, &buffer);
  if (s == Scope::kTensor) {
    const int64_t k = wanted(alpha, N * K);
    const double largest = double(select_magnitude(z, 1));
    lam[0] = k == 0 ? largest * largest : lam_below(select_magnitude(z, k));
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
  PRECAL_RETURN_IF_ERROR(check_tensor(op, "lam", lam, lam_spec(w, s, group_size), "(one per unit of scope)"));
  out[0] = {DType::kBool, {w.shape[0], w.shape[1]}};
  return {};
}

Status SalienceMask::run(const TensorView* out) const {
  Scope s;
  Normalize mode;
  PRECAL_RETURN_IF_ERROR(parse_scope("", scope, &s));
  PRECAL_RETURN_IF_ERROR(parse_normalize("", normalize, &mode));
  if (w.numel() == 0) return {};
  PRECAL_RETURN_IF_ERROR(first_nonfinite("salience_mask", w));
  std::vector<float> buffer;
  const TensorView z = normalized(w, mode, group_size, &buffer);
  const int64_t N = w.shape[0], K = w.shape[1];
  const int64_t groups = ceil_div(K, group_size);
  const double* limits = lam.as<double>();
  uint8_t* mask = out[0].as<uint8_t>();
  parallel_for(0, N, std::max<int64_t>(1, kElementGrain / std::max<int64_t>(K, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t k = 0; k < K; ++k) {
        const int64_t unit = s == Scope::kTensor ? 0 : s == Scope::kRow ? n : n * groups + k / group_size;
        const double value = double(element(z, n * K + k));
        mask[n * K + k] = value * value > limits[unit];
      }
    }
  });
  return {};
}

}  // namespace precal::cpu
