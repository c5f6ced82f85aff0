// SPDX-License-Identifier: Apache-2.0
#include "bindings/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

namespace precal::bindings {

namespace {

constexpr int kMaxThreads = 1024;

int default_threads() {
  if (const char* text = std::getenv("PRECAL_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1 && n <= kMaxThreads) return n;
  }
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

std::atomic<int>& thread_count() {
  static std::atomic<int> n{default_threads()};
  return n;
}

}  // namespace

int pool_threads() { return thread_count().load(); }

void set_pool_threads(int n) {
  if (n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("set_num_threads: n must lie in [1, 1024], got " + std::to_string(n));
  }
  thread_count() = n;
}

// Threads are started per call: tens of microseconds, once per op, and nothing to tear down at fork or exit.
void pool_parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn body, void* context) {
  const int64_t pieces = std::min<int64_t>(pool_threads(), (end - begin + grain - 1) / grain);
  if (pieces <= 1) return body(context, begin, end);
  std::mutex lock;
  std::exception_ptr failure;
  const int64_t step = (end - begin + pieces - 1) / pieces;
  auto piece = [&](int64_t i) {
    try {
      const int64_t first = begin + i * step, last = std::min(end, first + step);
      if (first < last) body(context, first, last);
    } catch (...) {
      std::lock_guard<std::mutex> guard(lock);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(size_t(pieces - 1));
  int64_t started = 1;
  try {
    for (; started < pieces; ++started) threads.emplace_back(piece, started);
  } catch (const std::system_error&) {
    // No more threads to be had: the caller does what is left.
  }
  piece(0);
  for (int64_t i = started; i < pieces; ++i) piece(i);
  for (std::thread& t : threads) t.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace precal::bindings
