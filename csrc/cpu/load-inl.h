// SPDX-License-Identifier: Apache-2.0
// Weights as stored -> float32. Exact for every dtype.
#pragma once

#include "core/tensor_view.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

PRECAL_INLINE float load_element(const void* w, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kBFloat16: return bf16_to_float(static_cast<const uint16_t*>(w)[index]);
    case DType::kFloat16: return half_to_float(static_cast<const uint16_t*>(w)[index]);
    default: return static_cast<const float*>(w)[index];
  }
}

static void load_elements(const void* w, DType dtype, int64_t begin, int64_t count, float* out) {
  if (dtype == DType::kBFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(w) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = bf16_to_float(p[i]);
  } else if (dtype == DType::kFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(w) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(p[i]);
  } else {
    const float* p = static_cast<const float*>(w) + begin;
    for (int64_t i = 0; i < count; ++i) out[i] = p[i];
  }
}

// Sixteen weights from `index` on.
PRECAL_INLINE F32 load_weights(const void* w, DType dtype, int64_t index) {
  if (dtype == DType::kFloat32) return load(static_cast<const float*>(w) + index);
  if (dtype == DType::kBFloat16) {
    return as_floats(shift_left(widen_words(static_cast<const uint16_t*>(w) + index), 16));
  }
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = half_to_float(static_cast<const uint16_t*>(w)[index + i]);
  return load(lanes);
}

PRECAL_INLINE void store_element(void* out, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kBFloat16: static_cast<uint16_t*>(out)[index] = float_to_bf16(value); break;
    case DType::kFloat16: static_cast<uint16_t*>(out)[index] = float_to_half(value); break;
    default: static_cast<float*>(out)[index] = value;
  }
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
