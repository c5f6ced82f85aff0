// SPDX-License-Identifier: Apache-2.0
// Squares of 16-bit words, turned.
#pragma once

#include "cpu/simd_words.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

// out[j][i] = in[i][j] for 8 x 8 words, rows `stride` words apart.
PRECAL_INLINE void transpose8x8(const int16_t* in, int64_t in_stride, int16_t* out, int64_t out_stride) {
#if defined(__AVX2__)
  __m128i row[8], pair[8], quad[8];
  for (int i = 0; i < 8; ++i) row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * in_stride));
  for (int i = 0; i < 4; ++i) {  // words of rows i and i + 4 side by side, then of i, i + 2, i + 4, i + 6, then of all
    pair[2 * i] = _mm_unpacklo_epi16(row[i], row[i + 4]);
    pair[2 * i + 1] = _mm_unpackhi_epi16(row[i], row[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    quad[2 * i] = _mm_unpacklo_epi16(pair[i], pair[i + 4]);
    quad[2 * i + 1] = _mm_unpackhi_epi16(pair[i], pair[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * i * out_stride), _mm_unpacklo_epi16(quad[i], quad[i + 4]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (2 * i + 1) * out_stride),
                     _mm_unpackhi_epi16(quad[i], quad[i + 4]));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) out[j * out_stride + i] = in[i * in_stride + j];
  }
#endif
}

// Lower and upper bytes of 16 words.
PRECAL_INLINE void split_bytes(const int16_t* words, uint8_t* lower, uint8_t* upper) {
#if defined(__AVX2__)
  const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words));
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + 8));
  const __m128i mask = _mm_set1_epi16(0xFF);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(lower), _mm_packus_epi16(_mm_and_si128(a, mask), _mm_and_si128(b, mask)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(upper), _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
#else
  for (int i = 0; i < 16; ++i) {
    lower[i] = uint8_t(words[i]);
    upper[i] = uint8_t(uint16_t(words[i]) >> 8);
  }
#endif
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
