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

PRECAL_INLINE TokenPlace token_place(const LinearArgs& args, Panel panel, int64_t m, int64_t first, int64_t width) {
  const QuantizedRows& q = args.q;
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

// Four registers of 16 integers of 8 signed bits as bytes: column 16 i + 4 j + r at byte 16 j + 4 i + r.
PRECAL_FORCE_INLINE __m512i narrow_four(const __m512i v[4]) {
  return _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
}

// What is the same for all spans.
struct RoundTables {
  __m512i interleave, even, odd;

  explicit RoundTables(int64_t chunk) {
    // Byte 4 t + j of a chunk is column j * (chunk / 4) + t, which narrow_four has put elsewhere.
    alignas(64) uint8_t order[64];
    for (int64_t i = 0; i < 64; ++i) {
      const int64_t inside = i % chunk, column = i - inside + inside % 4 * (chunk / 4) + inside / 4;
      order[i] = uint8_t(column % 16 / 4 * 16 + column / 16 * 4 + column % 4);
    }
    interleave = load512(order);
    // One token in 16 bits: the planes' steps by turns.
    even = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
  }
};

// Columns [0, count) of a span that begins at element `at`; kWhole: count is width, and that a multiple of 64.
template <DType kType, int kPlanes, bool kWhole>
PRECAL_FORCE_INLINE void quantize_span(const LinearArgs& args, const RoundTables& tables, int64_t at, int64_t count,
                                       int64_t width, TokenPlace place, float* scale, int32_t* start) {
  const auto load = [&](int64_t i) __attribute__((always_inline)) {
    return load16(args.x_rows, kType, at + i, kWhole ? __mmask16(0xFFFF) : first_lanes(count - i));
  };
  // Bits of |x|: their order is that of the numbers, and infinity and NaN are on top.
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(load(i))));
  }
  const uint32_t peak_bits = _mm512_reduce_max_epu32(largest);
  const bool strange = peak_bits >= 0x7F800000u;
  const float peak = bits_float(peak_bits), top = kPlanes == 2 ? kPeak16 : kPeak8;
  const bool usable = !strange && peak > kSmallestPeak;
  *scale = span_scale(strange, peak, top);
  const __m512 inverse = _mm512_set1_ps(usable ? top / peak : 0.0f);
  const __mmask16 used = usable ? 0xFFFF : 0;
  __m512i sums[kPlanes];
#pragma GCC unroll 2
  for (__m512i& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < width; i += 64) {
    __m512i v[4], high[4], bytes[kPlanes];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {  // loads behind the last column read nothing
      v[j] = _mm512_maskz_cvtps_epi32(used, _mm512_mul_ps(load(i + 16 * j), inverse));
      high[j] = kPlanes == 1 ? v[j] : _mm512_srai_epi32(_mm512_add_epi32(v[j], _mm512_set1_epi32(128)), 8);
      v[j] = _mm512_sub_epi32(v[j], _mm512_slli_epi32(high[j], 8));
    }
#pragma GCC unroll 2
    for (int p = 0; p < kPlanes; ++p) {
      bytes[p] = _mm512_permutexvar_epi8(tables.interleave, narrow_four(p == 0 ? high : v));
      sums[p] = _mm512_dpbusd_epi32(sums[p], _mm512_set1_epi8(1), bytes[p]);
    }
    int8_t* to = place.x + i / 4 * place.stride;
    if (place.stride == 4 && (kWhole || width - i >= 64)) {
      _mm512_storeu_si512(to, bytes[0]);
    } else if (kPlanes == 2 && place.stride == 8 && (kWhole || width - i >= 64)) {
      _mm512_storeu_si512(to, _mm512_permutex2var_epi32(bytes[0], tables.even, bytes[kPlanes - 1]));
      _mm512_storeu_si512(to + 64, _mm512_permutex2var_epi32(bytes[0], tables.odd, bytes[kPlanes - 1]));
    } else {
      alignas(64) int32_t quads[16];
      const int64_t here = kWhole || width - i >= 64 ? 16 : (width - i) / 4;
      for (int p = 0; p < kPlanes; ++p) {
        _mm512_store_si512(quads, bytes[p]);
        for (int64_t t = 0; t < here; ++t) __builtin_memcpy(to + t * place.stride + 4 * p, quads + t, 4);
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < kPlanes; ++p) start[p] = -128 * _mm512_reduce_add_epi32(sums[p]);
}

template <DType kType, int kPlanes>
static void quantize_rows(const LinearArgs& args, int64_t begin, int64_t end) {
  const QuantizedRows& q = args.q;
  const int64_t K = args.format.K, chunk = args.layout.chunk;
  const RoundTables tables(chunk);
  for (int64_t m = begin; m < end; ++m) {
    const Panel panel = panel_of(q, m);
    for (int64_t s = 0; s < q.num_spans; ++s) {
      const int64_t first = s * q.span, count = first + q.span < K ? q.span : K - first;
      const int64_t width = round_up(count, chunk), at = m * K + first;
      const TokenPlace place = token_place(args, panel, m, first, width);
      float* scale = q.scale + s * args.M + m;
      int32_t* start = q.start + (s * args.M + m) * kPlanes;
      if (count % 64 == 0) {
        quantize_span<kType, kPlanes, true>(args, tables, at, count, width, place, scale, start);
      } else {
        quantize_span<kType, kPlanes, false>(args, tables, at, count, width, place, scale, start);
      }
    }
  }
}

static void quantize_activations(const LinearArgs& args, int64_t begin, int64_t end) {
  const bool two = args.q.planes == 2;
  switch (args.x_dtype) {
    case DType::kFloat32:
      return (two ? quantize_rows<DType::kFloat32, 2> : quantize_rows<DType::kFloat32, 1>)(args, begin, end);
    case DType::kFloat16:
      return (two ? quantize_rows<DType::kFloat16, 2> : quantize_rows<DType::kFloat16, 1>)(args, begin, end);
    default: return (two ? quantize_rows<DType::kBFloat16, 2> : quantize_rows<DType::kBFloat16, 1>)(args, begin, end);
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
    if (lanes == 1) {
      for (int64_t k = k0; k < k1; k += 16) {
        const __mmask16 columns = first_lanes(k1 - k);
        _mm512_mask_storeu_ps(to + k, columns, load16(args.x_rows, args.x_dtype, m0 * K + k, columns));
      }
      continue;
    }
    for (int64_t k = k0; k < k1; k += 16) {
      const __mmask16 columns = first_lanes(k1 - k);
      __m512 r[16];
#pragma GCC unroll 16
      for (int m = 0; m < 16; ++m) {
        r[m] = m < lanes && m0 + m < args.M ? load16(args.x_rows, args.x_dtype, (m0 + m) * K + k, columns)
                                            : _mm512_setzero_ps();
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
        const TokenPlace place = token_place(args, panel_of(q, m), m, first, width);
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
