// SPDX-License-Identifier: Apache-2.0
// Scalar number formats and small integer helpers. Every conversion is exact or rounds to nearest even, in integer
// arithmetic, so that all instruction sets and devices agree bit for bit.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace precal {

// a >= 0, b > 0; no overflow, whatever b.
PRECAL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }
PRECAL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

union FloatBits {
  float value;
  uint32_t bits;
};

PRECAL_INLINE uint32_t float_bits(float value) {
  FloatBits u;
  u.value = value;
  return u.bits;
}

PRECAL_INLINE float bits_float(uint32_t bits) {
  FloatBits u;
  u.bits = bits;
  return u.value;
}

PRECAL_INLINE float abs_float(float value) { return bits_float(float_bits(value) & 0x7FFFFFFFu); }

// Weights up to 2^126 can be quantized: beyond, a scale rounded up would carry W' out of float32.
constexpr float kMaxWeight = 8.507059173023462e37f;

PRECAL_INLINE bool is_finite(float value) { return (float_bits(value) & 0x7F800000u) != 0x7F800000u; }

// ---- bfloat16: the upper half of a float32
// ---------------------------------------------------------------------------
PRECAL_INLINE float bf16_to_float(uint16_t h) { return bits_float(uint32_t(h) << 16); }

PRECAL_INLINE uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t((bits >> 16) | 0x40u);  // quiet NaN
  return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// ---- float16
// ---------------------------------------------------------------------------------------------------------
PRECAL_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 31u) return bits_float(sign | 0x7F800000u | (mantissa << 13));
  if (exponent == 0u) {
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;  // 2^-24, exact
    return bits_float(sign | float_bits(magnitude));
  }
  return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

PRECAL_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 a half counts multiples of 2^-24, which is the spacing of float32 at 0.5: adding 0.5 rounds to it.
    return uint16_t(sign | (float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f)));
  }
  magnitude += 0xFFFu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((magnitude - 0x38000000u) >> 13));
}

// A value that is not zero does not become zero in a narrower format: the smallest magnitude stands for it.
PRECAL_INLINE float double_to_float_nonzero(double value) {
  const float f = float(value);
  return (f == 0.0f && value != 0.0) ? (value < 0.0 ? -1.0f : 1.0f) * bits_float(1) : f;
}

PRECAL_INLINE uint16_t float_to_bf16_nonzero(float value) {
  const uint16_t h = float_to_bf16(value);
  return ((h & 0x7FFFu) == 0 && value != 0.0f) ? uint16_t(h | 1u) : h;
}

PRECAL_INLINE uint16_t float_to_half_nonzero(float value) {
  const uint16_t h = float_to_half(value);
  return ((h & 0x7FFFu) == 0 && value != 0.0f) ? uint16_t(h | 1u) : h;
}

}  // namespace precal
