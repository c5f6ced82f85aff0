// SPDX-License-Identifier: Apache-2.0
// quantize_groups with a trellis: the Viterbi search of csrc/cpu/trellis-inl.h, bit for bit.
//
// Work    search: a warp owns four rows, eight lanes each. The lanes of a row try eight candidate scales of a group,
//         each with the four costs in registers; then all repeat the best one and the first lane keeps its decisions,
//         a byte a column in the place of the code. They share a run of 16 weights as integers, two a lane.
//         trace: a thread follows the path of one block of columns of one row backwards; blocks are independent,
//         because the search keeps the state at each block's end.
// Count   per column one lookup and about 50 other instructions of a candidate, 80 when decisions are kept.
// Limits  any group size; trellis grids of 8 to 256 levels.
#include "cuda/quantize.cuh"

namespace precal::cuda {

namespace {

constexpr int kThreads = 128, kCandidates = 8, kRows = 32 / kCandidates;
constexpr int kRun = 16;                            // columns between subtractions of the least cost
constexpr int kSkipped = -32768;                    // number of a weight that costs nothing
constexpr uint32_t kMostCost = 65535;               // also of a state that no path reaches
constexpr float kLeastReach = 9.5367431640625e-7f;  // 2^-20

// Of a cell, a byte for each subset: distance of its lower edge from the nearest level, and the number of that level.
struct Tables {
  uint32_t distance[256], index[256];
  int cell_bits, shift, doublings;  // a cell is 2^cell_bits positions wide
  float unit;
};

// By the whole block; a barrier follows in the caller.
__device__ __forceinline__ void load_tables(const QuantizeParams& q, Tables* t) {
  const int all = q.format.grid_size, low = int(q.grid[0]), high = int(q.grid[all - 1]), count = all / 4;
  int shift = 0, doublings = 0;
  while (shift < 4 && (high - low) * (2 << shift) <= 8 * (all - 1)) ++shift;
  const int magnitude_of_low = low < 0 ? -low : low, magnitude_of_high = high < 0 ? -high : high;
  const int peak = !q.symmetric && magnitude_of_low > magnitude_of_high ? magnitude_of_low : magnitude_of_high;
  while (doublings < 8 && double(peak) * double(128 >> doublings) > 32767.0 * 0.9375 * double(q.search_lo)) {
    ++doublings;
  }
  const int cells = shift < 1 ? 128 : 256, width = 512 / cells, most = 127 - (width << shift);
  for (int cell = int(threadIdx.x); cell < cells; cell += int(blockDim.x)) {
    const int edge = width * (cell < cells / 2 ? cell : cell - cells);
    uint32_t distance = 0, index = 0;
    for (int z = 0; z < 4; ++z) {
      int i = 0;
      while (i + 1 < count && int(q.grid[z + 4 * i]) + int(q.grid[z + 4 * i + 4]) < 2 * edge + width) ++i;
      const int d = (edge - int(q.grid[z + 4 * i])) * (1 << shift);
      distance |= uint32_t(uint8_t(d < -127 ? -127 : d > most ? most : d)) << (8 * z);
      index |= uint32_t(i) << (8 * z);
    }
    t->distance[cell] = distance;
    t->index[cell] = index;
  }
  if (threadIdx.x == 0) {
    t->cell_bits = shift < 1 ? 9 : 8;
    t->shift = shift;
    t->doublings = doublings;
    t->unit = float(1 << (22 - doublings)) / 32767.0f;
  }
}

__device__ __forceinline__ float rounded(float x) {  // to the nearest even integer, |x| < 2^22
  constexpr float kRound = 12582912.0f;              // 1.5 * 2^23, where floats are integers
  return (x + kRound) - kRound;
}

__device__ __forceinline__ float limited(float reach) { return reach < kLeastReach ? kLeastReach : reach; }

// A weight in units of its group's reach. `factor` is 32767 / limited(reach).
__device__ __forceinline__ int number_of(const QuantizeKernelParams& p, int64_t n, int64_t k, float row_scale,
                                         float factor) {
  const float x = scaled_weight(p, n, k, row_scale) * factor;
  return int(rounded(x < -32767.0f ? -32767.0f : x < 32767.0f ? x : 32767.0f));
}

__device__ __forceinline__ int multiplier_of(const Tables& t, uint8_t code, float reach) {
  const float s = format::e4m3_to_float(uint8_t(code & 0x7Fu));
  if (!(s > 0.0f)) return 0;
  const float m = limited(reach) * t.unit / s;
  const int magnitude = int(rounded(m < 32767.0f ? m : 32767.0f));
  return (code & 0x80u) != 0 ? -magnitude : magnitude;
}

__device__ __forceinline__ float square_of(uint8_t code) {
  const float s = format::e4m3_to_float(uint8_t(code & 0x7Fu));
  return s > 0.0f ? s * s : 1.0f;
}

// v / s, 16 bits.
__device__ __forceinline__ int position(const Tables& t, int number, int multiplier) {
  const int x = ((number * multiplier + 0x4000) >> 15) * (1 << t.doublings);
  return x < -32768 ? -32768 : x > 32767 ? 32767 : x;
}

__device__ __forceinline__ int cell_of(const Tables& t, int x) { return int((uint32_t(x) & 0xFFFFu) >> t.cell_bits); }

// States are 2 * b_{k-2} + b_{k-1}. Between groups costs are floats, in a group integers.
template <typename T>
struct Costs {
  T state[4];
};

template <typename T>
__device__ __forceinline__ T smaller(T a, T b) {
  return a < b ? a : b;
}

template <typename T>
__device__ __forceinline__ T least_cost(const Costs<T>& c) {
  return smaller(smaller(c.state[0], c.state[1]), smaller(c.state[2], c.state[3]));
}

// The lowest state with the least cost.
template <typename T>
__device__ __forceinline__ uint8_t cheapest_state(const Costs<T>& c) {
  const bool one = c.state[1] < c.state[0], three = c.state[3] < c.state[2];
  const bool upper = smaller(c.state[2], c.state[3]) < smaller(c.state[0], c.state[1]);
  return uint8_t((upper ? (three ? 1 : 0) : (one ? 1 : 0)) | (upper ? 2 : 0));
}

__device__ __forceinline__ Costs<uint32_t> load_costs(const Costs<float>& from, float square) {
  Costs<uint32_t> to;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const float x = from.state[s] / square;
    to.state[s] = uint32_t(rounded(x < float(kMostCost) ? x : float(kMostCost)));
  }
  return to;
}

__device__ __forceinline__ Costs<float> store_costs(const Costs<uint32_t>& from, float square) {
  Costs<float> to;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    to.state[s] = from.state[s] == kMostCost ? bits_float(0x7F800000u) : float(from.state[s]) * square;
  }
  return to;
}

struct Row {
  int64_t n;
  float scale;          // of the row
  float reach, factor;  // of the group
  bool writes;
};

// The paths through the columns [begin, end) of a group with one scale; `block` is the block of column `begin`. Returns
// the cost of the cheapest, to which `costs` are then relative. With kKeep the decisions go to the codes and states at
// the ends of blocks to end_state, if the row `writes`.
template <bool kKeep>
__device__ __forceinline__ float extend_paths(const QuantizeKernelParams& p, const Tables& t, const Row& row,
                                              int64_t block, int64_t begin, int64_t end, int multiplier,
                                              Costs<uint32_t>* costs) {
  const int lane = int(threadIdx.x) % 32, in_row = lane % kCandidates;
  const int within = (1 << t.cell_bits) - 1;
  Costs<uint32_t> c = *costs;
  float total = 0.0f;
  for (int64_t k = begin; k < end;) {
    if (k == format::block_end(p.blocks, block)) ++block;
    if (k == format::block_begin(p.blocks, block)) {
      if (kKeep && row.writes && k > begin) {  // where a group begins, the caller knows better
        p.scratch.end_state[row.n * p.blocks.num_blocks + block - 1] = cheapest_state(c);
      }
      c.state[0] = least_cost(c);
      c.state[1] = c.state[2] = c.state[3] = kMostCost;
    }
    const int64_t stop = smaller(end, format::block_end(p.blocks, block));
    const int run = int(smaller(stop - k, int64_t(kRun)));
    uint32_t mine = 0;  // the numbers of columns in_row and in_row + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = k + in_row + half * kCandidates;
      int number = kSkipped;
      if (column < stop && row.reach != 0.0f && is_dense(p, row.n, column)) {
        number = number_of(p, row.n, column, row.scale, row.factor);
      }
      mine |= (uint32_t(number) & 0xFFFFu) << (16 * half);
    }
    for (int i = 0; i < run; ++i) {
      const uint32_t both = __shfl_sync(0xFFFFFFFFu, mine, lane / kCandidates * kCandidates + i % kCandidates);
      const int number = int16_t(uint16_t(i < kCandidates ? both : both >> 16));
      const int x = position(t, number, multiplier);
      const uint32_t distance = t.distance[cell_of(t, x)];
      const int rest = (x & within) * (2 << t.shift);
      uint32_t e[4];
#pragma unroll
      for (int z = 0; z < 4; ++z) {
        const int error = int(int8_t(uint8_t(distance >> (8 * z)))) * 256 + rest;
        e[z] = number == kSkipped ? 0u : uint32_t(error * error + 0x4000) >> 15;
      }
      //  into state   from, subset            or from, subset
      //     00        00, D0                  10, D2
      //     01        00, D2                  10, D0
      //     10        01, D1                  11, D3
      //     11        01, D3                  11, D1
      uint32_t a[4] = {c.state[0] + e[0], c.state[0] + e[2], c.state[1] + e[1], c.state[1] + e[3]};
      uint32_t b[4] = {c.state[2] + e[2], c.state[2] + e[0], c.state[3] + e[3], c.state[3] + e[1]};
      if (kKeep) {
        uint32_t chosen = 0;
#pragma unroll
        for (int s = 0; s < 4; ++s) {
          a[s] = smaller(a[s], kMostCost);
          chosen |= (b[s] < a[s] ? 1u : 0u) << s;
        }
        if (row.writes) p.q.codes[row.n * p.q.format.K + k + i] = uint8_t(chosen);
      }
#pragma unroll
      for (int s = 0; s < 4; ++s) c.state[s] = smaller(a[s], b[s]);
    }
    // Sums saturate. Without decisions to keep it is the same to do so here: those of a run fit 32 bits.
#pragma unroll
    for (int s = 0; s < 4; ++s) c.state[s] = smaller(c.state[s], kMostCost);
    const uint32_t least = least_cost(c);
#pragma unroll
    for (int s = 0; s < 4; ++s) c.state[s] -= least;
    total = total + float(least);
    k += run;
  }
  *costs = c;
  return total;
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
  PRECAL_SHARED(Tables, tables);
  const QuantizeParams& q = p.q;
  load_tables(q, &tables);
  __syncthreads();
  const int lane = int(threadIdx.x) % 32, candidate = lane % kCandidates;
  const int64_t wanted = (int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * kRows + lane / kCandidates;
  // A warp stays together: rows past the last one repeat it and write nothing.
  Row row;
  row.n = wanted < q.format.N ? wanted : q.format.N - 1;
  row.scale = bf16_to_float(q.row_scale[row.n]);
  row.writes = wanted < q.format.N && candidate == 0;
  Costs<float> costs = {};
  int64_t block = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    const int64_t begin = g * p.group_size;
    const int64_t end = begin + p.group_size < q.format.K ? begin + p.group_size : q.format.K;
    while (format::block_end(p.blocks, block) <= begin) ++block;
    if (row.writes && block > 0 && begin == format::block_begin(p.blocks, block)) {
      p.scratch.end_state[row.n * p.blocks.num_blocks + block - 1] = cheapest_state(costs);
    }
    const float t = p.scratch.target[row.n * p.groups + g];
    row.reach = p.scratch.reach[row.n * p.groups + g];
    row.factor = 32767.0f / limited(row.reach);
    int first, last;
    candidates(q, t, &first, &last);
    float best_cost = bits_float(0x7F800000u);
    int best = first;
    for (int at = first; __any_sync(0xFFFFFFFFu, at <= last); at += kCandidates) {
      int magnitude = at + candidate < last ? at + candidate : last;
      const uint8_t code = signed_code(t, magnitude);
      Costs<uint32_t> tried = load_costs(costs, square_of(code));
      float cost =
          extend_paths<false>(p, tables, row, block, begin, end, multiplier_of(tables, code, row.reach), &tried);
      cost = cost * square_of(code);
      keep_best(&cost, &magnitude);
      if (cost < best_cost) {
        best_cost = cost;
        best = magnitude;
      }
    }
    const uint8_t code = signed_code(t, best);
    if (row.writes) static_cast<uint8_t*>(q.scale)[row.n * p.groups + g] = code;
    Costs<uint32_t> kept = load_costs(costs, square_of(code));
    extend_paths<true>(p, tables, row, block, begin, end, multiplier_of(tables, code, row.reach), &kept);
    costs = store_costs(kept, square_of(code));
  }
  if (row.writes) p.scratch.end_state[(row.n + 1) * p.blocks.num_blocks - 1] = cheapest_state(costs);
}

__global__ void __launch_bounds__(kThreads) trace_kernel(QuantizeKernelParams p) {
  PRECAL_SHARED(Tables, tables);
  const QuantizeParams& q = p.q;
  load_tables(q, &tables);
  __syncthreads();
  const int64_t all = q.format.N * p.blocks.num_blocks;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < all; i += int64_t(gridDim.x) * kThreads) {
    const int64_t n = i / p.blocks.num_blocks, block = i % p.blocks.num_blocks;
    const int64_t begin = format::block_begin(p.blocks, block), end = format::block_end(p.blocks, block);
    const float row_scale = bf16_to_float(q.row_scale[n]);
    uint8_t* codes = q.codes + n * q.format.K;
    uint32_t state = p.scratch.end_state[i];
    int64_t group = (end - 1) / p.group_size + 1, group_begin = end;
    float factor = 0.0f;
    int multiplier = 0;
    for (int64_t k = end - 1; k >= begin; --k) {
      if (k < group_begin) {
        group_begin = --group * p.group_size;
        const float reach = p.scratch.reach[n * p.groups + group];
        factor = 32767.0f / limited(reach);
        multiplier = multiplier_of(tables, static_cast<const uint8_t*>(q.scale)[n * p.groups + group], reach);
      }
      const int x = position(tables, number_of(p, n, k, row_scale, factor), multiplier);
      const uint32_t bit = state & 1u;
      const uint32_t previous = k > begin ? state >> 1 : 0u;                            // b_{k-1}
      const uint32_t before = k > begin + 1 ? (uint32_t(codes[k]) >> state) & 1u : 0u;  // b_{k-2}
      const uint32_t z1 = bit ^ before, z = 2u * z1 + previous;
      const uint32_t index = (tables.index[cell_of(tables, x)] >> (8 * z)) & 0xFFu;
      codes[k] = uint8_t((2u * index + z1) ^ before);
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
