// SPDX-License-Identifier: Apache-2.0
// numpy arrays and DLPack tensors -> TensorView, without torch.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <array>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "core/tensor_view.h"
#include "cpu/ops.h"

namespace precal::bindings {

namespace py = pybind11;

// Keeps the owner alive while the view is used.
struct Borrowed {
  TensorView view;
  py::object owner;
  int32_t device_type = kDLCPU;
  int32_t device_id = 0;
};

// Raises the Python exception `type`, with the one that is set as its cause.
[[noreturn]] inline void raise(PyObject* type, const std::string& message) {
  if (PyErr_Occurred() != nullptr) {
    py::raise_from(type, message.c_str());
  } else {
    PyErr_SetString(type, message.c_str());
  }
  throw py::error_already_set();
}

inline std::string dlpack_dtype_text(DLDataType t) {
  static const char* const kinds[] = {"int", "uint", "float", "handle", "bfloat", "complex", "bool"};
  if (t.lanes == 1) {
    if (t.code < 7) return concat(kinds[t.code], int(t.bits));
    if (t.code == 10) return "float8_e4m3fn";
    if (t.code == 12) return "float8_e5m2";
  }
  return concat("DLPack code ", int(t.code), " with ", int(t.bits), " bits");
}

inline DType dtype_from_dlpack(const char* op, const char* name, DLDataType t) {
  if (t.lanes == 1) {
    if (t.code == kDLFloat && t.bits == 16) return DType::kFloat16;
    if (t.code == kDLFloat && t.bits == 32) return DType::kFloat32;
    if (t.code == kDLFloat && t.bits == 64) return DType::kFloat64;
    if (t.code == kDLBfloat && t.bits == 16) return DType::kBFloat16;
    if (t.code == kDLInt && t.bits == 8) return DType::kInt8;
    if (t.code == kDLInt && t.bits == 32) return DType::kInt32;
    if (t.code == kDLInt && t.bits == 64) return DType::kInt64;
    if (t.code == kDLUInt && t.bits == 8) return DType::kUInt8;
    if (t.code == kDLBool && t.bits == 8) return DType::kBool;
    if (t.code == kDLUInt && t.bits == 16) return DType::kBFloat16;  // bits of bfloat16, as numpy can carry them
  }
  throw py::type_error(unknown_dtype(op, name, dlpack_dtype_text(t)).message());
}

// Shapes of numpy are sound; a DLPack tensor may claim anything. Its bytes must be countable.
inline void check_claims(const char* op, const char* name, const DLTensor& t) {
  if (t.ndim < 0 || t.ndim > kMaxDims) {
    throw py::value_error(too_many_dimensions(op, name, t.ndim).message());
  }
  int64_t room = std::numeric_limits<int64_t>::max() / 8;
  bool sound = t.ndim == 0 || t.shape != nullptr, empty = false;
  for (int i = 0; sound && i < t.ndim; ++i) {
    sound = t.shape[i] >= 0 && t.shape[i] <= room;
    room /= std::max<int64_t>(t.shape[i], 1);
    empty = empty || t.shape[i] == 0;
  }
  if (!sound) throw py::value_error(concat(op, ": ", name, " must have sizes >= 0 of less than 2^60 elements in all"));
  if (t.data == nullptr && !empty) throw py::value_error(concat(op, ": ", name, " must have data, got a null pointer"));
}

// Kernels read whole elements: data at an odd address is copied.
inline void align(Borrowed* b, int64_t bytes) {
  bytes = std::max(bytes, dtype_bytes(b->view.dtype));
  if (!b->view.contiguous || reinterpret_cast<uintptr_t>(b->view.data) % uintptr_t(bytes) == 0) return;
  const size_t size = size_t(b->view.numel() * dtype_bytes(b->view.dtype));
  const py::array copy(py::dtype("uint8"), std::vector<py::ssize_t>{py::ssize_t(size)});
  std::memcpy(const_cast<void*>(copy.data()), b->view.data, size);
  b->view.data = const_cast<void*>(copy.data());
  b->owner = copy;
}

inline Borrowed borrow_dlpack(const char* op, const char* name, const py::object& object) {
  py::object capsule;
  DLManagedTensor* managed = nullptr;
  try {
    // Consumers that know streams pass one; the tensor must be ready on the stream the caller gives to the op.
    capsule = object.attr("__dlpack__")();
    managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
  } catch (py::error_already_set& error) {
    const std::string reason = error.what();
    error.restore();
    raise(PyExc_TypeError, concat(op, ": ", name, " must be a tensor that __dlpack__ hands over, got ", reason));
  }
  PyObject* raw = capsule.ptr();
  PyCapsule_SetName(raw, "used_dltensor");
  Borrowed b;
  b.owner = py::capsule(managed, [](void* p) {
    auto* m = static_cast<DLManagedTensor*>(p);
    if (m->deleter != nullptr) m->deleter(m);
  });
  const DLTensor& t = managed->dl_tensor;
  check_claims(op, name, t);
  b.view.dtype = dtype_from_dlpack(op, name, t.dtype);
  b.view.ndim = t.ndim;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    b.view.shape[i] = t.shape[i];
    if (t.strides != nullptr && t.shape[i] != 1 && t.strides[i] != expected) b.view.contiguous = false;
    expected *= t.shape[i];
  }
  if (b.view.numel() == 0) b.view.contiguous = true;
  b.view.data = static_cast<char*>(t.data) + t.byte_offset;
  b.view.present = true;
  b.device_type = t.device.device_type;
  b.device_id = t.device.device_id;
  return b;
}

inline Borrowed borrow_numpy(const char* op, const char* name, const py::array& array) {
  const py::dtype dtype = array.dtype();
  DLDataType code{kDLFloat, uint8_t(dtype.itemsize() * 8), 1};
  switch (dtype.kind()) {
    case 'f': break;
    case 'i': code.code = kDLInt; break;
    case 'u': code.code = kDLUInt; break;
    case 'b': code.code = kDLBool; break;
    default:
      if (dtype.attr("type").attr("__name__").cast<std::string>() == "bfloat16") {  // ml_dtypes
        code.code = kDLBfloat;
      } else {
        code.lanes = 0;  // refused
      }
  }
  if (dtype.byteorder() == '>') {
    throw py::type_error(concat(op, ": ", name, " must have native byte order, got big-endian; call .astype first"));
  }
  Borrowed b;
  if (array.ndim() > kMaxDims) {
    throw py::value_error(too_many_dimensions(op, name, array.ndim()).message());
  }
  b.view.dtype = dtype_from_dlpack(op, name, code);
  b.view.ndim = int(array.ndim());
  for (int i = 0; i < b.view.ndim; ++i) b.view.shape[i] = array.shape(i);
  b.view.data = const_cast<void*>(array.data());
  b.view.contiguous = (array.flags() & py::array::c_style) != 0;
  b.view.present = true;
  b.owner = array;
  return b;
}

// None gives an absent view.
inline Borrowed borrow(const char* op, const char* name, const py::object& object) {
  if (object.is_none()) return {};
  if (py::isinstance<py::array>(object)) return borrow_numpy(op, name, py::reinterpret_borrow<py::array>(object));
  if (py::hasattr(object, "__dlpack__")) return borrow_dlpack(op, name, object);
  throw py::type_error(
      concat(op, ": ", name, " must be a numpy array or a DLPack tensor, got ", Py_TYPE(object.ptr())->tp_name));
}

// An argument on the CPU that may be None.
inline Borrowed borrow_optional(const char* op, const char* name, const py::object& object, int64_t alignment = 1) {
  Borrowed b = borrow(op, name, object);
  if (b.device_type != kDLCPU && b.device_type != kDLCUDAHost) {
    throw py::value_error(concat(op, ": ", name, " must be on the CPU, got DLPack device type ", b.device_type));
  }
  align(&b, alignment);
  return b;
}

// An argument on the CPU that must be there.
inline Borrowed borrow_cpu(const char* op, const char* name, const py::object& object, int64_t alignment = 1) {
  if (object.is_none()) {
    throw py::type_error(concat(op, ": ", name, " must be a numpy array or a DLPack tensor, got None"));
  }
  return borrow_optional(op, name, object, alignment);
}

// numpy has no bfloat16: it comes out as uint16 bits.
inline py::array new_array(const TensorSpec& spec) {
  const char* name = spec.dtype == DType::kBFloat16 ? "uint16" : dtype_name(spec.dtype);
  return py::array(py::dtype(name), std::vector<py::ssize_t>(spec.shape, spec.shape + spec.ndim));
}

inline void check(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::kInvalidType) throw py::type_error(status.message());
  if (status.code() == StatusCode::kInvalidValue) throw py::value_error(status.message());
  throw std::runtime_error(status.message());
}

// The borrowed tensors of a weight; `list` keeps them alive. `Call` is the module's own, which knows its device.
template <typename Call>
cpu::WeightTensors weight_tensors(const Call& call, std::array<Borrowed, 8>* list, const py::object& packed,
                                  const py::object& scale, const py::object& row_scale, const py::object& grid,
                                  const py::object& outlier_index, const py::object& outlier_value,
                                  const py::object& outlier_scale, const py::object& outlier_mask, int64_t K,
                                  int64_t bits, int64_t group_size, int64_t segment) {
  auto& b = *list;
  b = {call.tensor("packed", packed),
       call.tensor("scale", scale),
       call.tensor("row_scale", row_scale),
       call.optional("grid", grid),
       call.optional("outlier_index", outlier_index),
       call.optional("outlier_value", outlier_value),
       call.optional("outlier_scale", outlier_scale),
       call.optional("outlier_mask", outlier_mask)};
  return {b[0].view, b[1].view, b[2].view, b[3].view, b[4].view,  b[5].view,
          b[6].view, b[7].view, K,         bits,      group_size, segment};
}

}  // namespace precal::bindings
