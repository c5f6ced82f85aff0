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
#include "format/cuda_tiles.h"

#ifndef PRECAL_VERSION
#define PRECAL_VERSION "unknown"
#endif

namespace precal::bindings {
namespace {

// One call of one op: every error begins with its name.
struct Call {
  const char* op;

  Borrowed tensor(const char* name, const py::object& object) const { return borrow_cpu(op, name, object); }
  Borrowed optional(const char* name, const py::object& object) const { return borrow_optional(op, name, object); }
  // The kernel reads int32 words out of these bytes.
  Borrowed prepacked(const py::object& object) const { return borrow_cpu(op, "prepacked", object, 4); }

  [[noreturn]] void out_of_memory(const std::string& what) const {
    raise(PyExc_MemoryError, must_fit_in_memory(op, what));
  }

  template <typename Op>
  py::object run(const Op& arguments) const {
    std::array<TensorSpec, Op::kOutputs> specs;
    check(arguments.plan(specs.data()));
    std::array<py::array, Op::kOutputs> arrays;
    std::array<TensorView, Op::kOutputs> views;
    for (size_t i = 0; i < specs.size(); ++i) {
      try {
        arrays[i] = new_array(specs[i]);
      } catch (py::error_already_set& error) {
        error.restore();
        out_of_memory(output_text(specs[i]));
      }
      static_cast<TensorSpec&>(views[i]) = specs[i];
      views[i].data = arrays[i].mutable_data();
      views[i].present = true;
    }
    Status status;
    try {
      py::gil_scoped_release release;
      status = arguments.run(views.data());
    } catch (const std::bad_alloc&) {
      out_of_memory("its working memory");
    }
    check(status);
    if constexpr (Op::kOutputs == 1) return arrays[0];
    py::tuple result(Op::kOutputs);
    for (size_t i = 0; i < arrays.size(); ++i) result[i] = arrays[i];
    return result;
  }
};

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

format::OutlierBlocks checked_blocks(const char* name, int64_t K, int64_t segment) {
  if (K < 0 || K > (int64_t(1) << 30)) {
    throw py::value_error(concat(name, ": K must lie in [0, 2^30], got ", K));
  }
  check(cpu::check_segment(name, segment, K));
  return format::outlier_blocks(K, segment);
}

py::list outlier_block_ranges(int64_t K, int64_t segment) {
  const format::OutlierBlocks blocks = checked_blocks("outlier_blocks", K, segment);
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
  m.def("cpu_isa", &cpu_isa, "Instruction set in use: scalar, avx2, avxvnni or avx512. PRECAL_ISA forces one.");
  m.def(
      "force_isa", [](const std::string& name) { check(cpu::force_isa(name.c_str())); }, py::arg("name"),
      "Use another instruction set from now on; an empty name returns to the automatic choice.");
  m.def("set_num_threads", &set_pool_threads, py::arg("n"), "Threads of this module's own pool, n >= 1.");
  m.def("get_num_threads", &pool_threads);
  m.def("outlier_blocks", &outlier_block_ranges, py::arg("K"), py::arg("segment") = 0,
        "[(begin, end)] of the outlier blocks of a row.");
  m.def(
      "num_outlier_blocks",
      [](int64_t K, int64_t segment) { return checked_blocks("num_outlier_blocks", K, segment).num_blocks; },
      py::arg("K"), py::arg("segment") = 0);
  m.def(
      "outlier_segment",
      [](int64_t K, int64_t segment) { return checked_blocks("outlier_segment", K, segment).segment; }, py::arg("K"),
      py::arg("segment") = 0, "Columns after which the blocks of a row start anew.");
  m.def(
      "words_per_row",
      [](int64_t K, int bits) {
        if (K < 0 || K > (int64_t(1) << 30) || bits < format::kMinBits || bits > format::kMaxBits) {
          throw py::value_error(
              concat("words_per_row: K must lie in [0, 2^30] and bits in [2, 8], got ", K, " and ", bits));
        }
        return format::words_per_row(K, bits);
      },
      py::arg("K"), py::arg("bits"));
  // As strict as prepack itself: fakes come here with whatever they were given.
  const auto define_prepacked_bytes = [&m](const char* name, int64_t (*bytes)(const format::WeightFormat&),
                                           const char* doc) {
    m.def(
        name,
        [name, bytes](int64_t N, int64_t K, int bits, int64_t group_size, int c, int grid_size, bool split,
                      const std::string& scale_dtype, int64_t segment) {
          constexpr int64_t kLimit = int64_t(1) << 30;
          if (N < 0 || N > kLimit || K < 0 || K > kLimit || group_size < 1 || group_size > kLimit || bits < 2 ||
              bits > 8 || c < 0 || c > format::kMaxCapacity || !format::grid_size_fits(grid_size, bits)) {
            throw py::value_error(concat(name, ": N and K must lie in [0, 2^30], group_size in [1, 2^30], bits in ",
                                         "[2, 8], c in [0, 16], grid_size 0, 2^bits or 2^(bits+1), got ", N, ", ", K,
                                         ", ", group_size, ", ", bits, ", ", c, ", ", grid_size));
          }
          if (scale_dtype != "e4m3" && scale_dtype != "float16") {
            throw py::value_error(concat(name, ": scale_dtype must be e4m3 or float16, got ", quoted(scale_dtype)));
          }
          format::WeightFormat f;
          f.N = N;
          f.K = K;
          check(cpu::check_segment(name, segment, K));
          f.segment = segment;
          f.bits = bits;
          f.group_size = group_size;
          f.c = c;
          f.grid_size = grid_size;
          f.split = split;
          f.scale_type = scale_dtype == "float16" ? format::ScaleType::kFloat16 : format::ScaleType::kE4m3;
          return bytes(f);
        },
        doc, py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("c"), py::arg("grid_size"),
        py::arg("split"), py::arg("scale_dtype"), py::arg("segment") = 0);
  };
  define_prepacked_bytes(
      "prepacked_bytes", [](const format::WeightFormat& f) { return format::tile_layout(f).total_bytes; },
      "Bytes of what prepack makes on the CPU.");
  define_prepacked_bytes(
      "cuda_prepacked_bytes", [](const format::WeightFormat& f) { return format::cuda_layout(f).total_bytes; },
      "Bytes of what prepack makes on a CUDA device.");
  m.attr("FORMAT_VERSION") = format::kFormatVersion;
  m.attr("OUTLIER_UNIT") = format::kOutlierUnit;
  m.attr("OUTLIER_BLOCK") = format::kBlock;
  m.attr("MAX_LEVEL") = format::kMaxLevel;
  m.attr("MAX_CAPACITY") = format::kMaxCapacity;

  m.def(
      "soft_threshold",
      [](const py::object& w, double lam) {
        const Call call{"soft_threshold"};
        const Borrowed a = call.tensor("w", w);
        return call.run(cpu::SoftThreshold{a.view, lam});
      },
      py::arg("w"), py::arg("lam"));
  m.def(
      "salience_threshold",
      [](const py::object& w, double alpha, const std::string& scope, int64_t group_size,
         const std::string& normalize) {
        const Call call{"salience_threshold"};
        const Borrowed a = call.tensor("w", w);
        return call.run(cpu::SalienceThreshold{a.view, alpha, scope, group_size, normalize});
      },
      py::arg("w"), py::arg("alpha"), py::arg("scope") = "tensor", py::arg("group_size") = 128,
      py::arg("normalize") = "none");
  m.def(
      "salience_mask",
      [](const py::object& w, const py::object& lam, const std::string& scope, int64_t group_size,
         const std::string& normalize) {
        const Call call{"salience_mask"};
        const Borrowed a = call.tensor("w", w), b = call.tensor("lam", lam);
        return call.run(cpu::SalienceMask{a.view, b.view, scope, group_size, normalize});
      },
      py::arg("w"), py::arg("lam"), py::arg("scope") = "tensor", py::arg("group_size") = 128,
      py::arg("normalize") = "none");
  m.def(
      "histogram",
      [](const py::object& w, int64_t num_bins, double lo, double hi, const py::object& divisor,
         const py::object& weight, int64_t group_size, const py::object& label, int64_t num_labels) {
        const Call call{"histogram"};
        const Borrowed a = call.tensor("w", w), b = call.optional("divisor", divisor),
                       c = call.optional("weight", weight), d = call.optional("label", label);
        return call.run(cpu::Histogram{a.view, num_bins, lo, hi, b.view, c.view, group_size, d.view, num_labels});
      },
      py::arg("w"), py::arg("num_bins"), py::arg("lo"), py::arg("hi"), py::arg("divisor") = py::none(),
      py::arg("weight") = py::none(), py::arg("group_size") = 128, py::arg("label") = py::none(),
      py::arg("num_labels") = 1);
  m.def(
      "spread_codes",
      [](const py::object& counts, double lo, double hi, const py::object& grid) {
        const Call call{"spread_codes"};
        const Borrowed a = call.tensor("counts", counts), b = call.tensor("grid", grid);
        return call.run(cpu::SpreadCodes{a.view, lo, hi, b.view});
      },
      py::arg("counts"), py::arg("lo"), py::arg("hi"), py::arg("grid"));
  m.def(
      "kl_divergence",
      [](const py::object& p, const py::object& q, double smoothing) {
        const Call call{"kl_divergence"};
        const Borrowed a = call.tensor("p", p), b = call.tensor("q", q);
        return call.run(cpu::KlDivergence{a.view, b.view, smoothing});
      },
      py::arg("p"), py::arg("q"), py::arg("smoothing") = 0.0);
  m.def(
      "fit_grid",
      [](const py::object& counts, double lo, double hi, const py::object& grid, double mu, int64_t rounds) {
        const Call call{"fit_grid"};
        const Borrowed a = call.tensor("counts", counts), b = call.tensor("grid", grid);
        return call.run(cpu::FitGrid{a.view, lo, hi, b.view, mu, rounds});
      },
      py::arg("counts"), py::arg("lo"), py::arg("hi"), py::arg("grid"), py::arg("mu") = 0.0, py::arg("rounds") = 1);
  m.def(
      "quantize_groups",
      [](const py::object& w, const py::object& grid, int64_t bits, int64_t group_size, int64_t c, double lam,
         const std::string& scale_dtype, bool symmetric, double search_lo, double search_hi) {
        const Call call{"quantize_groups"};
        const Borrowed a = call.tensor("w", w), b = call.optional("grid", grid);
        return call.run(cpu::QuantizeGroups{a.view, b.view, bits, group_size, c, lam, scale_dtype, symmetric, search_lo,
                                            search_hi});
      },
      py::arg("w"), py::arg("grid"), py::arg("bits"), py::arg("group_size"), py::arg("c") = 0, py::arg("lam") = 0.0,
      py::arg("scale_dtype") = "e4m3", py::arg("symmetric") = false, py::arg("search_lo") = 0.6,
      py::arg("search_hi") = 1.1);
  m.def(
      "quantize_split",
      [](const py::object& w, const py::object& salient, int64_t bits, int64_t group_size) {
        const Call call{"quantize_split"};
        const Borrowed a = call.tensor("w", w), b = call.tensor("salient", salient);
        return call.run(cpu::QuantizeSplit{a.view, b.view, bits, group_size});
      },
      py::arg("w"), py::arg("salient"), py::arg("bits"), py::arg("group_size"));
  m.def(
      "quantize_salient",
      [](const py::object& w, const py::object& lam, int64_t bits, int64_t group_size, const std::string& scope) {
        const Call call{"quantize_salient"};
        const Borrowed a = call.tensor("w", w), b = call.tensor("lam", lam);
        return call.run(cpu::QuantizeSalient{a.view, b.view, bits, group_size, scope});
      },
      py::arg("w"), py::arg("lam"), py::arg("bits"), py::arg("group_size"), py::arg("scope") = "tensor");
  m.def(
      "pack",
      [](const py::object& codes, int64_t bits) {
        const Call call{"pack"};
        const Borrowed a = call.tensor("codes", codes);
        return call.run(cpu::Pack{a.view, bits});
      },
      py::arg("codes"), py::arg("bits"));
  m.def(
      "unpack",
      [](const py::object& packed, int64_t bits, int64_t K) {
        const Call call{"unpack"};
        const Borrowed a = call.tensor("packed", packed);
        return call.run(cpu::Unpack{a.view, bits, K});
      },
      py::arg("packed"), py::arg("bits"), py::arg("K"));
  m.def(
      "dequantize",
      [](const py::object& packed, const py::object& scale, const py::object& row_scale, const py::object& grid,
         const py::object& outlier_index, const py::object& outlier_value, const py::object& outlier_scale,
         const py::object& outlier_mask, int64_t K, int64_t bits, int64_t group_size, int64_t segment) {
        const Call call{"dequantize"};
        std::array<Borrowed, 8> list;
        return call.run(
            cpu::Dequantize{weight_tensors(call, &list, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                           outlier_scale, outlier_mask, K, bits, group_size, segment)});
      },
      py::arg("packed"), py::arg("scale"), py::arg("row_scale"), py::arg("grid"), py::arg("outlier_index"),
      py::arg("outlier_value"), py::arg("outlier_scale"), py::arg("outlier_mask"), py::arg("K"), py::arg("bits"),
      py::arg("group_size"), py::arg("segment") = 0);
  m.def(
      "measure",
      [](const py::object& w, const py::object& packed, const py::object& scale, const py::object& row_scale,
         const py::object& grid, const py::object& outlier_index, const py::object& outlier_value,
         const py::object& outlier_scale, const py::object& outlier_mask, int64_t K, int64_t bits, int64_t group_size,
         int64_t num_bins, double half, int64_t segment) {
        const Call call{"measure"};
        const Borrowed a = call.tensor("w", w);
        std::array<Borrowed, 8> list;
        return call.run(
            cpu::Measure{a.view,
                         weight_tensors(call, &list, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                        outlier_scale, outlier_mask, K, bits, group_size, segment),
                         num_bins, half});
      },
      py::arg("w"), py::arg("packed"), py::arg("scale"), py::arg("row_scale"), py::arg("grid"),
      py::arg("outlier_index"), py::arg("outlier_value"), py::arg("outlier_scale"), py::arg("outlier_mask"),
      py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("num_bins"), py::arg("half"),
      py::arg("segment") = 0);
  m.def(
      "prepack",
      [](const py::object& packed, const py::object& scale, const py::object& row_scale, const py::object& grid,
         const py::object& outlier_index, const py::object& outlier_value, const py::object& outlier_scale,
         const py::object& outlier_mask, int64_t K, int64_t bits, int64_t group_size, int64_t segment) {
        const Call call{"prepack"};
        std::array<Borrowed, 8> list;
        return call.run(
            cpu::Prepack{weight_tensors(call, &list, packed, scale, row_scale, grid, outlier_index, outlier_value,
                                        outlier_scale, outlier_mask, K, bits, group_size, segment)});
      },
      py::arg("packed"), py::arg("scale"), py::arg("row_scale"), py::arg("grid"), py::arg("outlier_index"),
      py::arg("outlier_value"), py::arg("outlier_scale"), py::arg("outlier_mask"), py::arg("K"), py::arg("bits"),
      py::arg("group_size"), py::arg("segment") = 0);
  m.def(
      "unprepack",
      [](const py::object& prepacked, int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t c,
         int64_t grid_size, bool split, const std::string& scale_dtype, int64_t segment) {
        const Call call{"unprepack"};
        const Borrowed a = call.prepacked(prepacked);
        return call.run(cpu::Unprepack{
            cpu::PrepackedWeight{a.view, N, K, bits, group_size, c, grid_size, split, scale_dtype, segment}});
      },
      py::arg("prepacked"), py::arg("N"), py::arg("K"), py::arg("bits"), py::arg("group_size"), py::arg("c"),
      py::arg("grid_size"), py::arg("split"), py::arg("scale_dtype"), py::arg("segment") = 0);
  m.def(
      "linear",
      [](const py::object& x, const py::object& prepacked, const py::object& bias, int64_t N, int64_t K, int64_t bits,
         int64_t group_size, int64_t c, int64_t grid_size, bool split, const std::string& scale_dtype, int64_t segment,
         const std::string& activations) {
        const Call call{"linear"};
        const Borrowed a = call.tensor("x", x), b = call.prepacked(prepacked), d = call.optional("bias", bias);
        return call.run(cpu::Linear{
            a.view, cpu::PrepackedWeight{b.view, N, K, bits, group_size, c, grid_size, split, scale_dtype, segment},
            d.view, activations});
      },
      py::arg("x"), py::arg("prepacked"), py::arg("bias"), py::arg("N"), py::arg("K"), py::arg("bits"),
      py::arg("group_size"), py::arg("c"), py::arg("grid_size"), py::arg("split"), py::arg("scale_dtype"),
      py::arg("segment") = 0, py::arg("activations") = "a16");
}

}  // namespace
}  // namespace precal::bindings
