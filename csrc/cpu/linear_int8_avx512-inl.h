// SPDX-License-Identifier: Apache-2.0
// y = x @ W'^T + bias with integer dot products: AVX-512 VBMI, VNNI, GFNI.
//
//   Codes  decode_avx512-inl.h: level + 128, unsigned bytes, 16 rows x 4 columns a register.
//   Dots   vpdpbusd: levels + 128 times activations of 8 signed bits. a8: x rounded to 8 bits per span of up to 128
//          columns of a group. a16: x as high * 256 + low, 16 bits, two dots. Sums start at -128 * sum(x).
//   Work   a thread owns pairs of tiles of 16 rows. Up to 8 sums (tokens x planes): levels go straight from registers
//          into the dots of two tiles. Up to 16: the same again for the other half of the tokens. More: a span of two
//          tiles is decoded once into L1, and panels of up to 8 sums run over it.
//   Order  y = the outliers, block by block; then fma(float(sum) * x_scale, scale, y) span by span; then times the row
//          scale, plus bias. The same for every M: a token's result depends on it alone.
#pragma once

#include <utility>

#include "cpu/outliers_avx512-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int64_t kPrefetch = 7168;  // bytes ahead; more towards the end of a pair, for the next heads
// Sums (tokens x planes) of two tiles in registers, and how many there may be without levels in L1.
constexpr int kPanelSums = 8, kDirectSums = 16;
constexpr int kPanel8 = kPanelSums, kPanel16 = kPanelSums / 2, kFew8 = kPanel8, kFew16 = kPanel16;

PRECAL_FORCE_INLINE __m512i broadcast_dword(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// The sum in place: gcc 12 otherwise copies sums between registers from one step to the next.
PRECAL_FORCE_INLINE void dot(__m512i& sum, __m512i levels, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(x));
}

template <int kPlanes>
PRECAL_FORCE_INLINE __m512 sum_of_planes(const __m512i* sums) {
  return _mm512_cvtepi32_ps(kPlanes == 2 ? _mm512_add_epi32(_mm512_slli_epi32(sums[0], 8), sums[1]) : sums[0]);
}

PRECAL_INLINE const uint8_t* tile_at(const LinearArgs& args, int64_t t) {
  return args.prepacked + format::tile_place(args.layout, t).head;
}

// What stands before the codes of a tile: scales and outliers. Tiles are too far apart for the hardware to guess.
PRECAL_FORCE_INLINE void prefetch_head(const LinearArgs& args, int64_t t) {
  if (t >= args.layout.num_tiles) return;
  const uint8_t* tile = tile_at(args, t);
  for (int64_t line = 0; line < args.layout.head_bytes; line += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(tile + line), _MM_HINT_T0);
  }
}

// y * row_scale + bias of 16 rows, rounded to y's type.
struct TileOutput {
  __mmask16 rows;
  __m512 row_scale, bias;
  DType dtype;
  uint8_t* to;
  int64_t stride;  // bytes from token to token

  PRECAL_FORCE_INLINE TileOutput(const LinearArgs& args, int64_t t)
      : rows(first_lanes(args.format.N - t * kTileLanes)), dtype(args.y_dtype) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile_at(args, t)));
    row_scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(codes), 16));
    // y + (-0) is y, whatever y.
    bias = args.bias != nullptr ? _mm512_maskz_loadu_ps(rows, args.bias + t * kTileLanes) : _mm512_set1_ps(-0.0f);
    const int64_t bytes = dtype == DType::kFloat32 ? 4 : 2;
    to = static_cast<uint8_t*>(args.y) + t * kTileLanes * bytes;
    stride = args.y_stride * bytes;
  }

  PRECAL_FORCE_INLINE void store(int64_t m, __m512 y) const {
    y = _mm512_add_ps(_mm512_mul_ps(y, row_scale), bias);
    uint8_t* at = to + m * stride;
    if (dtype == DType::kFloat32) {
      _mm512_mask_storeu_ps(at, rows, y);
    } else if (dtype == DType::kFloat16) {
      _mm256_mask_storeu_epi16(at, rows, _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      // float_to_bf16(): nearest even, NaN stays quiet. vcvtneps2bf16 would flush denormals.
      const __m512i bits = _mm512_castps_si512(y), one = _mm512_set1_epi32(1);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
      __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
      const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
      rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
      _mm256_mask_storeu_epi16(at, rows, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    }
  }
};

// kTokens tokens and kTiles tiles, straight from the codes; two tiles are a pair.
template <int kBits, int kPlanes, int kTokens, int kTiles>
static void few_tokens(const LinearArgs& args, const LevelTables& tables, int64_t t0) {
  constexpr int kSums = kTokens * kPlanes;
  // Sums of the same output that run beside each other: a dot has a latency of 4 to 5 cycles, two start per cycle.
  constexpr int kChains = kSums * kTiles >= 8 ? 1 : kSums * kTiles >= 4 ? 2 : 4;
  const format::TileLayout& layout = args.layout;
  const QuantizedRows& q = args.q;
  const int64_t chunks_per_span = q.span / layout.chunk, spans_per_group = args.format.group_size / q.span;
  const int64_t chunk_x = layout.chunk * kSums;
  const int registers = int(layout.chunk_bytes / 64);
  const format::TilePlace place = format::tile_place(layout, t0);
  const uint8_t *tile = args.prepacked + place.head, *codes = args.prepacked + place.codes;
  const int8_t* x = q.x;
  ChunkDecoder<kBits, kTiles> decoder(tables);
  // Of a step's prefetches: its share of everything up to the next pair's begin. Half a pair alone is rare.
  const int64_t ahead =
      layout.num_chunks > 0 ? round_up(ceil_div(kTiles * layout.tile_bytes, layout.num_chunks), 64) : 0;
  const uint8_t* soon = codes + kPrefetch;
  __m512 y[kTiles][kTokens], scale[kTiles];
  alignas(64) float outliers[kTokens * kTileLanes];
#pragma GCC unroll 2
  for (int j = 0; j < kTiles; ++j) {
    outlier_sums(args, tile + j * layout.head_bytes, 0, outliers);
#pragma GCC unroll 16
    for (int m = 0; m < kTokens; ++m) y[j][m] = _mm512_load_ps(outliers + m * kTileLanes);
    scale[j] = _mm512_setzero_ps();
  }
  int64_t n = 0, group = 0, spans_left = 0;
  for (int64_t s = 0; s < q.num_spans; ++s) {
    if (spans_left == 0) {
#pragma GCC unroll 2
      for (int j = 0; j < kTiles; ++j) {
        scale[j] = load_scales(tile + j * layout.head_bytes + layout.scale, group, args.format.scale_type);
      }
      ++group;
      spans_left = spans_per_group;
    }
    --spans_left;
    __m512i acc[kTiles][kSums][kChains];
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
      const __m512i start = _mm512_set1_epi32(q.start[s * kSums + i]);
#pragma GCC unroll 2
      for (int j = 0; j < kTiles; ++j) {
        acc[j][i][0] = start;
#pragma GCC unroll 4
        for (int c = 1; c < kChains; ++c) acc[j][i][c] = _mm512_setzero_si512();
      }
    }
    const int64_t end = n + chunks_per_span < layout.num_chunks ? n + chunks_per_span : layout.num_chunks;
    for (; n < end; ++n) {
      for (int64_t line = 0; line < ahead; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(soon + n * ahead + line), _MM_HINT_T0);
      }
      decoder.decode(codes, layout.chunk_bytes, registers, args.keep[n],
                     [&](int t, int i, const __m512i* w) __attribute__((always_inline)) {
#pragma GCC unroll 16
                       for (int k = 0; k < kSums; ++k) {
                         const __m512i v = broadcast_dword(x + (t * kSums + k) * 4);
#pragma GCC unroll 2
                         for (int j = 0; j < kTiles; ++j) {
                           __m512i& sum = acc[j][k][i % kChains];
                           dot(sum, w[j], v);
                         }
                       }
                     });
      x += chunk_x;
      codes += place.stride;
    }
#pragma GCC unroll 16
    for (int m = 0; m < kTokens; ++m) {
      const __m512 x_scale = _mm512_set1_ps(q.scale[s * kTokens + m]);
#pragma GCC unroll 2
      for (int j = 0; j < kTiles; ++j) {
        __m512i sums[kPlanes];
#pragma GCC unroll 2
        for (int p = 0; p < kPlanes; ++p) {
          sums[p] = acc[j][m * kPlanes + p][0];
#pragma GCC unroll 4
          for (int c = 1; c < kChains; ++c) sums[p] = _mm512_add_epi32(sums[p], acc[j][m * kPlanes + p][c]);
        }
        y[j][m] = _mm512_fmadd_ps(_mm512_mul_ps(sum_of_planes<kPlanes>(sums), x_scale), scale[j], y[j][m]);
      }
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kTiles; ++j) {
    const TileOutput output(args, t0 + j);
#pragma GCC unroll 16
    for (int m = 0; m < kTokens; ++m) output.store(m, y[j][m]);
  }
}

// One panel over one span of kTiles tiles: dots straight from the codes; y [kTiles][M][16]. Decodes from where
// `decoder` is.
template <int kBits, int kPlanes, int kTokens, int kTiles>
PRECAL_FORCE_INLINE void panel_of_codes(const LinearArgs& args, ChunkDecoder<kBits, kTiles>& decoder,
                                        const uint8_t* codes, int64_t stride, int64_t s, int64_t first, int64_t end,
                                        int64_t m0, const __m512* scale, float* y) {
  constexpr int kSums = kTokens * kPlanes, kChains = kSums >= 4 ? 1 : 2;
  const QuantizedRows& q = args.q;
  const int64_t chunk = args.layout.chunk, width = (end - first) * chunk, chunk_bytes = args.layout.chunk_bytes;
  const int8_t* x = q.x + (first * chunk * args.M + m0 * width) * kPlanes;
  __m512i acc[kTiles][kSums][kChains];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
    const __m512i start = _mm512_set1_epi32(q.start[(s * args.M + m0) * kPlanes + i]);
#pragma GCC unroll 2
    for (int j = 0; j < kTiles; ++j) {
      acc[j][i][0] = start;
      if (kChains == 2) acc[j][i][kChains - 1] = _mm512_setzero_si512();
    }
  }
  for (int64_t n = first; n < end; ++n, x += chunk * kSums) {
    decoder.decode(codes + n * stride, chunk_bytes, int(chunk_bytes / 64), args.keep[n],
                   [&](int t, int i, const __m512i* w) __attribute__((always_inline)) {
#pragma GCC unroll 8
                     for (int k = 0; k < kSums; ++k) {
                       const __m512i v = broadcast_dword(x + (t * kSums + k) * 4);
#pragma GCC unroll 2
                       for (int j = 0; j < kTiles; ++j) {
                         __m512i& sum = acc[j][k][i % kChains];
                         dot(sum, w[j], v);
                       }
                     }
                   });
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    const __m512 x_scale = _mm512_set1_ps(q.scale[s * args.M + m0 + m]);
#pragma GCC unroll 2
    for (int j = 0; j < kTiles; ++j) {
      __m512i sums[kPlanes];
#pragma GCC unroll 2
      for (int p = 0; p < kPlanes; ++p) {
        sums[p] = acc[j][m * kPlanes + p][0];
        if (kChains == 2) sums[p] = _mm512_add_epi32(sums[p], acc[j][m * kPlanes + p][kChains - 1]);
      }
      float* at = y + (j * args.M + m0 + m) * kTileLanes;
      const __m512 part = _mm512_mul_ps(sum_of_planes<kPlanes>(sums), x_scale);
      _mm512_store_ps(at, _mm512_fmadd_ps(part, scale[j], _mm512_load_ps(at)));
    }
  }
}

// Panels over kTiles tiles: decoding each span for every panel costs less than levels in L1, or than a tile at a time,
// where every dot needs a load of its own.
template <int kBits, int kPlanes, int kTokens, int kTiles>
static void panels_of_codes(const LinearArgs& args, const LevelTables& tables, int64_t t0) {
  // As QuantizedRows says: wide ones first, others of one token less.
  constexpr int kPanels = (kTokens * kPlanes + kPanelSums - 1) / kPanelSums, kWide = (kTokens + kPanels - 1) / kPanels,
                kWidePanels = kTokens - kPanels * (kWide - 1);
  const format::TileLayout& layout = args.layout;
  const QuantizedRows& q = args.q;
  const int64_t chunks_per_span = q.span / layout.chunk, spans_per_group = args.format.group_size / q.span;
  const format::TilePlace place = format::tile_place(layout, t0);
  const uint8_t *tile = args.prepacked + place.head, *codes = args.prepacked + place.codes;
  ChunkDecoder<kBits, kTiles> decoder(tables);
  const int64_t ahead =
      layout.num_chunks > 0 ? round_up(ceil_div(kTiles * layout.tile_bytes, layout.num_chunks), 64) : 0;
  __m512 scale[kTiles];
  alignas(64) float y[kTiles * kTokens * kTileLanes];
  for (int j = 0; j < kTiles; ++j) outlier_sums(args, tile + j * layout.head_bytes, 0, y + j * kTokens * kTileLanes);
  for (int64_t s = 0; s < q.num_spans; ++s) {
    const int64_t first = s * chunks_per_span;
    const int64_t end = first + chunks_per_span < layout.num_chunks ? first + chunks_per_span : layout.num_chunks;
    for (int j = 0; j < kTiles && s % spans_per_group == 0; ++j) {
      scale[j] = load_scales(tile + j * layout.head_bytes + layout.scale, s / spans_per_group, args.format.scale_type);
    }
    for (int64_t line = first * ahead; line < end * ahead; line += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(codes + kPrefetch + line), _MM_HINT_T0);
    }
    const ChunkDecoder<kBits, kTiles> begin = decoder;
    int64_t m0 = 0;
#pragma GCC unroll 1
    for (int i = 0; i < kWidePanels; ++i, m0 += kWide) {
      decoder = begin;
      panel_of_codes<kBits, kPlanes, kWide, kTiles>(args, decoder, codes, place.stride, s, first, end, m0, scale, y);
    }
#pragma GCC unroll 1
    for (int i = kWidePanels; i < kPanels; ++i, m0 += kWide - 1) {
      decoder = begin;
      panel_of_codes<kBits, kPlanes, kWide - 1, kTiles>(args, decoder, codes, place.stride, s, first, end, m0, scale,
                                                        y);
    }
  }
  const TileOutput output[2] = {{args, t0}, {args, t0 + kTiles - 1}};
#pragma GCC unroll 16
  for (int m = 0; m < kTokens; ++m) {
    for (int j = 0; j < kTiles; ++j) output[j].store(m, _mm512_load_ps(y + (j * kTokens + m) * kTileLanes));
  }
}

// `count` panels from token m0 on over one decoded span of kTiles tiles: levels [step][kTiles][64]; y [kTiles][M][16].
template <int kPlanes, int kSums, int kTiles>
static void panels_of_tokens(const LinearArgs& args, const uint8_t* levels, int64_t s, const int8_t* x, int64_t steps,
                             int64_t m0, int64_t count, const __m512* scale, float* y) {
  constexpr int kTokens = kSums / kPlanes;
  const int64_t M = args.M;
  const int32_t* starts = args.q.start + (s * M + m0) * kPlanes;
  const float* x_scale = args.q.scale + s * M + m0;
  float* to = y + m0 * kTileLanes;
  __m512 scales[kTiles];
#pragma GCC unroll 2
  for (int j = 0; j < kTiles; ++j) scales[j] = scale[j];
  for (int64_t panel = 0; panel < count; ++panel) {
    __m512i acc[kSums][kTiles];
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      const __m512i start = _mm512_set1_epi32(starts[i]);
#pragma GCC unroll 2
      for (int j = 0; j < kTiles; ++j) acc[i][j] = start;
    }
    const uint8_t* from = levels;
    for (int64_t step = 0; step < steps; ++step) {
      __m512i w[kTiles];
#pragma GCC unroll 2
      for (int j = 0; j < kTiles; ++j) w[j] = _mm512_load_si512(from + j * 64);
#pragma GCC unroll 8
      for (int i = 0; i < kSums; ++i) {
        const __m512i v = broadcast_dword(x + i * 4);
#pragma GCC unroll 2
        for (int j = 0; j < kTiles; ++j) dot(acc[i][j], w[j], v);
      }
      from += kTiles * 64;
      x += kSums * 4;
    }
#pragma GCC unroll 8
    for (int m = 0; m < kTokens; ++m) {
      const __m512 of_token = _mm512_set1_ps(x_scale[m]);
#pragma GCC unroll 2
      for (int j = 0; j < kTiles; ++j) {
        __m512i sums[kPlanes];
#pragma GCC unroll 2
        for (int p = 0; p < kPlanes; ++p) sums[p] = acc[m * kPlanes + p][j];
        float* at = to + (j * M + m) * kTileLanes;
        const __m512 part = _mm512_mul_ps(sum_of_planes<kPlanes>(sums), of_token);
        _mm512_store_ps(at, _mm512_fmadd_ps(part, scales[j], _mm512_load_ps(at)));
      }
    }
    starts += kSums;
    x_scale += kTokens;
    to += kTokens * kTileLanes;
  }
}

using PanelKernel = void (*)(const LinearArgs&, const uint8_t*, int64_t, const int8_t*, int64_t, int64_t, int64_t,
                             const __m512*, float*);

template <int kPlanes, int kTiles, int... kBefore>
static PanelKernel panel_kernel(int64_t tokens, std::integer_sequence<int, kBefore...>) {
  static constexpr PanelKernel kKernels[] = {panels_of_tokens<kPlanes, (kBefore + 1) * kPlanes, kTiles>...};
  return kKernels[tokens - 1];
}

// y [kTiles][M][16] holds the outliers' part.
template <int kBits, int kPlanes, int kTiles>
static void many_tokens(const LinearArgs& args, const LevelTables& tables, int64_t t0, float* y) {
  const format::TileLayout& layout = args.layout;
  const QuantizedRows& q = args.q;
  const int64_t chunks_per_span = q.span / layout.chunk, spans_per_group = args.format.group_size / q.span;
  const int64_t wide_tokens = q.wide * q.panel,
                narrow_panels = (args.M - wide_tokens) / (q.panel > 1 ? q.panel - 1 : 1);
  using Widths = std::make_integer_sequence<int, kPanelSums / kPlanes>;
  const PanelKernel wide = panel_kernel<kPlanes, kTiles>(q.panel, Widths());
  const PanelKernel narrow = panel_kernel<kPlanes, kTiles>(q.panel > 1 ? q.panel - 1 : 1, Widths());
  alignas(64) uint8_t levels[kMaxSpan / 4 * kTiles * 64];
  const format::TilePlace place = format::tile_place(layout, t0);
  const uint8_t *tile = args.prepacked + place.head, *codes = args.prepacked + place.codes;
  // With many tokens the next span is far enough, and L1 has other things to hold.
  const int64_t distance = args.M <= 32 ? 4096 : chunks_per_span * place.stride;
  ChunkDecoder<kBits, kTiles> decoder(tables);
  __m512 scale[kTiles];
  for (int64_t s = 0; s < q.num_spans; ++s) {
    const int64_t first = s * chunks_per_span;
    const int64_t end = first + chunks_per_span < layout.num_chunks ? first + chunks_per_span : layout.num_chunks;
    if (s % spans_per_group == 0) {
#pragma GCC unroll 2
      for (int j = 0; j < kTiles; ++j) {
        scale[j] =
            load_scales(tile + j * layout.head_bytes + layout.scale, s / spans_per_group, args.format.scale_type);
      }
    }
    for (int64_t n = first; n < end; ++n) {
      // The dots that follow take long enough for the hardware to lose the stream: ask for the codes that come next.
      const uint8_t* ahead = codes + n * place.stride + distance;
      for (int64_t line = 0; line < kTiles * layout.chunk_bytes; line += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T0);
      }
      uint8_t* to = levels + (n - first) * (layout.chunk / 4) * kTiles * 64;
      decoder.decode(codes + n * place.stride, layout.chunk_bytes, int(layout.chunk_bytes / 64), args.keep[n],
                     [&](int t, int, const __m512i* w) __attribute__((always_inline)) {
#pragma GCC unroll 2
                       for (int j = 0; j < kTiles; ++j) _mm512_store_si512(to + (t * kTiles + j) * 64, w[j]);
                     });
    }
    const int64_t width = (end - first) * layout.chunk, steps = width / 4;
    const int8_t* x = q.x + first * layout.chunk * args.M * kPlanes;
    wide(args, levels, s, x, steps, 0, q.wide, scale, y);
    if (narrow_panels > 0) {
      narrow(args, levels, s, x + wide_tokens * kPlanes * width, steps, wide_tokens, narrow_panels, scale, y);
    }
  }
  // Token by token: two tiles are one cache line of 16-bit outputs.
  const TileOutput output[2] = {{args, t0}, {args, t0 + kTiles - 1}};
  for (int64_t m = 0; m < args.M; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < kTiles; ++j) output[j].store(m, _mm512_load_ps(y + (j * args.M + m) * kTileLanes));
  }
}

template <int kBits, int kPlanes, int kTokens, int kTiles>
static void direct(const LinearArgs& args, const LevelTables& tables, int64_t t) {
  if constexpr (kTokens * kPlanes <= kPanelSums) {
    few_tokens<kBits, kPlanes, kTokens, kTiles>(args, tables, t);
  } else {
    panels_of_codes<kBits, kPlanes, kTokens, kTiles>(args, tables, t);
  }
}

template <int kBits, int kPlanes, int kTokens>
static void few_tiles(const LinearArgs& args, const LevelTables& tables, int64_t begin, int64_t end) {
  int64_t t = begin;
  if (t % 2 != 0 && t < end) direct<kBits, kPlanes, kTokens, 1>(args, tables, t++);
  for (; t + 2 <= end; t += 2) direct<kBits, kPlanes, kTokens, 2>(args, tables, t);
  if (t < end) direct<kBits, kPlanes, kTokens, 1>(args, tables, t);
}

template <int kBits, int kPlanes, int... kBefore>
static void few_tiles(const LinearArgs& args, const LevelTables& tables, int64_t begin, int64_t end,
                      std::integer_sequence<int, kBefore...>) {
  using Kernel = void (*)(const LinearArgs&, const LevelTables&, int64_t, int64_t);
  static constexpr Kernel kKernels[] = {few_tiles<kBits, kPlanes, kBefore + 1>...};
  kKernels[args.M - 1](args, tables, begin, end);
}

template <int kBits, int kPlanes>
static void int8_tiles(const LinearArgs& args, const LevelTables& tables, int64_t begin, int64_t end, float* scratch) {
  constexpr int kDirect = kDirectSums / kPlanes;
  if (args.M <= kDirect) {
    return few_tiles<kBits, kPlanes>(args, tables, begin, end, std::make_integer_sequence<int, kDirect>());
  }
  const int64_t tile_floats = args.M * kTileLanes;
  for (int64_t first = begin; first < end; first += kStripTiles) {
    const int64_t last = first + kStripTiles < end ? first + kStripTiles : end;
    // Chunk by chunk of tokens over all tiles: the chunk's columns of x stay in L2.
    for (int64_t m = 0; m < args.M; m += args.q.lanes) {
      for (int64_t t = first; t < last; ++t) {
        prefetch_head(args, t + 1);
        outlier_sums(args, tile_at(args, t), m, scratch + (t - first) * tile_floats + m * kTileLanes);
      }
    }
    int64_t t = first;
    if (t % 2 != 0) many_tokens<kBits, kPlanes, 1>(args, tables, t++, scratch);
    for (; t + 2 <= last; t += 2) {
      many_tokens<kBits, kPlanes, 2>(args, tables, t, scratch + (t - first) * tile_floats);
    }
    if (t < last) many_tokens<kBits, kPlanes, 1>(args, tables, t, scratch + (t - first) * tile_floats);
  }
}

static void linear_int8_tiles(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  LevelTables tables;
  make_tables(args, &tables);
  using Kernel = void (*)(const LinearArgs&, const LevelTables&, int64_t, int64_t, float*);
  static constexpr Kernel kKernels[3][2] = {
      {int8_tiles<3, 1>, int8_tiles<3, 2>}, {int8_tiles<4, 1>, int8_tiles<4, 2>}, {int8_tiles<8, 1>, int8_tiles<8, 2>}};
  const int width = args.format.bits == 3 ? 0 : args.format.bits == 4 ? 1 : 2;
  kKernels[width][args.q.planes - 1](args, tables, begin, end, scratch);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
