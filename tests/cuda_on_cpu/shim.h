// SPDX-License-Identifier: Apache-2.0
// Runs a kernel on the CPU: blocks one after another, the threads of a block as fibers that switch where they wait for
// each other. What is checked and how: README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;

struct Index3 {
  unsigned x, y, z;
};

// The device that kernels are told they run on.
struct Device {
  int multiprocessors = 3;
  int shared_bytes = 227 << 10;
  bool capturing = false;  // a graph: whoever waits then has failed
};
Device& device();
// The host waits for the device.
void synchronize();

// Order in which blocks and the threads of a block run: 0 ascending, 1 descending, else shuffled anew at every switch.
void set_seed(uint64_t seed);

// Throws std::runtime_error with kernel, block, thread and line if a thread waits for ever, if threads meet at
// different lines, or (where the kernel was compiled for it) if two accesses race.
void run(const char* name, Index3 grid, Index3 block, size_t shared_bytes, const std::function<void()>& kernel);

// ---- for the thread that runs --------------------------------------------------------------------------------------
Index3 thread_index();
Index3 block_index();
Index3 block_size();
Index3 grid_size();
int lane_index();

void* dynamic_shared();
// The block's instance of a shared variable; `tag` tells variables apart.
void* static_shared(const void* tag, size_t bytes, size_t alignment);

int block_barrier(int predicate, const char* file, int line);  // returns the sum of the predicates
void warp_barrier(unsigned mask, const char* file, int line);
void fence();

constexpr size_t kSlotBytes = 64;
struct Slots {
  alignas(16) unsigned char lane[kWarp][kSlotBytes];
};
// Every lane of `mask` hands in `bytes` and gets what all of them handed in.
const Slots& collect(unsigned mask, const void* data, size_t bytes, const char* what, const char* file, int line);

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* what, const char* file, int line) {
  static_assert(sizeof(T) <= kSlotBytes, "a value fits in a slot");
  const Slots& slots = collect(mask, &value, sizeof(T), what, file, line);
  if (((mask >> source) & 1u) == 0) source = lane_index();  // undefined in CUDA
  T result;
  std::memcpy(static_cast<void*>(&result), slots.lane[source], sizeof(T));
  return result;
}
unsigned ballot(unsigned mask, bool predicate, const char* what, const char* file, int line);

// cp.async: the destination holds garbage until the copy is waited for, and only then is the source read.
void async_copy(void* to, const void* from, size_t bytes, size_t valid_bytes);
void async_commit();
void async_wait(int groups_left);

// ---- seen by the race detector -------------------------------------------------------------------------------------
void note_read(const void* address, size_t bytes);
void note_write(const void* address, size_t bytes);
void note_atomic(const void* address, size_t bytes);

[[noreturn]] void fail(const char* message, const char* file, int line);

// Accesses that are already noted: out of line, so that a detector that instruments the kernel does not see them twice.
void copy_unseen(void* to, const void* from, size_t bytes);
template <typename T>
T load_unseen(const T* address) {
  T value;
  copy_unseen(&value, address, sizeof(T));
  return value;
}
template <typename T>
void store_unseen(T* address, T value) {
  copy_unseen(address, &value, sizeof(T));
}

}  // namespace cuda_on_cpu
