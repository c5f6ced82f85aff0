// SPDX-License-Identifier: Apache-2.0
// y[M, N] = x[M, K] W'[N, K]^T + bias for many tokens: a matrix product on tiles whose weights are dequantized on the
// way into shared memory.
//
//   x          [M, K] float16 or bfloat16
//   weight     tiled, format/cuda_tiles.h
//   workspace  as in linear_small.cu, when K is cut into slices
//
// Work    A block of 8 warps owns 128 rows of W and 64 or 128 tokens, and goes through its slice of K by 64 columns.
// Warp
//         w turns the codes of row tile w into 16-bit scale * level, adds the outliers among them, and stores them; x
//         comes by cp.async, two steps ahead; both are read by ldmatrix. Rows in shared memory are 128 bytes, the eight
//         16-byte units of row r at unit ^ (r % 8): no bank conflicts, for ldmatrix and for the stores of a quarter
//         warp.
// Order   step i: wait for x and W of step i, barrier; ask for x of step i + 2 and codes of step i + 2; dequantize step
//         i + 1; multiply step i. So a stage is written one barrier after its last reader.
// Sums    float32 in mma; slices in order by the last to arrive. Weights are rounded to 16 bits once (scale * level of
// an
//         e4m3 scale is exact in float16): half a step of bfloat16 in every weight, as a dense bfloat16 matrix has.
// Limits  float16: |scale * level| and |outlier * U| up to 262016, both times the row scale.
#include "cuda/elements.cuh"
#include "cuda/linear_config.h"
#include "cuda/pairs.cuh"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kStagesX = 3;
constexpr int kRowBytes = kLargeColumns * 2;
constexpr float kHalfUnit = 0.25f;  // weights in float16 are a quarter of their size: a sum with an outlier then fits

static_assert(kLargeRows == kWarps * 16, "a warp dequantizes one row tile");
static_assert(kLargeColumns == format::kChunkColumns, "a step is a chunk");

struct LargeParams {
  LinearParams linear;
  LinearConfig config;
  format::OutlierBlocks blocks;
};

// Byte of 16-byte unit `unit` of row `row` of a tile.
__device__ __forceinline__ int swizzled(int row, int unit) { return row * kRowBytes + ((unit ^ row % 8) * 16); }

// The low bits of the last two codes of the first kPairs pairs: of row g in bits 0-1, of row g + 8 in bits 2-3.
template <int kPairs, int kBits>
__device__ __forceinline__ uint32_t chunk_low_bits(const uint32_t (&words)[kBits]) {
  constexpr int kEnd = kPairs * 2 * kBits - 2;
  return bits_of<kEnd, 2, 0>(words) | bits_of<16 * kBits + kEnd, 2, 2>(words);
}

// History of a lane's run: the last low bits of the lane that owns the columns before. `mine`: what this lane has for
// its right neighbour, `wrap`: what lane t = 3 has for t = 0, whose run comes after it.
__device__ __forceinline__ uint32_t history_of_run(uint32_t mine, uint32_t wrap, bool restarts) {
  const int lane = int(threadIdx.x) % 32;
  const uint32_t offered = lane % 4 == 3 ? wrap : mine;
  const uint32_t got = __shfl_sync(0xFFFFFFFFu, offered, (lane & ~3) | ((lane + 3) & 3));
  return restarts ? 0u : got;
}

template <int kBits, bool kHalf, int kTokens>
struct Large {
  // Warps share the tile as kWarpsN x kWarpsM; each has kTilesN row tiles and kOctets octets of tokens.
  static constexpr int kWarpsN = kTokens == 128 ? 2 : 4, kWarpsM = kWarps / kWarpsN;
  static constexpr int kTilesN = kLargeRows / kWarpsN / 16, kOctets = kTokens / kWarpsM / 8;
  static_assert(kOctets % 2 == 0, "ldmatrix brings two octets");

  const LargeParams& p;
  const LinearParams& a;
  const format::WeightFormat& f;
  int lane, warp, g, t;
  int64_t token, row_tile;  // first token of the block; row tile that this warp dequantizes
  int64_t first_chunk, num_chunks;
  uint8_t *tile_w, *tile_x;
  uint32_t* table;

  __device__ __forceinline__ Large(const LargeParams& params, uint8_t* shared)
      : p(params), a(params.linear), f(params.linear.format) {
    lane = int(threadIdx.x) % 32;
    warp = int(threadIdx.x) / 32;
    g = lane / 4;
    t = lane % 4;
    token = int64_t(blockIdx.y) * kTokens;
    row_tile = int64_t(blockIdx.x) * kWarps + warp;
    tile_w = shared;
    tile_x = shared + 2 * kLargeRows * kRowBytes;
    table = reinterpret_cast<uint32_t*>(tile_x + kStagesX * kTokens * kRowBytes);
    first_chunk = int64_t(blockIdx.z) * p.config.panels * 4;
    num_chunks = ceil_div(f.K, kLargeColumns) - first_chunk;
    if (num_chunks > p.config.panels * 4) num_chunks = p.config.panels * 4;
  }

  // ---- x -----------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ void fetch_x(int64_t step, bool vectors) const {
    uint8_t* stage = tile_x + step % kStagesX * (kTokens * kRowBytes);
    const uint16_t* x = static_cast<const uint16_t*>(a.x);
    for (int i = int(threadIdx.x); i < kTokens * 8; i += kThreads) {
      const int row = i / 8, unit = i % 8;
      const int64_t m = token + row, k = (first_chunk + step) * kLargeColumns + unit * 8;
      uint8_t* to = stage + swizzled(row, unit);
      const int64_t left = m < a.M && k < f.K ? f.K - k : 0;
      if (vectors) {
        ptx::cp_async16(to, left > 0 ? x + m * f.K + k : x, left >= 8 ? 16 : int(left) * 2);
      } else {
        for (int j = 0; j < 8; ++j) reinterpret_cast<uint16_t*>(to)[j] = j < left ? x[m * f.K + k + j] : uint16_t(0);
      }
    }
  }

  // ---- the weight --------------------------------------------------------------------------------------------------
  struct Codes {
    uint32_t words[kBits];
  };

  __device__ __forceinline__ void load_codes(int64_t chunk, Codes* out) const {
    if (row_tile >= a.layout.row_tiles) return;
    const uint32_t* panel = reinterpret_cast<const uint32_t*>(a.prepacked + a.layout.codes) +
                            (row_tile * a.layout.panels + chunk / 4) * kBits * 128;
    if constexpr (kBits == 4) {
      const uint4 v = ptx::load_once(reinterpret_cast<const uint4*>(panel) + chunk % 4 * 32 + lane);
      out->words[0] = v.x;
      out->words[1] = v.y;
      out->words[2] = v.z;
      out->words[3] = v.w;
    } else {
#pragma unroll
      for (int w = 0; w < kBits; ++w) out->words[w] = panel[format::panel_word(kBits, int(chunk % 4), lane, w)];
    }
  }

  // Scales of rows g and g + 8 at column k.
  __device__ __forceinline__ void load_scales(int k, float (&scale)[2]) const {
    constexpr float kUnit = kHalf ? kHalfUnit : 1.0f;
    const int64_t at = scale_at(a.layout, row_tile, g, k);
    uint32_t both;
    if (f.scale_type == format::ScaleType::kE4m3) {
      both = ptx::unpack_e4m3x2(*reinterpret_cast<const uint16_t*>(a.prepacked + a.layout.scale + at));
    } else {
      both = *reinterpret_cast<const uint32_t*>(a.prepacked + a.layout.scale + at * 2);
    }
    scale[0] = ptx::unpack_f16(uint16_t(both)) * kUnit;
    scale[1] = ptx::unpack_f16(uint16_t(both >> 16)) * kUnit;
  }

  static __device__ __forceinline__ float to_float(uint32_t h) {
    return kHalf ? ptx::unpack_f16(uint16_t(h)) : bits_float(h << 16);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    return kHalf ? ptx::pack_f16(low, high) : ptx::pack_bf16(low, high);
  }

  // Eight columns of a row: four pairs, scaled.
  __device__ __forceinline__ uint4 scaled(const uint32_t (&windows)[4], float scale) const {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = look_up(table + lane % kLargeCopies, windows[i]);
      v[i] = pack(scale * to_float(pair & 0xFFFFu), scale * to_float(pair >> 16));
    }
    return make_uint4(v[0], v[1], v[2], v[3]);
  }

  template <int kHalfChunk, int kRow>
  __device__ __forceinline__ void store_run(const Codes& codes, uint32_t history, float scale, uint8_t* stage) const {
    constexpr int kFirst = 4 * kHalfChunk, kAt = 5;  // 8 copies of 4 bytes
    static_assert(4 * kLargeCopies == 1 << kAt, "an offset in the table");
    constexpr int kField = 2 * kRow;
    uint32_t first;
    if constexpr (kHalfChunk == 0) {
      first = window_of<0, kRow, kAt, kField>(codes.words, history);
    } else {
      first = a.layout.run == 8 ? window_of<kFirst, kRow, kAt, kField>(codes.words, history)
                                : window_of<kFirst, kRow, kAt, kInWords>(codes.words, 0);
    }
    const uint32_t windows[4] = {first, window_of<kFirst + 1, kRow, kAt, kInWords>(codes.words, 0),
                                 window_of<kFirst + 2, kRow, kAt, kInWords>(codes.words, 0),
                                 window_of<kFirst + 3, kRow, kAt, kInWords>(codes.words, 0)};
    const int unit = format::chunk_column(a.layout.run, t, 8 * kHalfChunk) / 8;
    *reinterpret_cast<uint4*>(stage + swizzled(warp * 16 + g + 8 * kRow, unit)) = scaled(windows, scale);
  }

  // The lane that stored a column adds its outliers, so nobody has to wait.
  __device__ __forceinline__ void add_outliers(int k0, Cursor block, uint8_t* stage) const {
    const uint32_t* entries = reinterpret_cast<const uint32_t*>(a.prepacked + a.layout.outliers);
    for (;;) {
      for (int i = 0; i < f.c; ++i) {
        const uint32_t both = entries[((row_tile * p.blocks.num_blocks + block.block) * f.c + i) * 8 + g];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t e = (both >> (16 * half)) & 0xFFFFu;
          const int k = block.begin + int(e & 0xFFu), column = k - k0;
          if (e >> 8 == 0 || k >= block.end || column < 0 || column >= kLargeColumns) continue;
          if ((a.layout.run == 16 ? column / 16 : column % 32 / 8) != t) continue;
          uint16_t* h =
              reinterpret_cast<uint16_t*>(stage + swizzled(warp * 16 + g + 8 * half, column / 8)) + column % 8;
          const float value = ptx::unpack_f16(uint16_t(ptx::unpack_e4m3x2(uint16_t(e >> 8)))) *
                              (format::kOutlierUnit * (kHalf ? kHalfUnit : 1.0f));
          *h = uint16_t(pack(to_float(*h) + value, 0.0f));
        }
      }
      if (block.end >= k0 + kLargeColumns || block.end >= f.K) return;
      block.next_block(int(p.blocks.segment));
    }
  }

  // The codes of step `step` at `at`, which goes on to the next step.
  __device__ __forceinline__ void dequantize(int64_t step, const Codes& codes, Cursor* at, uint32_t* before) const {
    if (row_tile >= a.layout.row_tiles) return;
    uint8_t* stage = tile_w + step % 2 * (kLargeRows * kRowBytes);
    const int k0 = int(first_chunk + step) * kLargeColumns;
    const uint32_t restarts = at->restarts(k0, int(f.K)), end = chunk_low_bits<8>(codes.words);
    float scale[2];
    load_scales(k0, scale);
    uint32_t first, second;
    if (a.layout.run == 16) {
      first = history_of_run(end, *before, (t == 0 && (restarts & 1u)) || (t == 2 && (restarts & 2u)));
      second = 0;
    } else {
      const uint32_t middle = chunk_low_bits<4>(codes.words);
      first = history_of_run(middle, *before, t == 0 && (restarts & 1u));
      second = history_of_run(end, middle, t == 0 && (restarts & 2u));
    }
    store_run<0, 0>(codes, first, scale[0], stage);
    store_run<0, 1>(codes, first, scale[1], stage);
    if (a.layout.run == 8) load_scales(k0 + 32, scale);
    store_run<1, 0>(codes, second, scale[0], stage);
    store_run<1, 1>(codes, second, scale[1], stage);
    if (f.c > 0) add_outliers(k0, *at, stage);
    at->go_to(k0 + kLargeColumns, int(p.blocks.segment), int(f.K));
    *before = end;
  }

  // ---- the product -------------------------------------------------------------------------------------------------
  __device__ __forceinline__ void multiply(int64_t step, float (&sums)[kTilesN][kOctets][4]) const {
    const uint8_t* w = tile_w + step % 2 * (kLargeRows * kRowBytes);
    const uint8_t* x = tile_x + step % kStagesX * (kTokens * kRowBytes);
    const int first_row = warp / kWarpsM * (kTilesN * 16), first_token = warp % kWarpsM * (kOctets * 8);
    __syncwarp();  // ldmatrix and mma need all lanes; outliers may have parted them
#pragma unroll
    for (int k = 0; k < kLargeColumns / 16; ++k) {
      uint32_t rows[kTilesN][4], columns[kOctets][2];
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
        ptx::ldmatrix_x4(rows[i], w + swizzled(first_row + i * 16 + lane % 16, 2 * k + lane / 16));
      }
#pragma unroll
      for (int o = 0; o < kOctets; o += 2) {
        uint32_t two[4];
        ptx::ldmatrix_x4(two, x + swizzled(first_token + o * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
        columns[o][0] = two[0];
        columns[o][1] = two[1];
        columns[o + 1][0] = two[2];
        columns[o + 1][1] = two[3];
      }
#pragma unroll
      for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
        for (int o = 0; o < kOctets; ++o) {
          if (kHalf) {
            ptx::mma_f16(sums[i][o], rows[i], columns[o]);
          } else {
            ptx::mma_bf16(sums[i][o], rows[i], columns[o]);
          }
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t bits_before() const {
    if (first_chunk == 0 || row_tile >= a.layout.row_tiles) return 0;
    Codes codes = {};
    load_codes(first_chunk - 1, &codes);
    return chunk_low_bits<8>(codes.words);
  }

  __device__ __forceinline__ void run(float (&sums)[kTilesN][kOctets][4]) const {
    const bool vectors = f.K % 8 == 0 && reinterpret_cast<uintptr_t>(a.x) % 16 == 0;
    uint32_t before = bits_before();
    Cursor at;
    at.place(p.blocks, int(first_chunk) * kLargeColumns);
    Codes next = {};
    load_codes(first_chunk, &next);
    for (int step = 0; step < 2; ++step) {
      if (step < num_chunks) fetch_x(step, vectors);
      ptx::cp_async_commit();
    }
    dequantize(0, next, &at, &before);
    if (num_chunks > 1) load_codes(first_chunk + 1, &next);
    for (int64_t step = 0; step < num_chunks; ++step) {
      ptx::cp_async_wait<1>();
      __syncthreads();
      if (step + 2 < num_chunks) fetch_x(step + 2, vectors);
      ptx::cp_async_commit();
      const Codes codes = next;
      if (step + 2 < num_chunks) load_codes(first_chunk + step + 2, &next);
      if (step + 1 < num_chunks) dequantize(step + 1, codes, &at, &before);
      multiply(step, sums);
    }
    ptx::cp_async_wait<0>();
  }

  // ---- y -----------------------------------------------------------------------------------------------------------
  __device__ __forceinline__ void store_y(int64_t m, int64_t n, float sum) const {
    const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(a.prepacked + a.layout.row_scale);
    float y = bf16_to_float(row_scale[n]) * (kHalf ? sum * (1.0f / kHalfUnit) : sum);
    if (a.bias != nullptr) y = y + load_element(a.bias, a.bias_dtype, n);
    store_element(a.y, a.x_dtype, m * f.N + n, y);
  }

  __device__ __forceinline__ void finish(const float (&sums)[kTilesN][kOctets][4]) const {
    PRECAL_SHARED(uint32_t, ticket);
    const int64_t first_row = int64_t(blockIdx.x) * kLargeRows + warp / kWarpsM * (kTilesN * 16);
    const int64_t first_token = token + warp % kWarpsM * (kOctets * 8);
    const int64_t slices = p.config.slices;
    float* partial = reinterpret_cast<float*>(static_cast<uint8_t*>(a.workspace) +
                                              round_up(int64_t(gridDim.x) * gridDim.y * 4, kCountersAlign));
#pragma unroll
    for (int i = 0; i < kTilesN; ++i) {
#pragma unroll
      for (int o = 0; o < kOctets; ++o) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int64_t n = first_row + i * 16 + g + j / 2 * 8, m = first_token + o * 8 + 2 * t + j % 2;
          if (n >= f.N || m >= a.M) continue;
          if (slices == 1) {
            store_y(m, n, sums[i][o][j]);
          } else {
            partial[(blockIdx.z * a.M + m) * f.N + n] = sums[i][o][j];
          }
        }
      }
    }
    if (slices == 1) return;
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      ticket = atomicAdd(static_cast<uint32_t*>(a.workspace) + blockIdx.y * gridDim.x + blockIdx.x, 1u);
      __threadfence();
    }
    __syncthreads();
    if (ticket + 1 != uint32_t(slices)) return;
    for (int i = int(threadIdx.x); i < kLargeRows * kTokens; i += kThreads) {
      const int64_t n = int64_t(blockIdx.x) * kLargeRows + i % kLargeRows, m = token + i / kLargeRows;
      if (n >= f.N || m >= a.M) continue;
      float sum = 0.0f;
      for (int64_t s = 0; s < slices; ++s) sum = sum + __ldcg(&partial[(s * a.M + m) * f.N + n]);
      store_y(m, n, sum);
    }
  }
};

template <int kBits, bool kHalf, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) linear_large_kernel(LargeParams p) {
  using Kernel = Large<kBits, kHalf, kTokens>;
  const Kernel k(p, dynamic_shared<uint8_t>());
  build_table<kBits, kHalf, kLargeCopies>(k.table, p.linear.prepacked, p.linear.format.grid_size, kWarps);
  __syncthreads();
  float sums[Kernel::kTilesN][Kernel::kOctets][4] = {};
  if (k.num_chunks > 0) k.run(sums);
  k.finish(sums);
}

template <int kBits, bool kHalf>
Status launch_tokens(const LargeParams& p, cudaStream_t stream) {
  const dim3 grid(unsigned(ceil_div(p.linear.format.N, kLargeRows)),
                  unsigned(ceil_div(p.linear.M, p.config.tile_tokens)), unsigned(p.config.slices));
  return p.config.tile_tokens == 128 ? launch("linear", &linear_large_kernel<kBits, kHalf, 128>, grid, kThreads,
                                              p.config.shared_bytes, stream, p)
                                     : launch("linear", &linear_large_kernel<kBits, kHalf, 64>, grid, kThreads,
                                              p.config.shared_bytes, stream, p);
}

}  // namespace

Status launch_linear_large(const LinearParams& all, const LinearConfig& config, cudaStream_t stream) {
  LargeParams p{all, config, format::outlier_blocks(all.format)};
  const bool half = all.x_dtype == DType::kFloat16;
  const auto run = all.format.bits == 4 ? half ? launch_tokens<4, true> : launch_tokens<4, false>
                   : half               ? launch_tokens<3, true>
                                        : launch_tokens<3, false>;
  for (int64_t m = 0; m < all.M; m += config.rows) {
    p.linear.M = all.M - m < config.rows ? all.M - m : config.rows;
    p.linear.x = static_cast<const uint8_t*>(all.x) + m * all.format.K * 2;
    p.linear.y = static_cast<uint8_t*>(all.y) + m * all.format.N * 2;
    if (config.slices > 1) {
      const int64_t counters = ceil_div(all.format.N, kLargeRows) * ceil_div(p.linear.M, config.tile_tokens);
      PRECAL_RETURN_IF_ERROR(check_cuda("linear", cudaMemsetAsync(all.workspace, 0, size_t(counters * 4), stream)));
    }
    PRECAL_RETURN_IF_ERROR(run(p, stream));
  }
  return {};
}

}  // namespace precal::cuda
