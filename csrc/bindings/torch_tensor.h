// SPDX-License-Identifier: Apache-2.0
// torch::stable::Tensor -> TensorView, and the loop that runs an op struct: plan, allocate, run. Only the LibTorch
// stable ABI is used here, so one library serves every torch from 2.11 on.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/tensor_view.h"

namespace precal::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Names of dtypes that no op takes, as DLPack has them (bindings/python_array.h), so that both bindings say the same.
inline std::string foreign_dtype_text(ScalarType type) {
  switch (type) {
    case ScalarType::Short: return "int16";
    case ScalarType::UInt16: return "uint16";
    case ScalarType::UInt32: return "uint32";
    case ScalarType::UInt64: return "uint64";
    case ScalarType::ComplexHalf: return "complex32";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    default: return concat("ScalarType ", int(type));
  }
}

inline std::optional<DType> to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Bool: return DType::kBool;
    case ScalarType::Byte: return DType::kUInt8;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    default: return std::nullopt;
  }
}

inline ScalarType to_scalar_type(DType dtype) {
  switch (dtype) {
    case DType::kBool: return ScalarType::Bool;
    case DType::kUInt8: return ScalarType::Byte;
    case DType::kInt8: return ScalarType::Char;
    case DType::kInt32: return ScalarType::Int;
    case DType::kInt64: return ScalarType::Long;
    case DType::kFloat16: return ScalarType::Half;
    case DType::kBFloat16: return ScalarType::BFloat16;
    case DType::kFloat32: return ScalarType::Float;
    case DType::kFloat64: return ScalarType::Double;
  }
  return ScalarType::Float;
}

inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

// One call of one op: every error begins with its name.
struct Call {
  const char* op;

  TensorView view(const char* name, const Tensor& t) const {
    TensorView v;
    if (t.dim() > kMaxDims) check(too_many_dimensions(op, name, t.dim()));
    const std::optional<DType> dtype = to_dtype(t.scalar_type());
    if (!dtype) check(unknown_dtype(op, name, foreign_dtype_text(t.scalar_type())));
    v.dtype = *dtype;
    v.ndim = int(t.dim());
    for (int i = 0; i < v.ndim; ++i) v.shape[i] = t.size(i);
    v.data = t.data_ptr();
    v.present = true;
    v.contiguous = t.is_contiguous();
    // Kernels read whole elements, and int32 words of a prepacked weight.
    const int64_t alignment = std::strcmp(name, "prepacked") == 0 ? 4 : dtype_bytes(v.dtype);
    if (reinterpret_cast<uintptr_t>(v.data) % uintptr_t(alignment) != 0) {
      check(invalid_value(op, ": ", name, " must be aligned to ", alignment,
                          " bytes, got an odd address; call .clone() first"));
    }
    return v;
  }

  TensorView view(const char* name, const std::optional<Tensor>& t) const {
    return t.has_value() ? view(name, *t) : TensorView();
  }

  // Plan, allocate outputs on the device of `like`, run.
  template <typename Op>
  std::array<Tensor, Op::kOutputs> run(const Op& arguments, const Tensor& like) const {
    std::array<TensorSpec, Op::kOutputs> specs;
    check(arguments.plan(specs.data()));
    std::array<Tensor, Op::kOutputs> outputs;
    std::array<TensorView, Op::kOutputs> views;
    for (size_t i = 0; i < outputs.size(); ++i) {
      const std::vector<int64_t> sizes(specs[i].shape, specs[i].shape + specs[i].ndim);
      try {
        outputs[i] = torch::stable::new_empty(like, sizes, to_scalar_type(specs[i].dtype));
      } catch (const std::exception&) {
        throw std::runtime_error(must_fit_in_memory(op, output_text(specs[i])));
      }
      views[i] = view("output", outputs[i]);
    }
    try {
      check(arguments.run(views.data()));
    } catch (const std::bad_alloc&) {
      throw std::runtime_error(must_fit_in_memory(op, "its working memory"));
    }
    return outputs;
  }
};

}  // namespace precal::bindings
