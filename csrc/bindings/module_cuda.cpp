// SPDX-License-Identifier: Apache-2.0
// precal_ext._C_cuda: every CUDA launcher on DLPack tensors plus a stream, with no torch involved. Outputs are given by
// the caller; nothing is allocated or synchronised here. Importing it touches no device.
#include <cmath>

#include "bindings/python_array.h"
#include "cuda/kernels.h"

namespace precal::bindings {
namespace {

Borrowed borrow_cuda(const char* op, const char* name, const py::object& object) {
  Borrowed b = borrow(op, name, object);
  if (!b.view.present || b.device_type != kDLCUDA) {
    throw py::value_error(concat(op, ": ", name, " must be on a CUDA device, got DLPack device type ", b.device_type));
  }
  check(check_contiguous(op, name, b.view));
  return b;
}

void soft_threshold(const py::object& w, double lam, const py::object& out, uintptr_t stream) {
  constexpr const char* op = "soft_threshold";
  const Borrowed a = borrow_cuda(op, "w", w), b = borrow_cuda(op, "out", out);
  check(check_dtype(op, "out", b.view, {a.view.dtype}));
  check(check_shape(op, "out", b.view, a.view, "(the shape of w)"));
  if (!(lam >= 0.0) || std::isinf(lam)) {
    throw py::value_error(concat(op, ": lam must be finite and >= 0, got ", lam));
  }
  check(cuda::check_cuda(op, cudaSetDevice(a.device_id)));
  check(cuda::launch_soft_threshold({a.view.data, b.view.data, a.view.dtype, a.view.numel(), lam},
                                    reinterpret_cast<cudaStream_t>(stream)));
}

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

}  // namespace
}  // namespace precal::bindings

PYBIND11_MODULE(_C_cuda, m) {
  namespace py = pybind11;
  m.doc() = "precal's CUDA launchers on DLPack tensors. `stream` is a cudaStream_t as an integer, 0 for the default.";
  m.def("soft_threshold", &precal::bindings::soft_threshold, py::arg("w"), py::arg("lam"), py::arg("out"),
        py::arg("stream") = 0);
  m.def("device_info", &precal::bindings::device_info, "Runtime and driver version, number of devices seen.");
}
