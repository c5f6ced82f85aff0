// SPDX-License-Identifier: Apache-2.0
// Elements of w, x and y in the dtypes that models are stored in.
#pragma once

#include "core/numeric.h"
#include "core/tensor_view.h"
#include "cuda_runtime.h"

namespace precal::cuda {

template <DType kType>
__device__ __forceinline__ float load_element(const void* w, int64_t i) {
  if constexpr (kType == DType::kBFloat16) return bf16_to_float(static_cast<const uint16_t*>(w)[i]);
  if constexpr (kType == DType::kFloat16) return half_to_float(static_cast<const uint16_t*>(w)[i]);
  return static_cast<const float*>(w)[i];
}

// Where a branch per element costs nothing beside the memory.
__device__ __forceinline__ float load_element(const void* w, DType dtype, int64_t i) {
  if (dtype == DType::kBFloat16) return load_element<DType::kBFloat16>(w, i);
  if (dtype == DType::kFloat16) return load_element<DType::kFloat16>(w, i);
  return load_element<DType::kFloat32>(w, i);
}

__device__ __forceinline__ void store_element(void* out, DType dtype, int64_t i, float value) {
  if (dtype == DType::kBFloat16) {
    static_cast<uint16_t*>(out)[i] = float_to_bf16(value);
  } else if (dtype == DType::kFloat16) {
    static_cast<uint16_t*>(out)[i] = float_to_half(value);
  } else {
    static_cast<float*>(out)[i] = value;
  }
}

// A value that is not zero stays so.
template <DType kType>
__device__ __forceinline__ void store_nonzero(void* out, int64_t i, float value) {
  if constexpr (kType == DType::kBFloat16) {
    static_cast<uint16_t*>(out)[i] = float_to_bf16_nonzero(value);
  } else if constexpr (kType == DType::kFloat16) {
    static_cast<uint16_t*>(out)[i] = float_to_half_nonzero(value);
  } else {
    static_cast<float*>(out)[i] = value;
  }
}

}  // namespace precal::cuda
