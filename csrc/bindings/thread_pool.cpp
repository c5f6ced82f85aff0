// SPDX-License-Identifier: Apache-2.0
#include "bindings/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace precal::bindings {

namespace {

constexpr int kMaxThreads = 1024;

int usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, int(std::thread::hardware_concurrency()));
}

int default_threads() {
  if (const char* text = std::getenv("PRECAL_NUM_THREADS")) {
    const int n = std::atoi(text);
    if (n >= 1 && n <= kMaxThreads) return n;
  }
  return usable_cpus();
}

std::atomic<int>& thread_count() {
  static std::atomic<int> n{default_threads()};
  return n;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

thread_local bool inside_a_piece = false;

// Workers that wait for the next job: spinning for some tens of microseconds, as a model's layers follow each other
// closely, then asleep. One job at a time. Never destroyed: threads may outlive main().
class Pool {
 public:
  using Piece = void (*)(void* context, int64_t piece);

  // Runs piece(context, i) for i in [0, pieces), the caller among the threads. `piece` does not throw.
  void run(int64_t pieces, Piece piece, void* context) {
    std::lock_guard<std::mutex> one_job(job_);
    start_workers(pieces - 1);
    {
      std::lock_guard<std::mutex> guard(lock_);
      piece_ = piece;
      context_ = context;
      pieces_ = pieces;
      next_ = 0;
      open_ = true;
      spin_ = pieces <= usable_cpus_ ? kSpins : 0;
      ++generation_;
    }
    wake_.notify_all();
    work();
    // No piece is left to take. Who is inside still runs one; who comes later finds the job closed.
    std::unique_lock<std::mutex> guard(lock_);
    open_ = false;
    guard.unlock();
    for (int i = 0; i < spin_ && inside_ != 0; ++i) relax();
    guard.lock();
    finished_.wait(guard, [this] { return inside_ == 0; });
  }

 private:
  static constexpr int kSpins = 2000;

  void work() {
    for (int64_t i = next_++; i < pieces_; i = next_++) piece_(context_, i);
  }

  void start_workers(int64_t count) {
    try {
      for (; workers_ < count; ++workers_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // No more threads to be had: those that are there do the work.
    }
  }

  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < spin_ && generation_ == seen; ++i) relax();
      std::unique_lock<std::mutex> guard(lock_);
      wake_.wait(guard, [&] { return generation_ != seen; });
      seen = generation_;
      if (!open_) continue;
      ++inside_;
      guard.unlock();
      work();
      guard.lock();
      if (--inside_ == 0) finished_.notify_one();
    }
  }

  std::mutex job_, lock_;
  std::condition_variable wake_, finished_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> inside_{0}, spin_{0};
  int64_t pieces_ = 0, workers_ = 0;
  bool open_ = false;
  Piece piece_ = nullptr;
  void* context_ = nullptr;
  const int usable_cpus_ = usable_cpus();
};

std::atomic<Pool*>& pool() {
  static std::atomic<Pool*> instance = [] {
#if defined(__unix__) || defined(__APPLE__)
    // A forked child has none of the threads, and perhaps a locked mutex: it starts afresh.
    pthread_atfork(nullptr, nullptr, [] { pool() = new Pool; });
#endif
    return new Pool;
  }();
  return instance;
}

}  // namespace

int pool_threads() { return thread_count().load(); }

void set_pool_threads(int n) {
  if (n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("set_num_threads: n must lie in [1, 1024], got " + std::to_string(n));
  }
  thread_count() = n;
}

void pool_parallel_for(int64_t begin, int64_t end, int64_t grain, RangeFn body, void* context) {
  const int64_t pieces = std::min<int64_t>(pool_threads(), (end - begin + grain - 1) / grain);
  if (pieces <= 1 || inside_a_piece) return body(context, begin, end);
  struct Job {
    int64_t begin, end, step;
    RangeFn body;
    void* context;
    std::mutex lock;
    std::exception_ptr failure;
  } job{begin, end, (end - begin + pieces - 1) / pieces, body, context, {}, {}};
  const auto piece = [](void* p, int64_t i) {
    Job& j = *static_cast<Job*>(p);
    const int64_t first = j.begin + i * j.step, last = std::min(j.end, first + j.step);
    inside_a_piece = true;
    try {
      if (first < last) j.body(j.context, first, last);
    } catch (...) {
      std::lock_guard<std::mutex> guard(j.lock);
      if (!j.failure) j.failure = std::current_exception();
    }
    inside_a_piece = false;
  };
  pool().load()->run(pieces, piece, &job);
  if (job.failure) std::rethrow_exception(job.failure);
}

}  // namespace precal::bindings
