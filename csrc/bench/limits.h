// SPDX-License-Identifier: Apache-2.0
// What this machine can do at most: memory read and copied, multiply-adds a second. A speed in docs/performance.md is a
// share of these, measured in the same minute.
#pragma once

#include <cstdint>
#include <string>

#include "core/status.h"

namespace precal::bench {

struct LimitRequest {
  std::string name;      // one of limit_names()
  std::string isa;       // avx512, avx2 or generic; empty: the best that this CPU has
  double seconds = 0.1;  // measure for at least this long, and for at least three passes
  int64_t bytes = 0;     // size of the buffer that memory limits walk through; beyond 4 x L3 for DRAM
  int threads = 1;       // pieces handed to the parallel_for hook
};

struct LimitResult {
  double value = 0;  // median over passes
  const char* unit = "";
  std::string isa;
  int64_t passes = 0;
};

// dram_read   every byte once, the better of one and four streams per thread; GB/s
// copy        memcpy into another buffer; GB/s copied (the bus moves two to three times that)
// fp32_fma    fused multiply-adds from registers, 2 operations each; Gop/s
// bf16_dot    the same for pairs of bfloat16 (vdpbf16ps), 4 operations a lane
// int8_dot    the same for four uint8 x int8 (vpdpbusd), 8 operations a lane
const char* limit_names();

// Every pass checks its own result: a loop that the compiler shortened is an error, not a record.
// kUnavailable where the CPU lacks the instruction.
Status measure_limit(const LimitRequest& request, LimitResult* result);

}  // namespace precal::bench
