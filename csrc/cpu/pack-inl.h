// SPDX-License-Identifier: Apache-2.0
// Codes <-> little-endian bit stream (format/bitstream.h).
#pragma once

#include <cstring>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

// Eight codes of kBits, a byte each, next to each other in the low bits, and back: twos, fours, all.
template <int kBits>
PRECAL_INLINE uint64_t join_codes(uint64_t x) {
  x = (x & 0x00FF00FF00FF00FFu) | ((x & 0xFF00FF00FF00FF00u) >> (8 - kBits));
  x = (x & 0x0000FFFF0000FFFFu) | ((x & 0xFFFF0000FFFF0000u) >> (16 - 2 * kBits));
  return (x & 0x00000000FFFFFFFFu) | ((x & 0xFFFFFFFF00000000u) >> (32 - 4 * kBits));
}

template <int kBits>
PRECAL_INLINE uint64_t split_codes(uint64_t x) {
  constexpr uint64_t kFour = (uint64_t(1) << (4 * kBits)) - 1, kTwo = (1u << (2 * kBits)) - 1, kOne = (1u << kBits) - 1;
  x = (x & kFour) | ((x & (kFour << (4 * kBits % 64))) << (32 - 4 * kBits));
  x = (x & (kTwo | kTwo << 32)) | ((x & ((kTwo | kTwo << 32) << (2 * kBits))) << (16 - 2 * kBits));
  constexpr uint64_t kOnes = kOne * 0x0001000100010001u;
  return (x & kOnes) | ((x & (kOnes << kBits)) << (8 - kBits));
}

#if defined(__AVX512VBMI__)
// Whole 64s of codes, as join_codes does: twos to words, fours to double words, eights, whose bytes are then put next
// to each other. Returns how many codes that were.
template <int kBits>
static int64_t pack_many(const uint8_t* codes, int64_t K, uint8_t* out, const uint8_t* out_end, uint64_t* seen) {
  if (kBits == 8) return 0;
  alignas(64) uint8_t order[64] = {};
  for (int i = 0; i < 8 * kBits; ++i) order[i] = uint8_t(i / kBits * 8 + i % kBits);
  const __m512i bytes = _mm512_load_si512(order), low = _mm512_set1_epi64((int64_t(1) << 4 * kBits) - 1);
  const __m512i twos = _mm512_set1_epi16(int16_t(1 | 1 << (kBits + 8) % 16));
  const __m512i fours = _mm512_set1_epi32(1 | 1 << (2 * kBits + 16) % 32);
  const __mmask64 whole = ~uint64_t(0) >> (64 - 8 * kBits);
  __m512i all = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= K; k += 64, out += 8 * kBits) {
    __m512i x = _mm512_loadu_si512(codes + k);
    all = _mm512_or_si512(all, x);
    x = _mm512_madd_epi16(_mm512_maddubs_epi16(twos, x), fours);
    x = _mm512_or_si512(_mm512_and_si512(x, low), _mm512_srli_epi64(_mm512_andnot_si512(low, x), 32 - 4 * kBits));
    x = _mm512_permutexvar_epi8(bytes, x);
    if (kBits == 4) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_castsi512_si256(x));
    else if (out_end - out >= 64) _mm512_storeu_si512(out, x);  // what follows is written later
    else _mm512_mask_storeu_epi8(out, whole, x);                // slower
  }
  *seen |= uint64_t(_mm512_reduce_or_epi64(all));
  return k;
}
#else
template <int kBits>
static int64_t pack_many(const uint8_t*, int64_t, uint8_t*, const uint8_t*, uint64_t*) {
  return 0;
}
#endif

// Returns the bits that any code has. Writes the row's words, and nothing beyond.
template <int kBits>
static uint8_t pack_row(const uint8_t* codes, int64_t K, uint8_t* out, uint8_t* out_end) {
  uint64_t seen = 0;
  int64_t k = pack_many<kBits>(codes, K, out, out_end, &seen);
  out += k / 8 * kBits;
  for (; k + 8 <= K; k += 8, out += kBits) {
    uint64_t x;
    std::memcpy(&x, codes + k, 8);
    seen |= x;
    x = join_codes<kBits>(x);
    std::memcpy(out, &x, kBits);
  }
  uint64_t x = 0;
  std::memcpy(&x, codes + k, size_t(K - k));
  seen |= x;
  x = join_codes<kBits>(x);
  std::memset(out, 0, size_t(out_end - out));
  std::memcpy(out, &x, size_t(ceil_div((K - k) * kBits, 8)));
  seen |= seen >> 32;
  seen |= seen >> 16;
  return uint8_t(seen | seen >> 8);
}

#if defined(__AVX512VBMI__)
// Sixty-four codes: the bytes of eight of them in each word, from which every byte takes its own bits.
template <int kBits>
PRECAL_INLINE __m512i split_vector(const uint8_t* packed) {
  alignas(64) uint8_t place[64], shift[64];
  for (int i = 0; i < 64; ++i) {
    place[i] = uint8_t(i / 8 * kBits + i % 8);
    shift[i] = uint8_t(i % 8 * kBits);
  }
  constexpr __mmask64 kBytes = kBits == 8 ? ~__mmask64(0) : (__mmask64(1) << (8 * kBits % 64)) - 1;
  const __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(place), _mm512_maskz_loadu_epi8(kBytes, packed));
  return _mm512_and_si512(_mm512_multishift_epi64_epi8(_mm512_load_si512(shift), bytes),
                          _mm512_set1_epi8(char((1 << kBits) - 1)));
}
#endif

template <int kBits>
static void unpack_row(const uint8_t* packed, int64_t K, uint8_t* codes) {
  int64_t k = 0;
#if defined(__AVX512VBMI__)
  for (; k + 64 <= K; k += 64, packed += 8 * kBits) _mm512_storeu_si512(codes + k, split_vector<kBits>(packed));
#endif
  for (; k + 8 <= K; k += 8, packed += kBits) {
    uint64_t x = 0;
    std::memcpy(&x, packed, kBits);
    x = split_codes<kBits>(x);
    std::memcpy(codes + k, &x, 8);
  }
  uint64_t x = 0;
  std::memcpy(&x, packed, size_t(ceil_div((K - k) * kBits, 8)));
  x = split_codes<kBits>(x);
  std::memcpy(codes + k, &x, size_t(K - k));
}

template <int kBits>
static bool pack_rows_of(const PackArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t words = format::words_per_row(args.K, kBits);
  uint32_t seen = 0;
  for (int64_t n = row_begin; n < row_end; ++n) {
    uint8_t* out = reinterpret_cast<uint8_t*>(args.packed + n * words);
    seen |= pack_row<kBits>(args.codes + n * args.K, args.K, out, out + 4 * words);
  }
  return (seen >> kBits) == 0;
}

template <int kBits>
static void unpack_rows_of(const UnpackArgs& args, int64_t row_begin, int64_t row_end) {
  const int64_t words = format::words_per_row(args.K, kBits);
  for (int64_t n = row_begin; n < row_end; ++n) {
    unpack_row<kBits>(reinterpret_cast<const uint8_t*>(args.packed + n * words), args.K, args.codes + n * args.K);
  }
}

// One row of codes that fit.
static void pack_codes(const uint8_t* codes, int64_t K, int bits, uint32_t* out) {
  constexpr decltype(&pack_row<2>) kOf[] = {pack_row<2>, pack_row<3>, pack_row<4>, pack_row<5>,
                                            pack_row<6>, pack_row<7>, pack_row<8>};
  uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
  kOf[bits - format::kMinBits](codes, K, bytes, bytes + 4 * format::words_per_row(K, bits));
}

static bool pack_rows(const PackArgs& args, int64_t row_begin, int64_t row_end) {
  constexpr decltype(&pack_rows_of<2>) kOf[] = {pack_rows_of<2>, pack_rows_of<3>, pack_rows_of<4>, pack_rows_of<5>,
                                                pack_rows_of<6>, pack_rows_of<7>, pack_rows_of<8>};
  return kOf[args.bits - format::kMinBits](args, row_begin, row_end);
}

static void unpack_rows(const UnpackArgs& args, int64_t row_begin, int64_t row_end) {
  constexpr decltype(&unpack_rows_of<2>) kOf[] = {unpack_rows_of<2>, unpack_rows_of<3>, unpack_rows_of<4>,
                                                  unpack_rows_of<5>, unpack_rows_of<6>, unpack_rows_of<7>,
                                                  unpack_rows_of<8>};
  kOf[args.bits - format::kMinBits](args, row_begin, row_end);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
