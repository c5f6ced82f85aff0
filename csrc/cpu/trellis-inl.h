// SPDX-License-Identifier: Apache-2.0
// Rows with a trellis (format/trellis.h): scales and codes by one Viterbi search, sixteen rows side by side.
//
// In place of steps 4 and 5 of quantize-inl.h, with its t, v and candidate scales:
//   4. cost[state] of the best path so far, in units of v^2; at a block's first column the path is in state 0 with the
//      least cost of the column before, the lowest state on a tie. A column adds e_z = (v - s * near_z)^2 (0 for an
//      outlier) to the path, near_z being the level of subset z = 0..3 (levels z, z + 4, ...) in whose cell v * (1 / s)
//      lies, cells cut as in step 5. Of two paths into a state the one whose b_{k-2} is 0 stays unless the other is
//      strictly cheaper. At a group's start the least cost is subtracted from all four; every candidate scale is then
//      tried from there, and the first with the least cost over the states at the group's end is kept with its paths.
//   5. the path of least cost over the states after the last column, the lowest on a tie, is followed backwards.
// Lanes are rows and never meet, so the result does not depend on which rows are searched together.
#pragma once

#include <limits>

#include "cpu/quantize-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

static_assert(kTrellisRows == kLanes, "one row a lane");

// States are 2 * b_{k-2} + b_{k-1}; the state after code bit b is 2 * b_{k-1} + b.
struct TrellisCosts {
  F32 state[4];
};

PRECAL_INLINE F32 least_cost(const TrellisCosts& c) {
  return min(min(c.state[0], c.state[1]), min(c.state[2], c.state[3]));
}

// Bit masks over the lanes of the lowest state with the least cost: its bit 0 and bit 1.
PRECAL_INLINE uint64_t cheapest_state(const TrellisCosts& c) {
  const uint32_t one = less(c.state[1], c.state[0]), three = less(c.state[3], c.state[2]);
  const F32 low = min(c.state[1], c.state[0]), high = min(c.state[3], c.state[2]);
  const uint32_t upper = less(high, low);
  return uint64_t((upper & three) | (~upper & one & 0xFFFFu)) | uint64_t(upper) << 16;
}

struct TrellisLevels {
  LevelSteps near[4], index[4];
};

struct TrellisTile {
  const float* v;       // [K][16]
  const float* weight;  // [K][16], 0 for outliers and for lanes without a row
  uint64_t* kept;       // [K] decisions of the paths kept: 4 masks over the lanes, bit set where b_{k-2} is 1; at a
                        // block's first column, where only state 0 goes on, cheapest_state of the column before
  uint64_t* tried;      // [K] of the candidate at hand
};

PRECAL_INLINE uint64_t spread_mask(uint32_t mask) { return uint64_t(mask) * 0x0001000100010001u; }

// The paths through columns [begin, end) with one scale a lane. `block` is the block of column `begin`.
static TrellisCosts extend_paths(const TrellisLevels& levels, const TrellisTile& tile,
                                 const format::OutlierBlocks& blocks, int64_t block, int64_t begin, int64_t end,
                                 F32 scale, F32 inverse, TrellisCosts cost) {
  const F32 unreachable = splat(std::numeric_limits<float>::infinity());
  int64_t restart = format::block_begin(blocks, block);
  if (restart < begin) restart = format::block_end(blocks, block);
  for (int64_t k = begin; k < end; ++k) {
    uint64_t chosen = 0;
    const bool first = k == restart;
    if (first) {
      chosen = cheapest_state(cost);
      cost.state[0] = least_cost(cost);
      cost.state[1] = cost.state[2] = cost.state[3] = unreachable;
      if (k != format::block_begin(blocks, block)) ++block;
      restart = format::block_end(blocks, block);
    }
    const F32 value = load(tile.v + k * kLanes), weight = load(tile.weight + k * kLanes);
    const F32 x = mul(value, inverse);
    F32 e[4];
    for (int z = 0; z < 4; ++z) {
      const F32 error = mul(weight, sub(value, mul(scale, nearest_level(levels.near[z], x))));
      e[z] = mul(error, error);
    }
    //  into state   from, subset            or from, subset
    //     00        00, D0                  10, D2
    //     01        00, D2                  10, D0
    //     10        01, D1                  11, D3
    //     11        01, D3                  11, D1
    const F32 a0 = add(cost.state[0], e[0]), b0 = add(cost.state[2], e[2]);
    const F32 a1 = add(cost.state[0], e[2]), b1 = add(cost.state[2], e[0]);
    const F32 a2 = add(cost.state[1], e[1]), b2 = add(cost.state[3], e[3]);
    const F32 a3 = add(cost.state[1], e[3]), b3 = add(cost.state[3], e[1]);
    if (!first) {
      chosen = uint64_t(less(b0, a0)) | uint64_t(less(b1, a1)) << 16 | uint64_t(less(b2, a2)) << 32 |
               uint64_t(less(b3, a3)) << 48;
    }
    cost.state[0] = min(b0, a0);
    cost.state[1] = min(b1, a1);
    cost.state[2] = min(b2, a2);
    cost.state[3] = min(b3, a3);
    tile.tried[k] = chosen;
  }
  return cost;
}

// Step 4 of one group: `t` [16] in, `codes` and `scales` [16] out.
static TrellisCosts search_group(const QuantizeArgs& args, const TrellisLevels& levels, const TrellisTile& tile,
                                 const format::OutlierBlocks& blocks, int64_t block, int64_t begin, int64_t end,
                                 const float* t, TrellisCosts cost, uint8_t* codes, float* scales) {
  const F32 least = least_cost(cost);
  for (F32& c : cost.state) c = sub(c, least);
  int first[kLanes], last[kLanes], tries = 1;
  for (int r = 0; r < kLanes; ++r) {
    const float magnitude = abs_float(t[r]);
    first[r] = magnitude > 0.0f ? format::float_to_e4m3(magnitude * args.search_lo) : 0;
    last[r] = magnitude > 0.0f ? format::float_to_e4m3(magnitude * args.search_hi) : 0;
    if (magnitude > 0.0f && first[r] < 1) first[r] = 1;
    if (last[r] < first[r]) last[r] = first[r];
    if (last[r] - first[r] + 1 > tries) tries = last[r] - first[r] + 1;
    scales[r] = 0.0f;
    codes[r] = 0;
  }
  TrellisCosts best = cost;
  F32 best_cost = splat(std::numeric_limits<float>::infinity());
  for (int i = 0; i < tries; ++i) {
    uint8_t code[kLanes];
    float scale[kLanes], inverse[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const int magnitude = first[r] + i < last[r] ? first[r] + i : last[r];  // a lane that is done repeats its last
      code[r] = uint8_t(magnitude | (t[r] < 0.0f && magnitude != 0 ? 0x80 : 0));
      scale[r] = format::e4m3_to_float(code[r]);
      inverse[r] = scale[r] != 0.0f ? 1.0f / scale[r] : 0.0f;
    }
    const TrellisCosts tried = extend_paths(levels, tile, blocks, block, begin, end, load(scale), load(inverse), cost);
    const F32 tried_cost = least_cost(tried);
    const uint32_t better = i == 0 ? 0xFFFFu : less(tried_cost, best_cost);
    if (better == 0) continue;
    best_cost = select(better, tried_cost, best_cost);
    for (int s = 0; s < 4; ++s) best.state[s] = select(better, tried.state[s], best.state[s]);
    for (int r = 0; r < kLanes; ++r) {
      if (((better >> r) & 1u) == 0u) continue;
      codes[r] = code[r];
      scales[r] = scale[r];
    }
    const uint64_t lanes = spread_mask(better);
    for (int64_t k = begin; k < end; ++k) tile.kept[k] = (tile.kept[k] & ~lanes) | (tile.tried[k] & lanes);
  }
  return best;
}

// Step 5: from the last column to the first, codes [rows][K].
static void trace_back(const RowQuantizer& q, const TrellisLevels& levels, const TrellisTile& tile,
                       const TrellisCosts& cost, const float* scales, int rows, int64_t row_begin) {
  const int64_t K = q.K;
  const uint64_t final_state = cheapest_state(cost);
  uint32_t state[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    state[r] = uint32_t((final_state >> r) & 1u) | uint32_t((final_state >> (16 + r)) & 1u) << 1;
  }
  int64_t block = q.blocks.num_blocks - 1;
  for (int64_t k = K - 1; k >= 0; --k) {
    const bool first = k == format::block_begin(q.blocks, block);
    const uint64_t chosen = tile.kept[k];
    const float* scale = scales + (k / q.group_size) * kLanes;
    float inverse[kLanes], index[4][kLanes];
    for (int r = 0; r < kLanes; ++r) inverse[r] = scale[r] != 0.0f ? 1.0f / scale[r] : 0.0f;
    const F32 x = mul(load(tile.v + k * kLanes), load(inverse));
    for (int z = 0; z < 4; ++z) store(index[z], nearest_level(levels.index[z], x));
    for (int r = 0; r < rows; ++r) {
      const uint32_t bit = state[r] & 1u;
      uint32_t previous = 0, before = 0;  // b_{k-1}, b_{k-2}
      if (!first) {
        previous = state[r] >> 1;
        before = uint32_t(chosen >> (16 * state[r] + unsigned(r))) & 1u;
      }
      const uint32_t z1 = bit ^ before, z = 2u * z1 + previous;
      q.args.codes[(row_begin + r) * K + k] = uint8_t((2u * uint32_t(index[z][r]) + z1) ^ before);
      state[r] =
          first ? uint32_t((chosen >> r) & 1u) | uint32_t((chosen >> (16 + r)) & 1u) << 1 : previous | before << 1;
    }
    if (first) --block;
  }
}

static int64_t quantize_trellis_rows(const RowQuantizer& q, int64_t row_begin, int64_t row_end, float* scratch) {
  const QuantizeArgs& args = q.args;
  const int64_t K = q.K, groups = q.groups;
  TrellisLevels levels;
  for (int z = 0; z < 4; ++z) {
    make_level_steps(args.levels + z, 4, q.num_levels / 4, &levels.near[z]);
    make_index_steps(levels.near[z], &levels.index[z]);
  }
  const RowBuffers row(q, scratch);
  float* v = row.end;
  float* weight = v + K * kLanes;
  float* t = weight + K * kLanes;
  float* scales = t + groups * kLanes;
  uint64_t* decisions =
      reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(scales + groups * kLanes) + 7u) & ~uintptr_t(7));
  const TrellisTile tile{v, weight, decisions, decisions + K};

  for (int64_t n = row_begin; n < row_end; n += kLanes) {
    const int rows = int(row_end - n < kLanes ? row_end - n : kLanes);
    if (rows < kLanes) {
      for (int64_t i = 0; i < K * kLanes; ++i) v[i] = weight[i] = 0.0f;
      for (int64_t i = 0; i < groups * kLanes; ++i) t[i] = 0.0f;
    }
    for (int r = 0; r < rows; ++r) {
      const int64_t bad = prepare_row(q, n + r, row);
      if (bad >= 0) return bad;
      for (int64_t g = 0; g < groups; ++g) {
        t[g * kLanes + r] = target_scale(q, n + r, row.extreme[g]);
        const float *from = row.v + g * q.stride, *dense = row.dense + g * q.stride;
        const int64_t begin = q.begin_of(g), count = q.count_of(g);
        for (int64_t i = 0; i < count; ++i) {
          v[(begin + i) * kLanes + r] = from[i];
          weight[(begin + i) * kLanes + r] = dense[i];
        }
      }
    }
    TrellisCosts cost;
    for (F32& c : cost.state) c = splat(0.0f);
    int64_t block = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = q.begin_of(g), end = begin + q.count_of(g);
      while (format::block_end(q.blocks, block) <= begin) ++block;
      uint8_t codes[kLanes];
      cost = search_group(args, levels, tile, q.blocks, block, begin, end, t + g * kLanes, cost, codes,
                          scales + g * kLanes);
      for (int r = 0; r < rows; ++r) static_cast<uint8_t*>(args.scale)[(n + r) * groups + g] = codes[r];
    }
    if (K > 0) trace_back(q, levels, tile, cost, scales, rows, n);
    for (int r = 0; r < rows; ++r) {
      store_outliers(q, n + r, [&](int64_t k) {
        format::TrellisState state;
        const uint8_t* codes = args.codes + (n + r) * K;
        const int64_t first = format::block_begin_at(q.blocks, k);
        for (int64_t i = k - 2 < first ? first : k - 2; i < k; ++i) format::trellis_index(&state, codes[i]);
        return v[k * kLanes + r] -
               scales[(k / q.group_size) * kLanes + r] * args.levels[format::trellis_index(&state, codes[k])];
      });
    }
  }
  return -1;
}

static int64_t quantize_rows(const QuantizeArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
  const RowQuantizer q(args);
  return format::is_trellis(args.format) ? quantize_trellis_rows(q, row_begin, row_end, scratch)
                                         : quantize_plain_rows(q, row_begin, row_end, scratch);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
