// SPDX-License-Identifier: Apache-2.0
// Threads come from whoever hosts the kernels: torch's pool in the op library, a small std::thread pool in `_C`.
#pragma once

#include <cstdint>

namespace precal {

// Runs body over [begin, end) in pieces of at least `grain`. No result may depend on where the pieces are cut.
using RangeFn = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, RangeFn body, void* context);

void set_parallel_for(ParallelFor hook);  // nullptr: run on the calling thread
ParallelFor get_parallel_for();

template <typename Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  if (grain < 1) grain = 1;
  auto call = [](void* context, int64_t b, int64_t e) { (*static_cast<const Body*>(context))(b, e); };
  void* context = const_cast<void*>(static_cast<const void*>(&body));
  ParallelFor hook = get_parallel_for();
  if (hook == nullptr || end - begin <= grain) {
    call(context, begin, end);
  } else {
    hook(begin, end, grain, call, context);
  }
}

}  // namespace precal
