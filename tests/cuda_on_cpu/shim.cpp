// SPDX-License-Identifier: Apache-2.0
#include "shim.h"

#include <algorithm>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "races.h"

namespace cuda_on_cpu {
namespace {

constexpr unsigned char kPoison = 0xFF;  // NaN in every float format

struct Copy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

struct Place {
  const char* what = nullptr;
  const char* file = "";
  int line = 0;
};

struct Thread {
  std::unique_ptr<Fiber> fiber = std::make_unique<Fiber>();
  Index3 index{};
  int number = 0, warp = 0, lane = 0;
  bool done = false, waiting = false;
  Place at;                              // where it waits
  std::vector<Copy> open;                // cp.async not yet committed
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  unsigned arrived = 0, mask = 0;
  int generation = 0;
  Place at;
  Slots slots[2];
};

struct State {
  const std::function<void()>* kernel = nullptr;
  std::string name, error;
  Index3 grid{}, block{}, at{};
  int num_threads = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int arrived = 0, sum = 0, barrier_result = 0;
  Place barrier_at;
  Thread* current = nullptr;
  std::unique_ptr<unsigned char[]> dynamic;
  std::map<const void*, std::unique_ptr<unsigned char[]>> statics;
  uint64_t seed = 0;
  std::mt19937_64 random;
};

State g;
Device g_device;
int g_waits = 0;  // of the host for the device

std::string text(Index3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const Place& p) {
  const char* slash = std::strrchr(p.file, '/');
  return std::string(slash ? slash + 1 : p.file) + ":" + std::to_string(p.line);
}

std::string where(const Thread& t) { return g.name + ", block " + text(g.at) + ", thread " + text(t.index); }

[[noreturn]] void stop(const std::string& message) {
  g.error = message;
  if (g.current == nullptr) throw std::runtime_error(message);
  Fiber::leave_forever();  // the scheduler throws; this block is not continued
}

void wait(Thread* t) {
  t->waiting = true;
  Fiber::leave();
}

void thread_body() {
  Thread* t = g.current;
  (*g.kernel)();
  if (!t->groups.empty() || !t->open.empty()) stop(where(*t) + ": returned with copies of cp.async in flight");
  t->done = true;
  Fiber::leave_forever();
}

// All fibers wait: the barrier or a collective lacks somebody.
std::string deadlock() {
  std::string message = g.name + ", block " + text(g.at) + ": deadlock;";
  int shown = 0;
  for (const Thread& t : g.threads) {
    if (t.number >= g.num_threads || shown == 4) break;
    const bool first_of_kind = t.number == 0 || t.done != g.threads[size_t(t.number) - 1].done ||
                               t.at.line != g.threads[size_t(t.number) - 1].at.line;
    if (!first_of_kind) continue;
    ++shown;
    message += " thread " + text(t.index) +
               (t.done ? " has returned;" : " waits in " + std::string(t.at.what) + " at " + text(t.at) + ";");
  }
  message.pop_back();
  return message;
}

void run_block() {
  g.arrived = g.sum = 0;
  g.statics.clear();
  std::vector<Thread*> alive;
  for (int i = 0; i < g.num_threads; ++i) {
    Thread& t = g.threads[size_t(i)];
    t.number = i;
    t.index = {unsigned(i) % g.block.x, unsigned(i) / g.block.x % g.block.y, unsigned(i) / (g.block.x * g.block.y)};
    t.warp = i / kWarp;
    t.lane = i % kWarp;
    t.done = t.waiting = false;
    t.at = {};
    t.open.clear();
    t.groups.clear();
    t.fiber->prepare(&thread_body);
    alive.push_back(&t);
  }
  for (Warp& w : g.warps) w.arrived = 0;
  if (g.seed == 1) std::reverse(alive.begin(), alive.end());
  while (!alive.empty()) {
    if (g.seed > 1) std::shuffle(alive.begin(), alive.end(), g.random);
    bool moved = false;
    for (Thread* t : alive) {
      if (t->waiting || t->done) continue;
      g.current = t;
      t->fiber->enter();
      g.current = nullptr;
      if (!g.error.empty()) throw std::runtime_error(g.error);
      moved = true;
    }
    alive.erase(std::remove_if(alive.begin(), alive.end(), [](const Thread* t) { return t->done; }), alive.end());
    if (!moved && !alive.empty()) throw std::runtime_error(deadlock());
  }
}

void complete(Thread* t, size_t groups_left) {
  while (t->groups.size() > groups_left) {
    for (const Copy& c : t->groups.front()) {
      races::landed(c.to, c.bytes);
      if (c.valid > 0) note_read(c.from, c.valid);
      note_write(c.to, c.bytes);
      std::memcpy(c.to, c.from, c.valid);
      std::memset(static_cast<unsigned char*>(c.to) + c.valid, 0, c.bytes - c.valid);
    }
    t->groups.pop_front();
  }
}

}  // namespace

Device& device() { return g_device; }
void synchronize() {
  if (g_device.capturing) throw std::runtime_error("the host waits for the device while a graph is being captured");
  ++g_waits;
}

void set_seed(uint64_t seed) {
  g.seed = seed;
  g.random.seed(seed);
}

void run(const char* name, Index3 grid, Index3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  g.name = name;
  g.error.clear();
  g.current = nullptr;
  g.kernel = &kernel;
  g.grid = grid;
  g.block = block;
  g.num_threads = int(block.x * block.y * block.z);
  if (g.num_threads < 1 || g.num_threads > kMaxThreads || uint64_t(grid.x) * grid.y * grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > size_t(g_device.shared_bytes)) {
    throw std::runtime_error(g.name + ": grid " + text(grid) + ", block " + text(block) + " with " +
                             std::to_string(shared_bytes) + " bytes of shared memory cannot be launched");
  }
  if (g.threads.size() < size_t(g.num_threads)) g.threads.resize(size_t(g.num_threads));
  g.warps.resize(size_t((g.num_threads + kWarp - 1) / kWarp));
  const size_t num_blocks = size_t(grid.x) * grid.y * grid.z;
  races::begin_launch(num_blocks, g.warps.size());
  std::vector<size_t> order(num_blocks);
  for (size_t i = 0; i < num_blocks; ++i) order[i] = g.seed == 1 ? num_blocks - 1 - i : i;
  if (g.seed > 1) std::shuffle(order.begin(), order.end(), g.random);
  for (size_t i : order) {
    g.at = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (size_t(grid.x) * grid.y))};
    // A new allocation of the exact size: what lies past it belongs to AddressSanitizer.
    g.dynamic.reset(new unsigned char[shared_bytes]);
    std::memset(g.dynamic.get(), kPoison, shared_bytes);
    races::begin_block(i, g.dynamic.get(), shared_bytes);
    run_block();
  }
  g.statics.clear();
  g.dynamic.reset();
}

Index3 thread_index() { return g.current->index; }
Index3 block_index() { return g.at; }
Index3 block_size() { return g.block; }
Index3 grid_size() { return g.grid; }
int lane_index() { return g.current->lane; }
void* dynamic_shared() { return g.dynamic.get(); }

void* static_shared(const void* tag, size_t bytes, size_t) {
  std::unique_ptr<unsigned char[]>& memory = g.statics[tag];
  if (memory == nullptr) {
    memory.reset(new unsigned char[bytes]);
    std::memset(memory.get(), kPoison, bytes);
    races::forget(memory.get(), bytes);
  }
  return memory.get();
}

int block_barrier(int predicate, const char* file, int line) {
  Thread* t = g.current;
  t->at = {"__syncthreads", file, line};
  if (g.arrived == 0) {
    g.barrier_at = t->at;
    g.sum = 0;
  } else if (g.barrier_at.line != line || std::strcmp(g.barrier_at.file, file) != 0) {
    stop(where(*t) + ": divergence; __syncthreads at " + text(t->at) + ", others at " + text(g.barrier_at));
  }
  for (int i = 0; i < g.num_threads; ++i) {
    if (!g.threads[size_t(i)].done) continue;
    stop(where(*t) + ": __syncthreads at " + text(t->at) + ", but thread " + text(g.threads[size_t(i)].index) +
         " has returned");
  }
  g.sum += predicate;
  if (++g.arrived < g.num_threads) {
    wait(t);
    return g.barrier_result;
  }
  g.arrived = 0;
  g.barrier_result = g.sum;
  races::block_barrier();
  for (int i = 0; i < g.num_threads; ++i) g.threads[size_t(i)].waiting = false;
  return g.barrier_result;
}

namespace {
const Slots& meet(unsigned mask, const void* data, size_t bytes, const char* what, const char* file, int line,
                  bool orders_memory) {
  Thread* t = g.current;
  Warp& w = g.warps[size_t(t->warp)];
  t->at = {what, file, line};
  if (((mask >> t->lane) & 1u) == 0) stop(where(*t) + ": " + what + " at " + text(t->at) + " without its own lane");
  if (w.arrived == 0) {
    w.mask = mask;
    w.at = t->at;
  } else if (w.mask != mask || w.at.line != line || std::strcmp(w.at.file, file) != 0) {
    stop(where(*t) + ": divergence; " + what + " at " + text(t->at) + ", its warp in " + w.at.what + " at " +
         text(w.at));
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    if (((mask >> lane) & 1u) == 0) continue;
    const int number = t->warp * kWarp + lane;
    if (number < g.num_threads && !g.threads[size_t(number)].done) continue;
    stop(where(*t) + ": " + what + " at " + text(t->at) + ", but lane " + std::to_string(lane) +
         " of the mask has returned or never was");
  }
  const int generation = w.generation;
  std::memcpy(w.slots[generation].lane[t->lane], data, bytes);
  w.arrived |= 1u << t->lane;
  if (w.arrived != mask) {
    wait(t);
  } else {
    w.arrived = 0;
    if (orders_memory) races::warp_barrier(size_t(t->warp), mask);
    w.generation ^= 1;  // a lane may hand in its next value before the last one has read these
    for (int lane = 0; lane < kWarp; ++lane) {
      const int number = t->warp * kWarp + lane;
      if (((mask >> lane) & 1u) != 0) g.threads[size_t(number)].waiting = false;
    }
  }
  return w.slots[generation];
}
}  // namespace

const Slots& collect(unsigned mask, const void* data, size_t bytes, const char* what, const char* file, int line) {
  return meet(mask, data, bytes, what, file, line, false);
}

void warp_barrier(unsigned mask, const char* file, int line) {
  const char nothing = 0;
  meet(mask, &nothing, 1, "__syncwarp", file, line, true);
}

unsigned ballot(unsigned mask, bool predicate, const char* what, const char* file, int line) {
  const Slots& slots = collect(mask, &predicate, sizeof(predicate), what, file, line);
  unsigned result = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (((mask >> lane) & 1u) != 0 && slots.lane[lane][0] != 0) result |= 1u << lane;
  }
  return result;
}

void fence() { races::fence(size_t(g.current->number)); }

void async_copy(void* to, const void* from, size_t bytes, size_t valid_bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    stop(where(*g.current) + ": cp.async of " + std::to_string(bytes) + " bytes at an address that is no multiple");
  }
  note_write(to, bytes);
  races::in_flight(to, bytes);
  std::memset(to, kPoison, bytes);
  g.current->open.push_back({to, from, bytes, valid_bytes});
}

void async_commit() {
  g.current->groups.push_back(std::move(g.current->open));
  g.current->open.clear();
}

void async_wait(int groups_left) { complete(g.current, size_t(groups_left)); }

void note_read(const void* address, size_t bytes) { races::access(address, bytes, races::kRead); }
void note_write(const void* address, size_t bytes) { races::access(address, bytes, races::kWrite); }
void note_atomic(const void* address, size_t bytes) { races::access(address, bytes, races::kAtomic); }

void copy_unseen(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

void fail(const char* message, const char* file, int line) {
  const Place place{"", file, line};
  stop(where(*g.current) + ": " + message + " at " + text(place));
}

namespace races {
Runner runner() {
  const Thread* t = g.current;
  return t == nullptr ? Runner{-1, -1, -1} : Runner{t->number, t->warp, t->lane};
}
bool on_own_stack(const void* address) { return g.current == nullptr || g.current->fiber->on_stack(address); }
void report(const std::string& message) { stop(where(*g.current) + ": " + message); }
std::string thread_name(int number) {
  return text(Index3{unsigned(number) % g.block.x, unsigned(number) / g.block.x % g.block.y,
                     unsigned(number) / (g.block.x * g.block.y)});
}
}  // namespace races

}  // namespace cuda_on_cpu

// For Python, through ctypes.
extern "C" __attribute__((visibility("default"))) void precal_shim_set(uint64_t seed, int multiprocessors,
                                                                       int shared_bytes, int capturing) {
  cuda_on_cpu::set_seed(seed);
  cuda_on_cpu::device() = {multiprocessors, shared_bytes, capturing != 0};
}

extern "C" __attribute__((visibility("default"))) int precal_shim_waits() { return cuda_on_cpu::g_waits; }
