// SPDX-License-Identifier: Apache-2.0
// Lanes between weights and codes, on every instruction set, with the same result on each.
//   max_where      lanes of `mask`: max(acc, a) of signed words; others: acc
//   words_of       the bits of floats
//   quotient       w / d rounded once, where |w / d| is at least 2^-26 and 2^-60 <= d <= 2^60 is a bfloat16; elsewhere
//                  off by less than 2^-80. r = 1 / d
//   store_nearest  sixteen codes: the nearest integer of [lowest, highest], a number between two to the lower one,
//                  counted from `lowest`. |x| < 2^30
#pragma once

#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

// Without a branch: halves of a code below, then up. For those that have no rounding upwards of their own.
PRECAL_INLINE F32 nearest_integer(F32 x, F32 lowest, F32 highest) {
  const F32 round = splat(12582912.0f), inside = min(max(x, lowest), highest);  // 1.5 * 2^23: floats are integers there
  const F32 nearest = sub(add(inside, round), round);
  const F32 index = sub(nearest, lowest), half = splat(0.5f);
  return select(less(sub(nearest, inside), half), index, sub(index, splat(1.0f)));
}

#if defined(__AVX512F__)

PRECAL_INLINE I32 max_where(uint32_t mask, I32 acc, I32 a) {
  return {_mm512_mask_max_epi32(acc.v, __mmask16(mask), acc.v, a.v)};
}
PRECAL_INLINE I32 words_of(F32 a) { return {_mm512_castps_si512(a.v)}; }
// Newton's step from a quotient by the reciprocal. d has 8 bits, so no quotient is within 2^-9 of its last place of one
// that two floats are equally near to, and the step's error is below 2^-20 of it: the same as one division.
PRECAL_INLINE F32 quotient(F32 w, F32 d, F32 r) {
  const __m512 first = _mm512_mul_ps(w.v, r.v);
  return {_mm512_fmadd_ps(_mm512_fnmadd_ps(first, d.v, w.v), r.v, first)};
}
PRECAL_INLINE void store_nearest(uint8_t* p, F32 x, float lowest, float highest) {
  // ceil(x - 1/2): rounded upwards, the difference passes no integer that it did not pass before.
  constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
  const __m512 above = _mm512_add_round_ps(x.v, _mm512_set1_ps(-lowest - 0.5f), kUp);
  const __m512i code = _mm512_max_epi32(_mm512_cvt_roundps_epi32(above, kUp), _mm512_setzero_si512());
  const __m512i top = _mm512_set1_epi32(int(highest - lowest));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_min_epi32(code, top)));
}

#elif defined(__AVX2__)

PRECAL_INLINE I32 max_where(uint32_t mask, I32 acc, I32 a) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i lo = _mm256_and_si256(_mm256_set1_epi32(int(mask)), bit);
  const __m256i hi = _mm256_and_si256(_mm256_set1_epi32(int(mask >> 8)), bit);
  return {_mm256_blendv_epi8(acc.lo, _mm256_max_epi32(acc.lo, a.lo), _mm256_cmpeq_epi32(lo, bit)),
          _mm256_blendv_epi8(acc.hi, _mm256_max_epi32(acc.hi, a.hi), _mm256_cmpeq_epi32(hi, bit))};
}
PRECAL_INLINE I32 words_of(F32 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
PRECAL_INLINE F32 quotient(F32 w, F32 d, F32 r) {
  const F32 first = mul(w, r);
  const F32 left = {_mm256_fnmadd_ps(first.lo, d.lo, w.lo), _mm256_fnmadd_ps(first.hi, d.hi, w.hi)};
  return fma(left, r, first);
}
PRECAL_INLINE void store_nearest(uint8_t* p, F32 x, float lowest, float highest) {
  store_bytes(p, nearest_integer(x, splat(lowest), splat(highest)));
}

#else  // scalar: the specification

PRECAL_INLINE I32 max_where(uint32_t mask, I32 acc, I32 a) {
  for (int i = 0; i < kLanes; ++i) {
    if (((mask >> i) & 1u) != 0u && int32_t(a.v[i]) > int32_t(acc.v[i])) acc.v[i] = a.v[i];
  }
  return acc;
}
PRECAL_INLINE I32 words_of(F32 a) {
  I32 r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = float_bits(a.v[i]);
  return r;
}
PRECAL_INLINE F32 quotient(F32 w, F32 d, F32) { return div(w, d); }
PRECAL_INLINE void store_nearest(uint8_t* p, F32 x, float lowest, float highest) {
  store_bytes(p, nearest_integer(x, splat(lowest), splat(highest)));
}

#endif

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
