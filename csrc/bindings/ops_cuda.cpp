// SPDX-License-Identifier: Apache-2.0
// torch.ops.precal on CUDA devices. Loaded by precal_ext only where torch itself has CUDA.
#include <cstdlib>
#include <string>
#include <tuple>

#include "bindings/cuda_ops.h"
#include "bindings/dense_linear.h"
#include "bindings/torch_cuda.h"

namespace precal::bindings {
namespace {

using MaybeTensor = std::optional<Tensor>;

// Another argument may have brought the call here.
int32_t device_of(const char* op, const Tensor& first) {
  if (!is_on_gpu(first)) {
    throw std::runtime_error(concat(op, ": the first argument must be on the CUDA device of the others, got a CPU ",
                                    "tensor; call .to(device) first"));
  }
  return first.get_device_index();
}

// One call of one op: on the device and the current stream of its first tensor, where the others must lie too.
struct DeviceCall : Call {
  const Tensor& like;
  DeviceGuard guard;

  DeviceCall(const char* name, const Tensor& first) : Call{name}, like(first), guard(device_of(name, first)) {}

  TensorView tensor(const char* name, const Tensor& t) const {
    if (!is_on_gpu(t) || t.get_device_index() != like.get_device_index()) {
      throw std::runtime_error(concat(op, ": ", name, " must be on CUDA device ", like.get_device_index(),
                                      " as the first argument, got another device; call .to(device) first"));
    }
    return view(name, t);
  }
  TensorView optional(const char* name, const MaybeTensor& t) const {
    return t.has_value() ? tensor(name, *t) : TensorView();
  }

  template <typename Op>
  std::array<Tensor, Op::kOutputs> run(const Op& arguments) const {
    std::array<TensorSpec, Op::kOutputs> specs;
    check(arguments.plan(specs.data()));
    std::array<Tensor, Op::kOutputs> outputs;
    std::array<TensorView, Op::kOutputs> views;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::vector<int64_t> sizes(specs[i].shape, specs[i].shape + specs[i].ndim);
      outputs[i] = torch::stable::new_empty(like, sizes, to_scalar_type(specs[i].dtype));
      views[i] = view("output", outputs[i]);
    }
    const int64_t bytes = arguments.workspace_bytes();
    Tensor workspace;  // freed on return: the allocator hands it on in the order of the stream
    if (bytes > 0) workspace = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
    const cudaStream_t stream = current_stream(like.get_device_index());
    check(arguments.launch(views.data(), bytes > 0 ? workspace.data_ptr() : nullptr, stream));
    if constexpr (gpu::HasVerify<Op>::value) {
      if (!cuda::is_capturing(stream)) {
        const Tensor flag = torch::stable::new_empty(like, {1}, ScalarType::Int);
        check(arguments.verify(views.data(), static_cast<uint32_t*>(flag.data_ptr()), stream));
      }
    }
    return outputs;
  }
  template <typename Op>
  auto run_tuple(const Op& arguments) const {
    return as_tuple(run(arguments), std::make_index_sequence<size_t(Op::kOutputs)>());
  }

 private:
  template <size_t... I, typename Array>
  static auto as_tuple(const Array& a, std::index_sequence<I...>) {
    return std::make_tuple(a[I]...);
  }
};

Tensor soft_threshold(const Tensor& w, double lam) {
  const DeviceCall call("soft_threshold", w);
  return call.run(gpu::SoftThreshold{{call.tensor("w", w), lam}, {}})[0];
}

Tensor salience_threshold(const Tensor& w, double alpha, std::string scope, int64_t group_size, std::string normalize) {
  const DeviceCall call("salience_threshold", w);
  return call.run(gpu::SalienceThreshold{{call.tensor("w", w), alpha, scope, group_size, normalize}})[0];
}

Tensor salience_mask(const Tensor& w, const Tensor& lam, std::string scope, int64_t group_size, std::string normalize) {
  const DeviceCall call("salience_mask", w);
  return call.run(gpu::SalienceMask{{call.tensor("w", w), call.tensor("lam", lam), scope, group_size, normalize}})[0];
}

Tensor spread_codes(const Tensor& counts, double lo, double hi, const Tensor& grid) {
  const DeviceCall call("spread_codes", counts);
  return call.run(gpu::SpreadCodes{{call.tensor("counts", counts), lo, hi, call.tensor("grid", grid)}, {}})[0];
}

Tensor kl_divergence(const Tensor& p, const Tensor& q, double smoothing) {
  const DeviceCall call("kl_divergence", p);
  return call.run(gpu::KlDivergence{{call.tensor("p", p), call.tensor("q", q), smoothing}, {}})[0];
}

Tensor fit_grid(const Tensor& counts, double lo, double hi, const Tensor& grid, double mu, int64_t rounds) {
  const DeviceCall call("fit_grid", counts);
  return call.run(gpu::FitGrid{{call.tensor("counts", counts), lo, hi, call.tensor("grid", grid), mu, rounds}})[0];
}

std::tuple<Tensor, Tensor> histogram(const Tensor& w, int64_t num_bins, double lo, double hi, MaybeTensor divisor,
                                     MaybeTensor weight, int64_t group_size, MaybeTensor label, int64_t num_labels) {
  const DeviceCall call("histogram", w);
  return call.run_tuple(
      gpu::Histogram{{call.tensor("w", w), num_bins, lo, hi, call.optional("divisor", divisor),
                      call.optional("weight", weight), group_size, call.optional("label", label), num_labels},
                     {}});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_groups(const Tensor& w, MaybeTensor grid, int64_t bits,
                                                                   int64_t group_size, int64_t c, double lam,
                                                                   std::string scale_dtype, bool symmetric,
                                                                   double search_lo, double search_hi) {
  const DeviceCall call("quantize_groups", w);
  return call.run_tuple(gpu::QuantizeGroups{{call.tensor("w", w), call.optional("grid", grid), bits, group_size, c, lam,
                                             scale_dtype, symmetric, search_lo, search_hi}});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_split(const Tensor& w, const Tensor& salient, int64_t bits,
                                                                  int64_t group_size) {
  const DeviceCall call("quantize_split", w);
  return call.run_tuple(gpu::QuantizeSplit{{call.tensor("w", w), call.tensor("salient", salient), bits, group_size}});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_salient(const Tensor& w, const Tensor& lam, int64_t bits,
                                                                    int64_t group_size, std::string scope) {
  const DeviceCall call("quantize_salient", w);
  return call.run_tuple(gpu::QuantizeSalient{{call.tensor("w", w), call.tensor("lam", lam), bits, group_size, scope}});
}

Tensor pack(const Tensor& codes, int64_t bits) {
  const DeviceCall call("pack", codes);
  return call.run(gpu::Pack{{call.tensor("codes", codes), bits}, {}})[0];
}

Tensor unpack(const Tensor& packed, int64_t bits, int64_t K) {
  const DeviceCall call("unpack", packed);
  return call.run(gpu::Unpack{{call.tensor("packed", packed), bits, K}, {}})[0];
}

cpu::WeightTensors weight_tensors(const DeviceCall& call, const Tensor& packed, const Tensor& scale,
                                  const Tensor& row_scale, const MaybeTensor& grid, const MaybeTensor& outlier_index,
                                  const MaybeTensor& outlier_value, const MaybeTensor& outlier_scale,
                                  const MaybeTensor& outlier_mask, int64_t K, int64_t bits, int64_t group_size,
                                  int64_t segment) {
  return {call.tensor("packed", packed),
          call.tensor("scale", scale),
          call.tensor("row_scale", row_scale),
          call.optional("grid", grid),
          call.optional("outlier_index", outlier_index),
          call.optional("outlier_value", outlier_value),
          call.optional("outlier_scale", outlier_scale),
          call.optional("outlier_mask", outlier_mask),
          K,
          bits,
          group_size,
          segment};
}

Tensor dequantize(const Tensor& packed, const Tensor& scale, const Tensor& row_scale, MaybeTensor grid,
                  MaybeTensor outlier_index, MaybeTensor outlier_value, MaybeTensor outlier_scale,
                  MaybeTensor outlier_mask, int64_t K, int64_t bits, int64_t group_size, int64_t segment) {
  const DeviceCall call("dequantize", packed);
  return call.run(gpu::Dequantize{{weight_tensors(call, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                                  outlier_scale, outlier_mask, K, bits, group_size, segment)},
                                  {}})[0];
}

std::tuple<Tensor, Tensor> measure(const Tensor& w, const Tensor& packed, const Tensor& scale, const Tensor& row_scale,
                                   MaybeTensor grid, MaybeTensor outlier_index, MaybeTensor outlier_value,
                                   MaybeTensor outlier_scale, MaybeTensor outlier_mask, int64_t K, int64_t bits,
                                   int64_t group_size, int64_t num_bins, double half, int64_t segment) {
  const DeviceCall call("measure", w);
  return call.run_tuple(gpu::Measure{{call.tensor("w", w),
                                      weight_tensors(call, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                                     outlier_scale, outlier_mask, K, bits, group_size, segment),
                                      num_bins, half},
                                     {}});
}

Tensor prepack(const Tensor& packed, const Tensor& scale, const Tensor& row_scale, MaybeTensor grid,
               MaybeTensor outlier_index, MaybeTensor outlier_value, MaybeTensor outlier_scale,
               MaybeTensor outlier_mask, int64_t K, int64_t bits, int64_t group_size, int64_t segment) {
  const DeviceCall call("prepack", packed);
  return call.run(gpu::Prepack{weight_tensors(call, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                              outlier_scale, outlier_mask, K, bits, group_size, segment)})[0];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> unprepack(
    const Tensor& prepacked, int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t c, int64_t grid_size,
    bool split, std::string scale_dtype, int64_t segment) {
  const DeviceCall call("unprepack", prepacked);
  return call.run_tuple(gpu::Unprepack{
      {call.tensor("prepacked", prepacked), N, K, bits, group_size, c, grid_size, split, scale_dtype, segment}});
}

// PRECAL_LINEAR, looked at in every call: the product of dense matrices, precal's own kernels, or what is faster.
bool wants_dense(const gpu::Linear& arguments) {
  const char* text = std::getenv("PRECAL_LINEAR");
  const std::string wanted = text == nullptr ? "auto" : text;
  bool dense = wanted == "dequantize";
  if (wanted == "auto" || wanted.empty()) {
    check(arguments.prefers_dense(&dense));
  } else if (!dense && wanted != "mma") {
    check(invalid_value("linear: PRECAL_LINEAR must be auto, mma or dequantize, got ", quoted(wanted)));
  }
  return dense;
}

// x may be strided: activations often are, and a copy of them is small beside the weight.
Tensor linear(const Tensor& x, const Tensor& prepacked, MaybeTensor bias, int64_t N, int64_t K, int64_t bits,
              int64_t group_size, int64_t c, int64_t grid_size, bool split, std::string scale_dtype, int64_t segment,
              std::string activations) {
  const DeviceCall call("linear", x);
  const Tensor rows = torch::stable::contiguous(x);
  const gpu::Linear arguments{
      call.tensor("x", rows),
      {call.tensor("prepacked", prepacked), N, K, bits, group_size, c, grid_size, split, scale_dtype, segment},
      call.optional("bias", bias),
      activations};
  TensorSpec y;
  check(arguments.plan(&y));
  if (y.numel() == 0 || K == 0 || !wants_dense(arguments)) return call.run(arguments)[0];
  return dense_linear(rows, bias, N, K, slice_rows(N, K, dtype_bytes(y.dtype)), [&](int64_t first, const Tensor& w) {
    const TensorView out = call.view("slice", w);
    check(gpu::DenseRows(arguments.weight, y.dtype, first, w.size(0))
              .launch(&out, nullptr, current_stream(x.get_device_index())));
  });
}

}  // namespace

PRECAL_TORCH_LIBRARY_IMPL(PRECAL_NAMESPACE, PRECAL_CUDA_KEY, m) {
  m.impl("soft_threshold", TORCH_BOX(&soft_threshold));
  m.impl("salience_threshold", TORCH_BOX(&salience_threshold));
  m.impl("salience_mask", TORCH_BOX(&salience_mask));
  m.impl("spread_codes", TORCH_BOX(&spread_codes));
  m.impl("kl_divergence", TORCH_BOX(&kl_divergence));
  m.impl("fit_grid", TORCH_BOX(&fit_grid));
  m.impl("histogram", TORCH_BOX(&histogram));
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
