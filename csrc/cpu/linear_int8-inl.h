// SPDX-License-Identifier: Apache-2.0
// y = x @ W'^T + bias with integer dot products: what linear_int8_avx512-inl.h computes, with AVX2, AVX-VNNI or scalar
// code. The integers are the same, so results differ by the roundings of a fused multiply-add at most.
//
//   Dots   AVX2: levels and activations as 16-bit words, vpmaddwd: 2 instructions per 16 products in both modes. One
//          token in 8 bits: vpmaddubsw would saturate with level + 128, so |level| times x with the level's sign, at
//          most 2 * 127 * 127 = 32258 a pair; no words to make, 5 instructions per 32 products against 7.
//          AVX-VNNI: bytes and vpdpbusd as with AVX-512, half as wide: 1 per 32 products and plane.
//   Work   a thread owns pairs of tiles of 16 rows, which it does span by span by turns. Few tokens (AVX2: one in 8
//          bits): levels go straight from registers into the dots. Else a span of a tile is decoded once into L1, and
//          panels of tokens run over it.
//   Order  as with AVX-512, the same for every M.
#pragma once

#include "cpu/activations-inl.h"

#if defined(PRECAL_INT8_AVX512)
#include "cpu/linear_int8_avx512-inl.h"
#else
#include "cpu/decode_avx2-inl.h"
#include "cpu/outliers-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

#if defined(__AVXVNNI__)
// Sums (tokens x planes) of two halves of a tile in 16 registers: straight from the codes, and over decoded levels.
constexpr int kFewSums = 4, kPanelSums = 6;
constexpr int kFew8 = kFewSums, kFew16 = kFewSums / 2, kPanel8 = kPanelSums, kPanel16 = kPanelSums / 2;
#else
constexpr int kFew8 = 4, kFew16 = 4, kPanel8 = 4, kPanel16 = 4;  // tokens: with two halves of a tile 8 sums
#endif

PRECAL_INLINE const uint8_t* tile_at(const LinearArgs& args, int64_t t) {
  return args.prepacked + format::tile_place(args.layout, t).head;
}

// The 16 scales of a group.
PRECAL_INLINE F32 scales_of_group(const LinearArgs& args, const uint8_t* tile, int64_t group) {
  const int64_t bytes = format::scale_bytes(args.format.scale_type);
  const uint8_t* at = tile + args.layout.scale + group * kTileLanes * bytes;
#if defined(__AVX2__)
  if (bytes == 2) {
    const auto half = [at](int64_t r) {
      return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 2 * r)));
    };
    return {half(0), half(8)};
  }
  // e4m3.h: exponent and mantissa of a normal one are a float's, but for the bias; the others are m * 2^-9.
  const auto half = [at](int64_t r) {
    const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + r)));
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7F));
    const __m256i sign = _mm256_slli_epi32(_mm256_xor_si256(code, magnitude), 24);
    const __m256 normal =
        _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
    const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
    const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
    const __m256 value = _mm256_blendv_ps(normal, small, _mm256_castsi256_ps(is_small));
    const __m256i nan =
        _mm256_and_si256(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7F)), _mm256_set1_epi32(0x7FC00000));
    return _mm256_or_ps(value, _mm256_castsi256_ps(_mm256_or_si256(sign, nan)));
  };
  return {half(0), half(8)};
#else
  float lanes[kTileLanes];
  for (int64_t r = 0; r < kTileLanes; ++r) lanes[r] = format::load_scale(at, r, args.format.scale_type);
  return load(lanes);
#endif
}

// y = fma(float(sum) * x_scale, scale, y) for one token.
PRECAL_INLINE void add_span(const int32_t* sums, float x_scale, F32 scale, float* y) {
#if defined(__AVX2__)
  const auto half = [&](int64_t r) {
    return _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + r)));
  };
  const F32 total = {half(0), half(8)};
#else
  float lanes[kTileLanes];
  for (int64_t r = 0; r < kTileLanes; ++r) lanes[r] = float(sums[r]);
  const F32 total = load(lanes);
#endif
  store(y, fma(mul(total, splat(x_scale)), scale, load(y)));
}

#if defined(__AVX2__)

PRECAL_INLINE void store256(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

PRECAL_INLINE __m256i broadcast_dword(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}

#if defined(__AVXVNNI__)

using Level = uint8_t;  // plus 128

// [step][half][8 rows x 4 columns]
template <int kBits>
static void decode_to(ChunkDecoder* decoder, const uint8_t* codes, int registers, uint32_t keep, Level* levels) {
  decoder->decode<kBits>(codes, registers, keep, [&](int t, int, int half, __m256i w) __attribute__((always_inline)) {
    store256(levels + t * 64 + half * 32, w);
  });
}

template <int kSums>
PRECAL_FORCE_INLINE void store_sums(const __m256i (&acc)[kSums][2], int32_t* sums) {
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) {
    store256(sums + i * kTileLanes, acc[i][0]);
    store256(sums + i * kTileLanes + 8, acc[i][1]);
  }
}

// One panel over a decoded span. x: [step][kSums][4]
template <int kSums>
static void panel_sums(const uint8_t* levels, const int8_t* x, int64_t steps, const int32_t* start, int32_t* sums) {
  __m256i acc[kSums][2];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; ++i) acc[i][0] = acc[i][1] = _mm256_set1_epi32(start[i]);
  for (int64_t t = 0; t < steps; ++t, levels += 64, x += kSums * 4) {
    const __m256i low = ChunkDecoder::load256(levels), high = ChunkDecoder::load256(levels + 32);
#pragma GCC unroll 8
    for (int i = 0; i < kSums; ++i) {
      const __m256i four = broadcast_dword(x + i * 4);
      acc[i][0] = _mm256_dpbusd_avx_epi32(acc[i][0], low, four);
      acc[i][1] = _mm256_dpbusd_avx_epi32(acc[i][1], high, four);
    }
  }
  store_sums(acc, sums);
}

#else

using Level = int16_t;

// Words [step][half][columns 0 and 2, columns 1 and 3][16]
template <int kBits>
static void decode_to(ChunkDecoder* decoder, const uint8_t* codes, int registers, uint32_t keep, int16_t* levels) {
  decoder->decode<kBits>(codes, registers, keep, [&](int t, int, int half, __m256i w) __attribute__((always_inline)) {
    store256(levels + t * 64 + half * 32, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
    store256(levels + t * 64 + half * 32 + 16, _mm256_srai_epi16(w, 8));
  });
}

// sums [kTokens][16] of one panel over a decoded span
template <int kTokens>
static void panel_sums(const int16_t* levels, const int16_t* x, int64_t steps, int32_t* sums) {
  __m256i acc[kTokens][2];
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_si256();
  for (int64_t t = 0; t < steps; ++t) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i even = ChunkDecoder::load256(levels + h * 32), odd = ChunkDecoder::load256(levels + h * 32 + 16);
#pragma GCC unroll 4
      for (int i = 0; i < kTokens; ++i) {
        const __m256i a = _mm256_madd_epi16(even, broadcast_dword(x + i * 4));
        const __m256i b = _mm256_madd_epi16(odd, broadcast_dword(x + i * 4 + 2));
        acc[i][h] = _mm256_add_epi32(acc[i][h], _mm256_add_epi32(a, b));
      }
    }
    levels += 64;
    x += kTokens * 4;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kTokens; ++i) {
    store256(sums + i * kTileLanes, acc[i][0]);
    store256(sums + i * kTileLanes + 8, acc[i][1]);
  }
}

#endif  // AVX-VNNI

#else

using Level = int16_t;

template <int kBits>
static void decode_to(ChunkDecoder* decoder, const uint8_t* codes, int registers, uint32_t keep, int16_t* levels) {
  const int steps = registers * 8 / kBits;
  int8_t bytes[16 * 64];
  decoder->decode<kBits>(codes, registers, keep, bytes);
  for (int64_t i = 0; i < steps * 64; ++i) {
    const int64_t row = i / 4 % kTileLanes, column = i % 4;
    levels[i / 64 * 64 + row / 8 * 32 + column % 2 * 16 + row % 8 * 2 + column / 2] = bytes[i];
  }
}

template <int kTokens>
static void panel_sums(const int16_t* levels, const int16_t* x, int64_t steps, int32_t* sums) {
  for (int64_t i = 0; i < kTokens * kTileLanes; ++i) sums[i] = 0;
  for (int64_t t = 0; t < steps; ++t, levels += 64, x += kTokens * 4) {
    for (int i = 0; i < kTokens; ++i) {
      for (int64_t l = 0; l < 64; ++l) {
        sums[i * kTileLanes + l / 32 * 8 + l % 16 / 2] += levels[l] * x[i * 4 + l / 16 % 2 * 2 + l % 2];
      }
    }
  }
}

#endif

#if defined(__AVXVNNI__)

// sums [tokens][16] of a panel: planes are put together.
template <typename Run>
static void sums_of_planes(const QuantizedRows& q, int64_t tokens, const Run& run, int32_t* sums) {
  int32_t planes[kPanelSums * kTileLanes];
  const int64_t count = tokens * q.planes;
  run(count, q.planes == 1 ? sums : planes);
  if (q.planes == 1) return;
  for (int64_t m = 0; m < tokens; ++m) {
    const int32_t *high = planes + 2 * m * kTileLanes, *low = high + kTileLanes;
    for (int64_t r = 0; r < kTileLanes; ++r) sums[m * kTileLanes + r] = high[r] * 256 + low[r];
  }
}

// The panel from token m0 on of span s, whose columns are [first_column, first_column + width).
static void sums_of_panel(const LinearArgs& args, int64_t s, int64_t first_column, int64_t width, int64_t m0,
                          int64_t tokens, const Level* levels, int32_t* sums) {
  const QuantizedRows& q = args.q;
  const int8_t* x = q.x + (first_column * args.M + m0 * width) * q.planes;
  const int32_t* start = q.start + (s * args.M + m0) * q.planes;
  const int64_t steps = width / 4;
  sums_of_planes(
      q, tokens,
      [&](int64_t count, int32_t* to) {
        switch (count) {
          case 1: return panel_sums<1>(levels, x, steps, start, to);
          case 2: return panel_sums<2>(levels, x, steps, start, to);
          case 3: return panel_sums<3>(levels, x, steps, start, to);
          case 4: return panel_sums<4>(levels, x, steps, start, to);
          case 5: return panel_sums<5>(levels, x, steps, start, to);
          default: return panel_sums<6>(levels, x, steps, start, to);
        }
      },
      sums);
}

#else

static void sums_of_panel(const LinearArgs& args, int64_t, int64_t first_column, int64_t width, int64_t m0,
                          int64_t tokens, const Level* levels, int32_t* sums) {
  const int16_t* x = reinterpret_cast<const int16_t*>(args.q.x) + first_column * args.M + m0 * width;
  const int64_t steps = width / 4;
  switch (tokens) {
    case 1: return panel_sums<1>(levels, x, steps, sums);
    case 2: return panel_sums<2>(levels, x, steps, sums);
    case 3: return panel_sums<3>(levels, x, steps, sums);
    default: return panel_sums<4>(levels, x, steps, sums);
  }
}

#endif

// y of a tile, [M][16], to the output.
static void finish_tile(const LinearArgs& args, int64_t t, const float* y) {
  const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(tile_at(args, t));
  const int64_t rows = args.format.N - t * kTileLanes < kTileLanes ? args.format.N - t * kTileLanes : kTileLanes;
  for (int64_t m = 0; m < args.M; ++m) {
    for (int64_t r = 0; r < rows; ++r) {
      float value = y[m * kTileLanes + r] * bf16_to_float(row_scale[r]);
      if (args.bias != nullptr) value = value + args.bias[t * kTileLanes + r];
      store_element(args.y, args.y_dtype, m * args.y_stride + t * kTileLanes + r, value);
    }
  }
}

// A tile, or a pair of them span by span by turns: a pair's chunks are one stream. y [kTiles][M][16]
template <int kBits, int kTiles>
static void many_tokens(const LinearArgs& args, const LevelTables& tables, int64_t t, float* y) {
  const format::TileLayout& layout = args.layout;
  const QuantizedRows& q = args.q;
  const int64_t chunks_per_span = q.span / layout.chunk, spans_per_group = args.format.group_size / q.span;
  const format::TilePlace place = format::tile_place(layout, t);
  const uint8_t *tile = args.prepacked + place.head, *codes = args.prepacked + place.codes;
  alignas(64) Level levels[kMaxSpan * kTileLanes];
  int32_t sums[(kPanel8 > kFew8 ? kPanel8 : kFew8) * kTileLanes];
  ChunkDecoder decoders[2] = {ChunkDecoder(tables), ChunkDecoder(tables)};
  F32 scale[2] = {splat(0.0f), splat(0.0f)};
  for (int64_t s = 0; s < q.num_spans; ++s) {
    const int64_t first = s * chunks_per_span;
    const int64_t end = first + chunks_per_span < layout.num_chunks ? first + chunks_per_span : layout.num_chunks;
    const int64_t width = (end - first) * layout.chunk;
    for (int j = 0; j < kTiles; ++j) {
      if (s % spans_per_group == 0) {
        scale[j] = scales_of_group(args, tile + j * layout.head_bytes, s / spans_per_group);
      }
      for (int64_t n = first; n < end; ++n) {
        const uint8_t* chunk = codes + n * place.stride + j * layout.chunk_bytes;
#if defined(__AVX2__)
        // The dots that follow take long enough for the hardware to lose the stream: ask for the next span's codes.
        for (int64_t line = 0; line < layout.chunk_bytes; line += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(chunk + chunks_per_span * place.stride + line), _MM_HINT_T0);
        }
#endif
        decode_to<kBits>(&decoders[j], chunk, int(layout.chunk_bytes / 64), args.keep[n],
                         levels + (n - first) * layout.chunk * kTileLanes);
      }
      for (int64_t m0 = 0, tokens; m0 < args.M; m0 += tokens) {
        tokens = panel_of(q, m0).tokens;
        sums_of_panel(args, s, first * layout.chunk, width, m0, tokens, levels, sums);
        for (int64_t m = 0; m < tokens; ++m) {
          add_span(sums + m * kTileLanes, q.scale[s * args.M + m0 + m], scale[j],
                   y + (j * args.M + m0 + m) * kTileLanes);
        }
      }
    }
  }
  for (int j = 0; j < kTiles; ++j) finish_tile(args, t + j, y + j * args.M * kTileLanes);
}

#if defined(__AVX2__)

// acc += 8 rows of levels times x; `x` points to the 4 columns of a step.
PRECAL_FORCE_INLINE __m256i dot(__m256i acc, __m256i w, const int8_t* x) {
  const __m256i four = broadcast_dword(x);
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(acc, w, four);
#else
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(four, w));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#endif
}

// Few tokens: levels go straight from registers into the dots. x: [step][token][plane][4]; y as in many_tokens()
template <int kBits, int kTiles, int kPlanes, int kTokens>
static void few_tokens(const LinearArgs& args, const LevelTables& tables, int64_t t, float* y) {
  constexpr int kSums = kPlanes * kTokens;
  // Sums of the same outputs beside each other: a dot waits 4 to 5 cycles for the one before it.
  constexpr int kChains = kSums == 1 ? 2 : 1;
  const format::TileLayout& layout = args.layout;
  const QuantizedRows& q = args.q;
  const int64_t chunks_per_span = q.span / layout.chunk, spans_per_group = args.format.group_size / q.span;
  const format::TilePlace place = format::tile_place(layout, t);
  const uint8_t *tile = args.prepacked + place.head, *codes = args.prepacked + place.codes;
  const int8_t* x = q.x;
  ChunkDecoder decoders[2] = {ChunkDecoder(tables), ChunkDecoder(tables)};
  F32 scale[2] = {splat(0.0f), splat(0.0f)}, total[kTiles][kTokens];
#pragma GCC unroll 2
  for (int j = 0; j < kTiles; ++j) {
#pragma GCC unroll 4
    for (int m = 0; m < kTokens; ++m) total[j][m] = load(y + (j * kTokens + m) * kTileLanes);
  }
  int64_t n = 0, group = 0, spans_left = 0;
  for (int64_t s = 0; s < q.num_spans; ++s) {
    if (spans_left == 0) {
      for (int j = 0; j < kTiles; ++j) scale[j] = scales_of_group(args, tile + j * layout.head_bytes, group);
      ++group;
      spans_left = spans_per_group;
    }
    --spans_left;
    const int64_t end = n + chunks_per_span < layout.num_chunks ? n + chunks_per_span : layout.num_chunks;
#pragma GCC unroll 1
    for (int j = 0; j < kTiles; ++j) {
      __m256i acc[kSums][2][kChains];
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        const __m256i start = _mm256_set1_epi32(kLevelBias != 0 ? q.start[s * kSums + i] : 0);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          acc[i][h][0] = start;
          if (kChains == 2) acc[i][h][kChains - 1] = _mm256_setzero_si256();
        }
      }
      const uint8_t* chunk = codes + n * place.stride + j * layout.chunk_bytes;
      const int8_t* span_x = x;
      for (int64_t i = n; i < end; ++i, chunk += place.stride, span_x += layout.chunk * kSums) {
        for (int64_t line = 0; line < layout.chunk_bytes; line += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(chunk + kTiles * 2048 + line), _MM_HINT_T0);
        }
        decoders[j].decode<kBits>(chunk, int(layout.chunk_bytes / 64), args.keep[i],
                                  [&](int step, int odd, int h, __m256i w) __attribute__((always_inline)) {
#pragma GCC unroll 4
                                    for (int k = 0; k < kSums; ++k) {
                                      __m256i& sum = acc[k][h][odd % kChains];
                                      sum = dot(sum, w, span_x + (step * kSums + k) * 4);
                                    }
                                  });
      }
#pragma GCC unroll 4
      for (int m = 0; m < kTokens; ++m) {
        const auto half = [&](int h) __attribute__((always_inline)) {
          __m256i sum = acc[m * kPlanes][h][0];
          if (kChains == 2) sum = _mm256_add_epi32(sum, acc[m * kPlanes][h][kChains - 1]);
          if (kPlanes == 2) sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 8), acc[m * kPlanes + kPlanes - 1][h][0]);
          return _mm256_cvtepi32_ps(sum);
        };
        total[j][m] = fma(mul({half(0), half(1)}, splat(q.scale[s * kTokens + m])), scale[j], total[j][m]);
      }
    }
    x += (end - n) * layout.chunk * kSums;
    n = end;
  }
  for (int j = 0; j < kTiles; ++j) {
#pragma GCC unroll 4
    for (int m = 0; m < kTokens; ++m) store(y + (j * kTokens + m) * kTileLanes, total[j][m]);
    finish_tile(args, t + j, y + j * kTokens * kTileLanes);
  }
}

// false: too many for the registers.
template <int kBits, int kTiles>
static bool try_few_tokens(const LinearArgs& args, const LevelTables& tables, int64_t t, float* y) {
  switch (args.M * 4 + args.q.planes) {
    case 5: return few_tokens<kBits, kTiles, 1, 1>(args, tables, t, y), true;
#if defined(__AVXVNNI__)
    case 9: return few_tokens<kBits, kTiles, 1, 2>(args, tables, t, y), true;
    case 13: return few_tokens<kBits, kTiles, 1, 3>(args, tables, t, y), true;
    case 17: return few_tokens<kBits, kTiles, 1, 4>(args, tables, t, y), true;
    case 6: return few_tokens<kBits, kTiles, 2, 1>(args, tables, t, y), true;
    case 10: return few_tokens<kBits, kTiles, 2, 2>(args, tables, t, y), true;
#endif
    default: return false;
  }
}

#else

template <int kBits, int kTiles>
static bool try_few_tokens(const LinearArgs&, const LevelTables&, int64_t, float*) {
  return false;
}

#endif

template <int kBits, int kTiles>
static void int8_tiles(const LinearArgs& args, const LevelTables& tables, int64_t t, float* y) {
  if (!try_few_tokens<kBits, kTiles>(args, tables, t, y)) many_tokens<kBits, kTiles>(args, tables, t, y);
}

static void linear_int8_tiles(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  LevelTables tables;
  make_tables(args, &tables);
  using Kernel = void (*)(const LinearArgs&, const LevelTables&, int64_t, float*);
  static constexpr Kernel kKernels[3][2] = {
      {int8_tiles<3, 1>, int8_tiles<3, 2>}, {int8_tiles<4, 1>, int8_tiles<4, 2>}, {int8_tiles<8, 1>, int8_tiles<8, 2>}};
  const int64_t tile_floats = args.M * kTileLanes;
  for (int64_t first = begin; first < end; first += kStripTiles) {
    const int64_t last = first + kStripTiles < end ? first + kStripTiles : end;
    // Chunk by chunk of tokens over all tiles: the chunk's columns of x stay in L2.
    for (int64_t m = 0; m < args.M; m += args.q.lanes) {
      for (int64_t t = first; t < last; ++t) {
        outlier_sums(args, tile_at(args, t), m, scratch + (t - first) * tile_floats + m * kTileLanes);
      }
    }
    for (int64_t t = first, tiles; t < last; t += tiles) {
      tiles = t % 2 == 0 && t + 2 <= last ? 2 : 1;
      kKernels[args.format.bits == 3   ? 0
               : args.format.bits == 4 ? 1
                                       : 2][tiles - 1](args, tables, t, scratch + (t - first) * tile_floats);
    }
  }
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE

#endif

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

static constexpr IntegerKernels kIntegerKernels = {
    linear_int8_tiles, quantize_activations, transpose_activations, {kFew8, kFew16}, {kPanel8, kPanel16}};

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
