// SPDX-License-Identifier: Apache-2.0
// precal_ext._C: every CPU op on numpy arrays and DLPack tensors, plus facts about the build and the format. No torch:
// the way in for microbenchmarks, other frameworks and debugging.
#include <array>
#include <optional>

#include "bindings/bench_limits.h"
#include "bindings/python_array.h"
#include "bindings/thread_pool.h"
#include "core/parallel.h"
#include "cpu/ops.h"
#include "cpu/select.h"

#ifndef PRECAL_VERSION
#define PRECAL_VERSION "unknown"
#endif

namespace precal::bindings {
namespace {

template <typename Op>
py::object execute(const Op& op) {
  std::array<TensorSpec, Op::kOutputs> specs;
  check(op.plan(specs.data()));
  std::array<py::array, Op::kOutputs> arrays;
  std::array<TensorView, Op::kOutputs> views;
  for (size_t i = 0; i < specs.size(); ++i) {
    arrays[i] = new_array(specs[i]);
    static_cast<TensorSpec&>(views[i]) = specs[i];
    views[i].data = arrays[i].mutable_data();
    views[i].present = true;
  }
  Status status;
  {
    py::gil_scoped_release release;
    status = op.run(views.data());
  }
  check(status);
  if constexpr (Op::kOutputs == 1) return arrays[0];
  py::tuple result(Op::kOutputs);
  for (size_t i = 0; i < arrays.size(); ++i) result[i] = arrays[i];
  return result;
}

// The borrowed tensors of a weight; `list` keeps them alive.
cpu::WeightTensors weight_tensors(std::array<Borrowed, 8>* list, const py::object& packed, const py::object& scale,
                                  const py::object& row_scale, const py::object& grid, const py::object& outlier_index,
                                  const py::object& outlier_value, const py::object& outlier_scale,
                                  const py::object& outlier_mask, int64_t K, int64_t bits, int64_t group_size) {
  auto& b = *list;
  b = {borrow_cpu("packed", packed),
       borrow_cpu("scale", scale),
       borrow_cpu("row_scale", row_scale),
       borrow_optional("grid", grid),
       borrow_optional("outlier_index", outlier_index),
       borrow_optional("outlier_value", outlier_value),
       borrow_optional("outlier_scale", outlier_scale),
       borrow_optional("outlier_mask", outlier_mask)};
  return {b[0].view, b[1].view, b[2].view, b[3].view, b[4].view, b[5].view, b[6].view, b[7].view, K, bits, group_size};
}

py::dict build_info() {
  py::dict info;
  info["version"] = PRECAL_VERSION;
  info["compiler"] = __VERSION__;
  info["supported_isas"] = cpu::supported_isas();
  info["cuda"] = bool(PRECAL_WITH_CUDA);
  info["cuda_archs"] = PRECAL_CUDA_ARCHS;
  info["format_version"] = format::kFormatVersion;
  return info;
}

std::string cpu_isa() {
  check(cpu::kernels_status());
  return cpu::kernels().name;
}

py::list outlier_block_ranges(int64_t K) {
  if (K < 0 || K > (int64_t(1) << 30))
    throw py::value_error(concat("outlier_blocks: K must lie in [0, 2^30], got ", K));
  const format::OutlierBlocks blocks = format::outlier_blocks(K);
  py::list ranges;
  for (int64_t b = 0; b < blocks.num_blocks; ++b) {
    ranges.append(py::make_tuple(format::block_begin(blocks, b), format::block_end(blocks, b)));
  }
  return ranges;
}

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "precal's CPU ops on numpy arrays and DLPack tensors (bfloat16 comes out as uint16 bits). Same names, arguments "
      "and bytes as torch.ops.precal; the contracts are in precal_ext.ops.";
  set_parallel_for(pool_parallel_for);

  define_limits(m);

  m.def("build_info", &build_info, "Version, compiler, instruction sets and CUDA architectures of this build.");
  m.def("cpu_isa", &cpu_isa, "Instruction set in use: scalar, avx2 or avx512. PRECAL_ISA forces one.");
  m.def(
      "force_isa", [](const std::string& name) { check(cpu::force_isa(name.c_str())); }, py::arg("name"),
      "Use another instruction set from now on; an empty name returns to the automatic choice.");
  m.def("set_num_threads", &set_pool_threads, py::arg("n"), "Threads of this module's own pool, n >= 1.");
  m.def("get_num_threads", &pool_threads);
  m.def("outlier_blocks", &outlier_block_ranges, py::arg("K"), "[(begin, end)] of the outlier blocks of a row.");
  m.def("num_outlier_blocks", [](int64_t K) { return format::outlier_blocks(K).num_blocks; }, py::arg("K"));
  m.def(
      "words_per_row", [](int64_t K, int bits) { return format::words_per_row(K, bits); }, py::arg("K"),
      py::arg("bits"));
  m.def(
      "prepacked_bytes",
      [](int64_t N, int64_t K, int bits, int64_t group_size, int c, int grid_size, bool split,
         const std::string& scale_dtype) {
        // As strict as prepack itself: fakes come here with whatever they were given.
        constexpr int64_t kLimit = int64_t(1) << 30;
        if (N < 0 || N > kLimit || K < 0 || K > kLimit || group_size < 1 || group_size > kLimit || bits < 2 ||
            bits > 8 || c < 0 || c > format::kMaxCapacity || !format::grid_size_fits(grid_size, bits)) {
          throw py::value_error(
              concat("prepacked_bytes: N and K must lie in [0, 2^30], group_size in [1, 2^30], bits in ",
                     "[2, 8], c in [0, 16], grid_size 0, 2^bits or 2^(bits+1), got ", N, ", ", K, ", ", group_size,
                     ", ", bits, ", ", c, ", ", grid_size));
        }
        format::WeightFormat f;
        f.N = N;
        f.K = K;
        f.bits = bits;
        f.group_size = group_size;
        f.c = c;
        f.grid_size = grid_size;
        f.split = split;
        f.scale_type = scale_dtype == "float16" ? format::ScaleType::kFloat16 : format::ScaleType::kE4m3;
        return format::tile_layout(f).total_bytes;
      },
      py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("c"), py::arg("grid_size"),
      py::arg("split"), py::arg("scale_dtype"));
  m.attr("FORMAT_VERSION") = format::kFormatVersion;
  m.attr("OUTLIER_UNIT") = format::kOutlierUnit;
  m.attr("OUTLIER_BLOCK") = format::kBlock;
  m.attr("MAX_LEVEL") = format::kMaxLevel;
  m.attr("MAX_CAPACITY") = format::kMaxCapacity;

  m.def(
      "soft_threshold",
      [](const py::object& w, double lam) {
        const Borrowed a = borrow_cpu("w", w);
        return execute(cpu::SoftThreshold{a.view, lam});
      },
      py::arg("w"), py::arg("lam"));
  m.def(
      "salience_threshold",
      [](const py::object& w, double alpha, const std::string& scope, int64_t group_size,
         const std::string& normalize) {
        const Borrowed a = borrow_cpu("w", w);
        return execute(cpu::SalienceThreshold{a.view, alpha, scope, group_size, normalize});
      },
      py::arg("w"), py::arg("alpha"), py::arg("scope") = "tensor", py::arg("group_size") = 128,
      py::arg("normalize") = "none");
  m.def(
      "salience_mask",
      [](const py::object& w, const py::object& lam, const std::string& scope, int64_t group_size,
         const std::string& normalize) {
        const Borrowed a = borrow_cpu("w", w), b = borrow_cpu("lam", lam);
        return execute(cpu::SalienceMask{a.view, b.view, scope, group_size, normalize});
      },
      py::arg("w"), py::arg("lam"), py::arg("scope") = "tensor", py::arg("group_size") = 128,
      py::arg("normalize") = "none");
  m.def(
      "histogram",
      [](const py::object& w, int64_t num_bins, double lo, double hi, const py::object& divisor,
         const py::object& weight, int64_t group_size, const py::object& label, int64_t num_labels) {
        const Borrowed a = borrow_cpu("w", w), b = borrow_optional("divisor", divisor),
                       c = borrow_optional("weight", weight), d = borrow_optional("label", label);
        return execute(cpu::Histogram{a.view, num_bins, lo, hi, b.view, c.view, group_size, d.view, num_labels});
      },
      py::arg("w"), py::arg("num_bins"), py::arg("lo"), py::arg("hi"), py::arg("divisor") = py::none(),
      py::arg("weight") = py::none(), py::arg("group_size") = 128, py::arg("label") = py::none(),
      py::arg("num_labels") = 1);
  m.def(
      "spread_codes",
      [](const py::object& counts, double lo, double hi, const py::object& grid) {
        const Borrowed a = borrow_cpu("counts", counts), b = borrow_cpu("grid", grid);
        return execute(cpu::SpreadCodes{a.view, lo, hi, b.view});
      },
      py::arg("counts"), py::arg("lo"), py::arg("hi"), py::arg("grid"));
  m.def(
      "kl_divergence",
      [](const py::object& p, const py::object& q, double smoothing) {
        const Borrowed a = borrow_cpu("p", p), b = borrow_cpu("q", q);
        return execute(cpu::KlDivergence{a.view, b.view, smoothing});
      },
      py::arg("p"), py::arg("q"), py::arg("smoothing") = 0.0);
  m.def(
      "fit_grid",
      [](const py::object& counts, double lo, double hi, const py::object& grid, double mu, int64_t rounds) {
        const Borrowed a = borrow_cpu("counts", counts), b = borrow_cpu("grid", grid);
        return execute(cpu::FitGrid{a.view, lo, hi, b.view, mu, rounds});
      },
      py::arg("counts"), py::arg("lo"), py::arg("hi"), py::arg("grid"), py::arg("mu") = 0.0, py::arg("rounds") = 1);
  m.def(
      "quantize_groups",
      [](const py::object& w, const py::object& grid, int64_t bits, int64_t group_size, int64_t c, double lam,
         const std::string& scale_dtype, bool symmetric, double search_lo, double search_hi) {
        const Borrowed a = borrow_cpu("w", w), b = borrow_optional("grid", grid);
        return execute(cpu::QuantizeGroups{a.view, b.view, bits, group_size, c, lam, scale_dtype, symmetric, search_lo,
                                           search_hi});
      },
      py::arg("w"), py::arg("grid"), py::arg("bits"), py::arg("group_size"), py::arg("c") = 0, py::arg("lam") = 0.0,
      py::arg("scale_dtype") = "e4m3", py::arg("symmetric") = false, py::arg("search_lo") = 0.6,
      py::arg("search_hi") = 1.1);
  m.def(
      "quantize_split",
      [](const py::object& w, const py::object& salient, int64_t bits, int64_t group_size) {
        const Borrowed a = borrow_cpu("w", w), b = borrow_cpu("salient", salient);
        return execute(cpu::QuantizeSplit{a.view, b.view, bits, group_size});
      },
      py::arg("w"), py::arg("salient"), py::arg("bits"), py::arg("group_size"));
  m.def(
      "pack",
      [](const py::object& codes, int64_t bits) {
        const Borrowed a = borrow_cpu("codes", codes);
        return execute(cpu::Pack{a.view, bits});
      },
      py::arg("codes"), py::arg("bits"));
  m.def(
      "unpack",
      [](const py::object& packed, int64_t bits, int64_t K) {
        const Borrowed a = borrow_cpu("packed", packed);
        return execute(cpu::Unpack{a.view, bits, K});
      },
      py::arg("packed"), py::arg("bits"), py::arg("K"));
  m.def(
      "dequantize",
      [](const py::object& packed, const py::object& scale, const py::object& row_scale, const py::object& grid,
         const py::object& outlier_index, const py::object& outlier_value, const py::object& outlier_scale,
         const py::object& outlier_mask, int64_t K, int64_t bits, int64_t group_size) {
        std::array<Borrowed, 8> list;
        return execute(
            cpu::Dequantize{weight_tensors(&list, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                           outlier_scale, outlier_mask, K, bits, group_size)});
      },
      py::arg("packed"), py::arg("scale"), py::arg("row_scale"), py::arg("grid"), py::arg("outlier_index"),
      py::arg("outlier_value"), py::arg("outlier_scale"), py::arg("outlier_mask"), py::arg("K"), py::arg("bits"),
      py::arg("group_size"));
  m.def(
      "prepack",
      [](const py::object& packed, const py::object& scale, const py::object& row_scale, const py::object& grid,
         const py::object& outlier_index, const py::object& outlier_value, const py::object& outlier_scale,
         const py::object& outlier_mask, int64_t K, int64_t bits, int64_t group_size) {
        std::array<Borrowed, 8> list;
        return execute(cpu::Prepack{weight_tensors(&list, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                                   outlier_scale, outlier_mask, K, bits, group_size)});
      },
      py::arg("packed"), py::arg("scale"), py::arg("row_scale"), py::arg("grid"), py::arg("outlier_index"),
      py::arg("outlier_value"), py::arg("outlier_scale"), py::arg("outlier_mask"), py::arg("K"), py::arg("bits"),
      py::arg("group_size"));
  m.def(
      "unprepack",
      [](const py::object& prepacked, int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t c,
         int64_t grid_size, bool split, const std::string& scale_dtype) {
        const Borrowed a = borrow_cpu("prepacked", prepacked);
        return execute(
            cpu::Unprepack{cpu::PrepackedWeight{a.view, N, K, bits, group_size, c, grid_size, split, scale_dtype}});
      },
      py::arg("prepacked"), py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("c"),
      py::arg("grid_size"), py::arg("split"), py::arg("scale_dtype"));
  m.def(
      "linear",
      [](const py::object& x, const py::object& prepacked, const py::object& bias, int64_t N, int64_t K, int64_t bits,
         int64_t group_size, int64_t c, int64_t grid_size, bool split, const std::string& scale_dtype,
         const std::string& activations) {
        const Borrowed a = borrow_cpu("x", x), b = borrow_cpu("prepacked", prepacked),
                       d = borrow_optional("bias", bias);
        return execute(
            cpu::Linear{a.view, cpu::PrepackedWeight{b.view, N, K, bits, group_size, c, grid_size, split, scale_dtype},
                        d.view, activations});
      },
      py::arg("x"), py::arg("prepacked"), py::arg("bias"), py::arg("N"), py::arg("K"), py::arg("bits"),
      py::arg("group_size"), py::arg("c"), py::arg("grid_size"), py::arg("split"), py::arg("scale_dtype"),
      py::arg("activations") = "a16");
}

}  // namespace
}  // namespace precal::bindings
