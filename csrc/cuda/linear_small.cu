// SPDX-License-Identifier: Apache-2.0
// y[M, N] = x[M, K] W'[N, K]^T + bias for few tokens: every weight is read once and meets all of them.
//
//   x          [M, K] float16 or bfloat16, or float32 as three bfloat16 terms (their sum is exact)
//   weight     tiled, format/cuda_tiles.h
//   workspace  counters [row tiles], then sums [slices][columns of mma][rows]; none if one slice finishes its rows
//
// Work    A warp owns a row tile (16 rows) of one slice of K and runs through its panels of 256 columns, 16 bytes a
// lane
//         and piece, the next panel's loads in flight while this one is multiplied. Codes become pairs of levels by a
//         table in shared memory with one copy a lane (no bank conflicts); levels are exact in 16 bits, so scales come
//         after the sum of a group, in float32. x of the slice lies in shared memory in the order of fragments.
// Sums    Group, then slice, then all slices in order, by whichever warp arrives last: the same bits in any order of
//         arrival and for any M up to 16. No atomics on floats.
// Budget  table 128 KB (4 bits) or 32 KB (3 bits), 4 KB of x per panel and 8 columns of mma.
// Count   4 bits, one octet: per pair of weights a shift, a mask and a load from shared memory; per 32 weights of a
// lane
//         4 mma, 2 loads of x, 4 fma of scales and about 20 for history, scales and loop.
// Limits  M * planes <= 16.
#include "cuda/elements.cuh"
#include "cuda/linear_config.h"
#include "cuda/pairs.cuh"

namespace precal::cuda {

namespace {

struct SmallParams {
  LinearParams linear;
  LinearConfig config;
  format::OutlierBlocks blocks;
};

// Everything a lane loads of a panel.
template <int kBits>
struct Panel {
  uint4 codes[kBits];
  uint32_t scales[8];  // of rows g and g + 8, per half chunk
  uint32_t outlier;    // the first entry of the block at the panel's begin: both rows
};

struct Lane {
  int lane, g, t;
};

template <int kBits, bool kHalf, int kOctets, int kRun>
struct Small {
  // Two octets and twice as many scales need more registers than twelve warps leave: they would spill.
  static constexpr int kWarps = kOctets == 2 && kRun == 8 ? 8 : kSmallWarps, kThreads = kWarps * 32;

  const SmallParams& p;
  const LinearParams& a;
  const format::WeightFormat& f;
  Lane l;
  uint32_t* table;     // [windows][32]
  uint4* x;            // [panels][4 chunks][2 halves][kOctets][32]
  uint32_t* restarts;  // [panels][4]
  int first_panel, num_panels;
  Cursor start;  // of the slice

  __device__ __forceinline__ Small(const SmallParams& params, uint8_t* shared)
      : p(params), a(params.linear), f(params.linear.format) {
    l.lane = int(threadIdx.x) % 32;
    l.g = l.lane / 4;
    l.t = l.lane % 4;
    table = reinterpret_cast<uint32_t*>(shared);
    x = reinterpret_cast<uint4*>(shared + table_bytes(kBits));
    restarts = reinterpret_cast<uint32_t*>(x + p.config.panels * 256 * kOctets);
    first_panel = int(blockIdx.y * p.config.panels);
    num_panels = int(a.layout.panels) - first_panel;
    if (num_panels > p.config.panels) num_panels = int(p.config.panels);
    start = {};
    if (num_panels > 0) start.place(f, p.blocks, first_panel * 256);
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

  __device__ __forceinline__ void stage_x() const {
    const bool vectors = a.x_dtype != DType::kFloat32 && f.K % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
    for (int i = int(threadIdx.x); i < num_panels * 256 * kOctets; i += kThreads) {
      const int lane = i % 32, octet = i / 32 % kOctets, half = i / (32 * kOctets) % 2, chunk = i / (64 * kOctets);
      const int64_t column = octet * 8 + lane / 4;
      const int64_t k = first_panel * 256 + chunk * 64 + format::chunk_column(kRun, lane % 4, half * 8);
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
      x[i] = v;
    }
    for (int i = int(threadIdx.x); i < num_panels * 4; i += kThreads) {
      restarts[i] = chunk_restarts(p.blocks, first_panel * 256 + i * 64, f.K);
    }
  }

  // x of mma column `column` at column k of this slice.
  __device__ __forceinline__ float staged_x(int column, int k) const {
    const int c = k % 64;
    const int t = kRun == 16 ? c / 16 : c % 32 / 8, i = kRun == 16 ? c % 16 : c / 32 * 8 + c % 8;
    const int unit = ((k / 64 * 2 + i / 8) * kOctets + column / 8) * 32 + column % 8 * 4 + t;
    const uint16_t h = reinterpret_cast<const uint16_t*>(x + unit)[i % 8];
    return kHalf ? ptx::unpack_f16(h) : bf16_to_float(h);
  }

  // ---- the weight --------------------------------------------------------------------------------------------------
  __device__ __forceinline__ const uint32_t* panel_codes(int64_t tile, int64_t panel) const {
    return reinterpret_cast<const uint32_t*>(a.prepacked + a.layout.codes) +
           (tile * a.layout.panels + panel) * kBits * 128;
  }

  __device__ __forceinline__ uint32_t load_scales(int64_t tile, int group) const {
    if (group >= a.groups) return 0;  // columns past K
    const int64_t pair = (tile * a.groups + group) * 8 + l.g;
    return f.scale_type == format::ScaleType::kE4m3
               ? reinterpret_cast<const uint16_t*>(a.prepacked + a.layout.scale)[pair]
               : reinterpret_cast<const uint32_t*>(a.prepacked + a.layout.scale)[pair];
  }

  __device__ __forceinline__ uint32_t load_outlier(int64_t tile, int64_t block, int i) const {
    const uint32_t* entries = reinterpret_cast<const uint32_t*>(a.prepacked + a.layout.outliers);
    return entries[((tile * p.blocks.num_blocks + block) * f.c + i) * 8 + l.g];
  }

  // The panel at `codes` and `ahead`, which go on to the next one, of column `next_column`.
  __device__ __forceinline__ void load_panel(int64_t tile, int next_column, const uint4** codes, Cursor* ahead,
                                             Panel<kBits>* out) const {
#pragma unroll
    for (int i = 0; i < kBits; ++i) out->codes[i] = ptx::load_once(*codes + i * 32);
    *codes += kBits * 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (kRun == 16 && i % 2 == 1) continue;
      out->scales[i] = load_scales(tile, ahead->group);
      ahead->next_columns(kRun == 16 ? 64 : 32, int(f.group_size));
    }
    if (f.c == 0) return;
    out->outlier = load_outlier(tile, ahead->block, 0);
    ahead->go_to(next_column, int(p.blocks.segment), int(f.K));
  }

  // ---- sums --------------------------------------------------------------------------------------------------------
  template <int kHalfChunk>
  __device__ __forceinline__ void multiply(const uint32_t (&words)[kBits], uint32_t history, const uint4* fragments,
                                           float (&sums)[kOctets][4]) const {
    constexpr int kFirst = 4 * kHalfChunk, kAt = 7;  // 32 copies of 4 bytes
    constexpr bool kBegins = kHalfChunk == 0 || kRun == 8;
    const uint32_t windows[4][2] = {
        {window_of<kFirst, 0, kAt, kBegins>(words, history), window_of<kFirst, 1, kAt, kBegins>(words, history)},
        {window_of<kFirst + 1, 0, kAt, false>(words, 0), window_of<kFirst + 1, 1, kAt, false>(words, 0)},
        {window_of<kFirst + 2, 0, kAt, false>(words, 0), window_of<kFirst + 2, 1, kAt, false>(words, 0)},
        {window_of<kFirst + 3, 0, kAt, false>(words, 0), window_of<kFirst + 3, 1, kAt, false>(words, 0)}};
    const uint32_t* own = table + l.lane;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t rows[4] = {look_up(own, windows[2 * s][0]), look_up(own, windows[2 * s][1]),
                                look_up(own, windows[2 * s + 1][0]), look_up(own, windows[2 * s + 1][1])};
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
        const uint4 v = fragments[o * 32 + l.lane];
        const uint32_t columns[2] = {s == 0 ? v.x : v.z, s == 0 ? v.y : v.w};
        if (kHalf) {
          ptx::mma_f16(sums[o], rows, columns);
        } else {
          ptx::mma_bf16(sums[o], rows, columns);
        }
      }
    }
  }

  // total += scales * sums; then sums are zero again.
  __device__ __forceinline__ void apply_scales(uint32_t raw, float (&sums)[kOctets][4],
                                               float (&total)[kOctets][4]) const {
    float low, high;
    if (f.scale_type == format::ScaleType::kE4m3) {
      low = small_e4m3(raw & 0xFFu);
      high = small_e4m3(raw >> 8);
    } else {
      low = ptx::unpack_f16(uint16_t(raw)) * (1.0f / kScaleUnit);
      high = ptx::unpack_f16(uint16_t(raw >> 16)) * (1.0f / kScaleUnit);
    }
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        total[o][i] = fmaf(i < 2 ? low : high, sums[o][i], total[o][i]);
        sums[o][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void add_outlier(uint32_t entry, const Cursor& block, int panel_begin,
                                              float (&total)[kOctets][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t e = (entry >> (16 * half)) & 0xFFFFu;
      const int k = block.begin + int(e & 0xFFu);
      if (e >> 8 == 0 || k >= block.end || k < panel_begin || k >= panel_begin + 256) continue;
      const float value = format::kOutlierUnit * small_e4m3(e >> 8);
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& sum = half == 0 ? total[o][i] : total[o][2 + i];
          sum = fmaf(value, staged_x(o * 8 + 2 * l.t + i, k - first_panel * 256), sum);
        }
      }
    }
  }

  // Of all blocks that have columns in the panel; mostly one.
  __device__ __forceinline__ void add_outliers(int64_t tile, int panel_begin, uint32_t first, Cursor* here,
                                               float (&total)[kOctets][4]) const {
    add_outlier(first, *here, panel_begin, total);
    for (int i = 1; i < f.c; ++i) add_outlier(load_outlier(tile, here->block, i), *here, panel_begin, total);
    while (here->end < panel_begin + 256 && here->end < f.K) {
      here->next_block(int(p.blocks.segment));
      for (int i = 0; i < f.c; ++i) add_outlier(load_outlier(tile, here->block, i), *here, panel_begin, total);
    }
    here->go_to(panel_begin + 256, int(p.blocks.segment), int(f.K));
  }

  template <int kChunk>
  __device__ __forceinline__ void run_chunk(const Panel<kBits>& panel, int at, uint32_t* before,
                                            float (&sums)[kOctets][4], float (&total)[kOctets][4]) const {
    uint32_t words[kBits];
#pragma unroll
    for (int w = 0; w < kBits; ++w) {
      const uint4& piece = panel.codes[(kChunk * kBits + w) / 4];
      const int part = (kChunk * kBits + w) % 4;
      words[w] = part == 0 ? piece.x : part == 1 ? piece.y : part == 2 ? piece.z : piece.w;
    }
    const uint4* fragments = x + (at * 4 + kChunk) * 2 * kOctets * 32;
    const uint32_t restart = restarts[at * 4 + kChunk], end = last_low_bits<8>(words);
    if constexpr (kRun == 16) {
      const bool begins = (l.t == 0 && (restart & 1u)) || (l.t == 2 && (restart & 2u));
      const uint32_t history = history_of_run(end, *before, begins);
      multiply<0>(words, history, fragments, sums);
      multiply<1>(words, 0, fragments + kOctets * 32, sums);
      apply_scales(panel.scales[2 * kChunk], sums, total);
    } else {
      const uint32_t middle = last_low_bits<4>(words);
      multiply<0>(words, history_of_run(middle, *before, l.t == 0 && (restart & 1u)), fragments, sums);
      apply_scales(panel.scales[2 * kChunk], sums, total);
      multiply<1>(words, history_of_run(end, middle, l.t == 0 && (restart & 2u)), fragments + kOctets * 32, sums);
      apply_scales(panel.scales[2 * kChunk + 1], sums, total);
    }
    *before = end;
  }

  // Codes before the slice, whose low bits its first columns need.
  __device__ __forceinline__ uint32_t bits_before(int64_t tile) const {
    if (first_panel == 0) return 0;
    const uint32_t* panel = panel_codes(tile, first_panel - 1);
    uint32_t words[kBits];
#pragma unroll
    for (int w = 0; w < kBits; ++w) words[w] = panel[format::panel_word(kBits, 3, l.lane, w)];
    return last_low_bits<8>(words);
  }

  __device__ __forceinline__ void multiply_tile(int64_t tile, float (&total)[kOctets][4]) const {
    float sums[kOctets][4];
#pragma unroll
    for (int o = 0; o < kOctets; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[o][i] = sums[o][i] = 0.0f;
    }
    if (num_panels == 0) return;
    __syncwarp();
    uint32_t before = bits_before(tile);
    const uint4* codes = reinterpret_cast<const uint4*>(panel_codes(tile, first_panel)) + l.lane;
    Cursor here = start, ahead = start;
    Panel<kBits> next;
    int column = first_panel * 256;
    load_panel(tile, column + 256, &codes, &ahead, &next);
    for (int at = 0; at < num_panels; ++at, column += 256) {
      const Panel<kBits> panel = next;
      if (at + 1 < num_panels) load_panel(tile, column + 512, &codes, &ahead, &next);
      run_chunk<0>(panel, at, &before, sums, total);
      run_chunk<1>(panel, at, &before, sums, total);
      run_chunk<2>(panel, at, &before, sums, total);
      run_chunk<3>(panel, at, &before, sums, total);
      if (f.c > 0) add_outliers(tile, column, panel.outlier, &here, total);
    }
  }

  // ---- y -----------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ void store_y(int64_t m, int64_t n, float sum) const {
    const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(a.prepacked + a.layout.row_scale);
    float y = bf16_to_float(row_scale[n]) * (kScaleUnit * sum);
    if (a.bias != nullptr) y = y + load_element(a.bias, a.bias_dtype, n);
    store_element(a.y, a.x_dtype, m * f.N + n, y);
  }

  __device__ __forceinline__ void finish_tile(int64_t tile, const float (&total)[kOctets][4]) const {
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
  build_table<kBits, kHalf, kTableCopies>(s.table, p.linear.prepacked, p.linear.format.grid_size, Kernel::kThreads);
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
