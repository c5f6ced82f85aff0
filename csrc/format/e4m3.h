// SPDX-License-Identifier: Apache-2.0
// Group scales are signed 8-bit floats, "e4m3fn": 4 exponent bits with bias 7, 3 mantissa bits, no infinity.
//
//   bit   7    6      3 2      0
//        | s | exponent | mantissa|      value = (-1)^s * (8 + mantissa) * 2^(exponent - 10),   exponent > 0
//                                        value = (-1)^s * mantissa * 2^-9,                      exponent = 0
//
// Largest 448 = 0x7E, smallest normal 2^-6 = 0x08, smallest 2^-9 = 0x01. 0x7F and 0xFF are NaN: never written, refused
// on reading. Example: 1.0 = 0x38, -1.75 = 0xBE. Neighbours differ by 1/16 to 1/8 of the value: 8 steps an octave.
#pragma once

#include "core/numeric.h"

namespace precal::format {

constexpr uint8_t kE4m3Max = 0x7E;
constexpr float kE4m3MaxValue = 448.0f;

PRECAL_INLINE float e4m3_to_float(uint8_t code) {
  const uint32_t exponent = (code >> 3) & 15u, mantissa = code & 7u;
  const uint32_t sign = uint32_t(code & 0x80u) << 24;
  if ((code & 0x7Fu) == 0x7Fu) return bits_float(sign | 0x7FC00000u);  // NaN stays NaN, it never becomes 480
  if (exponent == 0u) {
    const float magnitude = float(mantissa) * 0.001953125f;  // 2^-9, exact
    return bits_float(sign | float_bits(magnitude));
  }
  return bits_float(sign | ((exponent + 120u) << 23) | (mantissa << 20));  // 120 = 127 - 7
}

// Round to nearest even; magnitudes beyond 448 saturate. The sign is kept, also of zero.
PRECAL_INLINE uint8_t float_to_e4m3(float value) {
  const uint32_t sign = (float_bits(value) >> 24) & 0x80u;
  uint32_t magnitude = float_bits(value) & 0x7FFFFFFFu;
  if (magnitude >= 0x43E00000u) return uint8_t(sign | kE4m3Max);  // 448 and above
  if (magnitude < 0x3C800000u) {
    // Below 2^-6 codes count multiples of 2^-9, the spacing of float32 at 2^14: adding 2^14 rounds to it.
    return uint8_t(sign | (float_bits(bits_float(magnitude) + 16384.0f) - float_bits(16384.0f)));
  }
  magnitude += 0x7FFFFu + ((magnitude >> 20) & 1u);
  const uint32_t code = (magnitude >> 20) - (120u << 3);
  return uint8_t(sign | (code > kE4m3Max ? kE4m3Max : code));
}

PRECAL_INLINE bool e4m3_is_nan(uint8_t code) { return (code & 0x7Fu) == 0x7Fu; }

}  // namespace precal::format
