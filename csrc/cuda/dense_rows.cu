// SPDX-License-Identifier: Apache-2.0
// Rows of W' from the GPU's order, in the dtype of the activations, for a matrix product of dense matrices
// (csrc/bindings/dense_linear.h): the bits of dequantize(), rounded once more.
//
//   weight   any format; tiled ones (format/cuda_tiles.h) with K % 8 = 0 by a table of pairs, the others element by
//   element out      [rows, K] float16, bfloat16 or float32
// Work    a warp makes a panel (256 columns) of a row tile, 16 bytes a lane and store; then the lanes redo the columns
//         that have outliers, element by element.
// Limits  first_row is a multiple of 16.
#include "cuda/any_weight.cuh"
#include "cuda/elements.cuh"
#include "cuda/pairs.cuh"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kCopies = 8, kAt = 5;  // 8 copies of 4 bytes
static_assert(4 * kCopies == 1 << kAt, "an offset in the table");

struct Levels {
  float of[256];
};

__device__ __forceinline__ PrepackedView view_of(const DenseRowsParams& p) {
  return {p.format, p.layout, p.prepacked, p.groups};
}

__global__ void __launch_bounds__(kThreads) dense_any_kernel(DenseRowsParams p) {
  PRECAL_SHARED(Levels, levels);
  load_levels(p.format, p.prepacked, levels.of, kThreads);
  __syncthreads();
  const format::OutlierBlocks blocks = format::outlier_blocks(p.format);
  const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(p.prepacked + p.layout.row_scale);
  const int64_t K = p.format.K, all = p.rows * K;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t n = p.first_row + i / K;
    const float value = bf16_to_float(row_scale[n]) * dense_weight(view_of(p), blocks, levels.of, n, i % K);
    store_element(p.out, p.dtype, i, value);
  }
}

template <int kBits, DType kType, int kRun>
struct Dense {
  static constexpr int kQuads = 16 / kRun;
  static constexpr int kBytes = kType == DType::kFloat32 ? 4 : 2;  // of an element

  const DenseRowsParams& p;
  const format::OutlierBlocks& blocks;
  const float* levels;
  const uint32_t* table;  // this lane's copy
  int lane, g, t;
  int64_t tile;
  int column;  // first of the panel

  // Whether blocks of columns begin where panels do, and nowhere else.
  __device__ __forceinline__ bool aligned() const {
    return blocks.segment == p.format.K || blocks.segment % format::kPanelColumns == 0;
  }

  __device__ __forceinline__ void load(const uint4* from, uint4 (&codes)[kBits]) const {
#pragma unroll
    for (int i = 0; i < kBits; ++i) codes[i] = from[i * 32];
  }

  // Element 0 of the panel's columns of row g + 8 * row.
  __device__ __forceinline__ uint8_t* row_of(int row) const {
    const int64_t n = tile * format::kRowTile + g + 8 * row - p.first_row;
    return static_cast<uint8_t*>(p.out) + (n * p.format.K + column) * kBytes;
  }

  // Eight columns from column k of the panel on; `left`: of the row, none where the row is not wanted.
  __device__ __forceinline__ void store(uint8_t* row, int k, int left, const float (&values)[8]) const {
    if (k >= left) return;
    if constexpr (kType == DType::kFloat32) {
      float4* to = reinterpret_cast<float4*>(row + k * kBytes);
      to[0] = make_float4(values[0], values[1], values[2], values[3]);
      to[1] = make_float4(values[4], values[5], values[6], values[7]);
    } else {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pairs[i] = kType == DType::kFloat16 ? ptx::pack_f16(values[2 * i], values[2 * i + 1])
                                            : ptx::pack_bf16(values[2 * i], values[2 * i + 1]);
      }
      *reinterpret_cast<uint4*>(row + k * kBytes) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }

  // What does not change within a panel, of rows g and g + 8.
  struct Rows {
    uint8_t* out[2];
    int left[2];
    float scale[2];
  };

  // Eight columns of a row, from column k of the panel on.
  template <int kHalfChunk, int kRow, int kField>
  __device__ __forceinline__ void run(const uint32_t (&words)[kBits], uint32_t history, const float (&scale)[2],
                                      const Rows& rows, int k) const {
    constexpr int kFirst = 4 * kHalfChunk;
    const uint32_t windows[4] = {
        window_of<kFirst, kRow, kAt, kField>(words, history), window_of<kFirst + 1, kRow, kAt, kInWords>(words, 0),
        window_of<kFirst + 2, kRow, kAt, kInWords>(words, 0), window_of<kFirst + 3, kRow, kAt, kInWords>(words, 0)};
    float values[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = look_up(table, windows[i]);  // bfloat16, exact
      values[2 * i] = rows.scale[kRow] * (scale[kRow] * bits_float(pair << 16));
      values[2 * i + 1] = rows.scale[kRow] * (scale[kRow] * bits_float(pair & 0xFFFF0000u));
    }
    store(rows.out[kRow], k, rows.left[kRow], values);
  }

  // Of column k of the panel.
  __device__ __forceinline__ void load_scales(const uint8_t* of_panel, int k, float (&scale)[2]) const {
    const int at = (k >> (8 - scale_shift(p.layout))) * 2;
    const bool e4m3 = p.format.scale_type == format::ScaleType::kE4m3;
    const uint32_t both = e4m3 ? ptx::unpack_e4m3x2(*reinterpret_cast<const uint16_t*>(of_panel + at))
                               : *reinterpret_cast<const uint32_t*>(of_panel + at * 2);
    scale[0] = ptx::unpack_f16(uint16_t(both));
    scale[1] = ptx::unpack_f16(uint16_t(both >> 16));
  }

  template <int kChunk>
  __device__ __forceinline__ void chunk(const uint4 (&codes)[kBits], const uint32_t (&history)[kQuads],
                                        const uint8_t* scales, const Rows& rows) const {
    constexpr int kUnit = kRun == 16 ? kChunk : 2 * kChunk % 4, kQuad = kRun == 16 ? 0 : kChunk / 2, kK = kChunk * 64;
    uint32_t words[kBits];
    chunk_words<kBits, kChunk>(codes, words);
    const int first = kK + format::chunk_column(kRun, t, 0), second = kK + format::chunk_column(kRun, t, 8);
    float scale[2];
    load_scales(scales, kK, scale);
    run<0, 0, history_bit(kUnit, 0)>(words, history[kQuad], scale, rows, first);
    run<0, 1, history_bit(kUnit, 1)>(words, history[kQuad], scale, rows, first);
    if constexpr (kRun == 16) {
      run<1, 0, kInWords>(words, 0, scale, rows, second);
      run<1, 1, kInWords>(words, 0, scale, rows, second);
    } else {
      load_scales(scales, kK + 32, scale);
      run<1, 0, history_bit(kUnit + 1, 0)>(words, history[kQuad], scale, rows, second);
      run<1, 1, history_bit(kUnit + 1, 1)>(words, history[kQuad], scale, rows, second);
    }
  }

  __device__ __forceinline__ void panel(int64_t at) const {
    const uint4* from = reinterpret_cast<const uint4*>(p.prepacked + p.layout.codes) +
                        (tile * p.layout.panels + at) * kBits * 32 + lane;
    const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(p.prepacked + p.layout.row_scale);
    const uint8_t* scales =
        p.prepacked + p.layout.scale + scale_at(p.layout, tile, g, column) * format::scale_bytes(p.format.scale_type);
    Rows rows;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t n = tile * format::kRowTile + g + 8 * i;
      rows.out[i] = row_of(i);
      rows.left[i] = n < p.first_row + p.rows ? int(p.format.K) - column : 0;
      rows.scale[i] = bf16_to_float(row_scale[n]);
    }
    uint4 codes[kBits];
    uint32_t before = 0;
    if (at > 0 && !aligned()) {
      load(from - kBits * 32, codes);
      before = last_low_bits<kBits, kRun>(codes, kQuads - 1);
    }
    load(from, codes);
    uint32_t history[kQuads];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const uint32_t mine = last_low_bits<kBits, kRun>(codes, q);
      history[q] = history_of(mine, before);
      before = mine;
      if (!aligned()) {
        history[q] &= history_that_counts<kRun>(blocks, column + q * 16 * kRun, t, p.format.K);
      } else if (q == 0 && t == 0) {
        history[q] &= ~((3u << history_bit(0, 0)) | (3u << history_bit(0, 1)));
      }
    }
    chunk<0>(codes, history, scales, rows);
    chunk<1>(codes, history, scales, rows);
    chunk<2>(codes, history, scales, rows);
    chunk<3>(codes, history, scales, rows);
  }

  // Columns of the panel with outliers, once more; of entries that point to the same one, the first does it. Unused
  // ones count too: they add a zero, which makes another one of -0.
  __device__ __forceinline__ void outliers() const {
    const format::WeightFormat& f = p.format;
    const uint16_t* entries = reinterpret_cast<const uint16_t*>(p.prepacked + p.layout.outliers);
    const uint16_t* row_scale = reinterpret_cast<const uint16_t*>(p.prepacked + p.layout.row_scale);
    const int64_t end = column + format::kPanelColumns < f.K ? column + format::kPanelColumns : f.K;
    __syncwarp();
    for (int64_t b = format::block_at(blocks, column); b <= format::block_at(blocks, end - 1); ++b) {
      const int64_t begin = format::block_begin(blocks, b), block_end = format::block_end(blocks, b);
      const uint16_t* of_block = entries + (tile * blocks.num_blocks + b) * f.c * 16;
      for (int e = lane; e < 16 * f.c; e += 32) {
        const int row = e % 16, slot = format::row_slot(row);
        const uint32_t entry = of_block[e / 16 * 16 + slot];
        const int64_t k = begin + (entry & 0xFFu), n = tile * format::kRowTile + row;
        bool first = k >= column && k < end && k < block_end && n < p.first_row + p.rows;
        for (int i = 0; i < e / 16 && first; ++i) first = (of_block[i * 16 + slot] & 0xFFu) != (entry & 0xFFu);
        if (!first) continue;
        const float value = bf16_to_float(row_scale[n]) * dense_weight(view_of(p), blocks, levels, n, k);
        store_element(p.out, kType, (n - p.first_row) * f.K + k, value);
      }
    }
  }
};

template <int kBits, DType kType, int kRun>
__global__ void __launch_bounds__(kThreads, 2) dense_tiled_kernel(DenseRowsParams p) {
  PRECAL_SHARED(Levels, levels);
  uint32_t* table = dynamic_shared<uint32_t>();
  build_table<kBits, false, kCopies>(table, p.prepacked, p.format.grid_size, kWarps);
  load_levels(p.format, p.prepacked, levels.of, kThreads);
  __syncthreads();
  const format::OutlierBlocks blocks = format::outlier_blocks(p.format);
  const int lane = int(threadIdx.x) % 32;
  const int64_t panels = p.layout.panels, all = ceil_div(p.rows, format::kRowTile) * panels;
  const int64_t first = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (int64_t i = first; i < all; i += int64_t(gridDim.x) * kWarps) {
    const int64_t panel = i % panels;
    const Dense<kBits, kType, kRun> d{p,
                                      blocks,
                                      levels.of,
                                      table + lane % kCopies,
                                      lane,
                                      lane / 4,
                                      lane % 4,
                                      p.first_row / format::kRowTile + i / panels,
                                      int(panel * format::kPanelColumns)};
    d.panel(panel);
    if (p.format.c > 0) d.outliers();
  }
}

template <int kBits, DType kType>
Status launch_run(const DenseRowsParams& p, dim3 grid, cudaStream_t stream) {
  constexpr int64_t kBytes = int64_t(4) * (4 << (2 * kBits)) * kCopies;
  return p.layout.run == 16 ? launch("linear", &dense_tiled_kernel<kBits, kType, 16>, grid, kThreads, kBytes, stream, p)
                            : launch("linear", &dense_tiled_kernel<kBits, kType, 8>, grid, kThreads, kBytes, stream, p);
}

template <int kBits>
Status launch_bits(const DenseRowsParams& p, dim3 grid, cudaStream_t stream) {
  return p.dtype == DType::kFloat16    ? launch_run<kBits, DType::kFloat16>(p, grid, stream)
         : p.dtype == DType::kBFloat16 ? launch_run<kBits, DType::kBFloat16>(p, grid, stream)
                                       : launch_run<kBits, DType::kFloat32>(p, grid, stream);
}

}  // namespace

Status launch_dense_rows(const DenseRowsParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.format.K == 0) return {};
  if (!p.layout.tiled || p.format.K % 8 != 0) {  // a store has eight columns
    return launch("linear", &dense_any_kernel, blocks_for(p.rows * p.format.K, kThreads), kThreads, 0, stream, p);
  }
  DeviceLimits device;
  PRECAL_RETURN_IF_ERROR(device_limits("linear", &device));
  // Blocks that stay: the table of one is made once, for all its panels.
  const int64_t wanted = ceil_div(ceil_div(p.rows, format::kRowTile) * p.layout.panels, kWarps);
  const int64_t most = int64_t(device.multiprocessors) * 6;
  const dim3 grid(unsigned(wanted < most ? wanted : most));
  return p.format.bits == 4 ? launch_bits<4>(p, grid, stream) : launch_bits<3>(p, grid, stream);
}

}  // namespace precal::cuda
