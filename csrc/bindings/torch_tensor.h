// SPDX-License-Identifier: Apache-2.0
// torch::stable::Tensor -> TensorView, and the loop that runs an op struct: plan, allocate, run. Only the LibTorch
// stable ABI is used here, so one library serves every torch from 2.11 on.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "core/tensor_view.h"

namespace precal::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType to_dtype(const char* name, ScalarType type) {
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
    default: break;
  }
  throw std::runtime_error(std::string("precal: ") + name + " must have dtype bool, uint8, int8, int32, int64, " +
                           "float16, bfloat16, float32 or float64, got ScalarType " + std::to_string(int(type)));
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

inline TensorView view(const char* name, const Tensor& t) {
  TensorView v;
  if (t.dim() > kMaxDims) {
    throw std::runtime_error(std::string("precal: ") + name + " must have at most 8 dimensions, got " +
                             std::to_string(t.dim()));
  }
  v.dtype = to_dtype(name, t.scalar_type());
  v.ndim = int(t.dim());
  for (int i = 0; i < v.ndim; ++i) v.shape[i] = t.size(i);
  v.data = t.data_ptr();
  v.present = true;
  v.contiguous = t.is_contiguous();
  // Kernels read whole elements, and int32 words of a prepacked weight.
  const int64_t alignment = std::strcmp(name, "prepacked") == 0 ? 4 : dtype_bytes(v.dtype);
  if (reinterpret_cast<uintptr_t>(v.data) % uintptr_t(alignment) != 0) {
    throw std::runtime_error(std::string("precal: ") + name + " must be aligned to " + std::to_string(alignment) +
                             " bytes, got an odd address; call .clone() first");
  }
  return v;
}

inline TensorView view(const char* name, const std::optional<Tensor>& t) {
  return t.has_value() ? view(name, *t) : TensorView();
}

inline void check(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

template <typename Op>
std::array<Tensor, Op::kOutputs> execute(const Op& op, const Tensor& like) {
  std::array<TensorSpec, Op::kOutputs> specs;
  check(op.plan(specs.data()));
  std::array<Tensor, Op::kOutputs> outputs;
  std::array<TensorView, Op::kOutputs> views;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const std::vector<int64_t> sizes(specs[i].shape, specs[i].shape + specs[i].ndim);
    outputs[i] = torch::stable::new_empty(like, sizes, to_scalar_type(specs[i].dtype));
    views[i] = view("output", outputs[i]);
  }
  check(op.run(views.data()));
  return outputs;
}

}  // namespace precal::bindings
