// SPDX-License-Identifier: Apache-2.0
// Huge pages for memory that is read from end to end again and again: with small ones a stream needs a translation of
// its address every 4 KB, which can cost bandwidth of DRAM; on some machines it costs none.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace precal {

// Before the memory is first written. Whole huge pages inside it only, so nothing else changes; where the system has
// none, or never gives them, neither does this.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace precal
