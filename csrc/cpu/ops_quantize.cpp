// SPDX-License-Identifier: Apache-2.0
// quantize_groups, quantize_split, quantize_salient, pack, unpack, dequantize, measure.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <mutex>
#include <vector>

#include "core/parallel.h"
#include "cpu/ops.h"
#include "cpu/select.h"

namespace precal::cpu {

namespace {

using format::ScaleType;
using format::WeightFormat;

constexpr int64_t kMaxGroup = int64_t(1) << 30;
constexpr int64_t kWeightsPerPiece = 1 << 14;

int64_t row_grain(int64_t K) { return std::max<int64_t>(1, kWeightsPerPiece / std::max<int64_t>(K, 1)); }

Status check_bits(const char* op, int64_t bits) {
  if (bits < format::kMinBits || bits > format::kMaxBits) {
    return invalid_value(op, ": bits must lie in [2, 8], got ", bits);
  }
  return {};
}

Status check_group(const char* op, int64_t group_size) {
  if (group_size < 1 || group_size > kMaxGroup) {
    return invalid_value(op, ": group_size must lie in [1, 2^30], got ", group_size);
  }
  return {};
}

Status check_columns(const char* op, int64_t K) {
  if (K < 0 || K > (int64_t(1) << 30)) return invalid_value(op, ": K must lie in [0, 2^30], got ", K);
  return {};
}

Status parse_scale_type(const char* op, const std::string& text, ScaleType* type) {
  if (text == "e4m3") *type = ScaleType::kE4m3;
  else if (text == "float16") *type = ScaleType::kFloat16;
  else return invalid_value(op, ": scale_dtype must be e4m3 or float16, got ", quoted(text));
  return {};
}

DType scale_dtype_of(ScaleType type) { return type == ScaleType::kE4m3 ? DType::kUInt8 : DType::kFloat16; }

// A grid [L] or [1, L]: 2^bits levels, or 2^(bits+1) for a trellis.
Status check_grid_shape(const char* op, const TensorView& grid, int64_t bits) {
  PRECAL_RETURN_IF_ERROR(check_dtype(op, "grid", grid, {DType::kInt8}));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, "grid", grid));
  const int64_t size = grid.ndim > 0 ? grid.shape[grid.ndim - 1] : 0;
  if (grid.ndim < 1 || grid.ndim > 2 || grid.numel() != size || size == 0 || !format::grid_size_fits(size, int(bits))) {
    return invalid_value(op, ": grid must be [1, ", int64_t(1) << bits, "] (1, 2^bits), or [1, ", int64_t(2) << bits,
                         "] for a trellis of 2 to 7 bits, got ", shape_text(grid));
  }
  return {};
}

Status nonfinite(const char* op, const TensorView& w, int64_t index) {
  const int64_t K = w.shape[1];
  const float value = w.dtype == DType::kFloat32    ? w.as<float>()[index]
                      : w.dtype == DType::kBFloat16 ? bf16_to_float(w.as<uint16_t>()[index])
                                                    : half_to_float(w.as<uint16_t>()[index]);
  const char* contract = is_finite(value) ? ": w must be at most 2^126 in magnitude, got " : ": w must be finite, got ";
  return invalid_value(op, contract, value, " at [", index / K, ", ", index % K, "]");
}

Status run_quantize(const char* op, const TensorView& w, const QuantizeArgs& args) {
  std::mutex lock;
  int64_t bad = -1;
  const int64_t rows = format::is_trellis(args.format) ? kTrellisRows : 1;  // that are worth doing together
  parallel_for(0, ceil_div(args.format.N, rows), ceil_div(row_grain(args.format.K), rows), [&](int64_t b, int64_t e) {
    std::vector<float> scratch(static_cast<size_t>(quantize_scratch_floats(args)));
    const int64_t end = std::min(e * rows, args.format.N);
    const auto quantize = args.format.split ? kernels().quantize_split_rows : kernels().quantize_rows;
    const int64_t first = quantize(args, b * rows, end, scratch.data());
    if (first < 0) return;
    std::lock_guard<std::mutex> guard(lock);
    if (bad < 0 || first < bad) bad = first;
  });
  return bad < 0 ? Status() : nonfinite(op, w, bad);
}

}  // namespace

Status make_levels(const char* op, const TensorView& grid, int bits, float* levels) {
  const int count = grid.present ? int(grid.numel()) : 1 << bits;
  if (!grid.present) {
    for (int u = 0; u < count; ++u) levels[u] = float(u - count / 2);
  } else {
    for (int u = 0; u < count; ++u) {
      const int level = grid.as<int8_t>()[u];
      if (level < -format::kMaxLevel) return invalid_value(op, ": grid must lie in [-127, 127], got -128");
      levels[u] = float(level);
      if (u > 0 && levels[u] < levels[u - 1]) {
        return invalid_value(op, ": grid must be non-decreasing, got ", levels[u - 1], " before ", levels[u]);
      }
    }
    if (levels[0] == 0.0f && levels[count - 1] == 0.0f) return invalid_value(op, ": grid must not be all zero");
  }
  for (int u = count; u < 256; ++u) levels[u] = levels[u - count];
  return {};
}

Status QuantizeGroups::plan(TensorSpec* out) const {
  constexpr const char* op = "quantize_groups";
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_weight(op, w));
  PRECAL_RETURN_IF_ERROR(check_columns(op, w.shape[1]));
  PRECAL_RETURN_IF_ERROR(check_bits(op, bits));
  PRECAL_RETURN_IF_ERROR(check_group(op, group_size));
  if (grid.present) PRECAL_RETURN_IF_ERROR(check_grid_shape(op, grid, bits));
  ScaleType type;
  PRECAL_RETURN_IF_ERROR(parse_scale_type(op, scale_dtype, &type));
  if (c < 0 || c > format::kMaxCapacity) {
    return invalid_value(op, ": c must lie in [0, ", format::kMaxCapacity, "], got ", c);
  }
  if (!(lam >= 0.0)) return invalid_value(op, ": lam must be >= 0, got ", lam);
  if (!(search_lo > 0.0 && search_lo <= search_hi && search_hi <= 1.1)) {
    return invalid_value(op, ": search must satisfy 0 < search_lo <= search_hi <= 1.1, got [", search_lo, ", ",
                         search_hi, "]");
  }
  if (type == ScaleType::kFloat16 && grid.present && grid.numel() != (int64_t(1) << bits)) {
    return invalid_value(op, ": scale_dtype must be e4m3 with a trellis grid, got ", scale_dtype);
  }
  if (type == ScaleType::kFloat16 && (search_lo != 1.0 || search_hi != 1.0)) {
    return invalid_value(op, ": search_lo and search_hi must be 1 for float16 scales, got [", search_lo, ", ",
                         search_hi, "]");
  }
  const int64_t N = w.shape[0], groups = ceil_div(w.shape[1], group_size);
  const int64_t blocks = format::outlier_blocks(w.shape[1]).num_blocks;
  out[0] = {DType::kUInt8, {N, w.shape[1]}};
  out[1] = {scale_dtype_of(type), {N, groups}};
  out[2] = {DType::kBFloat16, {N}};
  out[3] = {DType::kUInt8, {N, blocks, c}};
  out[4] = {DType::kUInt8, {N, blocks, c}};
  return {};
}

Status QuantizeGroups::run(const TensorView* out) const {
  constexpr const char* op = "quantize_groups";
  float levels[256];
  PRECAL_RETURN_IF_ERROR(make_levels(op, grid, int(bits), levels));
  const float top = levels[(grid.present ? grid.numel() : int64_t(1) << bits) - 1];
  if (symmetric && !(top > 0.0f)) {
    return invalid_value(op, ": grid must end above zero when symmetric, got top level ", top);
  }
  QuantizeArgs args{};
  args.w = w.data;
  args.dtype = w.dtype;
  args.format.N = w.shape[0];
  args.format.K = w.shape[1];
  args.format.bits = int(bits);
  args.format.group_size = group_size;
  args.format.c = int(c);
  args.format.grid_size = grid.present ? int(grid.numel()) : 0;
  PRECAL_RETURN_IF_ERROR(parse_scale_type(op, scale_dtype, &args.format.scale_type));
  args.levels = levels;
  args.symmetric = symmetric;
  args.lam = lam;
  args.search_lo = float(search_lo);
  args.search_hi = float(search_hi);
  args.codes = out[0].as<uint8_t>();
  args.scale = out[1].data;
  args.row_scale = out[2].as<uint16_t>();
  args.outlier_index = out[3].as<uint8_t>();
  args.outlier_value = out[4].as<uint8_t>();
  return run_quantize(op, w, args);
}

namespace {

// What quantize_split and quantize_salient share.
Status plan_split(const char* op, const TensorView& w, int64_t bits, int64_t group_size, TensorSpec* out) {
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_weight(op, w));
  PRECAL_RETURN_IF_ERROR(check_columns(op, w.shape[1]));
  PRECAL_RETURN_IF_ERROR(check_bits(op, bits));
  PRECAL_RETURN_IF_ERROR(check_group(op, group_size));
  const int64_t N = w.shape[0], K = w.shape[1], groups = ceil_div(K, group_size);
  out[0] = {DType::kUInt8, {N, K}};
  out[1] = {DType::kFloat16, {N, groups}};
  out[2] = {DType::kBFloat16, {N}};
  out[3] = {DType::kFloat16, {N, groups}};
  out[4] = {DType::kUInt8, {N, ceil_div(K, 8)}};
  return {};
}

Status run_split(const char* op, const TensorView& w, int64_t bits, int64_t group_size, const TensorView* out,
                 QuantizeArgs args) {
  float levels[256];
  PRECAL_RETURN_IF_ERROR(make_levels(op, TensorView(), int(bits), levels));
  args.w = w.data;
  args.dtype = w.dtype;
  args.format.N = w.shape[0];
  args.format.K = w.shape[1];
  args.format.bits = int(bits);
  args.format.group_size = group_size;
  args.format.split = true;
  args.format.scale_type = ScaleType::kFloat16;
  args.levels = levels;
  args.symmetric = true;
  args.search_lo = args.search_hi = 1.0f;
  args.scale = out[1].data;
  args.row_scale = out[2].as<uint16_t>();
  args.outlier_scale = out[3].data;
  args.mask = out[4].as<uint8_t>();
  return run_quantize(op, w, args);
}

}  // namespace

Status QuantizeSplit::plan(TensorSpec* out) const {
  constexpr const char* op = "quantize_split";
  PRECAL_RETURN_IF_ERROR(plan_split(op, w, bits, group_size, out));
  return check_tensor(op, "salient", salient, {DType::kBool, {w.shape[0], w.shape[1]}}, "(N, K)");
}

Status QuantizeSplit::run(const TensorView* out) const {
  QuantizeArgs args{};
  args.salient = salient.as<uint8_t>();
  args.codes = out[0].as<uint8_t>();
  return run_split("quantize_split", w, bits, group_size, out, args);
}

Status QuantizeSalient::plan(TensorSpec* out) const {
  constexpr const char* op = "quantize_salient";
  PRECAL_RETURN_IF_ERROR(plan_split(op, w, bits, group_size, out));
  PRECAL_RETURN_IF_ERROR(check_lam(op, w, lam, scope, group_size));
  out[0] = {DType::kInt32, {w.shape[0], format::words_per_row(w.shape[1], int(bits))}};
  return {};
}

Status QuantizeSalient::run(const TensorView* out) const {
  std::vector<int32_t> limits(static_cast<size_t>(lam.numel()));
  parallel_for(0, lam.numel(), 1 << 12, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) limits[size_t(i)] = salience_limit(w, lam.as<double>()[i]);
  });
  QuantizeArgs args{};
  args.limit = limits.data();
  args.limit_row = scope == "tensor" ? 0 : lam.numel() / std::max<int64_t>(w.shape[0], 1);
  args.limit_group = scope == "group";
  args.packed = out[0].as<uint32_t>();
  return run_split("quantize_salient", w, bits, group_size, out, args);
}

Status Pack::plan(TensorSpec* out) const {
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_bits("pack", bits));
  PRECAL_RETURN_IF_ERROR(check_dtype("pack", "codes", codes, {DType::kUInt8}));
  PRECAL_RETURN_IF_ERROR(check_contiguous("pack", "codes", codes));
  if (codes.ndim != 2) return invalid_value("pack: codes must be [N, K], got ", shape_text(codes));
  PRECAL_RETURN_IF_ERROR(check_columns("pack", codes.shape[1]));
  out[0] = {DType::kInt32, {codes.shape[0], format::words_per_row(codes.shape[1], int(bits))}};
  return {};
}

Status Pack::run(const TensorView* out) const {
  if (codes.numel() == 0) return {};
  const PackArgs args{codes.as<uint8_t>(), out[0].as<uint32_t>(), codes.shape[1], int(bits)};
  std::atomic<bool> fits{true};
  parallel_for(0, codes.shape[0], row_grain(codes.shape[1]), [&](int64_t begin, int64_t end) {
    if (!kernels().pack_rows(args, begin, end)) fits = false;
  });
  if (!fits) return invalid_value("pack: codes must be below 2^", bits, " = ", 1 << bits, ", got a larger one");
  return {};
}

Status Unpack::plan(TensorSpec* out) const {
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_bits("unpack", bits));
  PRECAL_RETURN_IF_ERROR(check_columns("unpack", K));
  PRECAL_RETURN_IF_ERROR(check_dtype("unpack", "packed", packed, {DType::kInt32}));
  PRECAL_RETURN_IF_ERROR(check_contiguous("unpack", "packed", packed));
  if (packed.ndim != 2) return invalid_value("unpack: packed must be [N, words], got ", shape_text(packed));
  PRECAL_RETURN_IF_ERROR(check_shape("unpack", "packed", packed,
                                     {DType::kInt32, {packed.shape[0], format::words_per_row(K, int(bits))}},
                                     "(N, ceil(K*bits/32))"));
  out[0] = {DType::kUInt8, {packed.shape[0], K}};
  return {};
}

Status Unpack::run(const TensorView* out) const {
  if (out[0].numel() == 0) return {};
  const UnpackArgs args{packed.as<uint32_t>(), out[0].as<uint8_t>(), K, int(bits)};
  parallel_for(0, packed.shape[0], row_grain(K),
               [&](int64_t begin, int64_t end) { kernels().unpack_rows(args, begin, end); });
  return {};
}

Status check_segment(const char* op, int64_t segment, int64_t K) {
  if (format::segment_fits(segment, K)) return {};
  return invalid_value(op, ": segment must be 0, K or a divisor of K that 32 divides, got ", segment, " for K=", K);
}

Status WeightTensors::check(const char* op, WeightFormat* f) const {
  PRECAL_RETURN_IF_ERROR(kernels_status());
  PRECAL_RETURN_IF_ERROR(check_bits(op, bits));
  PRECAL_RETURN_IF_ERROR(check_group(op, group_size));
  PRECAL_RETURN_IF_ERROR(check_columns(op, K));
  if (packed.ndim != 2) return invalid_value(op, ": packed must be [N, words], got ", shape_text(packed));
  const int64_t N = packed.shape[0], groups = ceil_div(K, group_size);
  PRECAL_RETURN_IF_ERROR(check_segment(op, segment, K));
  const int64_t blocks = format::outlier_blocks(K, segment).num_blocks;
  f->N = N;
  f->K = K;
  f->bits = int(bits);
  f->group_size = group_size;
  f->segment = segment;
  PRECAL_RETURN_IF_ERROR(check_tensor(op, "packed", packed, {DType::kInt32, {N, format::words_per_row(K, int(bits))}},
                                      "(N, ceil(K*bits/32))"));
  PRECAL_RETURN_IF_ERROR(check_dtype(op, "scale", scale, {DType::kUInt8, DType::kFloat16}));
  f->scale_type = scale.dtype == DType::kUInt8 ? ScaleType::kE4m3 : ScaleType::kFloat16;
  PRECAL_RETURN_IF_ERROR(check_tensor(op, "scale", scale, {scale.dtype, {N, groups}}, "(N, ceil(K/group_size))"));
  PRECAL_RETURN_IF_ERROR(check_tensor(op, "row_scale", row_scale, {DType::kBFloat16, {N}}, "(N)"));
  if (grid.present) PRECAL_RETURN_IF_ERROR(check_grid_shape(op, grid, bits));
  f->grid_size = grid.present ? int(grid.numel()) : 0;
  if (outlier_index.present != outlier_value.present) {
    return invalid_value(op, ": outlier_index and outlier_value must be given together, got one of them");
  }
  if (outlier_index.present) {
    f->c = outlier_index.ndim == 3 ? int(std::min<int64_t>(outlier_index.shape[2], 1 << 20)) : 0;
    if (f->c > format::kMaxCapacity) {
      return invalid_value(op, ": outlier_index must have c <= ", format::kMaxCapacity, " entries a block, got ", f->c);
    }
    PRECAL_RETURN_IF_ERROR(
        check_tensor(op, "outlier_index", outlier_index, {DType::kUInt8, {N, blocks, f->c}}, "(N, blocks, c)"));
    PRECAL_RETURN_IF_ERROR(
        check_tensor(op, "outlier_value", outlier_value, {DType::kUInt8, {N, blocks, f->c}}, "(N, blocks, c)"));
  }
  if (outlier_scale.present != mask.present) {
    return invalid_value(op, ": outlier_scale and outlier_mask must be given together, got one of them");
  }
  if (mask.present) {
    if (f->c > 0) return invalid_value(op, ": outlier_mask excludes outlier_index, got both");
    f->split = true;
    PRECAL_RETURN_IF_ERROR(
        check_tensor(op, "outlier_scale", outlier_scale, {scale.dtype, {N, groups}}, "(N, ceil(K/group_size))"));
    PRECAL_RETURN_IF_ERROR(
        check_tensor(op, "outlier_mask", mask, {DType::kUInt8, {N, ceil_div(K, 8)}}, "(N, ceil(K/8))"));
  }
  return {};
}

Status Dequantize::plan(TensorSpec* out) const {
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(weight.check("dequantize", &f));
  out[0] = {DType::kFloat32, {f.N, f.K}};
  return {};
}

namespace {

// All but `levels` and `out`.
DequantizeArgs dequantize_args(const WeightTensors& weight, const WeightFormat& f) {
  DequantizeArgs args{};
  args.format = f;
  args.packed = weight.packed.as<uint32_t>();
  args.scale = weight.scale.data;
  args.row_scale = weight.row_scale.as<uint16_t>();
  args.outlier_index = weight.outlier_index.as<uint8_t>();
  args.outlier_value = weight.outlier_value.as<uint8_t>();
  args.outlier_scale = weight.outlier_scale.data;
  args.mask = weight.mask.as<uint8_t>();
  return args;
}

}  // namespace

Status Dequantize::run(const TensorView* out) const {
  WeightFormat f;
  float levels[256];
  PRECAL_RETURN_IF_ERROR(weight.check("dequantize", &f));
  PRECAL_RETURN_IF_ERROR(make_levels("dequantize", weight.grid, f.bits, levels));
  DequantizeArgs args = dequantize_args(weight, f);
  args.levels = levels;
  args.out = out[0].as<float>();
  parallel_for(0, f.N, row_grain(f.K),
               [&](int64_t begin, int64_t end) { kernels().dequantize_rows(args, begin, end); });
  return {};
}

Status Measure::plan(TensorSpec* out) const {
  constexpr const char* op = "measure";
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(check_weight(op, w));
  PRECAL_RETURN_IF_ERROR(weight.check(op, &f));
  PRECAL_RETURN_IF_ERROR(check_shape(op, "w", w, {w.dtype, {f.N, f.K}}, "(N, K) of the quantized weight"));
  const auto is_power_of_two = [](double x) { return std::exp2(std::round(std::log2(x))) == x; };
  if (num_bins < 2 || num_bins > (1 << 16) || (num_bins & (num_bins - 1)) != 0) {
    return invalid_value(op, ": num_bins must be a power of two from 2 to 2^16, got ", num_bins);
  }
  if (!(half >= 1.0 && half <= 65536.0) || !is_power_of_two(half)) {
    return invalid_value(op, ": half must be a power of two from 1 to 2^16, got ", half);
  }
  out[0] = {DType::kInt64, {num_labels(f), num_bins}};
  out[1] = {DType::kFloat64, {f.N, 2}};
  return {};
}

Status Measure::run(const TensorView* out) const {
  WeightFormat f;
  float levels[256];
  PRECAL_RETURN_IF_ERROR(weight.check("measure", &f));
  PRECAL_RETURN_IF_ERROR(make_levels("measure", weight.grid, f.bits, levels));
  MeasureArgs args{dequantize_args(weight, f), w.data, w.dtype, 0, half, out[1].as<double>()};
  args.weight.levels = levels;
  while ((int64_t(1) << args.bin_bits) < num_bins) ++args.bin_bits;
  int64_t* counts = out[0].as<int64_t>();
  const int64_t labels = num_labels(f), stride = count_stride(args.bin_bits), cells = labels * stride;
  std::fill(counts, counts + labels * num_bins, 0);
  std::fill(args.squares, args.squares + 2 * f.N, 0.0);
  const int64_t K = std::max<int64_t>(f.K, 1), most = std::max<int64_t>(1, (int64_t(1) << 31) / K);
  std::mutex lock;
  parallel_for(0, f.N, std::max(row_grain(f.K), ceil_div(cells, K)), [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> local(static_cast<size_t>(cells));
    for (int64_t n = begin; n < end; n += most) {
      std::fill(local.begin(), local.end(), 0u);
      kernels().measure_rows(args, n, std::min(end, n + most), local.data());
      std::lock_guard<std::mutex> guard(lock);
      for (int64_t i = 0; i < labels; ++i) {
        for (int64_t b = 0; b < num_bins; ++b) counts[i * num_bins + b] += local[size_t(i * stride + b)];
      }
    }
  });
  return {};
}

}  // namespace precal::cpu
