// SPDX-License-Identifier: Apache-2.0
// A borrowed, contiguous tensor as every binding hands it over, and the checks that all ops share.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/status.h"

namespace precal {

enum class DType { kBool, kUInt8, kInt8, kInt32, kInt64, kFloat16, kBFloat16, kFloat32, kFloat64 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kBool: return "bool";
    case DType::kUInt8: return "uint8";
    case DType::kInt8: return "int8";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
  }
  return "unknown";
}

inline int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kBool:
    case DType::kUInt8:
    case DType::kInt8: return 1;
    case DType::kFloat16:
    case DType::kBFloat16: return 2;
    case DType::kInt32:
    case DType::kFloat32: return 4;
    case DType::kInt64:
    case DType::kFloat64: return 8;
  }
  return 0;
}

inline constexpr int kMaxDims = 8;

// Shape and dtype of an output, decided by an op's plan() before anything is allocated.
struct TensorSpec {
  DType dtype = DType::kFloat32;
  int ndim = 0;
  int64_t shape[kMaxDims] = {};

  TensorSpec() = default;
  TensorSpec(DType type, std::initializer_list<int64_t> sizes) : dtype(type), ndim(int(sizes.size())) {
    int i = 0;
    for (int64_t size : sizes) shape[i++] = size;
  }
  int64_t numel() const {
    for (int i = 0; i < ndim; ++i) {
      if (shape[i] == 0) return 0;  // first: the other sizes may be as large as they like
    }
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
};

struct TensorView : TensorSpec {
  void* data = nullptr;
  bool present = false;  // false for an optional argument that was not given
  bool contiguous = true;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline std::string shape_text(const TensorSpec& t) {
  std::string text = "[";
  for (int i = 0; i < t.ndim; ++i) text += (i ? ", " : "") + std::to_string(t.shape[i]);
  return text + "]";
}

// What no op takes, said alike by every binding. `got` is the dtype's name, or what is known of it.
inline Status unknown_dtype(const char* op, const char* name, const std::string& got) {
  return invalid_type(op, ": ", name,
                      " must have dtype bool, uint8, int8, int32, int64, float16, bfloat16, float32 or ",
                      "float64, got ", got);
}

inline Status too_many_dimensions(const char* op, const char* name, int64_t ndim) {
  return invalid_value(op, ": ", name, " must have at most 8 dimensions, got ", ndim);
}

inline std::string must_fit_in_memory(const char* op, const std::string& what) {
  return concat(op, ": ", what, " must fit in memory");
}

inline std::string output_text(const TensorSpec& spec) {
  return concat("an output of ", shape_text(spec), " ", dtype_name(spec.dtype));
}

// `contract` is the shape in words, e.g. "(N, ceil(K/group_size))".
inline Status check_shape(const char* op, const char* name, const TensorView& t, const TensorSpec& want,
                          const char* contract) {
  bool same = t.ndim == want.ndim;
  for (int i = 0; same && i < want.ndim; ++i) same = t.shape[i] == want.shape[i];
  if (!same) {
    return invalid_value(op, ": ", name, " must be ", shape_text(want), " ", contract, ", got ", shape_text(t));
  }
  return {};
}

inline Status check_dtype(const char* op, const char* name, const TensorView& t, std::initializer_list<DType> allowed) {
  std::string names;
  for (DType dtype : allowed) {
    if (t.dtype == dtype) return {};
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  }
  return invalid_type(op, ": ", name, " must have dtype ", names, ", got ", dtype_name(t.dtype));
}

inline Status check_contiguous(const char* op, const char* name, const TensorView& t) {
  if (!t.contiguous) {
    return invalid_value(op, ": ", name, " must be contiguous, got a strided view; call .contiguous() first");
  }
  return {};
}

// Everything about one argument: presence, dtype, layout, shape.
inline Status check_tensor(const char* op, const char* name, const TensorView& t, const TensorSpec& want,
                           const char* contract) {
  if (!t.present) return invalid_value(op, ": ", name, " must be given, got None");
  PRECAL_RETURN_IF_ERROR(check_dtype(op, name, t, {want.dtype}));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, name, t));
  return check_shape(op, name, t, want, contract);
}

// A weight matrix [N, K] in any of the floating dtypes that models are stored in.
inline Status check_weight(const char* op, const TensorView& w) {
  PRECAL_RETURN_IF_ERROR(check_dtype(op, "w", w, {DType::kFloat32, DType::kFloat16, DType::kBFloat16}));
  PRECAL_RETURN_IF_ERROR(check_contiguous(op, "w", w));
  if (w.ndim != 2) return invalid_value(op, ": w must be [N, K], got ", shape_text(w));
  return {};
}

}  // namespace precal
