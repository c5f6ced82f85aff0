// SPDX-License-Identifier: Apache-2.0
// Rows of x as whole numbers, in the order in which the kernels of linear_int8_avx512-inl.h eat them.
//
//   Round      per span (columns of one group, at most kMaxSpan) to 8 bits, peak = 127, or to 16 bits, peak = 32512.
//              The integer is the same on every instruction set. AVX-512 and AVX-VNNI store 16 bits as planes
//              high * 256 + low; others store both modes as words, columns of a step in the order 0 2 1 3, but for one
//              token in 8 bits.
//   Order      QuantizedRows (kernels.h): step by step of format/interleave.h, tokens of a panel beside each other.
//   Transpose  x itself as [chunk of tokens][K][lanes] float32: an outlier then needs one load for all tokens.
//   A span with NaN or an infinity gets scale NaN and integers 0, so that its outputs are NaN.
#pragma once

#include <limits>

#include "cpu/decode_avx512-inl.h"
#include "cpu/kernels.h"
#include "cpu/load-inl.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr float kPeak8 = 127.0f, kPeak16 = 32512.0f;
constexpr float kSmallestPeak = 1e-33f;  // below, a span counts as zero: its scale would be denormal

PRECAL_INLINE float span_scale(bool strange, float peak, float top) {
  return strange ? std::numeric_limits<float>::quiet_NaN() : peak > kSmallestPeak ? peak / top : 0.0f;
}

// Where the bytes of token m of a span lie: step t of plane p at `x + t * stride + 4 * p`.
struct TokenPlace {
  int8_t* x;
  int64_t stride;
};

PRECAL_INLINE TokenPlace token_place(const LinearArgs& args, int64_t m, int64_t first, int64_t width) {
  const QuantizedRows& q = args.q;
  const Panel panel = panel_of(q, m);
  const int64_t before = first * args.M + panel.first * width;  // elements of other spans and panels
  return {q.x + before * q.planes + (m - panel.first) * q.planes * 4, panel.tokens * q.planes * 4};
}

#if defined(PRECAL_INT8_AVX512)

PRECAL_FORCE_INLINE __m512 load16(const void* x, DType dtype, int64_t index, __mmask16 mask) {
  if (dtype == DType::kFloat32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(x) + index);
  const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(x) + index);
  if (dtype == DType::kFloat16) return _mm512_cvtph_ps(half);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

PRECAL_FORCE_INLINE __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xFFFF) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1u);
}

static void quantize_activations(const LinearArgs& args, int64_t begin, int64_t end) {
  const QuantizedRows& q = args.q;
  const int64_t K = args.format.K, chunk = args.layout.chunk, steps = chunk / 4;
  const float top = q.planes == 2 ? kPeak16 : kPeak8;
  // Byte 4 t + j of a chunk is column j * steps + t.
  alignas(64) uint8_t order[64];
  for (int64_t i = 0; i < 64; ++i) {
    const int64_t inside = i % chunk;
    order[i] = uint8_t(i - inside + inside % 4 * steps + inside / 4);
  }
  const __m512i interleave = load512(order), ones = _mm512_set1_epi8(1);
  alignas(64) float values[kMaxSpan];
  alignas(64) int8_t bytes[2][kMaxSpan];
  alignas(64) int32_t quads[16];
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t s = 0; s < q.num_spans; ++s) {
      const int64_t first = s * q.span, count = first + q.span < K ? q.span : K - first;
      const int64_t width = round_up(count, chunk);
      __m512 largest = _mm512_setzero_ps();
      __mmask16 strange = 0;  // NaN and infinities
      for (int64_t i = 0; i < width; i += 16) {
        const __m512 v = load16(args.x_rows, args.x_dtype, m * K + first + i, first_lanes(count - i));
        const __m512 magnitude = _mm512_abs_ps(v);
        strange |= _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(3.4028235e38f), _CMP_NLE_UQ);
        largest = _mm512_max_ps(largest, magnitude);
        _mm512_store_ps(values + i, v);
      }
      const float peak = _mm512_reduce_max_ps(largest);
      const bool usable = strange == 0 && peak > kSmallestPeak;
      q.scale[s * args.M + m] = span_scale(strange != 0, peak, top);
      const __m512 inverse = _mm512_set1_ps(usable ? top / peak : 0.0f);
      for (int64_t i = 0; i < width; i += 16) {
        const __m512i v =
            usable ? _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(values + i), inverse)) : _mm512_setzero_si512();
        const __m512i high = q.planes == 1 ? v : _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes[0] + i), _mm512_cvtepi32_epi8(high));
        // The lower byte of v is v - high * 256.
        if (q.planes == 2) _mm_store_si128(reinterpret_cast<__m128i*>(bytes[1] + i), _mm512_cvtepi32_epi8(v));
      }
      const TokenPlace place = token_place(args, m, first, width);
      for (int p = 0; p < q.planes; ++p) {
        for (int64_t i = width; i < round_up(width, 64); ++i) bytes[p][i] = 0;
        int8_t* to = place.x + 4 * p;
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = 0; i < width; i += 64) {
          const __m512i v = _mm512_permutexvar_epi8(interleave, load512(bytes[p] + i));
          sum = _mm512_dpbusd_epi32(sum, ones, v);
          const int64_t here = width - i < 64 ? (width - i) / 4 : 16;
          if (place.stride == 4 && here == 16) {
            _mm512_storeu_si512(to, v);
          } else {
            _mm512_store_si512(quads, v);
            for (int64_t t = 0; t < here; ++t) __builtin_memcpy(to + t * place.stride, quads + t, 4);
          }
          to += here * place.stride;
        }
        q.start[(s * args.M + m) * q.planes + p] = -128 * _mm512_reduce_add_epi32(sum);
      }
    }
  }
}

PRECAL_FORCE_INLINE void transpose16(__m512 r[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  // r[4 i + j]: column j of every four, of rows 4 i .. 4 i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]),
                  c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD);
    t[8 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0x88);
    r[4 + j] = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0x88);
    r[8 + j] = _mm512_shuffle_f32x4(t[j], t[8 + j], 0xDD);
    r[12 + j] = _mm512_shuffle_f32x4(t[4 + j], t[12 + j], 0xDD);
  }
}

// Pieces [begin, end) of chunks of tokens x blocks of kTransposeColumns columns.
static void transpose_activations(const LinearArgs& args, int64_t begin, int64_t end) {
  const int64_t K = args.format.K, lanes = args.q.lanes, blocks = ceil_div(K, kTransposeColumns);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t m0 = piece / blocks * lanes, k0 = piece % blocks * kTransposeColumns;
    const int64_t k1 = k0 + kTransposeColumns < K ? k0 + kTransposeColumns : K;
    float* to = args.q.transposed + m0 * K;
    for (int64_t k = k0; k < k1; k += 16) {
      const __mmask16 columns = first_lanes(k1 - k);
      __m512 r[16];
#pragma GCC unroll 16
      for (int m = 0; m < 16; ++m) {
        r[m] = m < lanes && m0 + m < args.M ? load16(args.x_rows, args.x_dtype, (m0 + m) * K + k, columns)
                                            : _mm512_setzero_ps();
      }
      if (lanes == 1) {
        _mm512_mask_storeu_ps(to + k, columns, r[0]);
        continue;
      }
      transpose16(r);
      const __mmask16 tokens = first_lanes(lanes);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (k + i < k1) _mm512_mask_storeu_ps(to + (k + i) * lanes, tokens, r[i]);
      }
    }
  }
}

#else

// Bytes, as with AVX-512: AVX-VNNI, and one token in 8 bits on AVX2.
PRECAL_INLINE bool in_bytes(const LinearArgs& args) {
#if defined(__AVXVNNI__)
  (void)args;
  return true;
#elif defined(__AVX2__)
  return args.M * args.q.planes == 1;
#else
  (void)args;
  return false;
#endif
}

static void quantize_activations(const LinearArgs& args, int64_t begin, int64_t end) {
  const QuantizedRows& q = args.q;
  const int64_t K = args.format.K, chunk = args.layout.chunk, steps = chunk / 4;
  const float top = q.planes == 2 ? kPeak16 : kPeak8;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number, rounded to nearest even
  float values[kMaxSpan];
  int32_t rounded[kMaxSpan];
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t s = 0; s < q.num_spans; ++s) {
      const int64_t first = s * q.span, count = first + q.span < K ? q.span : K - first;
      const int64_t width = round_up(count, chunk);
      load_elements(args.x_rows, args.x_dtype, m * K + first, count, values);
      for (int64_t i = count; i < width; ++i) values[i] = 0.0f;
      // Bits of |v|: their order is that of the numbers, and infinity and NaN are on top.
      uint32_t largest = 0;
      for (int64_t i = 0; i < width; ++i) {
        const uint32_t bits = float_bits(values[i]) & 0x7FFFFFFFu;
        largest = largest > bits ? largest : bits;
      }
      const bool strange = largest >= 0x7F800000u;
      const float peak = strange ? 0.0f : bits_float(largest);
      q.scale[s * args.M + m] = span_scale(strange, peak, top);
      const bool usable = peak > kSmallestPeak;
      const float inverse = usable ? top / peak : 0.0f;
      for (int64_t i = 0; i < width; ++i) {
        rounded[i] = usable ? int32_t((values[i] * inverse + kRound) - kRound) : 0;
      }
      if (in_bytes(args)) {
        const TokenPlace place = token_place(args, m, first, width);
        for (int p = 0; p < q.planes; ++p) {
          int8_t* at = place.x + 4 * p;
          int32_t sum = 0;
          for (int64_t c = 0; c < width; c += chunk) {
            for (int64_t t = 0; t < steps; ++t, at += place.stride) {
              for (int64_t j = 0; j < 4; ++j) {
                const int32_t v = rounded[c + j * steps + t];
                at[j] = int8_t(p + 1 < q.planes ? (v + 128) >> 8 : v);
                sum += at[j];
              }
            }
          }
          q.start[(s * args.M + m) * q.planes + p] = -128 * sum;
        }
        continue;
      }
      const Panel panel = panel_of(q, m);
      int16_t* to = reinterpret_cast<int16_t*>(q.x) + first * args.M + panel.first * width + (m - panel.first) * 4;
      for (int64_t c = 0; c < width; c += chunk) {
        const int32_t* from = rounded + c;
        for (int64_t t = 0; t < steps; ++t, to += panel.tokens * 4) {
          to[0] = int16_t(from[t]);
          to[1] = int16_t(from[2 * steps + t]);
          to[2] = int16_t(from[steps + t]);
          to[3] = int16_t(from[3 * steps + t]);
        }
      }
    }
  }
}

static void transpose_activations(const LinearArgs& args, int64_t begin, int64_t end) {
  const int64_t K = args.format.K, lanes = args.q.lanes, blocks = ceil_div(K, kTransposeColumns);
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t m0 = piece / blocks * lanes, k0 = piece % blocks * kTransposeColumns;
    const int64_t k1 = k0 + kTransposeColumns < K ? k0 + kTransposeColumns : K;
    float* to = args.q.transposed + m0 * K;
    for (int64_t m = 0; m < lanes; ++m) {
      for (int64_t k = k0; k < k1; ++k) {
        to[k * lanes + m] = m0 + m < args.M ? load_element(args.x_rows, args.x_dtype, (m0 + m) * K + k) : 0.0f;
      }
    }
  }
}

#endif

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
