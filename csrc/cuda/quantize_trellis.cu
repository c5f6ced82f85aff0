// SPDX-License-Identifier: Apache-2.0
// quantize_groups with a trellis: the Viterbi search of csrc/cpu/trellis-inl.h, bit for bit.
//
// Work    search: a warp owns four rows, eight lanes each; the lanes try eight candidate scales of a group side by
// side,
//         each with the four costs in registers, then all repeat the best one and the first lane keeps its decisions, a
//         byte a column in the place of the code. trace: a thread follows the path of one block of columns of one row
//         backwards; blocks are independent, because the search keeps the state at each block's end.
// Count   per column and candidate 4 * (levels / 4 - 1) compares, 8 additions, 4 minima and about 12 more; twice.
// Limits  any group size; trellis grids of 8 to 256 levels.
#include "cuda/quantize.cuh"

namespace precal::cuda {

namespace {

constexpr uint32_t kInfinity = 0x7F800000u;  // as bits
constexpr int kThreads = 128, kCandidates = 8, kRows = 32 / kCandidates;

struct Costs {
  float state[4];  // 2 * b_{k-2} + b_{k-1}
};

__device__ __forceinline__ float smaller(float a, float b) { return a < b ? a : b; }

__device__ __forceinline__ float least_cost(const Costs& c) {
  return smaller(smaller(c.state[0], c.state[1]), smaller(c.state[2], c.state[3]));
}

// The lowest state with the least cost.
__device__ __forceinline__ uint8_t cheapest_state(const Costs& c) {
  const bool one = c.state[1] < c.state[0], three = c.state[3] < c.state[2];
  const bool upper = smaller(c.state[3], c.state[2]) < smaller(c.state[1], c.state[0]);
  return uint8_t((upper ? (three ? 1 : 0) : (one ? 1 : 0)) | (upper ? 2 : 0));
}

struct Row {
  int64_t n;
  float scale;  // of the row
};

// The paths through columns [begin, end) with one scale; `block` is the block of column `begin`. With kKeep the
// decisions go to the codes and states at the ends of blocks to end_state, if `writes`.
template <bool kKeep>
__device__ __forceinline__ Costs extend_paths(const QuantizeKernelParams& p, const LevelTable& levels, const Row& row,
                                              int64_t block, int64_t begin, int64_t end, float scale, Costs cost,
                                              bool writes) {
  const float inverse = inverse_of(scale);
  int64_t restart = format::block_begin(p.blocks, block);
  if (restart < begin) restart = format::block_end(p.blocks, block);
  for (int64_t k = begin; k < end; ++k) {
    const bool first = k == restart;
    if (first) {
      if (kKeep && writes && k > 0) {
        const int64_t ended = k == format::block_begin(p.blocks, block) ? block - 1 : block;
        p.scratch.end_state[row.n * p.blocks.num_blocks + ended] = cheapest_state(cost);
      }
      cost.state[0] = least_cost(cost);
      cost.state[1] = cost.state[2] = cost.state[3] = bits_float(kInfinity);
      if (k != format::block_begin(p.blocks, block)) ++block;
      restart = format::block_end(p.blocks, block);
    }
    const float v = scaled_weight(p, row.n, k, row.scale), x = v * inverse;
    const float weight = is_dense(p, row.n, k) ? 1.0f : 0.0f;
    float e[4];
#pragma unroll
    for (int z = 0; z < 4; ++z) {
      const float error = weight * (v - scale * levels.level[z + 4 * nearest(levels, z, x)]);
      e[z] = error * error;
    }
    //  into state   from, subset            or from, subset
    //     00        00, D0                  10, D2
    //     01        00, D2                  10, D0
    //     10        01, D1                  11, D3
    //     11        01, D3                  11, D1
    const float a0 = cost.state[0] + e[0], b0 = cost.state[2] + e[2];
    const float a1 = cost.state[0] + e[2], b1 = cost.state[2] + e[0];
    const float a2 = cost.state[1] + e[1], b2 = cost.state[3] + e[3];
    const float a3 = cost.state[1] + e[3], b3 = cost.state[3] + e[1];
    if (kKeep && writes) {
      p.q.codes[row.n * p.q.format.K + k] =
          uint8_t((b0 < a0 ? 1 : 0) | (b1 < a1 ? 2 : 0) | (b2 < a2 ? 4 : 0) | (b3 < a3 ? 8 : 0));
    }
    cost.state[0] = smaller(b0, a0);
    cost.state[1] = smaller(b1, a1);
    cost.state[2] = smaller(b2, a2);
    cost.state[3] = smaller(b3, a3);
  }
  return cost;
}

// The candidate with the least cost, the first of equals, among the eight lanes of a row.
__device__ __forceinline__ void keep_best(float* cost, int* magnitude) {
  for (int d = 1; d < kCandidates; d *= 2) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, *cost, d);
    const int other_magnitude = __shfl_xor_sync(0xFFFFFFFFu, *magnitude, d);
    if (other < *cost || (other == *cost && other_magnitude < *magnitude)) {
      *cost = other;
      *magnitude = other_magnitude;
    }
  }
}

__global__ void __launch_bounds__(kThreads) search_kernel(QuantizeKernelParams p) {
  PRECAL_SHARED(LevelTable, levels);
  const QuantizeParams& q = p.q;
  load_levels(q, &levels);
  __syncthreads();
  const int lane = int(threadIdx.x) % 32, candidate = lane % kCandidates;
  const int64_t wanted = (int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * kRows + lane / kCandidates;
  const bool writes = wanted < q.format.N && candidate == 0;
  // A warp stays together: rows past the last one repeat it and write nothing.
  Row row;
  row.n = wanted < q.format.N ? wanted : q.format.N - 1;
  row.scale = bf16_to_float(q.row_scale[row.n]);
  Costs cost = {};
  int64_t block = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t begin = g * p.group_size;
    const int64_t end = begin + p.group_size < q.format.K ? begin + p.group_size : q.format.K;
    while (format::block_end(p.blocks, block) <= begin) ++block;
    const float least = least_cost(cost);
    for (float& c : cost.state) c = c - least;
    const float t = p.scratch.target[row.n * p.groups + g];
    int first, last;
    candidates(q, t, &first, &last);
    float best_cost = bits_float(kInfinity);
    int best = first;
    for (int at = first; __any_sync(0xFFFFFFFFu, at <= last); at += kCandidates) {
      int magnitude = at + candidate < last ? at + candidate : last;
      const float scale = format::e4m3_to_float(signed_code(t, magnitude));
      float tried = least_cost(extend_paths<false>(p, levels, row, block, begin, end, scale, cost, false));
      keep_best(&tried, &magnitude);
      if (tried < best_cost) {
        best_cost = tried;
        best = magnitude;
      }
    }
    const uint8_t code = signed_code(t, best);
    if (writes) static_cast<uint8_t*>(q.scale)[row.n * p.groups + g] = code;
    cost = extend_paths<true>(p, levels, row, block, begin, end, format::e4m3_to_float(code), cost, writes);
  }
  if (writes) p.scratch.end_state[(row.n + 1) * p.blocks.num_blocks - 1] = cheapest_state(cost);
}

__global__ void __launch_bounds__(kThreads) trace_kernel(QuantizeKernelParams p) {
  PRECAL_SHARED(LevelTable, levels);
  const QuantizeParams& q = p.q;
  load_levels(q, &levels);
  __syncthreads();
  const int64_t all = q.format.N * p.blocks.num_blocks;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t n = i / p.blocks.num_blocks, block = i % p.blocks.num_blocks;
    const int64_t begin = format::block_begin(p.blocks, block), end = format::block_end(p.blocks, block);
    const float row_scale = bf16_to_float(q.row_scale[n]);
    uint8_t* codes = q.codes + n * q.format.K;
    uint32_t state = p.scratch.end_state[i];
    int64_t group = (end - 1) / p.group_size, group_begin = group * p.group_size;
    const uint8_t* scales = static_cast<const uint8_t*>(q.scale) + n * p.groups;
    float scale = format::e4m3_to_float(scales[group]);
    for (int64_t k = end - 1; k >= begin; --k) {
      if (k < group_begin) {
        scale = format::e4m3_to_float(scales[--group]);
        group_begin -= p.group_size;
      }
      const float x = scaled_weight(p, n, k, row_scale) * inverse_of(scale);
      const uint32_t bit = state & 1u;
      uint32_t previous = 0, before = 0;  // b_{k-1}, b_{k-2}
      if (k > begin) {
        previous = state >> 1;
        before = (uint32_t(codes[k]) >> state) & 1u;
      }
      const uint32_t z1 = bit ^ before, z = 2u * z1 + previous;
      codes[k] = uint8_t((2u * uint32_t(nearest(levels, int(z), x)) + z1) ^ before);
      state = previous | before << 1;
    }
  }
}

}  // namespace

Status launch_quantize_trellis(const QuantizeKernelParams& p, cudaStream_t stream) {
  constexpr const char* op = "quantize_groups";
  const int64_t blocks = ceil_div(p.q.format.N, kRows * (kThreads / 32));
  PRECAL_RETURN_IF_ERROR(launch(op, &search_kernel, dim3(unsigned(blocks)), kThreads, 0, stream, p));
  const dim3 grid = blocks_for(p.q.format.N * p.blocks.num_blocks, kThreads);
  return launch(op, &trace_kernel, grid, kThreads, 0, stream, p);
}

}  // namespace precal::cuda
