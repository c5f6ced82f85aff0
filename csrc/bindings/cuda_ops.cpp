// SPDX-License-Identifier: Apache-2.0
#include "bindings/cuda_ops.h"

#include "cuda/linear_config.h"

namespace precal::bindings::gpu {

namespace {

using format::ScaleType;
using format::WeightFormat;

cuda::WeightPointers pointers(const cpu::WeightTensors& w) {
  return {w.packed.as<uint32_t>(),       w.scale.data,
          w.row_scale.as<uint16_t>(),    w.grid.as<int8_t>(),
          w.outlier_index.as<uint8_t>(), w.outlier_value.as<uint8_t>(),
          w.outlier_scale.data,          w.mask.as<uint8_t>()};
}

}  // namespace

Status SoftThreshold::launch(const TensorView* out, void*, cudaStream_t stream) const {
  return cuda::launch_soft_threshold({w.data, out[0].data, w.dtype, w.numel(), lam}, stream);
}

namespace {

// Columns of a unit: 0 for the whole tensor, which is `none` for normalize.
int64_t unit_of(const std::string& text, int64_t K, int64_t group_size) {
  if (text == "row") return K > 0 ? K : 1;
  if (text == "group") return group_size < K ? group_size : K > 0 ? K : 1;
  return 0;
}

template <typename Op>
cuda::SalienceParams salience_params(const Op& op, void* workspace) {
  cuda::SalienceParams p{};
  p.w = op.w.data;
  p.dtype = op.w.dtype;
  p.N = op.w.shape[0];
  p.K = op.w.shape[1];
  p.unit = unit_of(op.scope, p.K, op.group_size);
  p.normalize_unit = unit_of(op.normalize, p.K, op.group_size);
  p.workspace = workspace;
  return p;
}

cuda::GridParams grid_params(const TensorView& counts, double lo, double hi, const TensorView& grid) {
  cuda::GridParams p{};
  p.counts = counts.as<int64_t>();
  p.bins = counts.shape[counts.ndim - 1];
  p.by_code = counts.ndim == 2;
  p.lo = lo;
  p.hi = hi;
  p.grid = grid.as<int8_t>();
  p.levels = int(grid.numel());
  return p;
}

// Kernels hold that many; the CPU looks at it when it reads the levels.
Status check_levels(const char* op, const TensorView& grid) {
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, "grid", grid));
  if (grid.ndim < 1 || grid.numel() < 2 || grid.numel() > 256) {
    return invalid_value(op, ": grid must hold 2 to 256 levels, got ", shape_text(grid));
  }
  return {};
}

}  // namespace

int64_t SalienceThreshold::workspace_bytes() const { return cuda::salience_workspace(w.numel(), normalize != "none"); }
int64_t SalienceMask::workspace_bytes() const { return cuda::salience_workspace(w.numel(), normalize != "none"); }

Status SalienceThreshold::launch(const TensorView* out, void* workspace, cudaStream_t stream) const {
  cuda::SalienceParams p = salience_params(*this, workspace);
  p.alpha = alpha;
  p.lam = out[0].as<double>();
  p.num_lam = out[0].numel();
  return cuda::launch_salience_threshold(p, stream);
}

Status SalienceMask::launch(const TensorView* out, void* workspace, cudaStream_t stream) const {
  cuda::SalienceParams p = salience_params(*this, workspace);
  p.lam = lam.as<double>();
  p.num_lam = lam.numel();
  p.mask = out[0].as<uint8_t>();
  return cuda::launch_salience_mask(p, stream);
}

Status SpreadCodes::launch(const TensorView* out, void*, cudaStream_t stream) const {
  PRECAL_RETURN_IF_ERROR(check_levels("spread_codes", grid));
  cuda::GridParams p = grid_params(counts, lo, hi, grid);
  p.out = out[0].as<double>();
  return cuda::launch_spread_codes(p, stream);
}

Status KlDivergence::launch(const TensorView* out, void*, cudaStream_t stream) const {
  return cuda::launch_kl_divergence(
      {p.data, q.data, p.dtype == DType::kInt64, q.dtype == DType::kInt64, p.shape[0], smoothing, out[0].as<double>()},
      stream);
}

int64_t FitGrid::workspace_bytes() const {
  return counts.ndim == 2 ? 0 : cuda::grid_workspace(counts.shape[counts.ndim - 1]);
}

Status FitGrid::launch(const TensorView* out, void* workspace, cudaStream_t stream) const {
  PRECAL_RETURN_IF_ERROR(check_levels("fit_grid", grid));
  cuda::GridParams p = grid_params(counts, lo, hi, grid);
  p.mu = mu;
  p.rounds = rounds;
  p.out_grid = out[0].as<int8_t>();
  p.workspace = workspace;
  return cuda::launch_fit_grid(p, stream);
}

Status Histogram::launch(const TensorView* out, void*, cudaStream_t stream) const {
  cuda::HistogramParams p{};
  p.w = w.data;
  p.dtype = w.dtype;
  p.N = w.shape[0];
  p.K = w.shape[1];
  p.group_size = group_size < p.K ? group_size : p.K > 0 ? p.K : 1;
  p.groups = ceil_div(p.K, group_size);
  p.divisor = divisor.as<float>();
  p.weight = weight.as<int64_t>();
  p.label = label.as<uint8_t>();
  p.num_bins = num_bins;
  p.num_labels = num_labels;
  p.lo = lo;
  p.hi = hi;
  p.counts = out[0].as<int64_t>();
  p.outside = out[1].as<int64_t>();
  return cuda::launch_histogram(p, stream);
}

namespace {

WeightFormat format_of(const cpu::QuantizeGroups& q) {
  WeightFormat f;
  f.N = q.w.shape[0];
  f.K = q.w.shape[1];
  f.bits = int(q.bits);
  f.group_size = q.group_size;
  f.c = int(q.c);
  f.grid_size = q.grid.present ? int(q.grid.numel()) : 0;
  f.scale_type = q.scale_dtype == "float16" ? ScaleType::kFloat16 : ScaleType::kE4m3;
  return f;
}

template <typename Op>
WeightFormat split_format_of(const Op& q) {
  WeightFormat f;
  f.N = q.w.shape[0];
  f.K = q.w.shape[1];
  f.bits = int(q.bits);
  f.group_size = q.group_size;
  f.split = true;
  f.scale_type = ScaleType::kFloat16;
  return f;
}

}  // namespace

int64_t QuantizeGroups::workspace_bytes() const { return cuda::quantize_workspace(format_of(*this)); }
int64_t QuantizeSplit::workspace_bytes() const { return cuda::quantize_workspace(split_format_of(*this)); }

Status QuantizeGroups::launch(const TensorView* out, void* workspace, cudaStream_t stream) const {
  cuda::QuantizeParams p{};
  p.format = format_of(*this);
  p.w = w.data;
  p.dtype = w.dtype;
  p.grid = grid.as<int8_t>();
  p.symmetric = symmetric;
  p.lam = lam;
  p.search_lo = float(search_lo);
  p.search_hi = float(search_hi);
  p.codes = out[0].as<uint8_t>();
  p.scale = out[1].data;
  p.row_scale = out[2].as<uint16_t>();
  p.outlier_index = out[3].as<uint8_t>();
  p.outlier_value = out[4].as<uint8_t>();
  p.workspace = workspace;
  return cuda::launch_quantize(p, stream);
}

namespace {

// In the order of the workspace; whole sixteens of bytes each.
struct SalientScratch {
  int64_t quantize, codes, mask;
  explicit SalientScratch(const cpu::QuantizeSalient& q)
      : quantize(round_up(cuda::quantize_workspace(split_format_of(q)), 16)),
        codes(round_up(q.w.numel(), 16)),
        mask(codes) {}
};

}  // namespace

int64_t QuantizeSalient::workspace_bytes() const {
  const SalientScratch s(*this);
  return s.quantize + s.codes + s.mask;
}

Status QuantizeSalient::launch(const TensorView* out, void* workspace, cudaStream_t stream) const {
  const SalientScratch scratch(*this);
  const int64_t N = w.shape[0], K = w.shape[1];
  TensorView salient = w, codes = w;
  salient.dtype = DType::kBool;
  codes.dtype = DType::kUInt8;
  codes.data = static_cast<uint8_t*>(workspace) + scratch.quantize;
  salient.data = codes.as<uint8_t>() + scratch.codes;
  cuda::SalienceParams s{};
  s.w = w.data;
  s.dtype = w.dtype;
  s.N = N;
  s.K = K;
  s.unit = unit_of(scope, K, group_size);
  s.lam = lam.as<double>();
  s.num_lam = lam.numel();
  s.mask = salient.as<uint8_t>();
  s.workspace = workspace;
  PRECAL_RETURN_IF_ERROR(cuda::launch_salience_mask(s, stream));
  const TensorView parts[] = {codes, out[1], out[2], out[3], out[4]};
  const QuantizeSplit split{{w, salient, bits, group_size}};
  PRECAL_RETURN_IF_ERROR(split.launch(parts, workspace, stream));
  return Pack{{codes, bits}, {}}.launch(out, nullptr, stream);
}

Status QuantizeSplit::launch(const TensorView* out, void* workspace, cudaStream_t stream) const {
  cuda::QuantizeParams p{};
  p.format = split_format_of(*this);
  p.w = w.data;
  p.dtype = w.dtype;
  p.symmetric = true;
  p.search_lo = p.search_hi = 1.0f;
  p.codes = out[0].as<uint8_t>();
  p.scale = out[1].data;
  p.row_scale = out[2].as<uint16_t>();
  p.salient = salient.as<uint8_t>();
  p.outlier_scale = out[3].data;
  p.mask = out[4].as<uint8_t>();
  p.workspace = workspace;
  return cuda::launch_quantize(p, stream);
}

Status Pack::launch(const TensorView* out, void*, cudaStream_t stream) const {
  return cuda::launch_pack({codes.as<uint8_t>(), out[0].as<uint32_t>(), codes.shape[0], codes.shape[1], int(bits)},
                           stream);
}

Status Unpack::launch(const TensorView* out, void*, cudaStream_t stream) const {
  return cuda::launch_unpack({out[0].as<uint8_t>(), packed.as<uint32_t>(), packed.shape[0], K, int(bits)}, stream);
}

Status Dequantize::launch(const TensorView* out, void*, cudaStream_t stream) const {
  cuda::DequantizeParams p{};
  PRECAL_RETURN_IF_ERROR(weight.check("dequantize", &p.format));
  p.weight = pointers(weight);
  p.out = out[0].as<float>();
  return cuda::launch_dequantize(p, stream);
}

Status Measure::launch(const TensorView* out, void*, cudaStream_t stream) const {
  cuda::MeasureParams p{};
  PRECAL_RETURN_IF_ERROR(weight.check("measure", &p.format));
  p.w = w.data;
  p.dtype = w.dtype;
  p.weight = pointers(weight);
  p.num_bins = num_bins;
  p.labels = num_labels(p.format);
  p.half = half;
  p.counts = out[0].as<int64_t>();
  p.squares = out[1].as<double>();
  return cuda::launch_measure(p, stream);
}

Status Prepack::plan(TensorSpec* out) const {
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(weight.check("prepack", &f));
  out[0] = {DType::kUInt8, {format::cuda_layout(f).total_bytes}};
  return {};
}

Status Prepack::launch(const TensorView* out, void*, cudaStream_t stream) const {
  cuda::PrepackParams p{};
  PRECAL_RETURN_IF_ERROR(weight.check("prepack", &p.format));
  p.layout = format::cuda_layout(p.format);
  p.weight = pointers(weight);
  p.prepacked = out[0].as<uint8_t>();
  return cuda::launch_prepack(p, stream);
}

// The header of a weight in the GPU's order lies on the device and is not read here.
static Status check_prepacked(const char* op, const cpu::PrepackedWeight& w, WeightFormat* f) {
  PRECAL_RETURN_IF_ERROR(w.check_numbers(op, f));
  const int64_t bytes = format::cuda_layout(*f).total_bytes;
  if (w.data.ndim != 1 || w.data.shape[0] != bytes) {
    return invalid_value(op, ": prepacked must be [", bytes, "] bytes, from prepack() on a CUDA device, for N=", w.N,
                         ", K=", w.K, ", bits=", w.bits, ", group_size=", w.group_size, ", c=", w.c,
                         ", grid_size=", w.grid_size, ", got ", shape_text(w.data));
  }
  if (reinterpret_cast<uintptr_t>(w.data.data) % 16 != 0) {
    return invalid_value(op, ": prepacked must be aligned to 16 bytes; call .clone() first");
  }
  return {};
}

Status Unprepack::plan(TensorSpec* out) const {
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(check_prepacked("unprepack", weight, &f));
  cpu::unprepacked_specs(f, out);
  return {};
}

Status Unprepack::launch(const TensorView* out, void*, cudaStream_t stream) const {
  cuda::PrepackParams p{};
  PRECAL_RETURN_IF_ERROR(check_prepacked("unprepack", weight, &p.format));
  p.layout = format::cuda_layout(p.format);
  p.weight = {out[0].as<uint32_t>(), out[1].data,          out[2].as<uint16_t>(), out[3].as<int8_t>(),
              out[4].as<uint8_t>(),  out[5].as<uint8_t>(), out[6].data,           out[7].as<uint8_t>()};
  p.prepacked = weight.data.as<uint8_t>();
  return cuda::launch_unprepack(p, stream);
}

namespace {

Status check_float(const char* op, const char* name, const TensorView& t) {
  PRECAL_RETURN_IF_ERROR(check_dtype(op, name, t, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}));
  return check_contiguous(op, name, t);
}

int64_t tokens_of(const TensorView& x) {
  int64_t M = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) M *= x.shape[i];
  return M;
}

}  // namespace

Status Linear::plan(TensorSpec* out) const {
  constexpr const char* op = "linear";
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(check_float(op, "x", x));
  PRECAL_RETURN_IF_ERROR(check_prepacked(op, weight, &f));
  if (x.ndim < 1 || x.shape[x.ndim - 1] != f.K) {
    return invalid_value(op, ": x must be [..., K] with K = ", f.K, ", got ", shape_text(x));
  }
  if (activations != "f32" && activations != "a16" && activations != "a8") {
    return invalid_value(op, ": activations must be f32, a16 or a8, got ", activations);
  }
  if (bias.present) {
    PRECAL_RETURN_IF_ERROR(check_float(op, "bias", bias));
    PRECAL_RETURN_IF_ERROR(check_shape(op, "bias", bias, {bias.dtype, {f.N}}, "(N)"));
  }
  out[0] = x;
  out[0].shape[x.ndim - 1] = f.N;
  return {};
}

int64_t Linear::workspace_bytes() const {
  WeightFormat f;
  int64_t bytes = 0;
  // An error of the device is found, and named, by the launch.
  if (check_prepacked("linear", weight, &f).ok()) (void)cuda::linear_workspace(f, tokens_of(x), x.dtype, &bytes).ok();
  return bytes;
}

Status Linear::launch(const TensorView* out, void* workspace, cudaStream_t stream) const {
  cuda::LinearParams p{};
  PRECAL_RETURN_IF_ERROR(check_prepacked("linear", weight, &p.format));
  p.layout = format::cuda_layout(p.format);
  p.prepacked = weight.data.as<uint8_t>();
  p.x = x.data;
  p.bias = bias.data;
  p.y = out[0].data;
  p.x_dtype = x.dtype;
  p.bias_dtype = bias.dtype;
  p.M = tokens_of(x);
  p.groups = format::num_groups(p.format);
  p.workspace = workspace;
  return cuda::launch_linear(p, stream);
}

Status Linear::prefers_dense(bool* dense) const {
  constexpr const char* op = "linear";
  WeightFormat f;
  int capability = 0;
  *dense = false;
  if (!cuda::kDenseMeasured) return {};
  PRECAL_RETURN_IF_ERROR(check_prepacked(op, weight, &f));
  PRECAL_RETURN_IF_ERROR(cuda::compute_capability(op, &capability));
  *dense = cuda::dense_is_chosen(f, tokens_of(x), x.dtype == DType::kFloat32, capability, cuda::kDenseMeasured);
  return {};
}

Status DenseRows::plan(TensorSpec* out) const {
  WeightFormat f;
  PRECAL_RETURN_IF_ERROR(check_prepacked("dense_rows", weight, &f));
  if (first_row < 0 || first_row % format::kRowTile != 0 || rows < 0 || first_row + rows > f.N) {
    return invalid_value("dense_rows: rows must lie in [0, N) and begin at a multiple of 16, got ", rows, " from ",
                         first_row, " of ", f.N);
  }
  out[0] = {dtype, {rows, f.K}};
  return {};
}

Status DenseRows::launch(const TensorView* out, void*, cudaStream_t stream) const {
  cuda::DenseRowsParams p{};
  PRECAL_RETURN_IF_ERROR(check_prepacked("dense_rows", weight, &p.format));
  p.layout = format::cuda_layout(p.format);
  p.prepacked = weight.data.as<uint8_t>();
  p.groups = format::num_groups(p.format);
  p.out = out[0].data;
  p.dtype = dtype;
  p.first_row = first_row;
  p.rows = rows;
  return cuda::launch_dense_rows(p, stream);
}

}  // namespace precal::bindings::gpu
