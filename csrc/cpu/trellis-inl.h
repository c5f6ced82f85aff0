// SPDX-License-Identifier: Apache-2.0
// Rows with a trellis (format/trellis.h): scales and codes by one Viterbi search on 16-bit integers, 64 rows side by
// side.
//
// In place of steps 4 and 5 of quantize-inl.h, with its v, t and candidate scales; round() is to the nearest even:
//   4. A group's weights become 16-bit integers, n = round(v * (32767 / a)), a = max |v| of its dense weights, at least
//      2^-20. For a scale s the multiplier is m = round(((a * unit) / |s|) kept within 32767), with the sign of s, and
//      x = ((n * m + 2^14) >> 15) doubled `doublings` times, saturated at 16 bits each time: v / s in 1/128 of a level.
//      A cell is width = 2 levels wide, x >> 8, or 4 where shift = 0, x >> 9; each subset z = 0..3 (levels z, z + 4,
//      ...) has its level nearest to the cell's centre, the lower one on a tie. With d = (lower edge - level) * 2^shift
//      kept within [-127, 127 - width * 2^shift] and e = d * 256 + (x - lower edge) * 2^(shift + 1), choosing it costs
//      e_z = (e * e + 2^14) >> 15; an outlier, and a weight of a group without dense ones, cost 0.
//      cost[state] of the best path so far is an unsigned 16-bit integer, sums saturate. At a block's first column the
//      path is in state 0 with the least cost of the column before, the lowest state on a tie; other states cost 65535.
//      Of two paths into a state the one whose b_{k-2} is 0 stays unless the other is strictly cheaper. After every run
//      of at most 16 columns, counted from the group's first and from a block's first column, the least cost is moved
//      to a float32 total. Between groups costs are float32, in units of |s|^2: every candidate starts with
//      round(min(cost / |s|^2, 65535)), 65535 being unreachable, and the first of least total * |s|^2 is kept with the
//      paths it finds.
//   5. the path of least cost over the states after the last column, the lowest on a tie, is followed backwards. A code
//      names the level that step 4 took as its subset's nearest; of an outlier, of its true n.
// Lanes are rows and never meet, so the result does not depend on which rows are searched together. What 16 bits cost
// against float32: docs/method.md.
#pragma once

#include <cstring>
#include <limits>

#include "cpu/quantize-inl.h"
#include "cpu/transpose-inl.h"

namespace precal::cpu::PRECAL_ISA_NAMESPACE {

static_assert(kTrellisRows == 2 * kWordLanes, "one row a lane: rows 0 to 31 in a first Words, 32 to 63 in a second");

constexpr int kRun = 16;              // columns between subtractions of the least cost
constexpr int kSkipped = -32768;      // n of a weight that costs nothing
constexpr int kUnreachable = 0xFFFF;  // cost

struct TrellisTables {
  uint8_t distance[4][2 * kHalfTable];  // of a cell: d
  uint8_t index[4][2 * kHalfTable];     // of a cell: number of the level in its subset
  int halves;                           // of these tables: cells are four levels wide in one, two levels in two
  int shift, doublings;
  float unit;
};

static void make_trellis_tables(const QuantizeArgs& args, int num_levels, float peak, TrellisTables* t) {
  const float* levels = args.levels;
  // Costs are whole numbers of 2^-(1 + 2 shift) level^2: 20 or more for a usual level, whatever their spacing, and
  // little enough for the sum of a run to fit.
  t->shift = 0;
  while (t->shift < 4 && (levels[num_levels - 1] - levels[0]) * float(2 << t->shift) <= 8.0f * float(num_levels - 1)) {
    ++t->shift;
  }
  t->halves = t->shift < 1 ? 1 : 2;
  // The least scale searched must have a multiplier that fits; e4m3 may round it down by a sixteenth.
  t->doublings = 0;
  while (t->doublings < 8 &&
         double(abs_float(peak)) * double(128 >> t->doublings) > 32767.0 * 0.9375 * double(args.search_lo)) {
    ++t->doublings;
  }
  t->unit = float(1 << (22 - t->doublings)) / 32767.0f;
  const int cells = t->halves * kHalfTable, width = 512 / cells;
  const int count = num_levels / 4, most = 127 - (width << t->shift);
  for (int z = 0; z < 4; ++z) {
    for (int cell = 0; cell < cells; ++cell) {
      const int low = width * (cell < cells / 2 ? cell : cell - cells);
      int i = 0;
      while (i + 1 < count && levels[z + 4 * i] + levels[z + 4 * i + 4] < float(2 * low + width)) ++i;
      const int d = (low - int(levels[z + 4 * i])) * (1 << t->shift);
      t->distance[z][cell] = uint8_t(d < -127 ? -127 : d > most ? most : d);
      t->index[z][cell] = uint8_t(i);
    }
  }
}

// States are 2 * b_{k-2} + b_{k-1}; the state after code bit b is 2 * b_{k-1} + b. Of 32 rows.
struct PathCosts {
  Words state[4];
};

PRECAL_INLINE Words least_cost(const PathCosts& c) {
  return min_unsigned(min_unsigned(c.state[0], c.state[1]), min_unsigned(c.state[2], c.state[3]));
}

// The lowest state with the least cost, its bit 0 and bit 1 as masks over the lanes.
PRECAL_INLINE void cheapest_state(const PathCosts& c, uint32_t* bit0, uint32_t* bit1) {
  const uint32_t one = less_unsigned(c.state[1], c.state[0]), three = less_unsigned(c.state[3], c.state[2]);
  const uint32_t upper = less_unsigned(min_unsigned(c.state[2], c.state[3]), min_unsigned(c.state[0], c.state[1]));
  *bit0 = (upper & three) | (~upper & one);
  *bit1 = upper;
}

PRECAL_INLINE uint64_t join(uint32_t first, uint32_t second) { return first | uint64_t(second) << kWordLanes; }

PRECAL_INLINE Words position(const TrellisTables& t, Words n, Words multiplier) {
  Words x = multiply_high(n, multiplier);
  for (int i = 0; i < t.doublings; ++i) x = twice_saturated(x);
  return x;
}

// Adds one column to the paths of 32 rows. `chosen`, where wanted: per state, bits where b_{k-2} is 1.
//
//  into state   from, subset            or from, subset
//     00        00, D0                  10, D2
//     01        00, D2                  10, D0
//     10        01, D1                  11, D3
//     11        01, D3                  11, D1
template <bool kKeep>
PRECAL_INLINE void step(PathCosts* c, const Words e[4], uint32_t chosen[4]) {
  const int from[4] = {0, 0, 1, 1}, subset[4] = {0, 2, 1, 3};
  PathCosts next;
  for (int s = 0; s < 4; ++s) {
    const Words stay = add_unsigned(c->state[from[s]], e[subset[s]]);
    const Words other = add_unsigned(c->state[from[s] + 2], e[subset[s] ^ 2]);
    if (kKeep) chosen[s] = less_unsigned(other, stay);
    next.state[s] = min_unsigned(stay, other);
  }
  *c = next;
}

// The paths through a run of columns. decisions [columns][4]: masks over the 64 rows.
template <bool kKeep, int kHalves>
static void extend_run(const TrellisTables& t, const int16_t* n, int64_t columns, const Words multiplier[2],
                       PathCosts cost[2], uint64_t* decisions) {
  const Tables<kHalves> distance = load_tables<kHalves>(t.distance);
  const Words skipped = splat16(kSkipped), within = splat16(kHalves == 1 ? 511 : 255);
  PathCosts first = cost[0], second = cost[1];
  for (int64_t k = 0; k < columns; ++k, n += kTrellisRows) {
    const Words n0 = load16(n), n1 = load16(n + kWordLanes);
    const Words x0 = position(t, n0, multiplier[0]), x1 = position(t, n1, multiplier[1]);
    Bytes d[4];
    look_up(distance, cells_of<kHalves>(x0, x1), d);
    const Words rest0 = shift_left16(and16(x0, within), t.shift + 1);
    const Words rest1 = shift_left16(and16(x1, within), t.shift + 1);
    const WordMask counts0 = differs(n0, skipped), counts1 = differs(n1, skipped);
    Words e0[4], e1[4];
    for (int z = 0; z < 4; ++z) {
      e0[z] = square_where(counts0, add16(first_bytes(d[z]), rest0));
      e1[z] = square_where(counts1, add16(second_bytes(d[z]), rest1));
    }
    uint32_t chosen0[4], chosen1[4];
    step<kKeep>(&first, e0, chosen0);
    step<kKeep>(&second, e1, chosen1);
    if (kKeep) {
      for (int s = 0; s < 4; ++s) decisions[4 * k + s] = join(chosen0[s], chosen1[s]);
    }
  }
  cost[0] = first;
  cost[1] = second;
}

// Columns that are searched and traced together: whole groups and whole blocks, as few as that leaves.
struct Segment {
  int64_t begin, end;
};

// 64 rows of one segment, and what is known of their groups.
struct TrellisTile {
  int16_t* n;           // [columns + 8][64]
  uint64_t* decisions;  // [columns][4] of the paths kept; at a block's first column, where only state 0 goes on, the
                        // cheapest state of the column before in the first two
  uint8_t* codes;       // [columns + 16][64] in the order of Bytes
  int16_t* line;        // [8][columns + 32] rows before they are turned
  float* w;             // [columns + 32]
  float* t;             // [groups of the row][64]
  float* reach;         // [groups of the row][64]: a, 0 in a group without dense weights
  int16_t* multiplier;  // [groups of the row][64]
};

struct GroupCosts {
  alignas(64) float state[4][kTrellisRows];
};

// The paths through one group; total [64] is the cost of the cheapest, to which those of `cost` are then relative.
template <bool kKeep, int kHalves>
static void extend_group(const RowQuantizer& q, const TrellisTables& t, const TrellisTile& tile, const Segment& segment,
                         int64_t begin, int64_t end, const int16_t* multiplier, PathCosts cost[2], float* total) {
  for (int r = 0; r < kTrellisRows; ++r) total[r] = 0.0f;
  const Words m[2] = {load16(multiplier), load16(multiplier + kWordLanes)};
  for (int64_t k = begin; k < end;) {
    const int64_t block_begin = format::block_begin_at(q.blocks, k);
    const int64_t block_end = format::block_end(q.blocks, format::block_at(q.blocks, k));
    int64_t run = end - k < block_end - k ? end - k : block_end - k;
    if (run > kRun) run = kRun;
    uint64_t* decisions = tile.decisions + 4 * (k - segment.begin);
    uint32_t bit[2][2];
    for (int half = 0; half < 2 && k == block_begin; ++half) {
      cheapest_state(cost[half], &bit[half][0], &bit[half][1]);
      cost[half].state[0] = least_cost(cost[half]);
      for (int s = 1; s < 4; ++s) cost[half].state[s] = splat16(kUnreachable);
    }
    extend_run<kKeep, kHalves>(t, tile.n + (k - segment.begin) * kTrellisRows, run, m, cost, decisions);
    if (kKeep && k == block_begin) {
      for (int i = 0; i < 2; ++i) decisions[i] = join(bit[0][i], bit[1][i]);
    }
    alignas(64) int16_t least[kTrellisRows];
    for (int half = 0; half < 2; ++half) {
      const Words l = least_cost(cost[half]);
      for (Words& c : cost[half].state) c = sub16(c, l);
      store16(least + half * kWordLanes, l);
    }
    for (int r = 0; r < kTrellisRows; ++r) total[r] += float(uint16_t(least[r]));
    k += run;
  }
}

PRECAL_INLINE float rounded(float x) {   // to the nearest even integer, |x| < 2^22
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23, where floats are integers
  return (x + kRound) - kRound;
}

// format::float_to_e4m3 of a number >= 0 without a branch, so that the loop over the rows becomes vectors.
PRECAL_INLINE int32_t e4m3_of(float value) {
  const int32_t bits = int32_t(float_bits(value));
  const int32_t small = int32_t(float_bits(value + 16384.0f)) - int32_t(float_bits(16384.0f));
  const int32_t normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3);
  const int32_t code = value < 0.015625f ? small : normal;
  return code < format::kE4m3Max ? code : format::kE4m3Max;
}

// |s| as a number and squared (1 where the scale is 0), and the multiplier, of 64 candidates.
static void make_multipliers(const TrellisTables& t, const int32_t* code, const float* reach, float* square,
                             int16_t* multiplier) {
  for (int r = 0; r < kTrellisRows; ++r) {
    // The bits of an e4m3 are those of a float whose exponent has another bias; also below the normal ones.
    const float s = bits_float(uint32_t(code[r] & 0x7F) << 20) * 1.329227995784916e36f;  // 2^120
    const float a = reach[r] < 9.5367431640625e-7f ? 9.5367431640625e-7f : reach[r];
    float m = a * t.unit / (s > 0.0f ? s : 1.0f);
    m = m < 32767.0f ? m : 32767.0f;
    m = s > 0.0f ? rounded(m) : 0.0f;
    multiplier[r] = int16_t((code[r] & 0x80) != 0 ? -m : m);
    square[r] = s > 0.0f ? s * s : 1.0f;
  }
}

static void load_costs(const GroupCosts& from, const float* square, PathCosts cost[2]) {
  for (int s = 0; s < 4; ++s) {
    alignas(64) int16_t units[kTrellisRows];
    for (int r = 0; r < kTrellisRows; ++r) {
      const float x = from.state[s][r] / square[r];
      units[r] = int16_t(int32_t(rounded(x < float(kUnreachable) ? x : float(kUnreachable))));
    }
    for (int half = 0; half < 2; ++half) cost[half].state[s] = load16(units + half * kWordLanes);
  }
}

static void store_costs(const PathCosts cost[2], const float* square, GroupCosts* to) {
  for (int s = 0; s < 4; ++s) {
    alignas(64) int16_t units[kTrellisRows];
    for (int half = 0; half < 2; ++half) store16(units + half * kWordLanes, cost[half].state[s]);
    for (int r = 0; r < kTrellisRows; ++r) {
      const int units_of_row = uint16_t(units[r]);
      to->state[s][r] =
          units_of_row == kUnreachable ? std::numeric_limits<float>::infinity() : float(units_of_row) * square[r];
    }
  }
}

// Step 4 of group g; its scale codes to codes [64].
template <int kHalves>
static void search_group(const RowQuantizer& q, const TrellisTables& tables, const TrellisTile& tile,
                         const Segment& segment, int64_t g, GroupCosts* costs, uint8_t* codes) {
  const int64_t begin = q.begin_of(g), end = begin + q.count_of(g);
  const float *t = tile.t + g * kTrellisRows, *reach = tile.reach + g * kTrellisRows;
  alignas(64) int32_t first[kTrellisRows], last[kTrellisRows], sign[kTrellisRows], chosen_try[kTrellisRows];
  int32_t tries = 1;
  for (int r = 0; r < kTrellisRows; ++r) {
    const float magnitude = abs_float(t[r]);
    const int32_t from = e4m3_of(magnitude * q.args.search_lo), to = e4m3_of(magnitude * q.args.search_hi);
    first[r] = magnitude > 0.0f ? (from > 1 ? from : 1) : 0;
    last[r] = magnitude > 0.0f && to > first[r] ? to : first[r];
    sign[r] = t[r] < 0.0f ? 0x80 : 0;
    tries = last[r] - first[r] + 1 > tries ? last[r] - first[r] + 1 : tries;
    chosen_try[r] = 0;
  }
  alignas(64) float square[kTrellisRows], total[kTrellisRows], best[kTrellisRows];
  alignas(64) int16_t multiplier[kTrellisRows];
  alignas(64) int32_t code[kTrellisRows];
  PathCosts cost[2];
  for (int i = 0; i < tries; ++i) {
    for (int r = 0; r < kTrellisRows; ++r) {  // a lane that is done repeats its last
      code[r] = (first[r] + i < last[r] ? first[r] + i : last[r]) | sign[r];
    }
    make_multipliers(tables, code, reach, square, multiplier);
    load_costs(*costs, square, cost);
    extend_group<false, kHalves>(q, tables, tile, segment, begin, end, multiplier, cost, total);
    for (int r = 0; r < kTrellisRows; ++r) {
      const float tried = total[r] * square[r], least = i == 0 ? std::numeric_limits<float>::infinity() : best[r];
      chosen_try[r] = tried < least ? i : chosen_try[r];
      best[r] = tried < least ? tried : least;
    }
  }
  for (int r = 0; r < kTrellisRows; ++r) {
    code[r] = (first[r] + chosen_try[r] < last[r] ? first[r] + chosen_try[r] : last[r]) | sign[r];
    codes[r] = uint8_t(code[r]);
  }
  int16_t* chosen = tile.multiplier + g * kTrellisRows;
  make_multipliers(tables, code, reach, square, chosen);
  load_costs(*costs, square, cost);
  extend_group<true, kHalves>(q, tables, tile, segment, begin, end, chosen, cost, total);
  store_costs(cost, square, costs);
}

// Step 5: from the segment's last column to its first.
template <int kHalves>
static void trace_back(const RowQuantizer& q, const TrellisTables& tables, const TrellisTile& tile,
                       const Segment& segment, const GroupCosts& costs) {
  const Tables<kHalves> index = load_tables<kHalves>(tables.index);
  uint64_t state0 = 0, state1 = 0;  // masks over the rows
  for (int r = 0; r < kTrellisRows; ++r) {
    int least = 0;
    for (int s = 1; s < 4; ++s) {
      if (costs.state[s][r] < costs.state[least][r]) least = s;
    }
    state0 |= uint64_t(least & 1) << r;
    state1 |= uint64_t(least >> 1) << r;
  }
  for (int64_t k = segment.end; k-- > segment.begin;) {
    const int64_t since = k - format::block_begin_at(q.blocks, k);
    const uint64_t* d = tile.decisions + 4 * (k - segment.begin);
    uint64_t previous = state1, before = 0;  // b_{k-1}, b_{k-2}
    if (since >= 2) {
      before = (~state1 & ((~state0 & d[0]) | (state0 & d[1]))) | (state1 & ((~state0 & d[2]) | (state0 & d[3])));
    } else if (since == 0) {
      previous = 0;
    }
    const int16_t *n = tile.n + (k - segment.begin) * kTrellisRows,
                  *m = tile.multiplier + k / q.group_size * kTrellisRows;
    const Words x0 = position(tables, load16(n), load16(m));
    const Words x1 = position(tables, load16(n + kWordLanes), load16(m + kWordLanes));
    Bytes i[4];
    look_up(index, cells_of<kHalves>(x0, x1), i);
    const uint64_t z1 = state0 ^ before;
    const Bytes upper = bytes_where(z1), lower = bytes_where(previous);  // z = 2 * z1 + previous
    const Bytes chosen = select8(upper, select8(lower, i[3], i[2]), select8(lower, i[1], i[0]));
    // code = (2 * index + z1) ^ before; a mask is -1
    const Bytes one = bytes_where(before), zero = sub8(one, one);
    store8(tile.codes + (k - segment.begin) * kTrellisRows, xor8(sub8(add8(chosen, chosen), upper), sub8(zero, one)));
    state0 = since == 0 ? d[0] : previous;
    state1 = since == 0 ? d[1] : before;
  }
}

// Steps 1 to 3 of a row, and what the search wants of its groups.
PRECAL_INLINE int64_t prepare_lane(const RowQuantizer& q, int64_t n, const RowBuffers& row, const TrellisTile& tile,
                                   int r) {
  const int64_t bad = prepare_row(q, n, row);
  if (bad >= 0) return bad;
  const float row_scale = bf16_to_float(q.args.row_scale[n]);
  for (int64_t g = 0; g < q.groups; ++g) {
    tile.t[g * kTrellisRows + r] = target_scale(q, n, row.extreme[g]);
    tile.reach[g * kTrellisRows + r] = row_scale > 0.0f ? abs_float(row.extreme[g] / row_scale) : 0.0f;
  }
  return -1;
}

PRECAL_INLINE float reciprocal_reach(float reach) {
  return 32767.0f / (reach < 9.5367431640625e-7f ? 9.5367431640625e-7f : reach);  // 2^-20
}

// n of every weight of a segment, turned so that rows are lanes.
static void fill_tile(const RowQuantizer& q, const TrellisTile& tile, const Segment& segment, int64_t row_begin,
                      int rows) {
  const int64_t columns = segment.end - segment.begin, stride = columns + 32;
  for (int r0 = 0; r0 < kTrellisRows; r0 += 8) {
    for (int r = r0; r < r0 + 8; ++r) {
      int16_t* line = tile.line + (r - r0) * stride;
      if (r >= rows) {
        for (int64_t k = 0; k < columns; ++k) line[k] = kSkipped;
        continue;
      }
      const int64_t n = row_begin + r;
      const F32 row_scale = splat(bf16_to_float(q.args.row_scale[n]));
      const float* w = tile.w;
      if (q.args.dtype == DType::kFloat32 && q.K % kLanes == 0 && q.group_size % kLanes == 0) {
        w = static_cast<const float*>(q.args.w) + n * q.K + segment.begin;
      } else {
        load_elements(q.args.w, q.args.dtype, n * q.K + segment.begin, columns, tile.w);
      }
      for (int64_t k = segment.begin; k < segment.end; k += q.group_size) {
        const int64_t g = k / q.group_size, count = q.count_of(g), at = k - segment.begin;
        const float reach = tile.reach[g * kTrellisRows + r];
        if (reach == 0.0f) {
          for (int64_t i = 0; i < count; ++i) line[at + i] = kSkipped;
          continue;
        }
        const F32 factor = splat(reciprocal_reach(reach));
        for (int64_t i = 0; i < count; i += kLanes) {  // what a short group writes too much, the next one overwrites
          store_rounded(line + at + i, mul(div(load(w + at + i), row_scale), factor));
        }
      }
    }
    for (int64_t k = 0; k < columns; k += 8) {
      transpose8x8(tile.line + k, stride, tile.n + k * kTrellisRows + r0, kTrellisRows);
    }
  }
}

// Outliers of a segment cost nothing while paths are searched; their codes are then those of the clipped weights.
static void mark_outliers(const RowQuantizer& q, const TrellisTile& tile, const Segment& segment, int64_t row_begin,
                          int rows, bool skipped) {
  for (int r = 0; r < rows; ++r) {
    const int64_t n = row_begin + r;
    for_outliers(q, n, segment.begin, segment.end, [&](int64_t k) {
      int value = kSkipped;
      if (!skipped) {
        const float v = load_element(q.args.w, q.args.dtype, n * q.K + k) / bf16_to_float(q.args.row_scale[n]);
        const float x = v * reciprocal_reach(tile.reach[k / q.group_size * kTrellisRows + r]);
        value = int(rounded(x < -32767.0f ? -32767.0f : x < 32767.0f ? x : 32767.0f));
      }
      tile.n[(k - segment.begin) * kTrellisRows + r] = int16_t(value);
    });
  }
}

// codes [columns][64] in the order of Bytes -> args.codes [N][K], in whole cache lines: where rows are 4096 bytes
// apart, the first level cache has no room for a line of each.
static void store_codes(const RowQuantizer& q, const TrellisTile& tile, const Segment& segment, int64_t row_begin,
                        int rows) {
  constexpr int kLine = 64;
  for (int64_t k = segment.begin; k < segment.end; k += kLine) {
    const int64_t count = segment.end - k < kLine ? segment.end - k : kLine;
    for (int r0 = 0; r0 < kWordLanes && r0 < rows; r0 += 8) {
      // A word holds the codes of rows r and 32 + r.
      const int16_t* words = reinterpret_cast<const int16_t*>(tile.codes + (k - segment.begin) * kTrellisRows) + r0;
      alignas(64) int16_t turned[8][kLine];
      for (int64_t i = 0; i < count; i += 8) transpose8x8(words + i * kWordLanes, kWordLanes, turned[0] + i, kLine);
      for (int r = r0; r < r0 + 8 && r < rows; ++r) {
        uint8_t lower[kLine], upper[kLine];
        for (int i = 0; i < kLine; i += 16) split_bytes(turned[r - r0] + i, lower + i, upper + i);
        uint8_t* to = q.args.codes + (row_begin + r) * q.K + k;
        std::memcpy(to, lower, size_t(count));
        if (r + kWordLanes < rows) std::memcpy(to + kWordLanes * q.K, upper, size_t(count));
      }
    }
  }
}

template <int kHalves>
static int64_t quantize_trellis_rows(const RowQuantizer& q, const TrellisTables& tables, int64_t row_begin,
                                     int64_t row_end, float* scratch) {
  const QuantizeArgs& args = q.args;
  const int64_t K = q.K, groups = q.groups, longest = longest_segment(q.f);
  const RowBuffers row(q, scratch);
  TrellisTile tile;
  tile.t = row.end;
  tile.reach = tile.t + groups * kTrellisRows;
  tile.w = tile.reach + groups * kTrellisRows;
  tile.decisions =
      reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(tile.w + longest + 32) + 63u) & ~uintptr_t(63));
  tile.n = reinterpret_cast<int16_t*>(tile.decisions + 4 * longest);
  tile.codes = reinterpret_cast<uint8_t*>(tile.n + (longest + 8) * kTrellisRows);
  tile.line = reinterpret_cast<int16_t*>(tile.codes + (longest + 16) * kTrellisRows);
  tile.multiplier = tile.line + 8 * (longest + 32);

  for (int64_t n = row_begin; n < row_end; n += kTrellisRows) {
    const int rows = int(row_end - n < kTrellisRows ? row_end - n : kTrellisRows);
    for (int64_t i = 0; i < groups * kTrellisRows * (rows < kTrellisRows); ++i) tile.t[i] = tile.reach[i] = 0.0f;
    for (int r = 0; r < rows; ++r) {
      const int64_t bad = prepare_lane(q, n + r, row, tile, r);
      if (bad >= 0) return bad;
    }
    for (Segment segment{0, 0}; segment.begin < K; segment.begin = segment.end) {
      segment.end = segment_end(q.f, q.blocks, segment.begin);
      fill_tile(q, tile, segment, n, rows);
      mark_outliers(q, tile, segment, n, rows, true);
      GroupCosts costs;
      for (auto& state : costs.state) {
        for (float& cost : state) cost = 0.0f;
      }
      for (int64_t g = segment.begin / q.group_size; g < groups && q.begin_of(g) < segment.end; ++g) {
        uint8_t codes[kTrellisRows];
        search_group<kHalves>(q, tables, tile, segment, g, &costs, codes);
        for (int r = 0; r < rows; ++r) static_cast<uint8_t*>(args.scale)[(n + r) * groups + g] = codes[r];
      }
      mark_outliers(q, tile, segment, n, rows, false);
      trace_back<kHalves>(q, tables, tile, segment, costs);
      store_codes(q, tile, segment, n, rows);
    }
    for (int r = 0; r < rows; ++r) {
      store_outliers(q, n + r, [&](int64_t k) {
        format::TrellisState state;
        const uint8_t* codes = args.codes + (n + r) * K;
        const int64_t first = format::block_begin_at(q.blocks, k);
        for (int64_t i = k - 2 < first ? first : k - 2; i < k; ++i) format::trellis_index(&state, codes[i]);
        const float v = load_element(args.w, args.dtype, (n + r) * K + k) / bf16_to_float(args.row_scale[n + r]);
        const float scale =
            format::load_scale(args.scale, (n + r) * groups + k / q.group_size, format::ScaleType::kE4m3);
        return v - scale * args.levels[format::trellis_index(&state, codes[k])];
      });
    }
  }
  return -1;
}

static int64_t quantize_rows(const QuantizeArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
  const RowQuantizer q(args);
  if (!format::is_trellis(args.format)) return quantize_plain_rows(q, row_begin, row_end, scratch);
  TrellisTables tables;
  make_trellis_tables(args, q.num_levels, q.peak, &tables);
  const auto quantize = tables.halves == 1 ? quantize_trellis_rows<1> : quantize_trellis_rows<2>;
  return quantize(q, tables, row_begin, row_end, scratch);
}

}  // namespace precal::cpu::PRECAL_ISA_NAMESPACE
