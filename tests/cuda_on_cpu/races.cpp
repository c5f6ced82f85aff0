// SPDX-License-Identifier: Apache-2.0
#include "races.h"

#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <unordered_map>
#include <vector>

#include <dlfcn.h>

namespace cuda_on_cpu::races {
namespace {

constexpr size_t kPage = 4096;
constexpr int kManyLanes = 32;
using Clock = std::vector<uint32_t>;  // [warp of the launch]: its intervals below this are known

struct Mark {
  int32_t warp = -1;  // of the launch; -1: nobody
  int8_t lane = 0;    // or kManyLanes
  bool atomic = false;
  uint32_t interval = 0;
};

struct Cell {  // of one byte
  Mark write, read[2];
  bool flying = false;
};

struct Page {
  Cell cells[kPage];
};

bool g_enabled = false;  // the kernels report their accesses
size_t g_warps = 0, g_first_warp = 0, g_launch_warps = 0;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> g_pages;
std::vector<Clock> g_clocks;                              // of the warps of the block
std::map<size_t, Clock> g_released, g_pending, g_fenced;  // by thread of the block
std::unordered_map<uintptr_t, Clock> g_sync;              // by address of an atomic
const void* g_pc = nullptr;

Cell& cell(uintptr_t address) {
  std::unique_ptr<Page>& page = g_pages[address / kPage];
  if (page == nullptr) page = std::make_unique<Page>();
  return page->cells[address % kPage];
}

void join(Clock* to, const Clock& from) {
  if (to->size() < from.size()) to->resize(from.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) (*to)[i] = std::max((*to)[i], from[i]);
}

std::string name(Kind kind) { return kind == kRead ? "read" : kind == kWrite ? "write" : "atomic"; }

[[noreturn]] void report_race(uintptr_t address, Kind kind, const Mark& other, const char* other_kind) {
  Dl_info info{};
  char pc[64] = "";
  if (g_pc != nullptr && dladdr(g_pc, &info) != 0) {
    std::snprintf(pc, sizeof(pc), " (pc 0x%zx)",
                  size_t(static_cast<const char*>(g_pc) - static_cast<char*>(info.dli_fbase)));
  }
  const int thread = int(size_t(other.warp) % g_warps) * 32 + (other.lane == kManyLanes ? 0 : other.lane);
  char where[32];
  std::snprintf(where, sizeof(where), "0x%zx", size_t(address));
  report("race: " + name(kind) + " at " + where + pc + " against the " + other_kind + " by thread " +
         thread_name(thread) + (other.lane == kManyLanes ? " and others of its warp" : "") + " of block number " +
         std::to_string(size_t(other.warp) / g_warps));
}

bool known(const Mark& m, const Runner& me, const Clock& clock) {
  if (m.warp < 0) return true;
  if (size_t(m.warp) == g_first_warp + size_t(me.warp) && m.lane == me.lane) return true;
  return m.interval < clock[size_t(m.warp)];
}

void add_reader(Cell* c, const Mark& m) {
  for (Mark& r : c->read) {
    if (r.warp != m.warp) continue;
    if (r.interval == m.interval && r.lane != m.lane) {
      r.lane = kManyLanes;
    } else {
      r = m;
    }
    return;
  }
  Mark& slot = c->read[0].warp < 0 ? c->read[0] : c->read[1];
  slot = m;
}

}  // namespace

void begin_launch(size_t num_blocks, size_t warps_per_block) {
  g_pages.clear();
  g_sync.clear();
  g_warps = warps_per_block;
  g_launch_warps = num_blocks * warps_per_block;
}

void begin_block(size_t block, const void* shared, size_t bytes) {
  if (!g_enabled) return;
  g_first_warp = block * g_warps;
  g_clocks.assign(g_warps, Clock(g_launch_warps, 0));
  for (size_t w = 0; w < g_warps; ++w) g_clocks[w][g_first_warp + w] = 1;
  g_released.clear();
  g_pending.clear();
  g_fenced.clear();
  forget(shared, bytes);
}

void forget(const void* memory, size_t bytes) {
  if (!g_enabled) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(memory);
  for (uintptr_t a = first; a < first + bytes; ++a) {
    if (a % kPage == 0 && a + kPage <= first + bytes) {
      g_pages.erase(a / kPage);
      a += kPage - 1;
    } else if (g_pages.count(a / kPage) != 0) {
      cell(a) = Cell{};
    }
  }
}

void access(const void* pointer, size_t bytes, Kind kind) {
  if (!g_enabled) return;
  const Runner me = runner();
  if (me.thread < 0 || on_own_stack(pointer)) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  Clock& clock = g_clocks[size_t(me.warp)];
  const size_t warp = g_first_warp + size_t(me.warp);
  const Mark mark{int32_t(warp), int8_t(me.lane), kind == kAtomic, clock[warp]};
  for (uintptr_t a = address; a < address + bytes; ++a) {
    Cell& c = cell(a);
    if (c.flying) report(name(kind) + " of memory that cp.async is still writing");
    if (!(kind == kAtomic && c.write.atomic) && !known(c.write, me, clock)) {
      report_race(a, kind, c.write, c.write.atomic ? "atomic" : "write");
    }
    if (kind == kRead) {
      add_reader(&c, mark);
      continue;
    }
    for (const Mark& r : c.read) {
      if (!known(r, me, clock)) report_race(a, kind, r, "read");
    }
    c.write = mark;
  }
  if (kind != kAtomic) return;
  const auto sync = g_sync.find(address);
  if (sync != g_sync.end()) join(&g_pending[size_t(me.thread)], sync->second);
  const auto released = g_released.find(size_t(me.thread));
  if (released != g_released.end()) join(&g_sync[address], released->second);
}

void fence(size_t thread) {
  if (!g_enabled) return;
  g_released[thread] = g_clocks[thread / 32];
  const auto pending = g_pending.find(thread);
  if (pending == g_pending.end()) return;
  join(&g_fenced[thread], pending->second);
  join(&g_released[thread], pending->second);
  g_pending.erase(pending);
}

void warp_barrier(size_t warp, unsigned mask) {
  if (!g_enabled) return;
  for (size_t lane = 0; lane < 32; ++lane) {
    const auto fenced = g_fenced.find(warp * 32 + lane);
    if (((mask >> lane) & 1u) == 0 || fenced == g_fenced.end()) continue;
    join(&g_clocks[warp], fenced->second);
    g_fenced.erase(fenced);
  }
  // A barrier of some lanes orders them alone, which intervals of a warp cannot say: it orders nothing here.
  if (mask == 0xFFFFFFFFu) ++g_clocks[warp][g_first_warp + warp];
}

void block_barrier() {
  if (!g_enabled) return;
  Clock all;
  for (size_t w = 0; w < g_warps; ++w) {
    warp_barrier(w, 0xFFFFFFFFu);
    join(&all, g_clocks[w]);
  }
  for (Clock& clock : g_clocks) clock = all;
}

void in_flight(const void* to, size_t bytes) {
  if (!g_enabled) return;
  for (size_t i = 0; i < bytes; ++i) cell(reinterpret_cast<uintptr_t>(to) + i).flying = true;
}

void landed(const void* to, size_t bytes) {
  if (!g_enabled) return;
  for (size_t i = 0; i < bytes; ++i) cell(reinterpret_cast<uintptr_t>(to) + i).flying = false;
}

void enable() { g_enabled = true; }
void at(const void* pc) { g_pc = pc; }

}  // namespace cuda_on_cpu::races

// ---- what -fsanitize=thread makes the kernels call -----------------------------------------------------------------
namespace races = cuda_on_cpu::races;

#define SEEN(pointer, bytes, kind)        \
  races::at(__builtin_return_address(0)); \
  races::access(pointer, size_t(bytes), races::kind)

#define ACCESSES(bytes)                                                 \
  void __tsan_read##bytes(void* p) { SEEN(p, bytes, kRead); }           \
  void __tsan_write##bytes(void* p) { SEEN(p, bytes, kWrite); }         \
  void __tsan_unaligned_read##bytes(void* p) { SEEN(p, bytes, kRead); } \
  void __tsan_unaligned_write##bytes(void* p) { SEEN(p, bytes, kWrite); }

extern "C" {
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) { SEEN(p, bytes, kRead); }
void __tsan_write_range(void* p, size_t bytes) { SEEN(p, bytes, kWrite); }
void __tsan_init() { races::enable(); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
