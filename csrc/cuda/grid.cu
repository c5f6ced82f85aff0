// SPDX-License-Identifier: Apache-2.0
// spread_codes, kl_divergence and fit_grid: what is decided on a histogram (csrc/cpu/ops_grid.cpp has the same
// arithmetic and the reasons).
//
// Work    one block. Sums have an order, so one thread adds; terms, logarithms and cells are made by all. A histogram
// has
//         some thousand bins: microseconds to a millisecond, without a copy to the host.
// Limits  levels up to 256. counts below 0 and grids out of order are the caller's to avoid (the CPU refuses them).
//         kl_divergence uses the device's log: equal to the CPU's within 1e-12. The others are equal bit for bit.
#include "cuda/launch.h"

namespace precal::cuda {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ double infinity() { return double(bits_float(0x7F800000u)); }

// Natural logarithm from +, *, / only.
__device__ __forceinline__ double portable_log(double x) {
  int exponent = 0;
  double m = frexp(x, &exponent);
  if (m < 0.70710678118654752) {
    m *= 2.0;
    --exponent;
  }
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double sum = 0.0;
  for (int odd = 21; odd >= 1; odd -= 2) sum = sum * s2 + 1.0 / double(odd);
  return double(exponent) * 0.69314718055994531 + 2.0 * s * sum;
}

struct Shared {
  int64_t first, last;  // hull of the occupied bins
  int64_t edge[257];
  int level[256], moved[256];
  double error[256], kl[256];
  double total, cost;
};

struct Sums {  // of bins before b, [bins + 1] each
  double *mass, *moment, *square, *information;
};

__device__ __forceinline__ Sums sums_of(const GridParams& p) {
  double* at = static_cast<double*>(p.workspace);
  return {at, at + p.bins + 1, at + 2 * (p.bins + 1), at + 3 * (p.bins + 1)};
}

__device__ __forceinline__ void load_levels(const GridParams& p, Shared* s) {
  for (int i = int(threadIdx.x); i < p.levels; i += kThreads) s->level[i] = s->moved[i] = p.grid[i];
}

__device__ __forceinline__ void find_hull(const GridParams& p, Shared* s) {
  if (threadIdx.x == 0) {
    double total = 0.0;
    int64_t first = p.bins, last = 0;
    for (int64_t b = 0; b < p.bins; ++b) {
      total += double(p.counts[b]);
      if (p.counts[b] <= 0) continue;
      first = b < first ? b : first;
      last = b + 1;
    }
    s->total = total;
    s->first = last == 0 ? 0 : first;
    s->last = last;
  }
  __syncthreads();
}

__device__ __forceinline__ void make_sums(const GridParams& p, const Shared& s, const Sums& sums) {
  const double width = (p.hi - p.lo) / double(p.bins);
  for (int64_t b = threadIdx.x; b < p.bins; b += kThreads) {
    const double mass = s.total > 0.0 ? double(p.counts[b]) / s.total : 0.0;
    const double x = p.lo + (double(b) + 0.5) * width;
    sums.mass[b + 1] = mass;
    sums.moment[b + 1] = mass * x;
    sums.square[b + 1] = mass * x * x;
    sums.information[b + 1] = mass > 0.0 ? mass * portable_log(mass) : 0.0;
  }
  __syncthreads();
  double* each[4] = {sums.mass, sums.moment, sums.square, sums.information};
  if (threadIdx.x < 4) {
    double* sum = each[threadIdx.x];
    sum[0] = 0.0;
    for (int64_t b = 0; b < p.bins; ++b) sum[b + 1] = sum[b] + sum[b + 1];
  }
  __syncthreads();
}

// Bins [edge[i], edge[i + 1]) of every code's decision cell, cut to the hull.
__device__ __forceinline__ void make_cells(const GridParams& p, const int* level, Shared* s) {
  const double width = (p.hi - p.lo) / double(p.bins);
  for (int i = int(threadIdx.x); i <= p.levels; i += kThreads) {
    int64_t edge = i == 0 ? s->first : s->last;
    if (i > 0 && i < p.levels) {
      const double x = 0.5 * double(level[i - 1] + level[i]), b = floor((x - p.lo) / width - 0.5) + 1.0;
      edge = b < 0.0 ? 0 : b > double(p.bins) ? p.bins : int64_t(b);
      edge = edge < s->first ? s->first : edge > s->last ? s->last : edge;
    }
    s->edge[i] = edge;
  }
  __syncthreads();
}

// Relative squared error + mu * KL(P || Q).
__device__ __forceinline__ double objective(const GridParams& p, const int* level, const Sums& sums, Shared* s) {
  make_cells(p, level, s);
  for (int i = int(threadIdx.x); i < p.levels; i += kThreads) {
    const int64_t a = s->edge[i], b = s->edge[i + 1];
    const double mass = sums.mass[b] - sums.mass[a], l = double(level[i]);
    s->error[i] = (sums.square[b] - sums.square[a]) - 2.0 * l * (sums.moment[b] - sums.moment[a]) + l * l * mass;
    s->kl[i] = p.mu > 0.0 && mass > 0.0
                   ? (sums.information[b] - sums.information[a]) - mass * portable_log(mass / double(b - a))
                   : 0.0;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double error = 0.0, kl = 0.0;
    for (int i = 0; i < p.levels; ++i) {
      error += s->error[i];
      kl += s->kl[i];
    }
    const double power = sums.square[p.bins];
    s->cost = (power > 0.0 ? error / power : error) + p.mu * kl;
  }
  __syncthreads();
  const double cost = s->cost;
  __syncthreads();
  return cost;
}

__device__ __forceinline__ int round_level(double x) {
  const double rounded = floor(x + 0.5), most = double(format::kMaxLevel);
  return int(rounded < -most ? -most : rounded > most ? most : rounded);
}

// By one thread: centroids (in error[]) sorted, and the largest level stretched to 127.
__device__ __forceinline__ void stretch(int levels, double* centroid, int* out) {
  double peak = 0.0;
  for (int i = 0; i < levels; ++i) peak = fabs(centroid[i]) > peak ? fabs(centroid[i]) : peak;
  for (int i = 1; i < levels; ++i) {
    const double c = centroid[i];
    int j = i;
    for (; j > 0 && centroid[j - 1] > c; --j) centroid[j] = centroid[j - 1];
    centroid[j] = c;
  }
  for (int i = 0; i < levels; ++i) {
    out[i] = round_level(peak > 0.0 ? centroid[i] / peak * double(format::kMaxLevel) : 0.0);
  }
}

__device__ __forceinline__ void lloyd_step(const GridParams& p, const Sums& sums, Shared* s) {
  make_cells(p, s->moved, s);
  for (int i = int(threadIdx.x); i < p.levels; i += kThreads) {
    const int64_t a = s->edge[i], b = s->edge[i + 1];
    const double mass = sums.mass[b] - sums.mass[a];
    s->error[i] = mass > 0.0 ? (sums.moment[b] - sums.moment[a]) / mass : double(s->moved[i]);
  }
  __syncthreads();
  if (threadIdx.x == 0) stretch(p.levels, s->error, s->moved);
  __syncthreads();
}

// Moves one level by one while the objective falls; the level of largest magnitude stays.
__device__ __forceinline__ double descend(const GridParams& p, const Sums& sums, int* level, Shared* s) {
  constexpr int kSweeps = 1000;
  double best = objective(p, level, sums, s);
  const int low = level[0] < 0 ? -level[0] : level[0];
  const int high = level[p.levels - 1] < 0 ? -level[p.levels - 1] : level[p.levels - 1];
  const int peak = low > high ? 0 : p.levels - 1;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool moved = false;
    for (int i = 0; i < p.levels; ++i) {
      if (i == peak) continue;
      for (int step = -1; step <= 1; step += 2) {
        const int old = level[i];
        const int least = i > 0 ? level[i - 1] : -format::kMaxLevel;
        const int most = i + 1 < p.levels ? level[i + 1] : format::kMaxLevel;
        if (old + step < least || old + step > most) continue;
        __syncthreads();
        if (threadIdx.x == 0) level[i] = old + step;
        __syncthreads();
        const double cost = objective(p, level, sums, s);
        if (cost < best) {
          best = cost;
          moved = true;
        } else {
          if (threadIdx.x == 0) level[i] = old;
          __syncthreads();
        }
      }
    }
    if (!moved) break;
  }
  return best;
}

__global__ void __launch_bounds__(kThreads) fit_grid_kernel(GridParams p) {
  PRECAL_SHARED(Shared, s);
  load_levels(p, &s);
  __syncthreads();
  const int* chosen = s.level;
  if (p.by_code) {
    const double width = (p.hi - p.lo) / double(p.bins);
    for (int i = int(threadIdx.x); i < p.levels; i += kThreads) {
      double mass = 0.0, moment = 0.0;
      for (int64_t b = 0; b < p.bins; ++b) {
        const double weight = double(p.counts[int64_t(i) * p.bins + b]);
        mass += weight;
        moment += weight * (p.lo + (double(b) + 0.5) * width);
      }
      s.error[i] = mass > 0.0 ? moment / mass : double(s.level[i]);
      s.kl[i] = mass;
    }
    __syncthreads();
    if (threadIdx.x == 0 && p.rounds > 0) {
      bool any = false;
      for (int i = 0; i < p.levels; ++i) any = any || s.kl[i] > 0.0;
      if (any) stretch(p.levels, s.error, s.level);
    }
    __syncthreads();
  } else {
    const Sums sums = sums_of(p);
    find_hull(p, &s);
    make_sums(p, s, sums);
    if (s.last > s.first && p.rounds > 0) {
      for (int64_t round = 0; round < p.rounds; ++round) lloyd_step(p, sums, &s);
      const double of_moved = descend(p, sums, s.moved, &s);
      const double of_level = descend(p, sums, s.level, &s);
      if (of_moved < of_level) chosen = s.moved;
    }
  }
  for (int i = int(threadIdx.x); i < p.levels; i += kThreads) p.out_grid[i] = int8_t(chosen[i]);
}

__global__ void __launch_bounds__(kThreads) spread_codes_kernel(GridParams p) {
  PRECAL_SHARED(Shared, s);
  load_levels(p, &s);
  for (int64_t b = threadIdx.x; b < p.bins; b += kThreads) p.out[b] = 0.0;
  __syncthreads();
  if (p.by_code) {
    for (int i = 0; i < p.levels; ++i) {
      const int64_t* counts = p.counts + int64_t(i) * p.bins;
      if (threadIdx.x == 0) {
        int64_t first = p.bins, last = -1;
        double total = 0.0;
        for (int64_t b = 0; b < p.bins; ++b) {
          if (counts[b] == 0) continue;
          first = b < first ? b : first;
          last = b;
          total += double(counts[b]);
        }
        s.first = first;
        s.last = last;
        s.total = total;
      }
      __syncthreads();
      for (int64_t b = s.first + threadIdx.x; b <= s.last; b += kThreads) {
        p.out[b] += s.total / double(s.last - s.first + 1);
      }
      __syncthreads();
    }
    return;
  }
  find_hull(p, &s);
  make_cells(p, s.level, &s);
  for (int i = int(threadIdx.x); i < p.levels; i += kThreads) {
    double total = 0.0;
    for (int64_t b = s.edge[i]; b < s.edge[i + 1]; ++b) total += double(p.counts[b]);
    for (int64_t b = s.edge[i]; b < s.edge[i + 1]; ++b) p.out[b] = total / double(s.edge[i + 1] - s.edge[i]);
  }
}

// ---- KL ------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ double mass_of(const KlParams& p, bool of_p, int64_t i) {
  const void* data = of_p ? p.p : p.q;
  return (of_p ? p.p_int64 : p.q_int64) ? double(static_cast<const int64_t*>(data)[i])
                                        : static_cast<const double*>(data)[i];
}

// By one thread. Mass i is (m / largest + smoothing / largest) / total; returns false for what is refused on the CPU.
__device__ __forceinline__ bool totals(const KlParams& p, bool of_p, double* largest, double* total) {
  *largest = p.smoothing;
  *total = 0.0;
  for (int64_t i = 0; i < p.bins; ++i) {
    const double m = mass_of(p, of_p, i);
    if (!(m >= 0.0) || !(m < infinity())) return false;
    *largest = m > *largest ? m : *largest;
  }
  for (int64_t i = 0; *largest > 0.0 && i < p.bins; ++i) {
    *total += mass_of(p, of_p, i) / *largest + p.smoothing / *largest;
  }
  return true;
}

__global__ void kl_divergence_kernel(KlParams p) {
  double largest[2], total[2];
  if (!totals(p, true, &largest[0], &total[0]) || !totals(p, false, &largest[1], &total[1])) {
    p.out[0] = double(bits_float(0x7FC00000u));
    return;
  }
  double kl = 0.0;
  if (total[0] > 0.0 && total[1] > 0.0) {
    for (int64_t b = 0; b < p.bins; ++b) {
      const double pb = (mass_of(p, true, b) / largest[0] + p.smoothing / largest[0]) / total[0];
      const double qb = (mass_of(p, false, b) / largest[1] + p.smoothing / largest[1]) / total[1];
      if (pb == 0.0) {
        kl += qb;
      } else if (qb == 0.0) {
        kl = infinity();
      } else if (pb > 2.0 * qb || qb > 2.0 * pb) {
        kl += pb * (log(pb) - log(qb)) - pb + qb;
      } else {
        const double d = (pb - qb) / qb, term = qb * ((1.0 + d) * log1p(d) - d);
        kl += term > 0.0 ? term : 0.0;
      }
    }
  } else if (total[0] > 0.0 || total[1] > 0.0) {
    kl = infinity();
  }
  p.out[0] = kl;
}

}  // namespace

int64_t grid_workspace(int64_t bins) { return 4 * (bins + 1) * 8; }

Status launch_fit_grid(const GridParams& p, cudaStream_t stream) {
  return launch("fit_grid", &fit_grid_kernel, dim3(1), kThreads, 0, stream, p);
}

Status launch_spread_codes(const GridParams& p, cudaStream_t stream) {
  return launch("spread_codes", &spread_codes_kernel, dim3(1), kThreads, 0, stream, p);
}

Status launch_kl_divergence(const KlParams& p, cudaStream_t stream) {
  return launch("kl_divergence", &kl_divergence_kernel, dim3(1), 1, 0, stream, p);
}

}  // namespace precal::cuda
