// SPDX-License-Identifier: Apache-2.0
#include "bench/limits.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(PRECAL_X86)
#include <immintrin.h>
#endif

#include "core/parallel.h"

namespace precal::bench {

namespace {

// Sums the 8-byte words of [p, p + words); words is a multiple of kReadStep.
using ReadFn = uint64_t (*)(const uint64_t* p, int64_t words);
// Adds up `steps` dot products of ones in every chain; returns the sum over all lanes of all chains.
using ComputeFn = double (*)(int64_t steps);

constexpr int64_t kReadStep = 8 * 8 * 4;  // words: 8 vectors of 64 bytes for each of 4 streams
// Latency 4 to 6 at two instructions a cycle needs 8 to 12 chains; 12 leave AVX2 registers for both operands.
constexpr int kChains = 12;
// The largest sum of a lane is 2 * kSteps + kChains: exact in float32.
constexpr int64_t kSteps = int64_t(1) << 20;
constexpr int kPrefetchAhead = 8 * 64;  // words: 4 KB

// Chains start apart (chain i at i) and the operands come out of volatile memory: equal chains would be merged into
// one, and constants folded.
volatile float g_one = 1.0f;
volatile int g_ones_u8 = 0x01010101;
volatile int g_start[kChains] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
constexpr int kStartSum = kChains * (kChains - 1) / 2;

uint64_t read_generic(const uint64_t* p, int64_t words) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i < words; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += p[i + j];
  }
  uint64_t sum = 0;
  for (uint64_t s : sums) sum += s;
  return sum;
}

// Plain C++, four lanes a chain, multiply and add apart: what a CPU without a faster path here is held against.
double fma_generic(int64_t steps) {
  const float a = g_one, b = g_one;
  float acc[kChains][4];
  for (int i = 0; i < kChains; ++i) {
    for (float& lane : acc[i]) lane = float(g_start[i]);
  }
  for (int64_t s = 0; s < steps; ++s) {
    for (auto& chain : acc) {
      for (float& lane : chain) lane += a * b;
    }
  }
  double sum = 0;
  for (auto& chain : acc) {
    for (float lane : chain) sum += lane;
  }
  return sum;
}

#if defined(PRECAL_X86)

#define PRECAL_TARGET(features) __attribute__((target(features)))
#define PRECAL_AVX512 PRECAL_TARGET("avx512f")

PRECAL_AVX512 uint64_t total(__m512i v) {
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, v);
  uint64_t sum = 0;
  for (uint64_t lane : lanes) sum += lane;
  return sum;
}

PRECAL_AVX512 double total(__m512 v) {
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, v);
  double sum = 0;
  for (float lane : lanes) sum += lane;
  return sum;
}

PRECAL_AVX512 uint64_t read_avx512(const uint64_t* p, int64_t words) {
  __m512i acc[8];
  for (__m512i& a : acc) a = _mm512_setzero_si512();
  for (int64_t i = 0; i < words; i += 64) {
    for (int j = 0; j < 8; ++j) acc[j] = _mm512_add_epi64(acc[j], _mm512_loadu_si512(p + i + j * 8));
  }
  for (int j = 1; j < 8; ++j) acc[0] = _mm512_add_epi64(acc[0], acc[j]);
  return total(acc[0]);
}

// Four streams keep more of the hardware's prefetchers busy; which of the two wins depends on the machine.
PRECAL_AVX512 uint64_t read4_avx512(const uint64_t* p, int64_t words) {
  const int64_t quarter = words / 4;
  __m512i acc[8];
  for (__m512i& a : acc) a = _mm512_setzero_si512();
  for (int64_t i = 0; i < quarter; i += 16) {
    for (int s = 0; s < 4; ++s) {
      const uint64_t* q = p + s * quarter + i;
      _mm_prefetch(reinterpret_cast<const char*>(q + kPrefetchAhead), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(q + kPrefetchAhead + 8), _MM_HINT_T0);
      acc[2 * s] = _mm512_add_epi64(acc[2 * s], _mm512_loadu_si512(q));
      acc[2 * s + 1] = _mm512_add_epi64(acc[2 * s + 1], _mm512_loadu_si512(q + 8));
    }
  }
  for (int j = 1; j < 8; ++j) acc[0] = _mm512_add_epi64(acc[0], acc[j]);
  return total(acc[0]);
}

PRECAL_TARGET("avx2") uint64_t read_avx2(const uint64_t* p, int64_t words) {
  __m256i acc[8];
  for (__m256i& a : acc) a = _mm256_setzero_si256();
  for (int64_t i = 0; i < words; i += 32) {
    for (int j = 0; j < 8; ++j) {
      acc[j] = _mm256_add_epi64(acc[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + j * 4)));
    }
  }
  for (int j = 1; j < 8; ++j) acc[0] = _mm256_add_epi64(acc[0], acc[j]);
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), acc[0]);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

PRECAL_AVX512 double fma_avx512(int64_t steps) {
  const __m512 a = _mm512_set1_ps(g_one), b = _mm512_set1_ps(g_one);
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(float(g_start[i]));
  for (int64_t s = 0; s < steps; ++s) {
    for (__m512& chain : acc) chain = _mm512_fmadd_ps(a, b, chain);
  }
  double sum = 0;
  for (const __m512& chain : acc) sum += total(chain);
  return sum;
}

PRECAL_TARGET("avx2,fma") double fma_avx2(int64_t steps) {
  const __m256 a = _mm256_set1_ps(g_one), b = _mm256_set1_ps(g_one);
  __m256 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_ps(float(g_start[i]));
  for (int64_t s = 0; s < steps; ++s) {
    for (__m256& chain : acc) chain = _mm256_fmadd_ps(a, b, chain);
  }
  double sum = 0;
  for (const __m256& chain : acc) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, chain);
    for (float lane : lanes) sum += lane;
  }
  return sum;
}

PRECAL_TARGET("avx512f,avx512vl,avx512bw,avx512bf16") double bf16_dot_avx512(int64_t steps) {
  const __m512 ones = _mm512_set1_ps(g_one);
  const __m512bh a = _mm512_cvtne2ps_pbh(ones, ones), b = _mm512_cvtne2ps_pbh(ones, ones);
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(float(g_start[i]));
  for (int64_t s = 0; s < steps; ++s) {
    for (__m512& chain : acc) chain = _mm512_dpbf16_ps(chain, a, b);
  }
  double sum = 0;
  for (const __m512& chain : acc) sum += total(chain);
  return sum;
}

PRECAL_TARGET("avx512f,avx512vnni") double int8_dot_avx512(int64_t steps) {
  const __m512i a = _mm512_set1_epi32(g_ones_u8), b = _mm512_set1_epi32(g_ones_u8);
  __m512i acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_epi32(g_start[i]);
  for (int64_t s = 0; s < steps; ++s) {
    for (__m512i& chain : acc) chain = _mm512_dpbusd_epi32(chain, a, b);
  }
  double sum = 0;
  for (const __m512i& chain : acc) {
    alignas(64) int32_t lanes[16];
    _mm512_store_si512(lanes, chain);
    for (int32_t lane : lanes) sum += lane;
  }
  return sum;
}

bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_bf16() {
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512bf16");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

#endif
bool always() { return true; }

struct Reader {
  const char* isa;
  ReadFn run;
  bool (*supported)();
};
struct Computer {
  const char* name;
  const char* isa;
  const char* instruction;
  ComputeFn run;
  int lanes;     // of a chain
  int products;  // that an instruction adds into a lane
  bool (*supported)();
};

// Best first.
const Reader kReaders[] = {
#if defined(PRECAL_X86)
    {"avx512", read_avx512, has_avx512},
    {"avx512", read4_avx512, has_avx512},
    {"avx2", read_avx2, has_avx2},
#endif
    {"generic", read_generic, always},
};
const Computer kComputers[] = {
#if defined(PRECAL_X86)
    {"fp32_fma", "avx512", "vfmadd (AVX-512)", fma_avx512, 16, 1, has_avx512},
    {"fp32_fma", "avx2", "vfmadd (FMA3)", fma_avx2, 8, 1, has_avx2},
    {"bf16_dot", "avx512", "vdpbf16ps (AVX512_BF16)", bf16_dot_avx512, 16, 2, has_bf16},
    {"int8_dot", "avx512", "vpdpbusd (AVX512_VNNI)", int8_dot_avx512, 16, 4, has_vnni},
#endif
    {"fp32_fma", "generic", "plain C++", fma_generic, 4, 1, always},
};

// Pages of its own, huge ones where the system allows: a limit should not be the limit of the TLB.
class Buffer {
 public:
  ~Buffer() { release(); }
  uint64_t* get(int64_t bytes) {
    if (bytes > size_) {
      release();
      constexpr size_t kHugePage = size_t(1) << 21;
      void* p = nullptr;
      if (posix_memalign(&p, kHugePage, size_t(bytes)) != 0) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
      madvise(p, size_t(bytes), MADV_HUGEPAGE);
#endif
      data_ = static_cast<uint64_t*>(p);
      size_ = bytes;
      fresh_ = true;
    }
    return data_;
  }
  // Whether nobody has asked this since the memory was allocated.
  bool fresh() { return std::exchange(fresh_, false); }

 private:
  void release() {
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  uint64_t* data_ = nullptr;
  int64_t size_ = 0;
  bool fresh_ = false;
};

template <typename Body>
double seconds_of(const Body& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + long(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Passes of one kind until the time is over: the median rate in units of `work` per second.
template <typename Pass>
Status measure(double seconds, double work, const Pass& pass, double* rate, int64_t* passes) {
  std::vector<double> times;
  double spent = 0;
  do {
    Status status;
    const double t = seconds_of([&] { status = pass(); });
    PRECAL_RETURN_IF_ERROR(status);
    times.push_back(t);
    spent += t;
  } while (spent < seconds || times.size() < 3);
  *rate = work / median(times);
  *passes += int64_t(times.size());
  return {};
}

Status wrong_result(const LimitRequest& request) {
  return {StatusCode::kUnavailable, concat("measure_limit: ", request.name, " computed a wrong result")};
}

int64_t words_per_thread(const LimitRequest& request) {
  return request.bytes / 8 / request.threads / kReadStep * kReadStep;
}

Status measure_read(const LimitRequest& request, LimitResult* result) {
  static Buffer buffer;
  const int64_t words = words_per_thread(request);
  uint64_t* p = buffer.get(request.bytes);
  if (p == nullptr) return invalid_value("measure_limit: ", request.bytes, " bytes must be available, they are not");
  if (buffer.fresh()) std::fill_n(p, request.bytes / 8, uint64_t(1));
  int kinds = 0;
  for (const Reader& reader : kReaders) {
    if (reader.supported() && reader.isa == result->isa) ++kinds;
  }
  for (const Reader& reader : kReaders) {
    if (!reader.supported() || reader.isa != result->isa) continue;
    double rate = 0;
    PRECAL_RETURN_IF_ERROR(measure(
        request.seconds / kinds, double(words) * 8 * request.threads * 1e-9,
        [&]() -> Status {
          std::atomic<uint64_t> sum{0};
          parallel_for(0, request.threads, 1, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) sum += reader.run(p + t * words, words);
          });
          return sum == uint64_t(words) * uint64_t(request.threads) ? Status() : wrong_result(request);
        },
        &rate, &result->passes));
    result->value = std::max(result->value, rate);
  }
  result->unit = "GB/s";
  return {};
}

Status measure_copy(const LimitRequest& request, LimitResult* result) {
  static Buffer from, to;
  const int64_t words = words_per_thread(request);
  uint64_t *source = from.get(request.bytes), *target = to.get(request.bytes);
  if (source == nullptr || target == nullptr)
    return invalid_value("measure_limit: 2 x ", request.bytes, " bytes must be available, they are not");
  if (from.fresh()) std::fill_n(source, request.bytes / 8, uint64_t(1));
  if (to.fresh()) std::fill_n(target, request.bytes / 8, uint64_t(0));
  uint64_t stamp = 2;  // a word of each share changes with every pass, so that the copy can be checked
  result->unit = "GB/s";
  return measure(
      request.seconds, double(words) * 8 * request.threads * 1e-9,
      [&]() -> Status {
        ++stamp;
        for (int t = 0; t < request.threads; ++t) source[(t + 1) * words - 1] = stamp;
        parallel_for(0, request.threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) std::memcpy(target + t * words, source + t * words, size_t(words) * 8);
        });
        for (int t = 0; t < request.threads; ++t) {
          if (target[(t + 1) * words - 1] != stamp) return wrong_result(request);
        }
        return {};
      },
      &result->value, &result->passes);
}

Status measure_compute(const LimitRequest& request, const Computer& computer, LimitResult* result) {
  const double lanes_all = double(kChains) * computer.lanes;
  const double expected = lanes_all * computer.products * kSteps + double(computer.lanes) * kStartSum;
  result->unit = "Gop/s";
  return measure(
      request.seconds, 2 * lanes_all * computer.products * kSteps * request.threads * 1e-9,
      [&]() -> Status {
        std::atomic<int> wrong{0};
        parallel_for(0, request.threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) wrong += computer.run(kSteps) != expected;
        });
        return wrong == 0 ? Status() : wrong_result(request);
      },
      &result->value, &result->passes);
}

Status unavailable(const LimitRequest& request, const std::string& needs) {
  return {StatusCode::kUnavailable,
          concat("measure_limit: ", request.name, " needs ", needs, ", which this CPU or this build does not have")};
}

}  // namespace

const char* limit_names() { return "dram_read,copy,fp32_fma,bf16_dot,int8_dot"; }

Status measure_limit(const LimitRequest& request, LimitResult* result) {
  const std::string& name = request.name;
  const bool memory = name == "dram_read" || name == "copy";
  if (!memory && name != "fp32_fma" && name != "bf16_dot" && name != "int8_dot")
    return invalid_value("measure_limit: name must be one of ", limit_names(), ", got ", name);
  if (!request.isa.empty() && request.isa != "avx512" && request.isa != "avx2" && request.isa != "generic")
    return invalid_value("measure_limit: isa must be avx512, avx2, generic or empty, got ", request.isa);
  if (!(request.seconds > 0) || request.seconds > 60)
    return invalid_value("measure_limit: seconds must lie in (0, 60], got ", request.seconds);
  if (memory && words_per_thread(request) < kReadStep)
    return invalid_value("measure_limit: megabytes must give every one of ", request.threads, " threads ",
                         kReadStep * 8, " bytes, got ", request.bytes >> 20, " MB");
  *result = LimitResult();
  if (name == "copy") {
    if (!request.isa.empty()) return invalid_value("measure_limit: copy is memcpy; isa must be empty");
    result->isa = "memcpy";
    return measure_copy(request, result);
  }
  if (name == "dram_read") {
    for (const Reader& reader : kReaders) {
      if (!reader.supported() || (!request.isa.empty() && request.isa != reader.isa)) continue;
      result->isa = reader.isa;
      return measure_read(request, result);
    }
    return unavailable(request, request.isa);
  }
  std::string needs, forms;
  for (const Computer& computer : kComputers) {
    if (name != computer.name) continue;
    forms += (forms.empty() ? "" : ", ") + std::string(computer.isa);
    if (!request.isa.empty() && request.isa != computer.isa) continue;
    needs = computer.instruction;
    if (!computer.supported()) continue;
    result->isa = computer.isa;
    return measure_compute(request, computer, result);
  }
  if (!needs.empty()) return unavailable(request, needs);
  if (forms.empty()) return unavailable(request, "x86-64 with AVX-512");
  return invalid_value("measure_limit: isa must be one of those that ", name, " has (", forms, "), got ", request.isa);
}

}  // namespace precal::bench
