// SPDX-License-Identifier: Apache-2.0
// precal_ext._C: the limits of the machine (bench/limits.h), for the benches.
#include "bindings/bench_limits.h"

#include <string>

#include "bench/limits.h"
#include "bindings/python_array.h"
#include "bindings/thread_pool.h"

namespace precal::bindings {

void define_limits(py::module_& m) {
  m.def(
      "limit_names", [] { return py::str(bench::limit_names()).attr("split")(","); },
      "What measure_limit can measure.");
  m.def(
      "measure_limit",
      [](const std::string& name, double seconds, int64_t megabytes, const std::string& isa) {
        bench::LimitRequest request;
        request.name = name;
        request.isa = isa;
        request.seconds = seconds;
        if (megabytes < 1 || megabytes > 65536)
          throw py::value_error(concat("measure_limit: megabytes must lie in [1, 65536], got ", megabytes));
        request.bytes = megabytes << 20;
        request.threads = pool_threads();
        bench::LimitResult result;
        Status status;
        {
          py::gil_scoped_release release;
          status = bench::measure_limit(request, &result);
        }
        check(status);
        py::dict found;
        found["name"] = name;
        found["value"] = result.value;
        found["unit"] = result.unit;
        found["isa"] = result.isa;
        found["threads"] = request.threads;
        found["passes"] = result.passes;
        return found;
      },
      py::arg("name"), py::arg("seconds") = 0.1, py::arg("megabytes") = 256, py::arg("isa") = "",
      "What this machine can do at most, on the threads of set_num_threads: dram_read and copy through a buffer of\n"
      "`megabytes` (more than 4 x L3 for DRAM), fp32_fma, bf16_dot, int8_dot. The median over passes of `seconds` in\n"
      "all. `isa` (avx512, avx2, generic) forces one. RuntimeError where the CPU lacks the instruction.");
}

}  // namespace precal::bindings
