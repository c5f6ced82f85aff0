// SPDX-License-Identifier: Apache-2.0
// Sums of squares of float lanes in double, a sum per lane. The square of a float is exact there, so that a fused
// multiplication and addition rounds like the two.
#pragma once

#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

#if defined(__AVX512F__)

struct Squares {
  __m512d lo, hi;
};
PRECAL_INLINE Squares zero_squares() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
PRECAL_INLINE Squares add_square(Squares sum, F32 a) {
  const __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  return {_mm512_fmadd_pd(lo, lo, sum.lo), _mm512_fmadd_pd(hi, hi, sum.hi)};
}
PRECAL_INLINE void store_squares(double* p, Squares sum) {
  _mm512_storeu_pd(p, sum.lo);
  _mm512_storeu_pd(p + 8, sum.hi);
}

#elif defined(__AVX2__)

struct Squares {
  __m256d v[4];
};
PRECAL_INLINE Squares zero_squares() {
  const __m256d zero = _mm256_setzero_pd();
  return {{zero, zero, zero, zero}};
}
PRECAL_INLINE __m256d add_square_of(__m256d sum, __m128 a) {
  const __m256d d = _mm256_cvtps_pd(a);
  return _mm256_fmadd_pd(d, d, sum);
}
PRECAL_INLINE Squares add_square(Squares sum, F32 a) {
  return {
      {add_square_of(sum.v[0], _mm256_castps256_ps128(a.lo)), add_square_of(sum.v[1], _mm256_extractf128_ps(a.lo, 1)),
       add_square_of(sum.v[2], _mm256_castps256_ps128(a.hi)), add_square_of(sum.v[3], _mm256_extractf128_ps(a.hi, 1))}};
}
PRECAL_INLINE void store_squares(double* p, Squares sum) {
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(p + 4 * i, sum.v[i]);
}

#else

struct Squares {
  double v[kLanes];
};
PRECAL_INLINE Squares zero_squares() { return {}; }
PRECAL_INLINE Squares add_square(Squares sum, F32 a) {
  for (int i = 0; i < kLanes; ++i) sum.v[i] = sum.v[i] + double(a.v[i]) * double(a.v[i]);
  return sum;
}
PRECAL_INLINE void store_squares(double* p, Squares sum) {
  for (int i = 0; i < kLanes; ++i) p[i] = sum.v[i];
}

#endif

PRECAL_INLINE double hsum(Squares a) {
  double v[kLanes];
  store_squares(v, a);
  return sum_of_lanes(v);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
