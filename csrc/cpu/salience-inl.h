// SPDX-License-Identifier: Apache-2.0
// Adaptive-LASSO soft threshold and the counting passes of its exact threshold.
#pragma once

#include "cpu/kernels.h"
#include "cpu/load-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

PRECAL_INLINE void store_nonzero(void* out, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kBFloat16: static_cast<uint16_t*>(out)[index] = float_to_bf16_nonzero(value); break;
    case DType::kFloat16: static_cast<uint16_t*>(out)[index] = float_to_half_nonzero(value); break;
    default: static_cast<float*>(out)[index] = value;
  }
}

// out = sign(w) * max(|w| - lam / |w|, 0). A weight survives exactly when w * w > lam: the square of a float32 is exact
// in double, so survival has no rounding. The value (w^2 - lam) / |w| avoids cancellation, and a survivor's value is
// never rounded to zero.
static void soft_threshold(const SoftThresholdArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const float w = load_element(args.w, args.dtype, i);
    const double square = double(w) * double(w);
    float out = 0.0f;
    if (!(square <= args.lam)) out = double_to_float_nonzero((square - args.lam) / double(w));  // NaN stays NaN
    if (float_bits(w) == 0x7F800000u || float_bits(w) == 0xFF800000u) out = w;
    store_nonzero(args.out, args.dtype, i, out);
  }
}

static void magnitude_digit(const MagnitudeDigitArgs& args, int64_t begin, int64_t end, int64_t* counts) {
  for (int64_t i = begin; i < end; ++i) {
    const uint32_t magnitude = float_bits(load_element(args.w, args.dtype, i)) & 0x7FFFFFFFu;
    if (!args.low_digit) {
      ++counts[magnitude >> 16];
    } else if ((magnitude >> 16) == args.prefix) {
      ++counts[magnitude & 0xFFFFu];
    }
  }
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
