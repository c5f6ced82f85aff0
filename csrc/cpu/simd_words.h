// SPDX-License-Identifier: Apache-2.0
// Integer lanes for the trellis search, on every instruction set: Words are 32 lanes of 16 bits, Bytes 64 of 8 bits.
// Byte lanes 2 i and 2 i + 1 belong to lane i of a first and of a second Words, so that going from one to the other is
// a shift or a mask. Every function is exact integer arithmetic: the same bits everywhere.
#pragma once

#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int kWordLanes = 32;
constexpr int kHalfTable = 128;  // entries of a lookup table of Bytes are one or two halves

#if defined(__AVX512VBMI__)

struct Words {
  __m512i v;
};
struct Bytes {
  __m512i v;
};
struct WordMask {
  __mmask32 v;
};
PRECAL_INLINE Words load16(const int16_t* p) { return {_mm512_loadu_si512(p)}; }
PRECAL_INLINE void store16(int16_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
PRECAL_INLINE void store8(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
PRECAL_INLINE Words splat16(int a) { return {_mm512_set1_epi16(int16_t(a))}; }
PRECAL_INLINE Words add16(Words a, Words b) { return {_mm512_add_epi16(a.v, b.v)}; }
PRECAL_INLINE Words sub16(Words a, Words b) { return {_mm512_sub_epi16(a.v, b.v)}; }
PRECAL_INLINE Words and16(Words a, Words b) { return {_mm512_and_si512(a.v, b.v)}; }
PRECAL_INLINE Words shift_left16(Words a, int n) { return {_mm512_sll_epi16(a.v, _mm_cvtsi32_si128(n))}; }
PRECAL_INLINE Words twice_saturated(Words a) { return {_mm512_adds_epi16(a.v, a.v)}; }
PRECAL_INLINE Words add_unsigned(Words a, Words b) { return {_mm512_adds_epu16(a.v, b.v)}; }
PRECAL_INLINE Words min_unsigned(Words a, Words b) { return {_mm512_min_epu16(a.v, b.v)}; }
// (a * b + 2^14) >> 15 of signed lanes
PRECAL_INLINE Words multiply_high(Words a, Words b) { return {_mm512_mulhrs_epi16(a.v, b.v)}; }
PRECAL_INLINE Words square_where(WordMask m, Words a) { return {_mm512_maskz_mulhrs_epi16(m.v, a.v, a.v)}; }
PRECAL_INLINE WordMask differs(Words a, Words b) { return {_mm512_cmpneq_epi16_mask(a.v, b.v)}; }
PRECAL_INLINE uint32_t less_unsigned(Words a, Words b) { return _mm512_cmplt_epu16_mask(a.v, b.v); }
// Lanes i of a and of b, shifted right by 9 bits (kHalves = 1; bit 7 may then be anything) or 8, to bytes 2 i, 2 i + 1.
template <int kHalves>
PRECAL_INLINE Bytes cells_of(Words a, Words b) {
  const int64_t from = kHalves == 1 ? 0x0039002900190009LL : 0x0038002800180008LL;
  const __m512i bytes = _mm512_multishift_epi64_epi8(_mm512_set1_epi64(from), a.v);
  return {_mm512_mask_multishift_epi64_epi8(bytes, 0xAAAAAAAAAAAAAAAAu, _mm512_set1_epi64(from << 8), b.v)};
}
// Bytes 2 i, and 2 i + 1, as the upper halves of words.
PRECAL_INLINE Words first_bytes(Bytes a) { return {_mm512_slli_epi16(a.v, 8)}; }
PRECAL_INLINE Words second_bytes(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi16(int16_t(0xFF00)))}; }
// Four tables at once: out[z] = tables[z][cell], the cell's bit 7 ignored if there is one half.
template <int kHalves>
struct Tables {
  __m512i part[4][2 * kHalves];
};
template <int kHalves>
PRECAL_INLINE Tables<kHalves> load_tables(const uint8_t tables[4][2 * kHalfTable]) {
  Tables<kHalves> t;
  for (int z = 0; z < 4; ++z) {
    for (int i = 0; i < 2 * kHalves; ++i) t.part[z][i] = _mm512_loadu_si512(tables[z] + 64 * i);
  }
  return t;
}
template <int kHalves>
PRECAL_INLINE void look_up(const Tables<kHalves>& t, Bytes cell, Bytes out[4]) {
  const __mmask64 upper = _mm512_movepi8_mask(cell.v);
  for (int z = 0; z < 4; ++z) {
    out[z].v = _mm512_permutex2var_epi8(t.part[z][0], cell.v, t.part[z][1]);
    if (kHalves == 2) {
      const __m512i other = _mm512_permutex2var_epi8(t.part[z][2 * kHalves - 2], cell.v, t.part[z][2 * kHalves - 1]);
      out[z].v = _mm512_mask_blend_epi8(upper, out[z].v, other);
    }
  }
}
// 0xFF in bytes 2 i and 2 i + 1 where bits i and 32 + i are set.
PRECAL_INLINE Bytes bytes_where(uint64_t bits) {
  const __m512i a = _mm512_movm_epi16(__mmask32(bits)), b = _mm512_movm_epi16(__mmask32(bits >> 32));
  return {_mm512_ternarylogic_epi64(_mm512_set1_epi16(0xFF), a, b, 0xCA)};
}
PRECAL_INLINE Bytes select8(Bytes mask, Bytes a, Bytes b) {
  return {_mm512_ternarylogic_epi64(mask.v, a.v, b.v, 0xCA)};
}
PRECAL_INLINE Bytes add8(Bytes a, Bytes b) { return {_mm512_add_epi8(a.v, b.v)}; }
PRECAL_INLINE Bytes sub8(Bytes a, Bytes b) { return {_mm512_sub_epi8(a.v, b.v)}; }
PRECAL_INLINE Bytes xor8(Bytes a, Bytes b) { return {_mm512_xor_si512(a.v, b.v)}; }
// Sixteen lanes rounded to the nearest even integer, kept within 16 bits; NaN and beyond 2^31: any value.
PRECAL_INLINE void store_rounded(int16_t* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(a.v)));
}

#elif defined(__AVX2__)

struct Words {
  __m256i lo, hi;
};
struct Bytes {
  __m256i lo, hi;
};
struct WordMask {
  __m256i lo, hi;
};
#define PRECAL_BOTH(intrinsic, a, b) {intrinsic((a).lo, (b).lo), intrinsic((a).hi, (b).hi)}
PRECAL_INLINE Words load16(const int16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16))};
}
PRECAL_INLINE void store16(int16_t* p, Words a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), a.hi);
}
PRECAL_INLINE void store8(uint8_t* p, Bytes a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), a.hi);
}
PRECAL_INLINE Words splat16(int a) { return {_mm256_set1_epi16(int16_t(a)), _mm256_set1_epi16(int16_t(a))}; }
PRECAL_INLINE Words add16(Words a, Words b) { return PRECAL_BOTH(_mm256_add_epi16, a, b); }
PRECAL_INLINE Words sub16(Words a, Words b) { return PRECAL_BOTH(_mm256_sub_epi16, a, b); }
PRECAL_INLINE Words and16(Words a, Words b) { return PRECAL_BOTH(_mm256_and_si256, a, b); }
PRECAL_INLINE Words shift_left16(Words a, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_sll_epi16(a.lo, count), _mm256_sll_epi16(a.hi, count)};
}
PRECAL_INLINE Words twice_saturated(Words a) { return PRECAL_BOTH(_mm256_adds_epi16, a, a); }
PRECAL_INLINE Words add_unsigned(Words a, Words b) { return PRECAL_BOTH(_mm256_adds_epu16, a, b); }
PRECAL_INLINE Words min_unsigned(Words a, Words b) { return PRECAL_BOTH(_mm256_min_epu16, a, b); }
PRECAL_INLINE Words multiply_high(Words a, Words b) { return PRECAL_BOTH(_mm256_mulhrs_epi16, a, b); }
PRECAL_INLINE Words square_where(WordMask m, Words a) {
  const Words square = multiply_high(a, a);
  return PRECAL_BOTH(_mm256_and_si256, m, square);
}
PRECAL_INLINE WordMask differs(Words a, Words b) {
  const __m256i ones = _mm256_set1_epi16(-1);
  return {_mm256_xor_si256(_mm256_cmpeq_epi16(a.lo, b.lo), ones),
          _mm256_xor_si256(_mm256_cmpeq_epi16(a.hi, b.hi), ones)};
}
PRECAL_INLINE uint32_t less_unsigned(Words a, Words b) {  // a < b is not b == min(a, b)
  const Words least = min_unsigned(a, b);
  const __m256i packed = _mm256_packs_epi16(_mm256_cmpeq_epi16(b.lo, least.lo), _mm256_cmpeq_epi16(b.hi, least.hi));
  return ~uint32_t(_mm256_movemask_epi8(_mm256_permute4x64_epi64(packed, 0xD8)));
}
template <int kHalves>
PRECAL_INLINE Bytes cells_of(Words a, Words b) {
  if (kHalves == 1) {
    const __m256i lower = _mm256_set1_epi16(0x7F00);
    return {_mm256_or_si256(_mm256_srli_epi16(a.lo, 9), _mm256_and_si256(_mm256_srli_epi16(b.lo, 1), lower)),
            _mm256_or_si256(_mm256_srli_epi16(a.hi, 9), _mm256_and_si256(_mm256_srli_epi16(b.hi, 1), lower))};
  }
  const __m256i odd = _mm256_set1_epi16(int16_t(0xFF00));
  return {_mm256_blendv_epi8(_mm256_srli_epi16(a.lo, 8), b.lo, odd),
          _mm256_blendv_epi8(_mm256_srli_epi16(a.hi, 8), b.hi, odd)};
}
PRECAL_INLINE Words first_bytes(Bytes a) { return {_mm256_slli_epi16(a.lo, 8), _mm256_slli_epi16(a.hi, 8)}; }
PRECAL_INLINE Words second_bytes(Bytes a) {
  const __m256i upper = _mm256_set1_epi16(int16_t(0xFF00));
  return {_mm256_and_si256(a.lo, upper), _mm256_and_si256(a.hi, upper)};
}
template <int kHalves>
struct Tables {
  const uint8_t (*of)[2 * kHalfTable];
};
template <int kHalves>
PRECAL_INLINE Tables<kHalves> load_tables(const uint8_t tables[4][2 * kHalfTable]) {
  return {tables};
}
// vpshufb sees 16 entries: parts of a table, each of which answers where the upper bits of the cell are its own.
template <int kHalves>
PRECAL_INLINE void look_up(const Tables<kHalves>& t, Bytes cell, Bytes out[4]) {
  for (int z = 0; z < 4; ++z) out[z] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int part = 0; part < kHalves * kHalfTable / 16; ++part) {
    const __m256i own = _mm256_set1_epi8(int8_t(16 * part)), beyond = _mm256_set1_epi8(0x70);
    const __m256i lo = _mm256_adds_epu8(_mm256_xor_si256(cell.lo, own), beyond);
    const __m256i hi = _mm256_adds_epu8(_mm256_xor_si256(cell.hi, own), beyond);
    for (int z = 0; z < 4; ++z) {
      const __m256i entries =
          _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t.of[z] + 16 * part)));
      out[z].lo = _mm256_or_si256(out[z].lo, _mm256_shuffle_epi8(entries, lo));
      out[z].hi = _mm256_or_si256(out[z].hi, _mm256_shuffle_epi8(entries, hi));
    }
  }
}
PRECAL_INLINE __m256i words_where(uint32_t bits) {
  const __m256i bit =
      _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, int16_t(-32768));
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(int16_t(bits)), bit), bit);
}
PRECAL_INLINE Bytes bytes_where(uint64_t bits) {
  const __m256i lower = _mm256_set1_epi16(0xFF);
  return {_mm256_blendv_epi8(words_where(uint32_t(bits >> 32) & 0xFFFFu), words_where(uint32_t(bits) & 0xFFFFu), lower),
          _mm256_blendv_epi8(words_where(uint32_t(bits >> 48)), words_where(uint32_t(bits >> 16) & 0xFFFFu), lower)};
}
PRECAL_INLINE Bytes select8(Bytes mask, Bytes a, Bytes b) {
  return {_mm256_blendv_epi8(b.lo, a.lo, mask.lo), _mm256_blendv_epi8(b.hi, a.hi, mask.hi)};
}
PRECAL_INLINE Bytes add8(Bytes a, Bytes b) { return PRECAL_BOTH(_mm256_add_epi8, a, b); }
PRECAL_INLINE Bytes sub8(Bytes a, Bytes b) { return PRECAL_BOTH(_mm256_sub_epi8, a, b); }
PRECAL_INLINE Bytes xor8(Bytes a, Bytes b) { return PRECAL_BOTH(_mm256_xor_si256, a, b); }
PRECAL_INLINE void store_rounded(int16_t* p, F32 a) {
  const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}
#undef PRECAL_BOTH

#else  // scalar: the specification

struct Words {
  uint16_t v[kWordLanes];
};
struct Bytes {
  uint8_t v[2 * kWordLanes];
};
struct WordMask {
  bool v[kWordLanes];
};
#define PRECAL_WORDS(Type, expression)                                               \
  do {                                                                               \
    Type r;                                                                          \
    for (int i = 0; i < int(sizeof(r.v) / sizeof(r.v[0])); ++i) r.v[i] = expression; \
    return r;                                                                        \
  } while (0)
PRECAL_INLINE int signed16(uint16_t a) { return int16_t(a); }
PRECAL_INLINE uint16_t saturated16(int a) { return uint16_t(a < -32768 ? -32768 : a > 32767 ? 32767 : a); }
PRECAL_INLINE Words load16(const int16_t* p) { PRECAL_WORDS(Words, uint16_t(p[i])); }
PRECAL_INLINE void store16(int16_t* p, Words a) {
  for (int i = 0; i < kWordLanes; ++i) p[i] = int16_t(a.v[i]);
}
PRECAL_INLINE void store8(uint8_t* p, Bytes a) {
  for (int i = 0; i < 2 * kWordLanes; ++i) p[i] = a.v[i];
}
PRECAL_INLINE Words splat16(int a) { PRECAL_WORDS(Words, uint16_t(a)); }
PRECAL_INLINE Words add16(Words a, Words b) { PRECAL_WORDS(Words, uint16_t(a.v[i] + b.v[i])); }
PRECAL_INLINE Words sub16(Words a, Words b) { PRECAL_WORDS(Words, uint16_t(a.v[i] - b.v[i])); }
PRECAL_INLINE Words and16(Words a, Words b) { PRECAL_WORDS(Words, uint16_t(a.v[i] & b.v[i])); }
PRECAL_INLINE Words shift_left16(Words a, int n) { PRECAL_WORDS(Words, uint16_t(uint32_t(a.v[i]) << n)); }
PRECAL_INLINE Words twice_saturated(Words a) { PRECAL_WORDS(Words, saturated16(2 * signed16(a.v[i]))); }
PRECAL_INLINE Words add_unsigned(Words a, Words b) {
  PRECAL_WORDS(Words, uint16_t(a.v[i] + b.v[i] > 0xFFFF ? 0xFFFF : a.v[i] + b.v[i]));
}
PRECAL_INLINE Words min_unsigned(Words a, Words b) { PRECAL_WORDS(Words, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
PRECAL_INLINE Words multiply_high(Words a, Words b) {
  PRECAL_WORDS(Words, uint16_t((signed16(a.v[i]) * signed16(b.v[i]) + 0x4000) >> 15));
}
PRECAL_INLINE Words square_where(WordMask m, Words a) {
  PRECAL_WORDS(Words, uint16_t(m.v[i] ? (signed16(a.v[i]) * signed16(a.v[i]) + 0x4000) >> 15 : 0));
}
PRECAL_INLINE WordMask differs(Words a, Words b) { PRECAL_WORDS(WordMask, a.v[i] != b.v[i]); }
PRECAL_INLINE uint32_t less_unsigned(Words a, Words b) {
  uint32_t mask = 0;
  for (int i = 0; i < kWordLanes; ++i) mask |= uint32_t(a.v[i] < b.v[i]) << i;
  return mask;
}
template <int kHalves>
PRECAL_INLINE Bytes cells_of(Words a, Words b) {
  PRECAL_WORDS(Bytes, uint8_t((i % 2 ? b : a).v[i / 2] >> (10 - kHalves)));
}
PRECAL_INLINE Words first_bytes(Bytes a) { PRECAL_WORDS(Words, uint16_t(a.v[2 * i] << 8)); }
PRECAL_INLINE Words second_bytes(Bytes a) { PRECAL_WORDS(Words, uint16_t(a.v[2 * i + 1] << 8)); }
template <int kHalves>
struct Tables {
  const uint8_t (*of)[2 * kHalfTable];
};
template <int kHalves>
PRECAL_INLINE Tables<kHalves> load_tables(const uint8_t tables[4][2 * kHalfTable]) {
  return {tables};
}
template <int kHalves>
PRECAL_INLINE void look_up(const Tables<kHalves>& t, Bytes cell, Bytes out[4]) {
  for (int z = 0; z < 4; ++z) {
    for (int i = 0; i < 2 * kWordLanes; ++i) out[z].v[i] = t.of[z][cell.v[i] & (kHalves * kHalfTable - 1)];
  }
}
PRECAL_INLINE Bytes bytes_where(uint64_t bits) {
  PRECAL_WORDS(Bytes, uint8_t((bits >> (i / 2 + i % 2 * kWordLanes)) & 1u ? 0xFF : 0));
}
PRECAL_INLINE Bytes select8(Bytes mask, Bytes a, Bytes b) { PRECAL_WORDS(Bytes, mask.v[i] ? a.v[i] : b.v[i]); }
PRECAL_INLINE Bytes add8(Bytes a, Bytes b) { PRECAL_WORDS(Bytes, uint8_t(a.v[i] + b.v[i])); }
PRECAL_INLINE Bytes sub8(Bytes a, Bytes b) { PRECAL_WORDS(Bytes, uint8_t(a.v[i] - b.v[i])); }
PRECAL_INLINE Bytes xor8(Bytes a, Bytes b) { PRECAL_WORDS(Bytes, uint8_t(a.v[i] ^ b.v[i])); }
PRECAL_INLINE void store_rounded(int16_t* p, F32 a) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23, where floats are integers
  for (int i = 0; i < kLanes; ++i) {
    const float x = a.v[i] < -32768.0f ? -32768.0f : a.v[i] < 32767.0f ? a.v[i] : 32767.0f;
    p[i] = int16_t((x + kRound) - kRound);
  }
}
#undef PRECAL_WORDS

#endif

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
