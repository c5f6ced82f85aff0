// SPDX-License-Identifier: Apache-2.0
#include "core/parallel.h"

#include <atomic>

namespace precal {

namespace {
std::atomic<ParallelFor> g_hook{nullptr};
}

void set_parallel_for(ParallelFor hook) { g_hook.store(hook); }
ParallelFor get_parallel_for() { return g_hook.load(); }

}  // namespace precal
