// SPDX-License-Identifier: Apache-2.0
// torch.ops.precal on the CPU: views in, tensors out. What an op accepts is decided in csrc/cpu.
#include <string>
#include <tuple>

#include "bindings/torch_tensor.h"
#include "core/parallel.h"
#include "cpu/ops.h"

namespace precal::bindings {
namespace {

using cpu::PrepackedWeight;
using cpu::WeightTensors;
using MaybeTensor = std::optional<Tensor>;

void torch_parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn body, void* context) {
  torch::stable::parallel_for(begin, end, grain, [&](int64_t b, int64_t e) { body(context, b, e); });
}

const bool g_installed = [] {
  set_parallel_for(torch_parallel_for);
  return true;
}();

template <size_t... I, typename Array>
auto as_tuple(const Array& a, std::index_sequence<I...>) {
  return std::make_tuple(a[I]...);
}

template <typename Op>
auto run_tuple(const Call& call, const Op& op, const Tensor& like) {
  return as_tuple(call.run(op, like), std::make_index_sequence<size_t(Op::kOutputs)>());
}

Tensor soft_threshold(const Tensor& w, double lam) {
  const Call call{"soft_threshold"};
  return call.run(cpu::SoftThreshold{call.view("w", w), lam}, w)[0];
}

Tensor salience_threshold(const Tensor& w, double alpha, std::string scope, int64_t group_size, std::string normalize) {
  const Call call{"salience_threshold"};
  return call.run(cpu::SalienceThreshold{call.view("w", w), alpha, scope, group_size, normalize}, w)[0];
}

Tensor salience_mask(const Tensor& w, const Tensor& lam, std::string scope, int64_t group_size, std::string normalize) {
  const Call call{"salience_mask"};
  return call.run(cpu::SalienceMask{call.view("w", w), call.view("lam", lam), scope, group_size, normalize}, w)[0];
}

std::tuple<Tensor, Tensor> histogram(const Tensor& w, int64_t num_bins, double lo, double hi, MaybeTensor divisor,
                                     MaybeTensor weight, int64_t group_size, MaybeTensor label, int64_t num_labels) {
  const Call call{"histogram"};
  return run_tuple(call,
                   cpu::Histogram{call.view("w", w), num_bins, lo, hi, call.view("divisor", divisor),
                                  call.view("weight", weight), group_size, call.view("label", label), num_labels},
                   w);
}

Tensor spread_codes(const Tensor& counts, double lo, double hi, const Tensor& grid) {
  const Call call{"spread_codes"};
  return call.run(cpu::SpreadCodes{call.view("counts", counts), lo, hi, call.view("grid", grid)}, counts)[0];
}

Tensor kl_divergence(const Tensor& p, const Tensor& q, double smoothing) {
  const Call call{"kl_divergence"};
  return call.run(cpu::KlDivergence{call.view("p", p), call.view("q", q), smoothing}, p)[0];
}

Tensor fit_grid(const Tensor& counts, double lo, double hi, const Tensor& grid, double mu, int64_t rounds) {
  const Call call{"fit_grid"};
  return call.run(cpu::FitGrid{call.view("counts", counts), lo, hi, call.view("grid", grid), mu, rounds}, grid)[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_groups(const Tensor& w, MaybeTensor grid, int64_t bits,
                                                                   int64_t group_size, int64_t c, double lam,
                                                                   std::string scale_dtype, bool symmetric,
                                                                   double search_lo, double search_hi) {
  const Call call{"quantize_groups"};
  return run_tuple(call,
                   cpu::QuantizeGroups{call.view("w", w), call.view("grid", grid), bits, group_size, c, lam,
                                       scale_dtype, symmetric, search_lo, search_hi},
                   w);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_split(const Tensor& w, const Tensor& salient, int64_t bits,
                                                                  int64_t group_size) {
  const Call call{"quantize_split"};
  return run_tuple(call, cpu::QuantizeSplit{call.view("w", w), call.view("salient", salient), bits, group_size}, w);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_salient(const Tensor& w, const Tensor& lam, int64_t bits,
                                                                    int64_t group_size, std::string scope) {
  const Call call{"quantize_salient"};
  return run_tuple(call, cpu::QuantizeSalient{call.view("w", w), call.view("lam", lam), bits, group_size, scope}, w);
}

Tensor pack(const Tensor& codes, int64_t bits) {
  const Call call{"pack"};
  return call.run(cpu::Pack{call.view("codes", codes), bits}, codes)[0];
}

Tensor unpack(const Tensor& packed, int64_t bits, int64_t K) {
  const Call call{"unpack"};
  return call.run(cpu::Unpack{call.view("packed", packed), bits, K}, packed)[0];
}

WeightTensors weight_tensors(const Call& call, const Tensor& packed, const Tensor& scale, const Tensor& row_scale,
                             const MaybeTensor& grid, const MaybeTensor& outlier_index,
                             const MaybeTensor& outlier_value, const MaybeTensor& outlier_scale,
                             const MaybeTensor& outlier_mask, int64_t K, int64_t bits, int64_t group_size,
                             int64_t segment) {
  return {call.view("packed", packed),
          call.view("scale", scale),
          call.view("row_scale", row_scale),
          call.view("grid", grid),
          call.view("outlier_index", outlier_index),
          call.view("outlier_value", outlier_value),
          call.view("outlier_scale", outlier_scale),
          call.view("outlier_mask", outlier_mask),
          K,
          bits,
          group_size,
          segment};
}

Tensor dequantize(const Tensor& packed, const Tensor& scale, const Tensor& row_scale, MaybeTensor grid,
                  MaybeTensor outlier_index, MaybeTensor outlier_value, MaybeTensor outlier_scale,
                  MaybeTensor outlier_mask, int64_t K, int64_t bits, int64_t group_size, int64_t segment) {
  const Call call{"dequantize"};
  return call.run(cpu::Dequantize{weight_tensors(call, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                                 outlier_scale, outlier_mask, K, bits, group_size, segment)},
                  packed)[0];
}

std::tuple<Tensor, Tensor> measure(const Tensor& w, const Tensor& packed, const Tensor& scale, const Tensor& row_scale,
                                   MaybeTensor grid, MaybeTensor outlier_index, MaybeTensor outlier_value,
                                   MaybeTensor outlier_scale, MaybeTensor outlier_mask, int64_t K, int64_t bits,
                                   int64_t group_size, int64_t num_bins, double half, int64_t segment) {
  const Call call{"measure"};
  return run_tuple(call,
                   cpu::Measure{call.view("w", w),
                                weight_tensors(call, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                               outlier_scale, outlier_mask, K, bits, group_size, segment),
                                num_bins, half},
                   w);
}

Tensor prepack(const Tensor& packed, const Tensor& scale, const Tensor& row_scale, MaybeTensor grid,
               MaybeTensor outlier_index, MaybeTensor outlier_value, MaybeTensor outlier_scale,
               MaybeTensor outlier_mask, int64_t K, int64_t bits, int64_t group_size, int64_t segment) {
  const Call call{"prepack"};
  return call.run(cpu::Prepack{weight_tensors(call, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                              outlier_scale, outlier_mask, K, bits, group_size, segment)},
                  packed)[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> unprepack(
    const Tensor& prepacked, int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t c, int64_t grid_size,
    bool split, std::string scale_dtype, int64_t segment) {
  const Call call{"unprepack"};
  return run_tuple(call,
                   cpu::Unprepack{PrepackedWeight{call.view("prepacked", prepacked), N, K, bits, group_size, c,
                                                  grid_size, split, scale_dtype, segment}},
                   prepacked);
}

// x may be strided: activations often are, and a copy of them is small beside the weight.
Tensor linear(const Tensor& x, const Tensor& prepacked, MaybeTensor bias, int64_t N, int64_t K, int64_t bits,
              int64_t group_size, int64_t c, int64_t grid_size, bool split, std::string scale_dtype, int64_t segment,
              std::string activations) {
  const Call call{"linear"};
  const Tensor rows = torch::stable::contiguous(x);
  return call.run(cpu::Linear{call.view("x", rows),
                              PrepackedWeight{call.view("prepacked", prepacked), N, K, bits, group_size, c, grid_size,
                                              split, scale_dtype, segment},
                              call.view("bias", bias), activations},
                  x)[0];
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(precal, CPU, m) {
  m.impl("soft_threshold", TORCH_BOX(&soft_threshold));
  m.impl("salience_threshold", TORCH_BOX(&salience_threshold));
  m.impl("salience_mask", TORCH_BOX(&salience_mask));
  m.impl("histogram", TORCH_BOX(&histogram));
  m.impl("spread_codes", TORCH_BOX(&spread_codes));
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("fit_grid", TORCH_BOX(&fit_grid));
  m.impl("quantize_groups", TORCH_BOX(&quantize_groups));
  m.impl("quantize_split", TORCH_BOX(&quantize_split));
  m.impl("quantize_salient", TORCH_BOX(&quantize_salient));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("unpack", TORCH_BOX(&unpack));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("measure", TORCH_BOX(&measure));
  m.impl("prepack", TORCH_BOX(&prepack));
  m.impl("unprepack", TORCH_BOX(&unprepack));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace precal::bindings

// For Python: force an instruction set in this library too (tests, benchmarks). Returns 0, or 1 with the reason in
// `message` (at most `size` bytes).
#include "cpu/select.h"
extern "C"
    __attribute__((visibility("default"))) int precal_torch_force_isa(const char* name, char* message, size_t size) {
  const precal::Status status = precal::cpu::force_isa(name);
  if (status.ok()) return 0;
  std::snprintf(message, size, "%s", status.message().c_str());
  return 1;
}
