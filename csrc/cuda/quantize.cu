// SPDX-License-Identifier: Apache-2.0
// quantize_groups and quantize_split: steps 1 to 3 (outliers, extremes, row scale) and 6 (outlier residuals).
//
// Work    prepare: a block a row; a warp finds the outliers of a block of columns, then the extremes of a group; one
//         thread sums the amplitudes for their mean, in order. Steps 4 and 5 are in quantize_plain.cu and
//         quantize_trellis.cu. residuals: a thread a row and block of columns.
// Limits  any format. The row is read twice; the second time from L2.
#include "cuda/quantize.cuh"

namespace precal::cuda {

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct RowState {
  LevelTable levels;
  float largest_outlier[kWarps];
  int refused;
  float row_scale;
};

__device__ __forceinline__ float largest_of_warp(float value) {
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, value, d);
    value = other > value ? other : value;
  }
  return value;
}

// Outliers of one block of columns, by a warp: lane l holds columns l, l + 32, ... Returns the largest magnitude.
__device__ __forceinline__ float select_outliers(const QuantizeKernelParams& p, int64_t n, int64_t b, bool* refused) {
  const QuantizeParams& q = p.q;
  const int lane = int(threadIdx.x) % 32, c = q.format.c;
  const int64_t begin = format::block_begin(p.blocks, b), width = format::block_end(p.blocks, b) - begin;
  float magnitude[8];
  uint32_t taken = 0;  // bit j: column lane + 32 j is an outlier, salient, or past the end
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const int64_t k = lane + 32 * j;
    magnitude[j] = k < width ? abs_float(load_element(q.w, q.dtype, n * q.format.K + begin + k)) : 0.0f;
    if (!(magnitude[j] <= kMaxWeight)) {
      *refused = true;
      magnitude[j] = 0.0f;
    }
    if (k >= width || (q.format.split && q.salient[n * q.format.K + begin + k] != 0)) taken |= 1u << j;
  }
  float largest = 0.0f;
  int mine = -1, found = 0;  // lane i keeps the position of outlier i
  for (int i = 0; i < c; ++i) {
    uint64_t best = 0;  // magnitude, then the lower column; 0: none
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (((taken >> j) & 1u) != 0 || !(double(magnitude[j]) * double(magnitude[j]) > q.lam)) continue;
      const uint64_t key = (uint64_t(float_bits(magnitude[j])) << 8 | uint64_t(255 - (lane + 32 * j))) + 1;
      best = key > best ? key : best;
    }
    for (int d = 16; d > 0; d /= 2) {
      const uint64_t other = __shfl_xor_sync(0xFFFFFFFFu, best, d);
      best = other > best ? other : best;
    }
    if (best == 0) break;  // of the whole warp
    const int position = 255 - int((best - 1) & 255u);
    if (position % 32 == lane) taken |= 1u << (position / 32);
    if (lane == i) mine = position;
    if (i == 0) largest = bits_float(uint32_t((best - 1) >> 8));
    ++found;
  }
  int rank = 0;  // ascending by column
  for (int i = 0; i < found; ++i) rank += __shfl_sync(0xFFFFFFFFu, mine, i) < mine ? 1 : 0;
  if (lane < c) {
    const int64_t entry = (n * p.blocks.num_blocks + b) * c + (lane < found ? rank : lane);
    q.outlier_index[entry] = lane < found ? uint8_t(mine) : uint8_t(0);
    q.outlier_value[entry] = lane < found;  // a mark, replaced by the residual
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t dense = __ballot_sync(0xFFFFFFFFu, ((taken >> j) & 1u) == 0);
    if (lane == 0 && 32 * j < width) p.scratch.dense[n * p.mask_words + begin / 32 + j] = dense;
  }
  return largest;
}

__device__ __forceinline__ void find_extremes(const QuantizeKernelParams& p, int64_t n, int64_t g) {
  const QuantizeParams& q = p.q;
  const int lane = int(threadIdx.x) % 32;
  const int64_t begin = g * p.group_size, end = begin + p.group_size < q.format.K ? begin + p.group_size : q.format.K;
  float highest = 0.0f, lowest = 0.0f, salient = 0.0f;
  for (int64_t k = begin + lane; k < end; k += 32) {
    const float value = load_element(q.w, q.dtype, n * q.format.K + k);
    if (!is_dense(p, n, k)) {
      salient = abs_float(value) > salient ? abs_float(value) : salient;
      continue;
    }
    highest = value > highest ? value : highest;
    lowest = value < lowest ? value : lowest;
  }
  highest = largest_of_warp(highest);
  lowest = -largest_of_warp(-lowest);
  salient = largest_of_warp(salient);
  if (lane != 0) return;
  const float extreme = highest >= -lowest ? highest : lowest;
  p.scratch.target[n * p.groups + g] = q.symmetric ? abs_float(extreme) : extreme;
  if (q.format.split) p.scratch.salient[n * p.groups + g] = salient;
}

__device__ __forceinline__ float row_base(const QuantizeKernelParams& p, int64_t n, float peak, float largest_outlier) {
  double sum = 0.0;
  float largest = 0.0f;
  for (int64_t g = 0; g < p.groups; ++g) {
    if (p.q.format.split) {
      const float salient = p.scratch.salient[n * p.groups + g] / abs_float(peak);
      if (salient > largest) largest = salient;
    }
    const float amplitude = abs_float(p.scratch.target[n * p.groups + g]) / abs_float(peak);
    sum += double(amplitude);
    if (amplitude > largest) largest = amplitude;
  }
  float base = p.groups > 0 ? float(sum / double(p.groups)) : 0.0f;
  const float least = largest / (p.q.format.scale_type == format::ScaleType::kE4m3 ? 400.0f : 32768.0f);
  if (base < least) base = least;
  const float least_outlier = largest_outlier / (format::kOutlierUnit * 400.0f);
  return base < least_outlier ? least_outlier : base;
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(QuantizeKernelParams p) {
  PRECAL_SHARED(RowState, s);
  const QuantizeParams& q = p.q;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t n = blockIdx.x;
  if (threadIdx.x == 0) s.refused = 0;
  load_levels(q, &s.levels);
  __syncthreads();
  // 1. outliers
  float largest = 0.0f;
  bool refused = false;
  for (int64_t b = warp; b < p.blocks.num_blocks; b += kWarps) {
    const float of_block = select_outliers(p, n, b, &refused);
    largest = of_block > largest ? of_block : largest;
  }
  if (lane == 0) s.largest_outlier[warp] = largest;
  if (refused) atomicOr(&s.refused, 1);
  __syncthreads();
  if (q.format.split) {
    const int64_t bytes = format::mask_bytes_per_row(q.format);
    for (int64_t i = threadIdx.x; i < bytes; i += kThreads) {
      uint32_t salient = 0;
      for (int64_t k = i * 8; k < i * 8 + 8 && k < q.format.K; ++k) {
        salient |= (q.salient[n * q.format.K + k] != 0 ? 1u : 0u) << (k % 8);
      }
      q.mask[n * bytes + i] = uint8_t(salient);
    }
  }
  // 2. extremes
  for (int64_t g = warp; g < p.groups; g += kWarps) find_extremes(p, n, g);
  __syncthreads();
  // 3. row scale
  if (threadIdx.x == 0) {
    for (int w = 0; w < kWarps; ++w) largest = s.largest_outlier[w] > largest ? s.largest_outlier[w] : largest;
    const uint16_t code = float_to_bf16_nonzero(row_base(p, n, s.levels.peak, largest));
    s.row_scale = bf16_to_float(code);
    q.row_scale[n] = s.refused != 0 ? kRefusedRow : code;
  }
  __syncthreads();
  for (int64_t g = threadIdx.x; g < p.groups; g += kThreads) {
    float& target = p.scratch.target[n * p.groups + g];
    const float extreme = s.row_scale > 0.0f ? target / s.row_scale : 0.0f;
    target = extreme / s.levels.peak;
    if (format::is_trellis(q.format)) p.scratch.reach[n * p.groups + g] = abs_float(extreme);
    if (!q.format.split) continue;
    const float salient = p.scratch.salient[n * p.groups + g];
    static_cast<uint16_t*>(q.outlier_scale)[n * p.groups + g] =
        nonzero_half(s.row_scale > 0.0f ? (salient / s.row_scale) / s.levels.peak : 0.0f);
  }
}

// Step 6.
__global__ void __launch_bounds__(kThreads) residuals_kernel(QuantizeKernelParams p) {
  PRECAL_SHARED(LevelTable, levels);
  const QuantizeParams& q = p.q;
  load_levels(q, &levels);
  __syncthreads();
  const int64_t K = q.format.K, all = q.format.N * p.blocks.num_blocks;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t n = i / p.blocks.num_blocks, begin = format::block_begin(p.blocks, i % p.blocks.num_blocks);
    const float row_scale = bf16_to_float(q.row_scale[n]);
    const uint8_t* codes = q.codes + n * K;
    uint8_t *indices = q.outlier_index + i * q.format.c, *values = q.outlier_value + i * q.format.c;
    int used = 0;
    for (int j = 0; j < q.format.c && values[j] != 0; ++j) {
      const int64_t k = begin + indices[j];
      uint32_t level = codes[k];
      if (format::is_trellis(q.format)) {
        format::TrellisState state;
        for (int64_t before = k - 2 < begin ? begin : k - 2; before < k; ++before) {
          format::trellis_index(&state, codes[before]);
        }
        level = format::trellis_index(&state, codes[k]);
      }
      const float scale = format::load_scale(q.scale, n * p.groups + k / p.group_size, q.format.scale_type);
      const float residual = scaled_weight(p, n, k, row_scale) - scale * levels.level[level];
      const uint8_t code = format::float_to_e4m3(residual * (1.0f / format::kOutlierUnit));
      if ((code & 0x7Fu) == 0) continue;
      indices[used] = indices[j];
      values[used++] = code;
    }
    for (int j = used; j < q.format.c; ++j) indices[j] = values[j] = 0;
  }
}

QuantizeKernelParams kernel_params(const QuantizeParams& q, int64_t* bytes) {
  const format::WeightFormat& f = q.format;
  QuantizeKernelParams p{};
  p.q = q;
  p.blocks = format::outlier_blocks(f);
  p.group_size = f.group_size < f.K ? f.group_size : f.K > 0 ? f.K : 1;
  p.groups = format::num_groups(f);
  p.mask_words = ceil_div(f.K, 32);
  int64_t at = 0;
  const auto take = [&](int64_t size) {
    uint8_t* memory = q.workspace == nullptr ? nullptr : static_cast<uint8_t*>(q.workspace) + at;
    at = round_up(at + size, 16);
    return memory;
  };
  p.scratch.target = reinterpret_cast<float*>(take(f.N * p.groups * 4));
  p.scratch.reach = reinterpret_cast<float*>(take(format::is_trellis(f) ? f.N * p.groups * 4 : 0));
  p.scratch.salient = reinterpret_cast<float*>(take(f.split ? f.N * p.groups * 4 : 0));
  p.scratch.dense = reinterpret_cast<uint32_t*>(take(f.N * p.mask_words * 4));
  p.scratch.end_state = take(format::is_trellis(f) ? f.N * p.blocks.num_blocks : 0);
  *bytes = at;
  return p;
}

}  // namespace

int64_t quantize_workspace(const format::WeightFormat& format) {
  QuantizeParams q{};
  q.format = format;
  int64_t bytes = 0;
  kernel_params(q, &bytes);
  return bytes;
}

Status launch_quantize(const QuantizeParams& q, cudaStream_t stream) {
  const char* op = q.format.split ? "quantize_split" : "quantize_groups";
  if (q.format.N == 0) return {};
  int64_t bytes = 0;
  const QuantizeKernelParams p = kernel_params(q, &bytes);
  PRECAL_RETURN_IF_ERROR(launch(op, &prepare_kernel, dim3(unsigned(q.format.N)), kThreads, 0, stream, p));
  if (q.format.K == 0) return {};
  PRECAL_RETURN_IF_ERROR(format::is_trellis(q.format) ? launch_quantize_trellis(p, stream)
                                                      : launch_quantize_plain(p, stream));
  if (q.format.c == 0) return {};
  return launch(op, &residuals_kernel, blocks_for(q.format.N * p.blocks.num_blocks, kThreads), kThreads, 0, stream, p);
}

}  // namespace precal::cuda
