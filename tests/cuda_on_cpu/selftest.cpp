// SPDX-License-Identifier: Apache-2.0
// Kernels that are right, and kernels with one fault each, for the shim itself:  selftest CASE SEED
// Ends with 0 and "right", or with 1 and what was found. Compiled by nvcc (bench/gpu_day.sh) the right ones run on a
// GPU, and so hold ptx.cuh against what ptx_host.h computes.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "format/e4m3.h"

namespace precal::cuda {

Status check_cuda(const char* op, cudaError_t error) {
  return error == cudaSuccess ? Status()
                              : Status(StatusCode::kUnavailable, concat(op, ": ", cudaGetErrorString(error)));
}

namespace {

constexpr int kThreads = 96, kBlocks = 4;

struct Params {
  const uint32_t* in;
  uint32_t* out;
  uint32_t* partial;
  uint32_t* counter;
};

void require(bool good, const char* what) {
  if (!good) throw std::runtime_error(std::string("wrong result: ") + what);
}

#if defined(PRECAL_CUDA_ON_CPU)

using cuda_on_cpu::set_seed;

struct Array {
  std::vector<uint32_t> values;
  explicit Array(const std::vector<uint32_t>& v) : values(v) {}
  uint32_t* data() { return values.data(); }
  void copy_to(std::vector<uint32_t>* out) { *out = values; }
};

#else

void set_seed(uint64_t) {}

void must(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct Array {
  uint32_t* memory = nullptr;
  size_t bytes;
  explicit Array(const std::vector<uint32_t>& v) : bytes(v.size() * 4) {
    must(cudaMalloc(&memory, bytes));
    must(cudaMemcpy(memory, v.data(), bytes, cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  ~Array() { (void)cudaFree(memory); }
  uint32_t* data() { return memory; }
  void copy_to(std::vector<uint32_t>* out) {
    must(cudaDeviceSynchronize());
    must(cudaMemcpy(out->data(), memory, bytes, cudaMemcpyDeviceToHost));
  }
};

#endif

void run_on(void (*kernel)(Params), int blocks, int threads, int64_t shared_bytes, std::vector<uint32_t>* out,
            const std::vector<uint32_t>& in) {
  Array from(in), to(*out), partial(std::vector<uint32_t>(1024, 0xFFFFFFFFu)), counter(std::vector<uint32_t>(4, 0));
  const Params p{from.data(), to.data(), partial.data(), counter.data()};
  const Status status = launch("selftest", kernel, dim3(unsigned(blocks)), threads, shared_bytes, nullptr, p);
  require(status.ok(), status.message().c_str());
  to.copy_to(out);
}

std::vector<uint32_t> numbers(size_t n) {
  std::vector<uint32_t> v(n);
  for (size_t i = 0; i < n; ++i) v[i] = uint32_t(i * 2654435761u >> 7);
  return v;
}

// ---- a sum over the block through shared memory --------------------------------------------------------------------
struct Sums {
  uint32_t lane[kThreads];
};

template <bool kFirstBarrier, bool kSecondBarrier>
__global__ void block_sum(Params p) {
  PRECAL_SHARED(Sums, s);
  const int i = int(threadIdx.x);
  for (int round = 0; round < 2; ++round) {
    s.lane[i] = p.in[round * kThreads + i];
    if (kFirstBarrier) __syncthreads();
    uint32_t sum = 0;
    for (int j = 0; j < kThreads; ++j) sum += s.lane[j];
    p.out[(int(blockIdx.x) * 2 + round) * kThreads + i] = sum;
    if (kSecondBarrier) __syncthreads();
  }
}

template <bool kFirst, bool kSecond>
void sum_case() {
  const std::vector<uint32_t> in = numbers(2 * kThreads);
  std::vector<uint32_t> out(2 * kBlocks * kThreads, 0);
  run_on(block_sum<kFirst, kSecond>, kBlocks, kThreads, 0, &out, in);
  for (size_t i = 0; i < out.size(); ++i) {
    uint32_t sum = 0;
    for (size_t j = 0; j < kThreads; ++j) sum += in[i / kThreads % 2 * kThreads + j];
    require(out[i] == sum, "block_sum");
  }
}

// ---- a race that no order of these threads shows in the result -----------------------------------------------------
__global__ void same_value(Params p) {
  PRECAL_SHARED(uint32_t, flag);
  if (p.in[threadIdx.x] % 2 == 0) flag = 1;  // several threads, one value
  __syncthreads();
  p.out[threadIdx.x] = flag;
}

void same_value_case() {
  std::vector<uint32_t> out(kThreads, 0);
  run_on(same_value, 1, kThreads, 0, &out, numbers(kThreads));
  require(out[5] == 1, "same_value");
}

// ---- inside a warp -------------------------------------------------------------------------------------------------
template <bool kSync>
__global__ void warp_reverse(Params p) {
  uint32_t* s = dynamic_shared<uint32_t>();
  const int lane = int(threadIdx.x) % 32, base = int(threadIdx.x) - lane;
  s[threadIdx.x] = p.in[threadIdx.x];
  if (kSync) __syncwarp();
  uint32_t v = s[base + 31 - lane];
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, d);
  p.out[threadIdx.x] = v + __ballot_sync(0xFFFFFFFFu, lane < 3);
}

template <bool kSync>
void warp_case() {
  const std::vector<uint32_t> in = numbers(kThreads);
  std::vector<uint32_t> out(kThreads, 0);
  run_on(warp_reverse<kSync>, 1, kThreads, kThreads * 4, &out, in);
  for (size_t i = 0; i < kThreads; ++i) {
    uint32_t sum = 7;
    for (size_t j = 0; j < 32; ++j) sum += in[i / 32 * 32 + j];
    require(out[i] == sum, "warp_reverse");
  }
}

// ---- partial sums of several blocks, finished by the last ----------------------------------------------------------
template <bool kRelease, bool kAcquire>
__global__ void last_arriver(Params p) {
  PRECAL_SHARED(uint32_t, ticket);
  p.partial[blockIdx.x * kThreads + threadIdx.x] = p.in[blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kRelease) __threadfence();
    ticket = atomicAdd(p.counter, 1u);
    if (kAcquire) __threadfence();
  }
  __syncthreads();
  if (ticket + 1 != gridDim.x) return;
  uint32_t sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += p.partial[b * kThreads + threadIdx.x];
  p.out[threadIdx.x] = sum;
}

template <bool kRelease, bool kAcquire>
void last_arriver_case() {
  const std::vector<uint32_t> in = numbers(kBlocks * kThreads);
  std::vector<uint32_t> out(kThreads, 0);
  run_on(last_arriver<kRelease, kAcquire>, kBlocks, kThreads, 0, &out, in);
  for (size_t i = 0; i < kThreads; ++i) {
    uint32_t sum = 0;
    for (size_t b = 0; b < kBlocks; ++b) sum += in[b * kThreads + i];
    require(out[i] == sum, "last_arriver");
  }
}

// ---- cp.async ------------------------------------------------------------------------------------------------------
template <int kLeft, bool kBarrier>
__global__ void copies(Params p) {
  uint4* s = dynamic_shared<uint4>();  // two stages of a warp
  const uint4* in = reinterpret_cast<const uint4*>(p.in);
  const int lane = int(threadIdx.x);
  uint32_t sum = 0;
  ptx::cp_async16(&s[lane], &in[lane], 16);
  ptx::cp_async_commit();
  for (int i = 0; i < 4; ++i) {
    if (i < 3) ptx::cp_async16(&s[(i + 1) % 2 * 32 + lane], &in[(i + 1) * 32 + lane], i == 2 ? 8 : 16);
    ptx::cp_async_commit();
    ptx::cp_async_wait<kLeft>();
    if (kBarrier) __syncthreads();
    const uint4 v = s[i % 2 * 32 + 31 - lane];
    sum += v.x + v.y + v.z + v.w;
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
  p.out[lane] = sum;
}

template <int kLeft, bool kBarrier>
void copies_case() {
  const std::vector<uint32_t> in = numbers(4 * 32 * 4);
  std::vector<uint32_t> out(32, 0);
  run_on(copies<kLeft, kBarrier>, 1, 32, 2 * 32 * 16, &out, in);
  for (size_t lane = 0; lane < 32; ++lane) {
    uint32_t sum = 0;
    for (size_t i = 0; i < 4; ++i) {
      for (size_t j = 0; j < (i == 3 ? 2 : 4); ++j) sum += in[(i * 32 + 31 - lane) * 4 + j];
    }
    require(out[lane] == sum, "copies");
  }
}

// ---- ldmatrix and mma: c = a b over 16 x 16 x 8 --------------------------------------------------------------------
template <bool kHalf>
__global__ void matrix_product(Params p) {
  uint16_t* s = dynamic_shared<uint16_t>();  // a [16][16], then b transposed [8][16]
  const int lane = int(threadIdx.x), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 24 * 16; i += 32) {
    const float value = float(int(p.in[i] % 17) - 8);
    s[i] = kHalf ? float_to_half(value) : float_to_bf16(value);
  }
  __syncthreads();
  uint32_t a[4], bb[4];
  ptx::ldmatrix_x4(a, s + (lane % 16) * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4(bb, s + (16 + lane % 8) * 16 + lane / 8 % 2 * 8);
  const uint32_t b[2] = {bb[0], bb[1]};
  float c[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  if (kHalf) {
    ptx::mma_f16(c, a, b);
  } else {
    ptx::mma_bf16(c, a, b);
  }
  for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = uint32_t(int(c[i]) - i - 1);
}

template <bool kHalf>
void matrix_case() {
  const std::vector<uint32_t> in = numbers(24 * 16);
  std::vector<uint32_t> out(16 * 8, 0);
  run_on(matrix_product<kHalf>, 1, 32, 24 * 16 * 2, &out, in);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int sum = 0;
      for (int k = 0; k < 16; ++k) {
        sum += (int(in[size_t(row * 16 + k)] % 17) - 8) * (int(in[size_t((16 + column) * 16 + k)] % 17) - 8);
      }
      require(int(out[size_t(row * 8 + column)]) == sum, "matrix_product");
    }
  }
}

// ---- conversions: every e4m3 but NaN, in both places, and floats to 16 bits ----------------------------------------
__global__ void conversions(Params p) {
  const uint32_t i = blockIdx.x * unsigned(kThreads) + threadIdx.x;
  if (i >= 65536u) return;
  p.out[i] = ptx::unpack_e4m3x2(uint16_t(i));
  p.out[65536u + i] = ptx::pack_bf16(bits_float(p.in[2 * i]), bits_float(p.in[2 * i + 1]));
  p.out[2 * 65536u + i] = ptx::pack_f16(float(i) * 0.37f, -float(i) * 1e-7f);
  p.out[3 * 65536u + i] = float_bits(ptx::unpack_f16(uint16_t(i)));
}

void conversions_case() {
  std::vector<uint32_t> in = numbers(2 * 65536);
  for (uint32_t& v : in) v &= 0xBFFFFFFFu;  // finite
  std::vector<uint32_t> out(4 * 65536, 0);
  run_on(conversions, (65536 + kThreads - 1) / kThreads, kThreads, 0, &out, in);
  const auto half = [](uint32_t code) { return uint32_t(float_to_half(format::e4m3_to_float(uint8_t(code)))); };
  for (uint32_t i = 0; i < 65536; ++i) {
    const bool number = !format::e4m3_is_nan(uint8_t(i)) && !format::e4m3_is_nan(uint8_t(i >> 8));
    require(!number || out[i] == (half(i & 0xFFu) | half(i >> 8) << 16), "unpack_e4m3x2");
    const uint32_t low = float_to_bf16(bits_float(in[2 * i])), high = float_to_bf16(bits_float(in[2 * i + 1]));
    require(out[65536 + i] == (low | high << 16), "pack_bf16");
    const uint32_t first = float_to_half(float(i) * 0.37f), second = float_to_half(-float(i) * 1e-7f);
    require(out[2 * 65536 + i] == (first | second << 16), "pack_f16");
    const bool finite = (i & 0x7C00u) != 0x7C00u;
    require(!finite || out[3 * 65536 + i] == float_bits(half_to_float(uint16_t(i))), "unpack_f16");
  }
}

// ---- threads that do not meet --------------------------------------------------------------------------------------
__global__ void early_return(Params p) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  p.out[threadIdx.x] = 1;
}
__global__ void two_barriers(Params p) {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p.out[threadIdx.x] = 1;
}
__global__ void lost_lane(Params p) {
  uint32_t v = p.in[threadIdx.x];
  if (threadIdx.x % 32 != 5) v = __shfl_xor_sync(0xFFFFFFFFu, v, 1);
  __syncthreads();
  p.out[threadIdx.x] = v;
}
__global__ void past_the_end(Params p) {
  uint32_t* s = dynamic_shared<uint32_t>();
  s[threadIdx.x + 1] = p.in[threadIdx.x];
  __syncthreads();
  p.out[threadIdx.x] = s[threadIdx.x];
}
__global__ void never_written(Params p) {
  uint32_t* s = dynamic_shared<uint32_t>();
  p.out[threadIdx.x] = s[threadIdx.x];
}

template <void (*kKernel)(Params)>
void plain_case() {
  std::vector<uint32_t> out(kThreads, 0);
  run_on(kKernel, 1, kThreads, kThreads * 4, &out, numbers(kThreads));
  for (uint32_t v : out) require(v != 0xFFFFFFFFu, "shared memory nobody wrote");
}

const std::map<std::string, void (*)()> kCases = {
    {"block_sum", sum_case<true, true>},
    {"warp_reverse", warp_case<true>},
    {"last_arriver", last_arriver_case<true, true>},
    {"copies", copies_case<1, true>},
    {"matrix_bf16", matrix_case<false>},
    {"matrix_f16", matrix_case<true>},
    {"conversions", conversions_case},
#if defined(PRECAL_CUDA_ON_CPU)
    {"no_first_barrier", sum_case<false, true>},
    {"no_second_barrier", sum_case<true, false>},
    {"same_value", same_value_case},
    {"no_syncwarp", warp_case<false>},
    {"no_release", last_arriver_case<false, true>},
    {"no_acquire", last_arriver_case<true, false>},
    {"no_wait", copies_case<2, true>},
    {"no_barrier_after_wait", copies_case<1, false>},
    {"early_return", plain_case<early_return>},
    {"two_barriers", plain_case<two_barriers>},
    {"lost_lane", plain_case<lost_lane>},
    {"past_the_end", plain_case<past_the_end>},
    {"never_written", plain_case<never_written>},
#endif
};

}  // namespace
}  // namespace precal::cuda

int main(int argc, char** argv) {
  if (argc != 3) {
    for (const auto& item : precal::cuda::kCases) std::printf("%s\n", item.first.c_str());
    return 2;
  }
  precal::cuda::set_seed(std::strtoull(argv[2], nullptr, 10));
  try {
    precal::cuda::kCases.at(argv[1])();
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("right\n");
  return 0;
}
