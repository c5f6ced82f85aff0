// SPDX-License-Identifier: Apache-2.0
// y[M, N] = x[M, K] W'[N, K]^T + bias for few tokens: every weight is read once and meets all of them.
//
//   x          [M, K] float16 or bfloat16, or float32 as three bfloat16 terms (their sum is exact)
//   weight     tiled, format/cuda_tiles.h
//   workspace  counters [row tiles], then sums [slices][columns of mma][rows]; none if one slice finishes its rows
//
// Work    A warp owns a row tile (16 rows) of one slice of K and runs through its panels of 256 columns, 16 bytes a
//         lane and piece, two panels in turn: a piece is asked for as soon as the one in its registers was used. Codes
//         become pairs of levels by a table in shared memory with one copy a lane (no bank conflicts); levels are exact
//         in 16 bits, so scales come after the sum of a group, in float32. x of the slice lies in shared memory.
// Sums    Group, then slice with its outliers, then all slices in order, by whichever warp arrives last: the same bits
//         in any order of arrival and for any M up to 16. No atomics on floats.
// Budget  table 128 KB (4 bits) or 32 KB (3 bits), 4 KB of x per panel and 8 columns of mma.
// Count   docs/cuda.md, held by tests/test_cuda_sass.py. Per pair of weights a mask, a shift with the addition of an
//         address, and a load from shared memory; the rest is less than half of it.
// Limits  M * planes <= 16.
#include "cuda/elements.cuh"
#include "cuda/linear_config.h"
#include "cuda/pairs.cuh"

namespace precal::cuda {

namespace {

constexpr int kAhead = 4;  // entries of outliers that are loaded together

struct SmallParams {
  LinearParams linear;
  LinearConfig config;
  format::OutlierBlocks blocks;
};

struct Lane {
  int lane, g, t;
};

template <int kBits, bool kHalf, int kOctets, int kRun>
struct Small {
  // Two octets, or twice as many scales, need more registers than twelve warps leave: they would spill. Between eight
  // and twelve nothing is gained, a quarter of the multiprocessor having three of ten as well.
  static constexpr int kWarps = kOctets == 2 || kRun == 8 ? 8 : kSmallWarps, kThreads = kWarps * 32;
  static constexpr int kUnits = 64 / kRun;  // of a panel: the columns of a unit have one scale, and four runs
  static constexpr int kQuads = kUnits / 4;

  // What a lane loads of a panel: codes, and scales of rows g and g + 8, of every unit.
  template <bool kHalfScale>
  struct Panel {
    uint4 codes[kBits];
    uint32_t scales[kHalfScale ? kUnits : kUnits / 2];
  };
  using Sums = float[kOctets][4];

  const SmallParams& p;
  const LinearParams& a;
  const format::WeightFormat& f;
  Lane l;
  uint32_t* table;   // [windows][32]
  uint8_t* x;        // [panels][4 chunks][kOctets][8 tokens][64 columns] 16 bits, pieces of 16 bytes as swizzled()
  uint32_t* begins;  // [panels][4 lanes t][kQuads]: history that counts, in the order of history_of()
  int first_panel, num_panels;

  __device__ __forceinline__ Small(const SmallParams& params, uint8_t* shared)
      : p(params), a(params.linear), f(params.linear.format) {
    l.lane = int(threadIdx.x) % 32;
    l.g = l.lane / 4;
    l.t = l.lane % 4;
    table = reinterpret_cast<uint32_t*>(shared);
    x = shared + table_bytes(kBits);
    begins = reinterpret_cast<uint32_t*>(x + p.config.panels * 4096 * kOctets);
    first_panel = int(blockIdx.y * p.config.panels);
    num_panels = int(a.layout.panels) - first_panel;
    if (num_panels > p.config.panels) num_panels = int(p.config.panels);
  }

  // ---- x -----------------------------------------------------------------------------------------------------------
  // Column `column` of mma: term column / M of token column % M.
  __device__ __forceinline__ uint16_t load_x(int64_t column, int64_t k) const {
    if (column >= a.M * p.config.planes || k >= f.K) return 0;
    if (a.x_dtype != DType::kFloat32) return static_cast<const uint16_t*>(a.x)[column * f.K + k];
    float rest = static_cast<const float*>(a.x)[column % a.M * f.K + k];
    const int64_t plane = column / a.M;
    if (!is_finite(rest)) return plane == 0 ? float_to_bf16(rest) : uint16_t(0);
    // Cut off, not rounded: 8 of 24 bits each, and none can overflow.
    for (int64_t i = 0; i < plane; ++i) rest = rest - bits_float(float_bits(rest) & 0xFFFF0000u);
    return uint16_t(float_bits(rest) >> 16);
  }

  // Pieces of 16 bytes of a token's chunk lie in an order of their own: the eight lanes that read a piece in one turn,
  // of tokens g and g + 1, meet all banks, and so do the eight tokens of one column.
  static __device__ __forceinline__ int swizzle(int token) {
    return (kRun == 16 ? token : token % 2 * 4 + token / 2) * 16;
  }

  // Byte of column k of the slice and mma column 8 o + token; `at_token` is token_bytes(token).
  static __device__ __forceinline__ int token_bytes(int token) { return token * 128; }
  static __device__ __forceinline__ int x_byte(int k, int o, int at_token, int swizzled) {
    return ((k / 64 * kOctets + o) * 1024 + at_token + k % 64 * 2) ^ swizzled;
  }

  __device__ __forceinline__ void stage_x() const {
    const bool vectors = a.x_dtype != DType::kFloat32 && f.K % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
    for (int i = int(threadIdx.x); i < num_panels * 256 * kOctets; i += kThreads) {
      const int piece = i % 8, token = i / 8 % 8, octet = i / 64 % kOctets, chunk = i / (64 * kOctets);
      const int64_t column = octet * 8 + token, k = (first_panel * 4 + chunk) * 64 + piece * 8;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (vectors) {
        if (column < a.M && k < f.K) {
          v = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(a.x) + column * f.K + k);
        }
      } else {
        uint32_t pairs[4];
        for (int j = 0; j < 4; ++j) {
          pairs[j] = load_x(column, k + 2 * j) | uint32_t(load_x(column, k + 2 * j + 1)) << 16;
        }
        v = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
      *reinterpret_cast<uint4*>(x + x_byte(chunk * 64 + piece * 8, octet, token_bytes(token), swizzle(token))) = v;
    }
    if (threadIdx.x == 0) begins[p.config.panels * 4 * kQuads] = 0;  // what a column that is not there holds
    for (int i = int(threadIdx.x); i < num_panels * 4 * kQuads; i += kThreads) {
      const int quad = i % kQuads, t = i / kQuads % 4, panel = first_panel + i / (4 * kQuads);
      begins[i] = history_that_counts<kRun>(p.blocks, panel * 256 + quad * (4 * 4 * kRun), t, f.K);
    }
  }

  // ---- the weight --------------------------------------------------------------------------------------------------
  __device__ __forceinline__ const uint32_t* panel_codes(int64_t tile, int64_t panel) const {
    return reinterpret_cast<const uint32_t*>(a.prepacked + a.layout.codes) +
           (tile * a.layout.panels + panel) * kBits * 128;
  }

  // `from`: this lane's scales of the panel.
  template <bool kHalfScale>
  __device__ __forceinline__ void load_scales(const uint8_t* from, Panel<kHalfScale>* out) const {
    const bool wide = kRun == 16 && a.layout.scale_columns == 128;  // two units, each for two chunks
    if constexpr (!kHalfScale && kRun == 16) {
      if (wide) {
        const uint32_t v = *reinterpret_cast<const uint32_t*>(from);
        out->scales[0] = __byte_perm(v, 0, 0x1010);
        out->scales[1] = __byte_perm(v, 0, 0x3232);
      } else {
        const uint2 v = *reinterpret_cast<const uint2*>(from);
        out->scales[0] = v.x;
        out->scales[1] = v.y;
      }
    } else if (wide) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      out->scales[0] = out->scales[1] = v.x;
      out->scales[2] = out->scales[3] = v.y;
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(out->scales) / 16); ++i) {
        const uint4 v = reinterpret_cast<const uint4*>(from)[i];
        out->scales[4 * i] = v.x;
        out->scales[4 * i + 1] = v.y;
        out->scales[4 * i + 2] = v.z;
        out->scales[4 * i + 3] = v.w;
      }
    }
  }

  // ---- sums --------------------------------------------------------------------------------------------------------
  // sums += the eight codes of half chunk kHalfChunk times x. With kBegins a run begins there, of unit kUnit of its
  // quad.
  template <int kHalfChunk, bool kBegins, int kUnit>
  __device__ __forceinline__ void multiply(const uint32_t (&words)[kBits], uint32_t history, const uint8_t* fragments,
                                           Sums& sums) const {
    constexpr int kFirst = 4 * kHalfChunk, kAt = 7;  // 32 copies of 4 bytes
    constexpr int kUpper = kBegins ? history_bit(kUnit, 0) : kInWords,
                  kLower = kBegins ? history_bit(kUnit, 1) : kInWords;
    const uint32_t windows[4][2] = {
        {window_of<kFirst, 0, kAt, kUpper>(words, history), window_of<kFirst, 1, kAt, kLower>(words, history)},
        {window_of<kFirst + 1, 0, kAt, kInWords>(words, 0), window_of<kFirst + 1, 1, kAt, kInWords>(words, 0)},
        {window_of<kFirst + 2, 0, kAt, kInWords>(words, 0), window_of<kFirst + 2, 1, kAt, kInWords>(words, 0)},
        {window_of<kFirst + 3, 0, kAt, kInWords>(words, 0), window_of<kFirst + 3, 1, kAt, kInWords>(words, 0)}};
    const uint32_t* own = table + l.lane;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t rows[4] = {look_up(own, windows[2 * s][0]), look_up(own, windows[2 * s][1]),
                                look_up(own, windows[2 * s + 1][0]), look_up(own, windows[2 * s + 1][1])};
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        const uint4 v = *reinterpret_cast<const uint4*>(fragments + o * 1024);
        const uint32_t columns[2] = {s == 0 ? v.x : v.z, s == 0 ? v.y : v.w};
        if (kHalf) {
          ptx::mma_f16(sums[o], rows, columns);
        } else {
          ptx::mma_bf16(sums[o], rows, columns);
        }
      }
    }
  }

  // total += scales of a unit * sums; then sums are zero again.
  template <int kUnit, bool kHalfScale>
  __device__ __forceinline__ void apply_scales(const Panel<kHalfScale>& panel, Sums& sums, Sums& total) const {
    uint32_t both;
    if constexpr (kHalfScale) {
      both = panel.scales[kUnit];
    } else {
      both = ptx::unpack_e4m3x2(uint16_t(panel.scales[kUnit / 2] >> (kUnit % 2 * 16)));
    }
    const float low = ptx::unpack_f16(uint16_t(both)), high = ptx::unpack_f16(uint16_t(both >> 16));
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[o][i] = fmaf(i < 2 ? low : high, sums[o][i], total[o][i]);
        sums[o][i] = 0.0f;
      }
    }
  }

  template <int kChunk, bool kHalfScale>
  __device__ __forceinline__ void run_chunk(const Panel<kHalfScale>& panel, const uint32_t (&history)[kQuads],
                                            const uint8_t* const (&x_at)[2], Sums& sums, Sums& total) const {
    uint32_t words[kBits];
    chunk_words<kBits, kChunk>(panel.codes, words);
    if constexpr (kRun == 16) {
      multiply<0, true, kChunk>(words, history[0], x_at[0] + kChunk * kOctets * 1024, sums);
      multiply<1, false, 0>(words, 0, x_at[1] + kChunk * kOctets * 1024, sums);
      apply_scales<kChunk>(panel, sums, total);
    } else {
      constexpr int kFirst = 2 * kChunk % 4;
      multiply<0, true, kFirst>(words, history[kChunk / 2], x_at[0] + kChunk * kOctets * 1024, sums);
      apply_scales<2 * kChunk>(panel, sums, total);
      multiply<1, true, kFirst + 1>(words, history[kChunk / 2], x_at[1] + kChunk * kOctets * 1024, sums);
      apply_scales<2 * kChunk + 1>(panel, sums, total);
    }
  }

  // Panel `at` of the slice; then its codes and scales are replaced by those of panel at + 2, at `next` and `scales`.
  template <bool kHalfScale>
  __device__ __forceinline__ void run_panel(int at, const uint4* next, const uint8_t* scales,
                                            const uint8_t* const (&x_at)[2], uint32_t* before, Panel<kHalfScale>* panel,
                                            Sums& sums, Sums& total) const {
    uint32_t history[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const uint32_t mine = last_low_bits<kBits, kRun>(panel->codes, q);
      history[q] = history_of(mine, *before) & begins[(at * 4 + l.t) * kQuads + q];
      *before = mine;
    }
    const bool more = at + 2 < num_panels;
    run_chunk<0>(*panel, history, x_at, sums, total);
    if (kBits == 4 && more) panel->codes[0] = ptx::load_once(next);
    run_chunk<1>(*panel, history, x_at, sums, total);
    if (more) panel->codes[kBits - 3] = ptx::load_once(next + (kBits - 3) * 32);
    run_chunk<2>(*panel, history, x_at, sums, total);
    if (more) panel->codes[kBits - 2] = ptx::load_once(next + (kBits - 2) * 32);
    run_chunk<3>(*panel, history, x_at, sums, total);
    if (!more) return;
    panel->codes[kBits - 1] = ptx::load_once(next + (kBits - 1) * 32);
    load_scales(scales, panel);
  }

  template <bool kHalfScale>
  __device__ __forceinline__ void load_panel(const uint4* codes, const uint8_t* scales,
                                             Panel<kHalfScale>* panel) const {
#pragma unroll
    for (int i = 0; i < kBits; ++i) panel->codes[i] = ptx::load_once(codes + i * 32);
    load_scales(scales, panel);
  }

  // Two panels in turn, each loaded while the other is multiplied, without a move of registers.
  template <bool kHalfScale>
  __device__ __forceinline__ void multiply_panels(int64_t tile, Sums& total) const {
    Sums sums = {};
    uint32_t before = 0;  // codes before the slice, whose low bits its first columns need
    if (first_panel > 0) {
      uint4 codes[kBits];
      const uint4* last = reinterpret_cast<const uint4*>(panel_codes(tile, first_panel - 1)) + l.lane;
#pragma unroll
      for (int i = 0; i < kBits; ++i) codes[i] = last[i * 32];
      before = last_low_bits<kBits, kRun>(codes, kQuads - 1);
    }
    constexpr int kPieces = kBits * 32;
    const uint4* codes = reinterpret_cast<const uint4*>(panel_codes(tile, first_panel)) + l.lane;
    constexpr int kScaleBytes = kHalfScale ? 2 : 1;
    const int scales_of_panel = (16 * kScaleBytes) << scale_shift(a.layout);  // bytes
    const uint8_t* scales =
        a.prepacked + a.layout.scale + scale_at(a.layout, tile, l.g, first_panel * 256) * kScaleBytes;
    const uint8_t* x_at[2] = {x + x_byte(kRun * l.t, 0, token_bytes(l.g), swizzle(l.g)),
                              x + x_byte(kRun == 16 ? 16 * l.t + 8 : 8 * l.t + 32, 0, token_bytes(l.g), swizzle(l.g))};
    Panel<kHalfScale> even = {}, odd = {};
    load_panel(codes, scales, &even);
    if (num_panels > 1) load_panel(codes + kPieces, scales + scales_of_panel, &odd);
    for (int at = 0; at < num_panels; at += 2) {
      codes += 2 * kPieces;
      scales += 2 * scales_of_panel;
      run_panel(at, codes, scales, x_at, &before, &even, sums, total);
      x_at[0] += kOctets * 4096;
      x_at[1] += kOctets * 4096;
      if (at + 1 == num_panels) break;
      run_panel(at + 1, codes + kPieces, scales + scales_of_panel, x_at, &before, &odd, sums, total);
      x_at[0] += kOctets * 4096;
      x_at[1] += kOctets * 4096;
    }
  }

  // ---- outliers ----------------------------------------------------------------------------------------------------
  // One entry of every row as one mma: slot n of it is row n, whose value stands on the diagonal of the one factor, and
  // whose column of x in the other. A token with an infinity gets NaN where that meets a zero. Entries count from
  // position `low` of their block on, `count` of them; `offset` is where the block begins in the slice.
  struct Diagonal {
    uint32_t upper, lower;  // of __byte_perm: the float16 of row g, of row g + 8, to the half of their slot, or zero
  };

  __device__ __forceinline__ void add_entry(const uint2& rows, const Diagonal& diagonal, uint32_t low, uint32_t count,
                                            int offset, const uint8_t* x_of_token, const uint8_t* zero,
                                            Sums& total) const {
    uint32_t columns[kOctets][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows 2 t, 2 t + 8, 2 t + 1, 2 t + 9
      const uint32_t index = __byte_perm(i < 2 ? rows.x : rows.y, 0, i % 2 == 0 ? 0x4440 : 0x4442);
      const uint32_t k = index + uint32_t(offset);
      const uint32_t byte = (k * (16 * kOctets) - (k & 63u) * (16 * kOctets - 2)) ^ uint32_t(swizzle(l.g));
      const bool counts = index - low < count;
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        columns[o][i] = *reinterpret_cast<const uint16_t*>(counts ? x_of_token + byte + o * 1024 : zero);
      }
    }
    const uint32_t mine = l.g % 2 == 0 ? rows.x : rows.y;  // rows g and g + 8, where this lane has their slots
    const uint32_t values = ptx::unpack_e4m3x2(uint16_t(__byte_perm(mine, 0, 0x0031)));
    const float upper = ptx::unpack_f16(uint16_t(values)) * format::kOutlierUnit;
    const float lower = ptx::unpack_f16(uint16_t(values >> 16)) * format::kOutlierUnit;
    const uint32_t both = kHalf ? ptx::pack_f16(upper, lower) : ptx::pack_bf16(upper, lower);
    const uint32_t factor[4] = {__byte_perm(both, 0, diagonal.upper), 0u, 0u, __byte_perm(both, 0, diagonal.lower)};
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
      const uint32_t pairs[2] = {__byte_perm(columns[o][0], columns[o][2], 0x5410),
                                 __byte_perm(columns[o][1], columns[o][3], 0x5410)};
      if (kHalf) {
        ptx::mma_f16(total[o], factor, pairs);
      } else {
        ptx::mma_bf16(total[o], factor, pairs);
      }
    }
  }

  __device__ __forceinline__ void add_outliers(int64_t tile, Sums& total) const {
    const int first_column = first_panel * 256, end = first_column + num_panels * 256, K = int(f.K);
    const bool mine = l.g / 2 == l.t, even = l.g % 2 == 0;
    const Diagonal diagonal{!mine ? 0x4444u : even ? 0x4410u : 0x1044u, !mine ? 0x4444u : even ? 0x4432u : 0x3244u};
    const uint8_t* x_of_token = x + token_bytes(l.g);
    const uint8_t* zero = reinterpret_cast<const uint8_t*>(begins + p.config.panels * 4 * kQuads);
    Cursor at;
    at.place(p.blocks, first_column);
    const int first = at.block, last = int(format::block_at(p.blocks, (end < K ? end : K) - 1));
    const int all = (last - first + 1) * f.c;
    const uint2* entries = reinterpret_cast<const uint2*>(a.prepacked + a.layout.outliers) +
                           ((tile * p.blocks.num_blocks + first) * f.c) * 4 + l.t;
    for (int i = 0, of_block = 0; i < all; i += kAhead, entries += kAhead * 4) {
      uint2 rows[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) rows[j] = i + j < all ? entries[j * 4] : uint2{0, 0};
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (i + j >= all) break;
        const int offset = at.begin - first_column, low = offset < 0 ? -offset : 0;
        const int high = (at.end < end ? at.end : end) - at.begin;
        add_entry(rows[j], diagonal, uint32_t(low), uint32_t(high - low), offset, x_of_token, zero, total);
        if (++of_block < f.c) continue;
        of_block = 0;
        at.next_block(int(p.blocks.segment));
      }
    }
  }

  __device__ __forceinline__ void multiply_tile(int64_t tile, Sums& total) const {
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[o][i] = 0.0f;
    }
    if (num_panels == 0) return;
    __syncwarp();
    if (f.scale_type == format::ScaleType::kE4m3) {
      multiply_panels<false>(tile, total);
    } else {
      multiply_panels<true>(tile, total);
    }
    if (f.c > 0) add_outliers(tile, total);
  }

  // ---- y -----------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ void store_y(int64_t m, int64_t n, float sum) const {
    const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(a.prepacked + a.layout.row_scale);
    float y = bf16_to_float(row_scale[n]) * sum;
    if (a.bias != nullptr) y = y + load_element(a.bias, a.bias_dtype, n);
    store_element(a.y, a.x_dtype, m * f.N + n, y);
  }

  __device__ __forceinline__ void finish_tile(int64_t tile, const Sums& total) const {
    const int64_t columns = a.M * p.config.planes, rows = a.layout.row_tiles * format::kRowTile;
    const bool alone = p.config.slices == 1 && p.config.planes == 1;
    float* sums =
        reinterpret_cast<float*>(static_cast<uint8_t*>(a.workspace) + round_up(a.layout.row_tiles * 4, kCountersAlign));
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t column = o * 8 + 2 * l.t + i % 2, n = tile * format::kRowTile + l.g + i / 2 * 8;
        if (column >= columns) continue;
        if (!alone) {
          sums[(blockIdx.y * columns + column) * rows + n] = total[o][i];
        } else if (n < f.N) {
          store_y(column, n, total[o][i]);
        }
      }
    }
    if (alone) return;
    __syncwarp();
    uint32_t ticket = 0;
    if (l.lane == 0) {
      __threadfence();
      ticket = atomicAdd(static_cast<uint32_t*>(a.workspace) + tile, 1u);
      __threadfence();
    }
    ticket = __shfl_sync(0xFFFFFFFFu, ticket, 0);
    __syncwarp();
    if (ticket + 1 != uint32_t(p.config.slices)) return;
    const int64_t n = tile * format::kRowTile + l.lane % 16;
    if (n >= f.N) return;
    for (int64_t m = l.lane / 16; m < a.M; m += 2) {
      float sum = 0.0f;
      for (int64_t column = m + (p.config.planes - 1) * a.M; column >= 0; column -= a.M) {  // the smallest term first
        for (int64_t s = 0; s < p.config.slices; ++s) sum = sum + __ldcg(&sums[(s * columns + column) * rows + n]);
      }
      store_y(m, n, sum);
    }
  }
};

template <int kBits, bool kHalf, int kOctets, int kRun>
__global__ void __launch_bounds__(Small<kBits, kHalf, kOctets, kRun>::kThreads, 1) linear_small_kernel(SmallParams p) {
  using Kernel = Small<kBits, kHalf, kOctets, kRun>;
  const Kernel s(p, dynamic_shared<uint8_t>());
  build_table<kBits, kHalf, kTableCopies>(s.table, p.linear.prepacked, p.linear.format.grid_size, Kernel::kWarps);
  s.stage_x();
  __syncthreads();
  const int64_t warps = int64_t(gridDim.x) * Kernel::kWarps;
  for (int64_t tile = int64_t(blockIdx.x) * Kernel::kWarps + threadIdx.x / 32; tile < p.linear.layout.row_tiles;
       tile += warps) {
    float total[kOctets][4];
    s.multiply_tile(tile, total);
    s.finish_tile(tile, total);
  }
}

template <int kBits, bool kHalf, int kOctets, int kRun>
Status launch_run(const SmallParams& p, cudaStream_t stream) {
  const dim3 grid(unsigned(p.config.blocks), unsigned(p.config.slices));
  return launch("linear", &linear_small_kernel<kBits, kHalf, kOctets, kRun>, grid,
                Small<kBits, kHalf, kOctets, kRun>::kThreads, p.config.shared_bytes, stream, p);
}

template <int kBits, bool kHalf>
Status launch_type(const SmallParams& p, cudaStream_t stream) {
  if (p.linear.layout.run == 16) {
    return p.config.octets == 1 ? launch_run<kBits, kHalf, 1, 16>(p, stream)
                                : launch_run<kBits, kHalf, 2, 16>(p, stream);
  }
  return p.config.octets == 1 ? launch_run<kBits, kHalf, 1, 8>(p, stream) : launch_run<kBits, kHalf, 2, 8>(p, stream);
}

}  // namespace

Status launch_linear_small(const LinearParams& all, const LinearConfig& config, cudaStream_t stream) {
  SmallParams p{all, config, format::outlier_blocks(all.format)};
  const int64_t row_bytes = all.format.K * dtype_bytes(all.x_dtype);
  const bool half = all.x_dtype == DType::kFloat16;
  const auto run = all.format.bits == 4 ? half ? launch_type<4, true> : launch_type<4, false>
                   : half               ? launch_type<3, true>
                                        : launch_type<3, false>;
  for (int64_t m = 0; m < all.M; m += config.rows) {
    p.linear.M = all.M - m < config.rows ? all.M - m : config.rows;
    p.linear.x = static_cast<const uint8_t*>(all.x) + m * row_bytes;
    p.linear.y = static_cast<uint8_t*>(all.y) + m * all.format.N * dtype_bytes(all.x_dtype);
    if (config.workspace_bytes > 0) {
      PRECAL_RETURN_IF_ERROR(
          check_cuda("linear", cudaMemsetAsync(all.workspace, 0, size_t(all.layout.row_tiles * 4), stream)));
    }
    PRECAL_RETURN_IF_ERROR(run(p, stream));
  }
  return {};
}

}  // namespace precal::cuda
