// SPDX-License-Identifier: Apache-2.0
// A small pool for `_C`, which has no framework to borrow threads from.
#pragma once

#include <cstdint>

#include "core/parallel.h"

namespace precal::bindings {

void pool_parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn body, void* context);
void set_pool_threads(int n);
int pool_threads();  // PRECAL_NUM_THREADS, else the number of CPUs this process may use

}  // namespace precal::bindings
