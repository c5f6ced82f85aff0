// SPDX-License-Identifier: Apache-2.0
// precal_ext._C_cuda: every CUDA op on DLPack tensors plus a stream, with no torch involved. Outputs and scratch are
// given by the caller; nothing is allocated or synchronised here. Importing it touches no device.
#include <array>

#include "bindings/cuda_ops.h"
#include "bindings/python_array.h"
#include "cuda/linear_config.h"

namespace precal::bindings {
namespace {

#if defined(PRECAL_CUDA_ON_CPU)
constexpr int kDevice = kDLCPU;  // tests/cuda_on_cpu
#else
constexpr int kDevice = kDLCUDA;
#endif

// One call of one op. All tensors must lie on one device.
struct Call {
  const char* op;
  uintptr_t stream;
  mutable int device_id = -1;

  Borrowed optional(const char* name, const py::object& object) const {
    Borrowed b = borrow(op, name, object);
    if (!b.view.present) return b;
    if (b.device_type != kDevice) {
      throw py::value_error(
          concat(op, ": ", name, " must be on a CUDA device, got DLPack device type ", b.device_type));
    }
    if (device_id >= 0 && device_id != b.device_id) {
      throw py::value_error(
          concat(op, ": ", name, " must be on CUDA device ", device_id, " as the others, got ", b.device_id));
    }
    device_id = b.device_id;
    check(check_contiguous(op, name, b.view));
    return b;
  }

  Borrowed tensor(const char* name, const py::object& object) const {
    if (object.is_none()) throw py::type_error(concat(op, ": ", name, " must be a DLPack tensor, got None"));
    return optional(name, object);
  }

  // `out` is a tensor, or a sequence of kOutputs tensors; `workspace` anything of at least as many bytes as needed.
  template <typename Op>
  void run(const Op& arguments, const py::object& out, const py::object& workspace) const {
    std::array<TensorSpec, Op::kOutputs> specs;
    check(arguments.plan(specs.data()));
    const bool several = py::isinstance<py::tuple>(out) || py::isinstance<py::list>(out);
    const py::object outs = several ? out : py::object(py::make_tuple(out));
    if (py::len(outs) != size_t(Op::kOutputs)) {
      throw py::value_error(concat(op, ": out must be ", Op::kOutputs, " tensors, got ", py::len(outs)));
    }
    std::array<Borrowed, Op::kOutputs> borrowed;
    std::array<TensorView, Op::kOutputs> views;
    for (size_t i = 0; i < specs.size(); ++i) {
      const std::string name = specs.size() == 1 ? "out" : concat("out[", i, "]");
      borrowed[i] = tensor(name.c_str(), outs[py::int_(i)]);
      views[i] = borrowed[i].view;
      check(check_tensor(op, name.c_str(), views[i], specs[i], "(what the op returns)"));
    }
    const int64_t wanted = arguments.workspace_bytes();
    const Borrowed scratch = optional("workspace", workspace);
    const int64_t given = scratch.view.present ? scratch.view.numel() * dtype_bytes(scratch.view.dtype) : 0;
    if (given < wanted || (wanted > 0 && reinterpret_cast<uintptr_t>(scratch.view.data) % 16 != 0)) {
      throw py::value_error(concat(op, ": workspace must have ", wanted, " bytes, aligned to 16, got ", given));
    }
    check(cuda::check_cuda(op, cudaSetDevice(device_id < 0 ? 0 : device_id)));
    check(arguments.launch(views.data(), scratch.view.data, reinterpret_cast<cudaStream_t>(stream)));
  }
};

py::dict device_info() {
  py::dict info;
  int driver = 0, count = 0;
  cudaDriverGetVersion(&driver);
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  info["runtime_version"] = CUDART_VERSION;
  info["driver_version"] = driver;
  info["device_count"] = count;
  return info;
}

py::dict linear_config(int64_t N, int64_t K, int64_t bits, int64_t group_size, bool split, int64_t M, bool float32,
                       int multiprocessors, int64_t shared_bytes) {
  format::WeightFormat f;
  f.N = N;
  f.K = K;
  f.bits = int(bits);
  f.group_size = group_size;
  f.split = split;
  const cuda::LinearConfig c = cuda::linear_config(f, M, float32, multiprocessors, shared_bytes);
  py::dict found;
  found["kernel"] = c.kernel == cuda::LinearKernel::kAny     ? "any"
                    : c.kernel == cuda::LinearKernel::kSmall ? "small"
                                                             : "large";
  found["rows"] = c.rows;
  found["planes"] = c.planes;
  found["octets"] = c.octets;
  found["slices"] = c.slices;
  found["panels"] = c.panels;
  found["blocks"] = c.blocks;
  found["tile_tokens"] = c.tile_tokens;
  found["shared_bytes"] = c.shared_bytes;
  found["workspace_bytes"] = c.workspace_bytes;
  return found;
}

py::dict dense_config(int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t M, bool float32, int capability,
                      bool measured) {
  format::WeightFormat f;
  f.N = N;
  f.K = K;
  f.bits = int(bits);
  f.group_size = group_size;
  py::dict found;
  found["chosen"] = cuda::dense_is_chosen(f, M, float32, capability, measured);
  found["slice_rows"] = cuda::dense_slice_rows(N, K, float32 ? 4 : 2);
  return found;
}

}  // namespace
}  // namespace precal::bindings

#if !defined(PRECAL_CUDA_MODULE)
#define PRECAL_CUDA_MODULE _C_cuda
#endif

// The arguments that every op ends with.
#define PRECAL_ENDING py::arg("out"), py::arg("workspace") = py::none(), py::arg("stream") = 0

PYBIND11_MODULE(PRECAL_CUDA_MODULE, m) {
  namespace py = pybind11;
  using namespace precal;
  using namespace precal::bindings;
  using py::object;
  m.doc() =
      "precal's CUDA ops on DLPack tensors. Names and arguments are those of torch.ops.precal; then come `out`, the\n"
      "tensor or tensors to write; `workspace`, scratch of the size that the error names, where an op needs any; and\n"
      "`stream`, a cudaStream_t as an integer, 0 for the default.";
  m.def("device_info", &device_info, "Runtime and driver version, number of devices seen.");

  m.def("linear_config", &linear_config, py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("group_size"),
        py::arg("split"), py::arg("M"), py::arg("float32"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        "How linear would run such a weight on such a device (csrc/cuda/linear_config.h).");
  m.def("dense_config", &dense_config, py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("M"),
        py::arg("float32"), py::arg("capability"), py::arg("measured") = cuda::kDenseMeasured,
        "Whether linear would dequantize and let torch multiply, and in slices of how many rows.");

  m.def(
      "soft_threshold",
      [](const object& w, double lam, const object& out, const object& workspace, uintptr_t stream) {
        const Call call{"soft_threshold", stream};
        const Borrowed a = call.tensor("w", w);
        call.run(gpu::SoftThreshold{{a.view, lam}, {}}, out, workspace);
      },
      py::arg("w"), py::arg("lam"), PRECAL_ENDING);
  m.def(
      "salience_threshold",
      [](const object& w, double alpha, const std::string& scope, int64_t group_size, const std::string& normalize,
         const object& out, const object& workspace, uintptr_t stream) {
        const Call call{"salience_threshold", stream};
        const Borrowed a = call.tensor("w", w);
        call.run(gpu::SalienceThreshold{{a.view, alpha, scope, group_size, normalize}}, out, workspace);
      },
      py::arg("w"), py::arg("alpha"), py::arg("scope") = "tensor", py::arg("group_size") = 128,
      py::arg("normalize") = "none", PRECAL_ENDING);
  m.def(
      "salience_mask",
      [](const object& w, const object& lam, const std::string& scope, int64_t group_size, const std::string& normalize,
         const object& out, const object& workspace, uintptr_t stream) {
        const Call call{"salience_mask", stream};
        const Borrowed a = call.tensor("w", w), b = call.tensor("lam", lam);
        call.run(gpu::SalienceMask{{a.view, b.view, scope, group_size, normalize}}, out, workspace);
      },
      py::arg("w"), py::arg("lam"), py::arg("scope") = "tensor", py::arg("group_size") = 128,
      py::arg("normalize") = "none", PRECAL_ENDING);
  m.def(
      "spread_codes",
      [](const object& counts, double lo, double hi, const object& grid, const object& out, const object& workspace,
         uintptr_t stream) {
        const Call call{"spread_codes", stream};
        const Borrowed a = call.tensor("counts", counts), b = call.tensor("grid", grid);
        call.run(gpu::SpreadCodes{{a.view, lo, hi, b.view}, {}}, out, workspace);
      },
      py::arg("counts"), py::arg("lo"), py::arg("hi"), py::arg("grid"), PRECAL_ENDING);
  m.def(
      "kl_divergence",
      [](const object& p, const object& q, double smoothing, const object& out, const object& workspace,
         uintptr_t stream) {
        const Call call{"kl_divergence", stream};
        const Borrowed a = call.tensor("p", p), b = call.tensor("q", q);
        call.run(gpu::KlDivergence{{a.view, b.view, smoothing}, {}}, out, workspace);
      },
      py::arg("p"), py::arg("q"), py::arg("smoothing") = 0.0, PRECAL_ENDING);
  m.def(
      "fit_grid",
      [](const object& counts, double lo, double hi, const object& grid, double mu, int64_t rounds, const object& out,
         const object& workspace, uintptr_t stream) {
        const Call call{"fit_grid", stream};
        const Borrowed a = call.tensor("counts", counts), b = call.tensor("grid", grid);
        call.run(gpu::FitGrid{{a.view, lo, hi, b.view, mu, rounds}}, out, workspace);
      },
      py::arg("counts"), py::arg("lo"), py::arg("hi"), py::arg("grid"), py::arg("mu") = 0.0, py::arg("rounds") = 1,
      PRECAL_ENDING);
  m.def(
      "histogram",
      [](const object& w, int64_t num_bins, double lo, double hi, const object& divisor, const object& weight,
         int64_t group_size, const object& label, int64_t num_labels, const object& out, const object& workspace,
         uintptr_t stream) {
        const Call call{"histogram", stream};
        const Borrowed a = call.tensor("w", w), d = call.optional("divisor", divisor);
        const Borrowed v = call.optional("weight", weight), l = call.optional("label", label);
        call.run(gpu::Histogram{{a.view, num_bins, lo, hi, d.view, v.view, group_size, l.view, num_labels}, {}}, out,
                 workspace);
      },
      py::arg("w"), py::arg("num_bins"), py::arg("lo"), py::arg("hi"), py::arg("divisor") = py::none(),
      py::arg("weight") = py::none(), py::arg("group_size") = 128, py::arg("label") = py::none(),
      py::arg("num_labels") = 1, PRECAL_ENDING);
  m.def(
      "quantize_groups",
      [](const object& w, const object& grid, int64_t bits, int64_t group_size, int64_t c, double lam,
         const std::string& scale_dtype, bool symmetric, double search_lo, double search_hi, const object& out,
         const object& workspace, uintptr_t stream) {
        const Call call{"quantize_groups", stream};
        const Borrowed a = call.tensor("w", w), g = call.optional("grid", grid);
        call.run(gpu::QuantizeGroups{{a.view, g.view, bits, group_size, c, lam, scale_dtype, symmetric, search_lo,
                                      search_hi}},
                 out, workspace);
      },
      py::arg("w"), py::arg("grid"), py::arg("bits"), py::arg("group_size"), py::arg("c") = 0, py::arg("lam") = 0.0,
      py::arg("scale_dtype") = "e4m3", py::arg("symmetric") = false, py::arg("search_lo") = 0.6,
      py::arg("search_hi") = 1.1, PRECAL_ENDING);
  m.def(
      "quantize_split",
      [](const object& w, const object& salient, int64_t bits, int64_t group_size, const object& out,
         const object& workspace, uintptr_t stream) {
        const Call call{"quantize_split", stream};
        const Borrowed a = call.tensor("w", w), b = call.tensor("salient", salient);
        call.run(gpu::QuantizeSplit{{a.view, b.view, bits, group_size}}, out, workspace);
      },
      py::arg("w"), py::arg("salient"), py::arg("bits"), py::arg("group_size"), PRECAL_ENDING);
  m.def(
      "quantize_salient",
      [](const object& w, const object& lam, int64_t bits, int64_t group_size, const std::string& scope,
         const object& out, const object& workspace, uintptr_t stream) {
        const Call call{"quantize_salient", stream};
        const Borrowed a = call.tensor("w", w), b = call.tensor("lam", lam);
        call.run(gpu::QuantizeSalient{{a.view, b.view, bits, group_size, scope}}, out, workspace);
      },
      py::arg("w"), py::arg("lam"), py::arg("bits"), py::arg("group_size"), py::arg("scope") = "tensor", PRECAL_ENDING);
  m.def(
      "pack",
      [](const object& codes, int64_t bits, const object& out, const object& workspace, uintptr_t stream) {
        const Call call{"pack", stream};
        const Borrowed a = call.tensor("codes", codes);
        call.run(gpu::Pack{{a.view, bits}, {}}, out, workspace);
      },
      py::arg("codes"), py::arg("bits"), PRECAL_ENDING);
  m.def(
      "unpack",
      [](const object& packed, int64_t bits, int64_t K, const object& out, const object& workspace, uintptr_t stream) {
        const Call call{"unpack", stream};
        const Borrowed a = call.tensor("packed", packed);
        call.run(gpu::Unpack{{a.view, bits, K}, {}}, out, workspace);
      },
      py::arg("packed"), py::arg("bits"), py::arg("K"), PRECAL_ENDING);

  const auto define_weight_op = [&m](const char* name, auto make) {
    m.def(
        name,
        [name, make](const object& packed, const object& scale, const object& row_scale, const object& grid,
                     const object& index, const object& value, const object& other, const object& mask, int64_t K,
                     int64_t bits, int64_t group_size, int64_t segment, const object& out, const object& workspace,
                     uintptr_t stream) {
          const Call call{name, stream};
          std::array<Borrowed, 8> list;
          call.run(make(weight_tensors(call, &list, packed, scale, row_scale, grid, index, value, other, mask, K, bits,
                                       group_size, segment)),
                   out, workspace);
        },
        py::arg("packed"), py::arg("scale"), py::arg("row_scale"), py::arg("grid"), py::arg("outlier_index"),
        py::arg("outlier_value"), py::arg("outlier_scale"), py::arg("outlier_mask"), py::arg("K"), py::arg("bits"),
        py::arg("group_size"), py::arg("segment") = 0, PRECAL_ENDING);
  };
  define_weight_op("dequantize", [](const cpu::WeightTensors& w) { return gpu::Dequantize{{w}, {}}; });
  define_weight_op("prepack", [](const cpu::WeightTensors& w) { return gpu::Prepack{w}; });

  m.def(
      "measure",
      [](const object& w, const object& packed, const object& scale, const object& row_scale, const object& grid,
         const object& index, const object& value, const object& other, const object& mask, int64_t K, int64_t bits,
         int64_t group_size, int64_t num_bins, double half, int64_t segment, const object& out, const object& workspace,
         uintptr_t stream) {
        const Call call{"measure", stream};
        const Borrowed a = call.tensor("w", w);
        std::array<Borrowed, 8> list;
        call.run(gpu::Measure{{a.view,
                               weight_tensors(call, &list, packed, scale, row_scale, grid, index, value, other, mask, K,
                                              bits, group_size, segment),
                               num_bins, half},
                              {}},
                 out, workspace);
      },
      py::arg("w"), py::arg("packed"), py::arg("scale"), py::arg("row_scale"), py::arg("grid"),
      py::arg("outlier_index"), py::arg("outlier_value"), py::arg("outlier_scale"), py::arg("outlier_mask"),
      py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("num_bins"), py::arg("half"),
      py::arg("segment") = 0, PRECAL_ENDING);

  m.def(
      "unprepack",
      [](const object& prepacked, int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t c, int64_t grid_size,
         bool split, const std::string& scale_dtype, int64_t segment, const object& out, const object& workspace,
         uintptr_t stream) {
        const Call call{"unprepack", stream};
        const Borrowed a = call.tensor("prepacked", prepacked);
        call.run(gpu::Unprepack{{a.view, N, K, bits, group_size, c, grid_size, split, scale_dtype, segment}}, out,
                 workspace);
      },
      py::arg("prepacked"), py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("c"),
      py::arg("grid_size"), py::arg("split"), py::arg("scale_dtype"), py::arg("segment") = 0, PRECAL_ENDING);

  m.def(
      "dense_rows",
      [](const object& prepacked, int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t c, int64_t grid_size,
         bool split, const std::string& scale_dtype, int64_t segment, int64_t first_row, const object& out,
         const object& workspace, uintptr_t stream) {
        const Call call{"dense_rows", stream};
        const Borrowed a = call.tensor("prepacked", prepacked), o = call.tensor("out", out);
        check(check_dtype("dense_rows", "out", o.view, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}));
        call.run(gpu::DenseRows({a.view, N, K, bits, group_size, c, grid_size, split, scale_dtype, segment},
                                o.view.dtype, first_row, o.view.ndim > 0 ? o.view.shape[0] : 0),
                 out, workspace);
      },
      py::arg("prepacked"), py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("c"),
      py::arg("grid_size"), py::arg("split"), py::arg("scale_dtype"), py::arg("segment") = 0, py::arg("first_row") = 0,
      PRECAL_ENDING,
      "Rows of W' from `first_row` on, as many as `out` [rows, K] has, in its dtype: what torch's linear multiplies\n"
      "with where PRECAL_LINEAR=dequantize.");

  m.def(
      "linear",
      [](const object& x, const object& prepacked, const object& bias, int64_t N, int64_t K, int64_t bits,
         int64_t group_size, int64_t c, int64_t grid_size, bool split, const std::string& scale_dtype, int64_t segment,
         const std::string& activations, const object& out, const object& workspace, uintptr_t stream) {
        const Call call{"linear", stream};
        const Borrowed a = call.tensor("x", x), b = call.tensor("prepacked", prepacked),
                       v = call.optional("bias", bias);
        call.run(gpu::Linear{a.view,
                             {b.view, N, K, bits, group_size, c, grid_size, split, scale_dtype, segment},
                             v.view,
                             activations},
                 out, workspace);
      },
      py::arg("x"), py::arg("prepacked"), py::arg("bias"), py::arg("N"), py::arg("K"), py::arg("bits"),
      py::arg("group_size"), py::arg("c"), py::arg("grid_size"), py::arg("split"), py::arg("scale_dtype"),
      py::arg("segment") = 0, py::arg("activations") = "a16", PRECAL_ENDING);
}
