// SPDX-License-Identifier: Apache-2.0
// Happens-before between the accesses of one launch. A kernel compiled with -fsanitize=thread calls __tsan_read4 and
// the like for every access; races.cpp defines them, so no runtime of the compiler is linked. Without that flag nothing
// calls access() but cp.async, ldmatrix and atomics, and nothing is kept.
//
//   Clocks    one per warp and, in each, what it knows of every other warp of the launch. __syncthreads joins the
//   clocks
//             of a block; __syncwarp starts a new interval of its warp; __threadfence + atomic releases, atomic +
//             __threadfence + __syncwarp or __syncthreads acquires. A shuffle orders nothing.
//   Accesses  per byte the last write and two readers of different warps, each with warp, lane and interval. Two
//   accesses
//             of different threads race when one is a write, not both are atomic, and neither is known to the other.
#pragma once

#include <cstddef>
#include <string>

namespace cuda_on_cpu::races {

enum Kind { kRead, kWrite, kAtomic };

void begin_launch(size_t num_blocks, size_t warps_per_block);
void begin_block(size_t block, const void* shared, size_t bytes);
void forget(const void* memory, size_t bytes);  // new memory at an old address
void access(const void* address, size_t bytes, Kind kind);
void block_barrier();
void warp_barrier(size_t warp, unsigned mask);
void fence(size_t thread);
void in_flight(const void* to, size_t bytes);
void landed(const void* to, size_t bytes);

// ---- what the scheduler knows --------------------------------------------------------------------------------------
struct Runner {
  int thread, warp, lane;  // of the block; -1: the host runs
};
Runner runner();
bool on_own_stack(const void* address);
[[noreturn]] void report(const std::string& message);
std::string thread_name(int number);

}  // namespace cuda_on_cpu::races
