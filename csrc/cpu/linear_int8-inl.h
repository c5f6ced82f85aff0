// SPDX-License-Identifier: Apache-2.0
// y = x @ W'^T + bias with integer dot products: AVX-512 VBMI, VNNI, GFNI.
//
//   Codes  64 bytes of codes are 16 rows x 4 columns (format/interleave.h). Per 128 codes of 4 bits: 1 bit permutation,
//          2 selects and 2 byte lookups give level + 128, unsigned; per 512 codes of 3 bits 4, 8 and 8. A trellis
//          code's two bits of history sit in the same byte of the register before, so it costs no more than a plain
//          one: the tables alone differ.
//   Dots   vpdpbusd: levels + 128 times activations of 8 signed bits. a8: x rounded to 8 bits per span of up to 128
//          columns of a group. a16: x as hi * 256 + lo, 16 bits, two dots. Sums start at -128 * sum(x).
//   Work   a thread owns tiles of 16 rows. Up to 4 tokens: decoded levels go straight from registers into the dots.
//   More:
//          a span of two tiles is decoded once into L1, and blocks of tokens run over it.
//   Order  y = fma(float(sum) * x_scale, scale, y) span by span, for every M: a token's result depends on it alone.
#pragma once

#include <limits>

#include "cpu/kernels.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__) && defined(__GFNI__)

#include "cpu/load-inl.h"
#include "cpu/simd.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

constexpr int64_t kTileLanes = format::kTileRows;
constexpr int64_t kPrefetch = 2048;  // bytes of codes ahead

PRECAL_INLINE __m512i load512(const void* p) { return _mm512_loadu_si512(p); }
PRECAL_INLINE __m512i select_bits(__m512i mask, __m512i a, __m512i b) {
  return _mm512_ternarylogic_epi32(mask, a, b, 0xCA);
}
PRECAL_INLINE __m512i broadcast_dword(const void* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}

// Tables of a grid: level + 128 of every value of the six bits that the selects bring together.
struct LevelTables {
  alignas(64) uint8_t table[8][64];
};

static uint8_t level_byte(const LinearArgs& args, bool trellis, uint32_t code, uint32_t previous, uint32_t before) {
  const uint32_t index = trellis ? 2u * (code ^ before) + previous : code;
  return uint8_t(int(args.levels[index]) + 128);
}

static void make_tables(const LinearArgs& args, LevelTables* out) {
  const bool trellis = format::is_trellis(args.format);
  for (uint32_t i = 0; i < 64; ++i) {
    const auto bit = [i](int b) { return (i >> b) & 1u; };
    if (args.format.bits == 4) {
      out->table[0][i] = level_byte(args, trellis, i & 15u, bit(4), bit(5));
      out->table[1][i] = level_byte(args, trellis, i & 15u, bit(5), bit(4));
      continue;
    }
    // Per step: where its b and pq, and the b of the two steps before, have been put.
    static const int kPlaces[8][4] = {{0, 2, 5, 4}, {1, 2, 0, 5}, {2, 4, 1, 0}, {3, 4, 2, 1},
                                      {4, 0, 3, 2}, {5, 0, 4, 3}, {2, 4, 1, 0}, {3, 4, 2, 1}};
    for (int s = 0; s < 8; ++s) {
      const int* p = kPlaces[s];
      const uint32_t code = ((i >> p[1]) & 3u) << 1 | bit(p[0]);
      out->table[s][i] = level_byte(args, trellis, code, bit(p[2]), bit(p[3]));
    }
  }
}

// Rows of gf2p8affineqb: byte 7 - i tells the bits of the input whose sum is output bit i.
constexpr uint64_t bit_rows(int b0, int b1, int b2, int b3, int b4, int b5) {
  return (uint64_t(1) << b0) << 56 | (uint64_t(1) << b1) << 48 | (uint64_t(1) << b2) << 40 | (uint64_t(1) << b3) << 32 |
         (uint64_t(1) << b4) << 24 | (uint64_t(1) << b5) << 16;
}

// Decodes chunks in order; keeps the bits that the next one needs.
template <int kBits, int kChunk>
struct ChunkDecoder {
  static constexpr int kRegisters = kChunk / 4 * kBits / 8;
  __m512i tables[kBits == 4 ? 2 : 8];
  __m512i before;  // of the last register of the chunk before

  explicit ChunkDecoder(const LevelTables& t) : before(_mm512_setzero_si512()) {
    for (int i = 0; i < (kBits == 4 ? 2 : 8); ++i) tables[i] = load512(t.table[i]);
  }

  // 4 bits: the upper code, its low bit again, the low bit of the lower one. 3 bits: b4..b7, b6 and b7 again.
  __attribute__((always_inline)) static __m512i history(__m512i w) {
    return kBits == 4 ? _mm512_gf2p8affine_epi64_epi8(w, _mm512_set1_epi64(int64_t(bit_rows(4, 5, 6, 7, 4, 0))), 0)
                      : _mm512_gf2p8affine_epi64_epi8(w, _mm512_set1_epi64(int64_t(bit_rows(4, 5, 6, 7, 6, 7))), 0);
  }

  // emit(t, levels + 128) for every step; `keep` has zero bytes where a block of the trellis begins.
  template <typename Emit>
  __attribute__((always_inline)) void decode(const uint8_t* codes, uint32_t keep, const Emit& emit) {
    const __m512i last = history(load512(codes + (kRegisters - 1) * 64));
    __m512i h = _mm512_and_si512(_mm512_or_si512(_mm512_slli_epi32(last, 8), _mm512_srli_epi32(before, 24)),
                                 _mm512_set1_epi32(int32_t(keep)));
    before = last;
    if (kBits == 4) {
      const __m512i low = _mm512_set1_epi8(0x0F), all_but_4 = _mm512_set1_epi8(char(0xEF));
#pragma GCC unroll 8
      for (int s = 0; s < kRegisters; ++s) {
        const __m512i w = load512(codes + s * 64), next = history(w);
        emit(2 * s, _mm512_permutexvar_epi8(select_bits(low, w, h), tables[0]));
        emit(2 * s + 1, _mm512_permutexvar_epi8(select_bits(all_but_4, next, h), tables[1]));
        h = next;
      }
    } else {
      const __m512i low4 = _mm512_set1_epi8(0x0F), at0 = _mm512_set1_epi8(0x03), at2 = _mm512_set1_epi8(0x0C),
                    at4 = _mm512_set1_epi8(0x30);
#pragma GCC unroll 4
      for (int s = 0; s < kRegisters; s += 3) {
        const __m512i w0 = load512(codes + s * 64), w1 = load512(codes + (s + 1) * 64),
                      b = load512(codes + (s + 2) * 64);
        const __m512i next = history(b), first = select_bits(low4, b, h);
        const __m512i w0_high = _mm512_srli_epi16(w0, 2), w1_high = _mm512_srli_epi16(w1, 2);
        const int t = s / 3 * 8;
        emit(t, _mm512_permutexvar_epi8(select_bits(at2, w0, first), tables[0]));
        emit(t + 1, _mm512_permutexvar_epi8(select_bits(at2, w1, first), tables[1]));
        emit(t + 2, _mm512_permutexvar_epi8(select_bits(at4, w0_high, first), tables[2]));
        emit(t + 3, _mm512_permutexvar_epi8(select_bits(at4, w0, first), tables[3]));
        emit(t + 4, _mm512_permutexvar_epi8(select_bits(at0, w0, b), tables[4]));
        emit(t + 5, _mm512_permutexvar_epi8(select_bits(at0, w1, b), tables[5]));
        emit(t + 6, _mm512_permutexvar_epi8(select_bits(at4, w1, next), tables[6]));
        emit(t + 7, _mm512_permutexvar_epi8(select_bits(at4, w1_high, next), tables[7]));
        h = next;
      }
    }
  }
};

PRECAL_INLINE __m512 load_scales(const uint8_t* scale, int64_t group, format::ScaleType type) {
  if (type == format::ScaleType::kFloat16) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scale + group * 32)));
  }
  // Sign and seven bits moved to where float32 has them are the value times 2^-120, also below 2^-6.
  const __m512i code = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale + group * 16)));
  const __m512i bits = _mm512_and_si512(_mm512_slli_epi32(code, 20), _mm512_set1_epi32(int32_t(0x87F00000u)));
  const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(0x1p120f));
  // Seven ones are NaN, not 480.
  const __m512i ones = _mm512_set1_epi32(0x7F);
  const __mmask16 nan = _mm512_cmpeq_epi32_mask(_mm512_and_si512(code, ones), ones);
  return _mm512_mask_mov_ps(value, nan, _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
}

template <int kPlanes>
PRECAL_INLINE __m512 sum_of_planes(__m512i high, __m512i low) {
  return _mm512_cvtepi32_ps(kPlanes == 2 ? _mm512_add_epi32(_mm512_slli_epi32(high, 8), low) : high);
}

// Outliers of one tile for one token: y += U * value * x.
PRECAL_INLINE __m512 add_outliers_to(const LinearArgs& args, const uint8_t* tile, const float* x, __m512 y) {
  const format::OutlierBlocks blocks = format::outlier_blocks(args.format.K);
  const int64_t c = args.format.c;
  const uint8_t *values = tile + args.layout.outlier_value, *indices = tile + args.layout.outlier_index;
  for (int64_t b = 0; b < blocks.num_blocks; ++b) {
    const int64_t begin = format::block_begin(blocks, b), width = format::block_end(blocks, b) - begin;
    for (int64_t i = b * c; i < (b + 1) * c; ++i) {
      const __m512i index =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(indices + i * kTileLanes)));
      const __mmask16 inside = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(int32_t(width)));
      const __m512 at = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, index, x + begin, 4);
      const __m512 value =
          _mm512_mul_ps(load_scales(values, i, format::ScaleType::kE4m3), _mm512_set1_ps(format::kOutlierUnit));
      y = _mm512_fmadd_ps(value, at, y);
    }
  }
  return y;
}

PRECAL_INLINE void store_tile(const LinearArgs& args, int64_t t, const uint8_t* tile, int64_t m, __m512 y) {
  const format::WeightFormat& f = args.format;
  if (f.c > 0) y = add_outliers_to(args, tile, args.x + m * f.K, y);
  const __m512i codes = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile)));
  y = _mm512_mul_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(codes, 16)));
  float lanes[kTileLanes];
  _mm512_storeu_ps(lanes, y);
  const int64_t rows = f.N - t * kTileLanes < kTileLanes ? f.N - t * kTileLanes : kTileLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const float value = args.bias != nullptr ? lanes[r] + args.bias[t * kTileLanes + r] : lanes[r];
    store_element(args.y, args.y_dtype, m * args.y_stride + t * kTileLanes + r, value);
  }
}

// Up to 4 tokens, straight from the codes.
template <int kBits, int kChunk, int kPlanes, int kTokens>
static void few_tokens(const LinearArgs& args, const LevelTables& tables, int64_t tile_begin, int64_t tile_end) {
  // Sums of the same output that run beside each other: a dot has a latency of 4 to 5 cycles, two start per cycle.
  constexpr int kChains = kTokens * kPlanes >= 4 ? 1 : kTokens * kPlanes >= 2 ? 2 : 4;
  const format::TileLayout& layout = args.layout;
  const QuantizedRows& q = args.q;
  const int64_t chunks_per_span = q.span / kChunk, plane = layout.num_chunks * kChunk;
  const int64_t spans_per_group = args.format.group_size / q.span;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const uint8_t* tile = args.prepacked + format::kPrepackedTilesOffset + t * layout.tile_bytes;
    const uint8_t* codes = tile + layout.codes;
    ChunkDecoder<kBits, kChunk> decoder(tables);
    __m512 y[kTokens];
    for (__m512& v : y) v = _mm512_setzero_ps();
    __m512 scale = _mm512_setzero_ps();
    int64_t n = 0, group = 0, spans_left = 0;
    for (int64_t s = 0; s < q.num_spans; ++s) {
      if (spans_left == 0) {
        scale = load_scales(tile + layout.scale, group++, args.format.scale_type);
        spans_left = spans_per_group;
      }
      --spans_left;
      __m512i acc[kTokens][kPlanes][kChains];
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 2
        for (int p = 0; p < kPlanes; ++p) {
          acc[m][p][0] = _mm512_set1_epi32(q.start[(m * kPlanes + p) * q.num_spans + s]);
#pragma GCC unroll 4
          for (int c = 1; c < kChains; ++c) acc[m][p][c] = _mm512_setzero_si512();
        }
      }
      const int64_t end = n + chunks_per_span < layout.num_chunks ? n + chunks_per_span : layout.num_chunks;
      for (; n < end; ++n) {
        const int8_t* x = q.x + n * kChunk;
        const uint8_t* chunk = codes + n * layout.chunk_bytes;
        _mm_prefetch(reinterpret_cast<const char*>(chunk + kPrefetch), _MM_HINT_T0);
        decoder.decode(chunk, args.keep[n], [&](int step, __m512i w) __attribute__((always_inline)) {
#pragma GCC unroll 8
          for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 2
            for (int p = 0; p < kPlanes; ++p) {
              __m512i& sum = acc[m][p][step % kChains];
              sum = _mm512_dpbusd_epi32(sum, w, broadcast_dword(x + (m * kPlanes + p) * plane + step * 4));
            }
          }
        });
      }
#pragma GCC unroll 8
      for (int m = 0; m < kTokens; ++m) {
#pragma GCC unroll 2
        for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 4
          for (int c = 1; c < kChains; ++c) acc[m][p][0] = _mm512_add_epi32(acc[m][p][0], acc[m][p][c]);
        }
        const __m512 part = _mm512_mul_ps(sum_of_planes<kPlanes>(acc[m][0][0], acc[m][kPlanes - 1][0]),
                                          _mm512_set1_ps(q.scale[m * q.num_spans + s]));
        y[m] = _mm512_fmadd_ps(part, scale, y[m]);
      }
    }
    for (int m = 0; m < kTokens; ++m) store_tile(args, t, tile, m, y[m]);
  }
}

// kTokens tokens over one decoded span of kTiles tiles: levels [step][kTiles][64].
template <int kPlanes, int kTokens, int kTiles>
static void span_of_tokens(const LinearArgs& args, const uint8_t* levels, int64_t s, int64_t first_column,
                           int64_t steps, int64_t m0, const __m512* scale, float* y) {
  const QuantizedRows& q = args.q;
  const int64_t stride = args.layout.num_chunks * args.layout.chunk;  // bytes of one plane of one token
  const int8_t* x = q.x + m0 * kPlanes * stride + first_column;
  __m512i acc[kTokens * kPlanes][kTiles];
#pragma GCC unroll 8
  for (int i = 0; i < kTokens * kPlanes; ++i) {
    const __m512i start = _mm512_set1_epi32(q.start[(m0 * kPlanes + i) * q.num_spans + s]);
#pragma GCC unroll 2
    for (int j = 0; j < kTiles; ++j) acc[i][j] = start;
  }
#pragma GCC unroll 4
  for (int64_t step = 0; step < steps; ++step) {
    __m512i w[kTiles];
#pragma GCC unroll 2
    for (int j = 0; j < kTiles; ++j) w[j] = load512(levels + (step * kTiles + j) * 64);
#pragma GCC unroll 8
    for (int i = 0; i < kTokens * kPlanes; ++i) {
      const __m512i v = broadcast_dword(x + i * stride + step * 4);
#pragma GCC unroll 2
      for (int j = 0; j < kTiles; ++j) acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], w[j], v);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kTokens; ++m) {
    const __m512 x_scale = _mm512_set1_ps(q.scale[(m0 + m) * q.num_spans + s]);
#pragma GCC unroll 2
    for (int j = 0; j < kTiles; ++j) {
      const __m512 part =
          _mm512_mul_ps(sum_of_planes<kPlanes>(acc[m * kPlanes][j], acc[m * kPlanes + kPlanes - 1][j]), x_scale);
      float* to = y + ((m0 + m) * 2 + j) * kTileLanes;
      _mm512_storeu_ps(to, _mm512_fmadd_ps(part, scale[j], _mm512_loadu_ps(to)));
    }
  }
}

template <int kBits, int kChunk, int kPlanes, int kTiles>
static void many_tokens(const LinearArgs& args, const LevelTables& tables, int64_t t0, float* y) {
  constexpr int kBlock = kPlanes == 2 ? 4 : 8;  // tokens that share a load of levels: 16 sums in registers
  const format::TileLayout& layout = args.layout;
  const QuantizedRows& q = args.q;
  const int64_t chunks_per_span = q.span / kChunk, spans_per_group = args.format.group_size / q.span;
  alignas(64) uint8_t levels[kMaxSpan / 4 * kTiles * 64];
  const uint8_t* tile[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    tile[i] = args.prepacked + format::kPrepackedTilesOffset + (t0 + i) * layout.tile_bytes;
  }
  ChunkDecoder<kBits, kChunk> decoders[2] = {ChunkDecoder<kBits, kChunk>(tables), ChunkDecoder<kBits, kChunk>(tables)};
  for (int64_t i = 0; i < args.M * 2 * kTileLanes; ++i) y[i] = 0.0f;
  __m512 scale[kTiles];
  for (int64_t s = 0; s < q.num_spans; ++s) {
    const int64_t first = s * chunks_per_span;
    const int64_t end = first + chunks_per_span < layout.num_chunks ? first + chunks_per_span : layout.num_chunks;
    for (int i = 0; i < kTiles; ++i) {
      if (s % spans_per_group == 0) {
        scale[i] = load_scales(tile[i] + layout.scale, s / spans_per_group, args.format.scale_type);
      }
      for (int64_t n = first; n < end; ++n) {
        uint8_t* to = levels + ((n - first) * (kChunk / 4) * kTiles + i) * 64;
        decoders[i].decode(tile[i] + layout.codes + n * layout.chunk_bytes, args.keep[n],
                           [&](int step, __m512i w) { _mm512_store_si512(to + step * kTiles * 64, w); });
      }
    }
    const int64_t steps = (end - first) * (kChunk / 4), column = first * kChunk;
    int64_t m = 0;
    for (; m + kBlock <= args.M; m += kBlock) {
      span_of_tokens<kPlanes, kBlock, kTiles>(args, levels, s, column, steps, m, scale, y);
    }
    if (kBlock > 4 && m + 4 <= args.M) {
      span_of_tokens<kPlanes, 4, kTiles>(args, levels, s, column, steps, m, scale, y);
      m += 4;
    }
    if (m + 2 <= args.M) {
      span_of_tokens<kPlanes, 2, kTiles>(args, levels, s, column, steps, m, scale, y);
      m += 2;
    }
    if (m < args.M) span_of_tokens<kPlanes, 1, kTiles>(args, levels, s, column, steps, m, scale, y);
  }
  for (int64_t m = 0; m < args.M; ++m) {
    for (int i = 0; i < kTiles; ++i) {
      store_tile(args, t0 + i, tile[i], m, _mm512_loadu_ps(y + (m * 2 + i) * kTileLanes));
    }
  }
}

template <int kBits, int kChunk, int kPlanes>
static void int8_tiles(const LinearArgs& args, const LevelTables& tables, int64_t begin, int64_t end, float* scratch) {
  switch (args.M) {
    case 1: return few_tokens<kBits, kChunk, kPlanes, 1>(args, tables, begin, end);
    case 2: return few_tokens<kBits, kChunk, kPlanes, 2>(args, tables, begin, end);
    case 3: return few_tokens<kBits, kChunk, kPlanes, 3>(args, tables, begin, end);
    case 4: return few_tokens<kBits, kChunk, kPlanes, 4>(args, tables, begin, end);
    default: break;
  }
  int64_t t = begin;
  for (; t + 2 <= end; t += 2) many_tokens<kBits, kChunk, kPlanes, 2>(args, tables, t, scratch);
  if (t < end) many_tokens<kBits, kChunk, kPlanes, 1>(args, tables, t, scratch);
}

// Rounds rows [begin, end) of x to q's planes, in the order of the steps.
static void quantize_activations(const float* x, int64_t K, const format::TileLayout& layout, const QuantizedRows& q,
                                 int64_t begin, int64_t end) {
  const int64_t chunk = layout.chunk, steps = chunk / 4, stride = layout.num_chunks * chunk;
  const float top = q.planes == 2 ? 32512.0f : 127.0f;
  alignas(64) float padded[kMaxSpan];
  alignas(64) int32_t rounded[kMaxSpan];
  for (int64_t m = begin; m < end; ++m) {
    for (int64_t s = 0; s < q.num_spans; ++s) {
      const int64_t first = s * q.span, count = first + q.span < K ? q.span : K - first;
      const int64_t width = round_up(count, chunk);  // whole chunks
      __builtin_memcpy(padded, x + m * K + first, size_t(count) * sizeof(float));
      for (int64_t i = count; i < round_up(width, kLanes); ++i) padded[i] = 0.0f;
      __m512 largest = _mm512_setzero_ps();
      __mmask16 strange = 0;  // NaN and infinities
      for (int64_t i = 0; i < width; i += kLanes) {
        const __m512 magnitude = _mm512_abs_ps(_mm512_load_ps(padded + i));
        strange |= _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(3.4028235e38f), _CMP_NLE_UQ);
        largest = _mm512_max_ps(largest, magnitude);
      }
      const float peak = _mm512_reduce_max_ps(largest);
      const bool usable = strange == 0 && peak > 1e-33f;  // smaller ones count as zero
      q.scale[m * q.num_spans + s] = strange != 0 ? std::numeric_limits<float>::quiet_NaN()
                                     : usable     ? peak / top
                                                  : 0.0f;
      const __m512 inverse = _mm512_set1_ps(usable ? top / peak : 0.0f);
      for (int64_t i = 0; i < width; i += kLanes) {
        const __m512 v = usable ? _mm512_mul_ps(_mm512_load_ps(padded + i), inverse) : _mm512_setzero_ps();
        _mm512_store_si512(rounded + i, _mm512_cvtps_epi32(v));
      }
      for (int p = 0; p < q.planes; ++p) {
        int8_t* out = q.x + (m * q.planes + p) * stride + first;
        int32_t sum = 0;
        for (int64_t c = 0; c < width; c += chunk) {
          for (int64_t t = 0; t < steps; ++t) {
            for (int64_t j = 0; j < 4; ++j) {
              const int32_t v = rounded[c + j * steps + t];
              const int32_t high = (v + 128) >> 8;
              const int32_t byte = q.planes == 1 ? v : p == 0 ? high : v - high * 256;
              out[c + 4 * t + j] = int8_t(byte);
              sum += byte;
            }
          }
        }
        q.start[(m * q.planes + p) * q.num_spans + s] = -128 * sum;
      }
    }
  }
}

static void linear_int8_tiles(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  LevelTables tables;
  make_tables(args, &tables);
  using Kernel = void (*)(const LinearArgs&, const LevelTables&, int64_t, int64_t, float*);
  static constexpr Kernel kFour[3][2] = {{int8_tiles<4, 16, 1>, int8_tiles<4, 16, 2>},
                                         {int8_tiles<4, 32, 1>, int8_tiles<4, 32, 2>},
                                         {int8_tiles<4, 64, 1>, int8_tiles<4, 64, 2>}};
  static constexpr Kernel kThree[2][2] = {{int8_tiles<3, 32, 1>, int8_tiles<3, 32, 2>},
                                          {int8_tiles<3, 64, 1>, int8_tiles<3, 64, 2>}};
  const int chunk = args.layout.chunk == 64 ? 2 : args.layout.chunk == 32 ? 1 : 0, planes = args.q.planes - 1;
  const Kernel kernel = args.format.bits == 4 ? kFour[chunk][planes] : kThree[chunk - 1][planes];
  kernel(args, tables, begin, end, scratch);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE

#endif
