// SPDX-License-Identifier: Apache-2.0
// Sixteen float lanes, on every instruction set. Kernel bodies are written once on this type and compiled per ISA in
// their own namespace, so quantization gives the same bits everywhere: each function is one correctly rounded
// operation per lane, and hsum fixes the reduction tree. Only fma() differs (scalar: two roundings); it is for
// `linear`.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/macros.h"
#include "core/numeric.h"

#ifndef PRECAL_ISA_NAMESPACE
#error "define PRECAL_ISA_NAMESPACE before including a kernel body"
#endif

// Kernel bodies whose registers must not go through memory.
#define PRECAL_FORCE_INLINE __attribute__((always_inline)) inline

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int kLanes = 16;

#if defined(__AVX512F__)

struct F32 {
  __m512 v;
};
struct I32 {
  __m512i v;
};
PRECAL_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
PRECAL_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
PRECAL_INLINE F32 splat(float a) { return {_mm512_set1_ps(a)}; }
PRECAL_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
PRECAL_INLINE F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PRECAL_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PRECAL_INLINE F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
PRECAL_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// acc + (x > limit ? step : 0)
PRECAL_INLINE F32 add_if_above(F32 acc, F32 x, F32 limit, F32 step) {
  return {_mm512_mask_add_ps(acc.v, _mm512_cmp_ps_mask(x.v, limit.v, _CMP_GT_OQ), acc.v, step.v)};
}
// a < b ? a : b
PRECAL_INLINE F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
// a > b ? a : b
PRECAL_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
PRECAL_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
// Bit i: a < b in lane i; a == b.
PRECAL_INLINE uint32_t less(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
PRECAL_INLINE uint32_t equal(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
PRECAL_INLINE float largest_lane(F32 a) { return _mm512_reduce_max_ps(a.v); }
// Bit i: byte i of 16 is not zero.
PRECAL_INLINE uint32_t nonzero_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm_test_epi8_mask(bytes, bytes);
}
// Whole numbers from 0 to 255.
PRECAL_INLINE void store_bytes(uint8_t* p, F32 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
// bit i of mask ? a : b
PRECAL_INLINE F32 select(uint32_t mask, F32 a, F32 b) { return {_mm512_mask_blend_ps(__mmask16(mask), b.v, a.v)}; }
PRECAL_INLINE I32 zero_words() { return {_mm512_setzero_si512()}; }
PRECAL_INLINE I32 load_words(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
PRECAL_INLINE I32 shift_right(I32 a, int n) { return {_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(n))}; }
PRECAL_INLINE I32 shift_left(I32 a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
PRECAL_INLINE I32 bit_or(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
PRECAL_INLINE I32 bit_xor(I32 a, I32 b) { return {_mm512_xor_si512(a.v, b.v)}; }
PRECAL_INLINE I32 low_bit(I32 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(1))}; }
// table[index & 31] of a table in two halves, per lane
PRECAL_INLINE F32 lookup32(F32 low, F32 high, I32 index) { return {_mm512_permutex2var_ps(low.v, index.v, high.v)}; }
// table[index & 15], per lane
PRECAL_INLINE F32 lookup16(F32 table, I32 index) { return {_mm512_permutexvar_ps(index.v, table.v)}; }
PRECAL_INLINE void store_words(int32_t* p, I32 a) { _mm512_storeu_si512(p, a.v); }
PRECAL_INLINE I32 splat_word(int32_t a) { return {_mm512_set1_epi32(a)}; }
PRECAL_INLINE F32 as_floats(I32 a) { return {_mm512_castsi512_ps(a.v)}; }
// Towards zero, and down; beyond 2^31, and NaN: any value that no lane index has.
PRECAL_INLINE I32 truncate_words(F32 a) { return {_mm512_cvttps_epi32(a.v)}; }
PRECAL_INLINE I32 floor_words(F32 a) {
  return {_mm512_cvt_roundps_epi32(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
PRECAL_INLINE F32 as_numbers(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
PRECAL_INLINE I32 bit_and(I32 a, I32 b) { return {_mm512_and_si512(a.v, b.v)}; }
PRECAL_INLINE I32 max_word(I32 a, I32 b) { return {_mm512_max_epi32(a.v, b.v)}; }
PRECAL_INLINE int32_t largest_word(I32 a) { return _mm512_reduce_max_epi32(a.v); }
PRECAL_INLINE I32 widen_words(const uint16_t* p) {
  return {_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
PRECAL_INLINE I32 widen_bytes(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
PRECAL_INLINE I32 sub_word(I32 a, I32 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
PRECAL_INLINE I32 add_word(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
// a < b ? 1 : 0
PRECAL_INLINE I32 below(F32 a, F32 b) { return {_mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), 1)}; }
// a > b ? acc + 1 : acc
PRECAL_INLINE I32 count_greater(I32 acc, I32 a, I32 b) {
  return {_mm512_mask_sub_epi32(acc.v, _mm512_cmpgt_epi32_mask(a.v, b.v), acc.v, _mm512_set1_epi32(-1))};
}
// Bit i: a <= b in lane i, as unsigned numbers.
PRECAL_INLINE uint32_t at_most_unsigned(I32 a, I32 b) { return _mm512_cmple_epu32_mask(a.v, b.v); }
// Writes the lanes of `mask` next to each other and returns their number; up to 16 words at p may change.
PRECAL_INLINE int append_where(uint32_t mask, I32 a, int32_t* p) {
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(mask), a.v));
  return __builtin_popcount(mask);
}

#elif defined(__AVX2__)

struct F32 {
  __m256 lo, hi;
};
struct I32 {
  __m256i lo, hi;
};
PRECAL_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PRECAL_INLINE void store(float* p, F32 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
PRECAL_INLINE F32 splat(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
PRECAL_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
PRECAL_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
PRECAL_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
PRECAL_INLINE F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
PRECAL_INLINE F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
PRECAL_INLINE F32 add_if_above(F32 acc, F32 x, F32 limit, F32 step) {
  return {_mm256_add_ps(acc.lo, _mm256_and_ps(_mm256_cmp_ps(x.lo, limit.lo, _CMP_GT_OQ), step.lo)),
          _mm256_add_ps(acc.hi, _mm256_and_ps(_mm256_cmp_ps(x.hi, limit.hi, _CMP_GT_OQ), step.hi))};
}
PRECAL_INLINE F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
PRECAL_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
PRECAL_INLINE F32 abs(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
PRECAL_INLINE uint32_t less(F32 a, F32 b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ))) |
         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))) << 8;
}
PRECAL_INLINE uint32_t equal(F32 a, F32 b) {
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ))) |
         uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ))) << 8;
}
PRECAL_INLINE float largest_lane(F32 a) {
  const __m256 eight = _mm256_max_ps(a.lo, a.hi);
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
PRECAL_INLINE uint32_t nonzero_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return ~uint32_t(_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_setzero_si128()))) & 0xFFFFu;
}
PRECAL_INLINE void store_bytes(uint8_t* p, F32 a) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  const __m256i sorted = _mm256_permute4x64_epi64(words, 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(sorted), _mm256_extracti128_si256(sorted, 1)));
}
PRECAL_INLINE __m256 select_half(uint32_t mask, __m256 a, __m256 b) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i chosen = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), bit), bit);
  return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(chosen));
}
PRECAL_INLINE F32 select(uint32_t mask, F32 a, F32 b) {
  return {select_half(mask, a.lo, b.lo), select_half(mask >> 8, a.hi, b.hi)};
}
PRECAL_INLINE I32 zero_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
PRECAL_INLINE I32 load_words(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
PRECAL_INLINE I32 shift_right(I32 a, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(a.lo, count), _mm256_srl_epi32(a.hi, count)};
}
PRECAL_INLINE I32 shift_left(I32 a, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_sll_epi32(a.lo, count), _mm256_sll_epi32(a.hi, count)};
}
PRECAL_INLINE I32 bit_or(I32 a, I32 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
PRECAL_INLINE I32 bit_xor(I32 a, I32 b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
PRECAL_INLINE I32 low_bit(I32 a) {
  const __m256i one = _mm256_set1_epi32(1);
  return {_mm256_and_si256(a.lo, one), _mm256_and_si256(a.hi, one)};
}
PRECAL_INLINE __m256 lookup16_half(F32 table, __m256i index) {
  // vpermps sees the low 3 bits; bit 3 chooses the half of the table through the sign bit of the blend.
  const __m256 low = _mm256_permutevar8x32_ps(table.lo, index);
  const __m256 high = _mm256_permutevar8x32_ps(table.hi, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
PRECAL_INLINE F32 lookup16(F32 table, I32 index) {
  return {lookup16_half(table, index.lo), lookup16_half(table, index.hi)};
}
PRECAL_INLINE F32 lookup32(F32 low, F32 high, I32 index) {
  const F32 a = lookup16(low, index), b = lookup16(high, index);
  return {_mm256_blendv_ps(a.lo, b.lo, _mm256_castsi256_ps(_mm256_slli_epi32(index.lo, 27))),
          _mm256_blendv_ps(a.hi, b.hi, _mm256_castsi256_ps(_mm256_slli_epi32(index.hi, 27)))};
}
PRECAL_INLINE void store_words(int32_t* p, I32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
PRECAL_INLINE I32 splat_word(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
PRECAL_INLINE F32 as_floats(I32 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
PRECAL_INLINE I32 truncate_words(F32 a) { return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
PRECAL_INLINE I32 floor_words(F32 a) {
  return {_mm256_cvttps_epi32(_mm256_floor_ps(a.lo)), _mm256_cvttps_epi32(_mm256_floor_ps(a.hi))};
}
PRECAL_INLINE F32 as_numbers(I32 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
PRECAL_INLINE I32 bit_and(I32 a, I32 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
PRECAL_INLINE I32 max_word(I32 a, I32 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
PRECAL_INLINE int32_t largest_word(I32 a) {
  const __m256i eight = _mm256_max_epi32(a.lo, a.hi);
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}
PRECAL_INLINE I32 widen_words(const uint16_t* p) {
  return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
PRECAL_INLINE I32 widen_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
PRECAL_INLINE I32 sub_word(I32 a, I32 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
PRECAL_INLINE I32 add_word(I32 a, I32 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
PRECAL_INLINE I32 below(F32 a, F32 b) {
  return {_mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)), 31),
          _mm256_srli_epi32(_mm256_castps_si256(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)), 31)};
}
PRECAL_INLINE I32 count_greater(I32 acc, I32 a, I32 b) {
  return {_mm256_sub_epi32(acc.lo, _mm256_cmpgt_epi32(a.lo, b.lo)),
          _mm256_sub_epi32(acc.hi, _mm256_cmpgt_epi32(a.hi, b.hi))};
}
PRECAL_INLINE uint32_t at_most_unsigned(I32 a, I32 b) {
  const __m256i lo = _mm256_cmpeq_epi32(_mm256_min_epu32(a.lo, b.lo), a.lo);
  const __m256i hi = _mm256_cmpeq_epi32(_mm256_min_epu32(a.hi, b.hi), a.hi);
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(lo))) | uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(hi)))
                                                                     << 8;
}
PRECAL_INLINE int append_where(uint32_t mask, I32 a, int32_t* p) {
  if (mask == 0) return 0;
  int32_t lanes[kLanes];
  store_words(lanes, a);
  int count = 0;
  for (; mask != 0; mask &= mask - 1) p[count++] = lanes[__builtin_ctz(mask)];
  return count;
}

#else  // scalar: the specification

struct F32 {
  float v[kLanes];
};
struct I32 {
  uint32_t v[kLanes];
};
#define PRECAL_LANES(result, expression)                         \
  do {                                                           \
    for (int i = 0; i < kLanes; ++i) (result)[i] = (expression); \
  } while (0)

PRECAL_INLINE F32 load(const float* p) {
  F32 r;
  PRECAL_LANES(r.v, p[i]);
  return r;
}
PRECAL_INLINE void store(float* p, F32 a) { PRECAL_LANES(p, a.v[i]); }
PRECAL_INLINE F32 splat(float a) {
  F32 r;
  PRECAL_LANES(r.v, a);
  return r;
}
PRECAL_INLINE F32 add(F32 a, F32 b) {
  F32 r;
  PRECAL_LANES(r.v, a.v[i] + b.v[i]);
  return r;
}
PRECAL_INLINE F32 sub(F32 a, F32 b) {
  F32 r;
  PRECAL_LANES(r.v, a.v[i] - b.v[i]);
  return r;
}
PRECAL_INLINE F32 mul(F32 a, F32 b) {
  F32 r;
  PRECAL_LANES(r.v, a.v[i] * b.v[i]);
  return r;
}
PRECAL_INLINE F32 div(F32 a, F32 b) {
  F32 r;
  PRECAL_LANES(r.v, a.v[i] / b.v[i]);
  return r;
}
PRECAL_INLINE F32 fma(F32 a, F32 b, F32 c) {
  F32 r;
  PRECAL_LANES(r.v, a.v[i] * b.v[i] + c.v[i]);
  return r;
}
PRECAL_INLINE F32 add_if_above(F32 acc, F32 x, F32 limit, F32 step) {
  F32 r;
  PRECAL_LANES(r.v, x.v[i] > limit.v[i] ? acc.v[i] + step.v[i] : acc.v[i]);
  return r;
}
PRECAL_INLINE F32 min(F32 a, F32 b) {
  F32 r;
  PRECAL_LANES(r.v, a.v[i] < b.v[i] ? a.v[i] : b.v[i]);
  return r;
}
PRECAL_INLINE F32 max(F32 a, F32 b) {
  F32 r;
  PRECAL_LANES(r.v, a.v[i] > b.v[i] ? a.v[i] : b.v[i]);
  return r;
}
PRECAL_INLINE F32 abs(F32 a) {
  F32 r;
  PRECAL_LANES(r.v, a.v[i] < 0.0f ? -a.v[i] : a.v[i]);
  return r;
}
PRECAL_INLINE uint32_t less(F32 a, F32 b) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(a.v[i] < b.v[i]) << i;
  return mask;
}
PRECAL_INLINE uint32_t equal(F32 a, F32 b) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(a.v[i] == b.v[i]) << i;
  return mask;
}
PRECAL_INLINE float largest_lane(F32 a) {
  float largest = a.v[0];
  for (int i = 1; i < kLanes; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
  return largest;
}
PRECAL_INLINE uint32_t nonzero_bytes(const uint8_t* p) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(p[i] != 0) << i;
  return mask;
}
PRECAL_INLINE void store_bytes(uint8_t* p, F32 a) { PRECAL_LANES(p, uint8_t(a.v[i])); }
PRECAL_INLINE F32 select(uint32_t mask, F32 a, F32 b) {
  F32 r;
  PRECAL_LANES(r.v, ((mask >> i) & 1u) != 0u ? a.v[i] : b.v[i]);
  return r;
}
PRECAL_INLINE I32 zero_words() {
  I32 r;
  PRECAL_LANES(r.v, 0u);
  return r;
}
PRECAL_INLINE I32 load_words(const int32_t* p) {
  I32 r;
  PRECAL_LANES(r.v, uint32_t(p[i]));
  return r;
}
PRECAL_INLINE I32 shift_right(I32 a, int n) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] >> n);
  return r;
}
PRECAL_INLINE I32 shift_left(I32 a, int n) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] << n);
  return r;
}
PRECAL_INLINE I32 bit_or(I32 a, I32 b) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] | b.v[i]);
  return r;
}
PRECAL_INLINE I32 bit_xor(I32 a, I32 b) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] ^ b.v[i]);
  return r;
}
PRECAL_INLINE I32 low_bit(I32 a) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] & 1u);
  return r;
}
PRECAL_INLINE F32 lookup32(F32 low, F32 high, I32 index) {
  F32 r;
  PRECAL_LANES(r.v, (index.v[i] & 16u) != 0u ? high.v[index.v[i] & 15u] : low.v[index.v[i] & 15u]);
  return r;
}
PRECAL_INLINE F32 lookup16(F32 table, I32 index) {
  F32 r;
  PRECAL_LANES(r.v, table.v[index.v[i] & 15u]);
  return r;
}
PRECAL_INLINE void store_words(int32_t* p, I32 a) { PRECAL_LANES(p, int32_t(a.v[i])); }
PRECAL_INLINE F32 as_floats(I32 a) {
  F32 r;
  PRECAL_LANES(r.v, bits_float(a.v[i]));
  return r;
}
PRECAL_INLINE I32 truncate_words(F32 a) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] > -2147483648.0f && a.v[i] < 2147483648.0f ? uint32_t(int32_t(a.v[i])) : 0x80000000u);
  return r;
}
PRECAL_INLINE I32 floor_words(F32 a) {
  I32 r = truncate_words(a);
  PRECAL_LANES(r.v, r.v[i] != 0x80000000u && a.v[i] < float(int32_t(r.v[i])) ? r.v[i] - 1 : r.v[i]);
  return r;
}
PRECAL_INLINE F32 as_numbers(I32 a) {
  F32 r;
  PRECAL_LANES(r.v, float(int32_t(a.v[i])));
  return r;
}
PRECAL_INLINE I32 splat_word(int32_t a) {
  I32 r;
  PRECAL_LANES(r.v, uint32_t(a));
  return r;
}
PRECAL_INLINE I32 bit_and(I32 a, I32 b) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] & b.v[i]);
  return r;
}
PRECAL_INLINE I32 max_word(I32 a, I32 b) {
  I32 r;
  PRECAL_LANES(r.v, int32_t(a.v[i]) > int32_t(b.v[i]) ? a.v[i] : b.v[i]);
  return r;
}
PRECAL_INLINE int32_t largest_word(I32 a) {
  int32_t largest = int32_t(a.v[0]);
  for (int i = 1; i < kLanes; ++i) largest = int32_t(a.v[i]) > largest ? int32_t(a.v[i]) : largest;
  return largest;
}
PRECAL_INLINE I32 widen_words(const uint16_t* p) {
  I32 r;
  PRECAL_LANES(r.v, p[i]);
  return r;
}
PRECAL_INLINE I32 widen_bytes(const uint8_t* p) {
  I32 r;
  PRECAL_LANES(r.v, p[i]);
  return r;
}
PRECAL_INLINE I32 sub_word(I32 a, I32 b) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] - b.v[i]);
  return r;
}
PRECAL_INLINE I32 add_word(I32 a, I32 b) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] + b.v[i]);
  return r;
}
PRECAL_INLINE I32 below(F32 a, F32 b) {
  I32 r;
  PRECAL_LANES(r.v, a.v[i] < b.v[i] ? 1u : 0u);
  return r;
}
PRECAL_INLINE I32 count_greater(I32 acc, I32 a, I32 b) {
  I32 r;
  PRECAL_LANES(r.v, acc.v[i] + uint32_t(int32_t(a.v[i]) > int32_t(b.v[i])));
  return r;
}
PRECAL_INLINE uint32_t at_most_unsigned(I32 a, I32 b) {
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= uint32_t(a.v[i] <= b.v[i]) << i;
  return mask;
}
PRECAL_INLINE int append_where(uint32_t mask, I32 a, int32_t* p) {
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    if (((mask >> i) & 1u) != 0u) p[count++] = int32_t(a.v[i]);
  }
  return count;
}
#undef PRECAL_LANES

#endif

// The reduction tree of every sum over lanes: 16 -> 8 -> 4 -> 2 -> 1, lane i with lane i + half.
template <typename Number>
PRECAL_INLINE Number sum_of_lanes(Number* v) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
  }
  return v[0];
}
PRECAL_INLINE float hsum(F32 a) {
  float v[kLanes];
  store(v, a);
  return sum_of_lanes(v);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
