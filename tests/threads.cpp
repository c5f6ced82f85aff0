// SPDX-License-Identifier: Apache-2.0
// Every op of cpu/ops.h on the pool of _C, for ThreadSanitizer (make tsan):
//   threads          each op with 1 to 8 threads, by every instruction set: the same bytes; then two callers at once
//   threads --race   a kernel that writes one counter from all threads: must be reported, or the run above means
//   nothing
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bindings/thread_pool.h"
#include "core/parallel.h"
#include "cpu/ops.h"
#include "cpu/select.h"

namespace {

using namespace precal;

constexpr int kMaxThreads = 8;

struct Tensor {
  TensorView view;
  std::vector<uint64_t> memory;  // aligned for every dtype

  Tensor() = default;
  explicit Tensor(const TensorSpec& spec) : memory(size_t(spec.numel() * dtype_bytes(spec.dtype) + 7) / 8) {
    static_cast<TensorSpec&>(view) = spec;
    view.data = memory.data();
    view.present = true;
  }
  Tensor(Tensor&&) = default;
  Tensor& operator=(Tensor&&) = default;

  template <typename T, typename Value>
  Tensor& fill(const Value& value) {
    for (int64_t i = 0; i < view.numel(); ++i) view.as<T>()[i] = T(value(i));
    return *this;
  }
  bool same(const Tensor& other) const { return memory == other.memory; }
};

bool g_failed = false;

void fail(const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  g_failed = true;
}

template <typename Op>
std::vector<Tensor> run(const char* name, const Op& op) {
  TensorSpec specs[Op::kOutputs];
  Status status = op.plan(specs);
  std::vector<Tensor> outputs;
  std::vector<TensorView> views;
  for (const TensorSpec& spec : specs) {
    outputs.emplace_back(spec);
    views.push_back(outputs.back().view);
  }
  if (status.ok()) status = op.run(views.data());
  if (!status.ok()) fail(std::string(name) + ": " + status.message());
  return outputs;
}

// The outputs with one thread, held against those with 2 to 8.
template <typename Op>
std::vector<Tensor> check(const char* name, const Op& op) {
  bindings::set_pool_threads(1);
  std::vector<Tensor> want = run(name, op);
  for (int threads = 2; threads <= kMaxThreads; ++threads) {
    bindings::set_pool_threads(threads);
    const std::vector<Tensor> got = run(name, op);
    for (size_t i = 0; i < want.size(); ++i) {
      if (!want[i].same(got[i])) fail(std::string(name) + ": other bytes with " + std::to_string(threads) + " threads");
    }
  }
  std::printf("%s ", name);
  return want;
}

// One matrix that every op cuts into pieces: 300 rows of 1000, 19 tiles, more elements than the coarsest grain, 2^18.
constexpr int64_t kN = 300, kK = 1000, kGroup = 50, kGroups = kK / kGroup;

void every_op() {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  Tensor w({DType::kFloat32, {kN, kK}});
  w.fill<float>([&](int64_t) { return 0.02f * normal(random); });
  const TensorView& W = w.view;

  check("soft_threshold", cpu::SoftThreshold{W, 1e-4});
  for (const char* scope : {"tensor", "row", "group"}) {
    for (const char* normalize : {"none", "row", "group"}) {
      const auto lam = check("salience_threshold", cpu::SalienceThreshold{W, 0.05, scope, kGroup, normalize});
      check("salience_mask", cpu::SalienceMask{W, lam[0].view, scope, kGroup, normalize});
    }
  }

  Tensor divisor({DType::kFloat32, {kN, kGroups}}), weight({DType::kInt64, {kN, kGroups}});
  Tensor label({DType::kUInt8, {kN, kK}}), salient({DType::kBool, {kN, kK}});
  divisor.fill<float>([&](int64_t) { return 1.0f + std::fabs(normal(random)); });
  weight.fill<int64_t>([](int64_t i) { return i % 5; });
  label.fill<uint8_t>([](int64_t i) { return i % 16; });
  salient.fill<bool>([&](int64_t i) { return std::fabs(W.as<float>()[i]) > 0.05f; });
  const TensorView none;
  check("histogram", cpu::Histogram{W, 64, -0.1, 0.1, divisor.view, weight.view, kGroup, label.view, 16});
  const auto counts = check("histogram", cpu::Histogram{W, 512, -0.1, 0.1, none, none, kGroup, none, 1});

  Tensor grid({DType::kInt8, {1, 16}}), trellis({DType::kInt8, {1, 32}});
  grid.fill<int8_t>([](int64_t i) { return -120 + 16 * i; });
  trellis.fill<int8_t>([](int64_t i) { return -124 + 8 * i; });
  check("spread_codes", cpu::SpreadCodes{counts[0].view, -128.0, 128.0, grid.view});
  check("kl_divergence", cpu::KlDivergence{counts[0].view, counts[0].view, 0.5});
  check("fit_grid", cpu::FitGrid{counts[0].view, -128.0, 128.0, grid.view, 0.1, 2});

  Tensor x({DType::kFloat32, {70, kK}}), bias({DType::kFloat32, {kN}});
  x.fill<float>([&](int64_t) { return normal(random); });
  bias.fill<float>([&](int64_t) { return normal(random); });
  for (int variant = 0; variant < 4; ++variant) {  // uniform, grid, trellis, split
    const bool split = variant == 3;
    const int64_t bits = 4, c = split ? 0 : 2;
    const TensorView levels = variant == 1 ? grid.view : variant == 2 ? trellis.view : none;
    const auto q = split ? check("quantize_split", cpu::QuantizeSplit{W, salient.view, bits, kGroup})
                         : check("quantize_groups",
                                 cpu::QuantizeGroups{W, levels, bits, kGroup, c, 1e-4, "e4m3", false, 0.6, 1.1});
    if (split) {
      const auto lam = check("salience_threshold", cpu::SalienceThreshold{W, 0.05, "group", kGroup, "none"});
      check("quantize_salient", cpu::QuantizeSalient{W, lam[0].view, bits, kGroup, "group"});
    }
    const auto packed = check("pack", cpu::Pack{q[0].view, bits});
    const auto codes = check("unpack", cpu::Unpack{packed[0].view, bits, kK});
    if (!codes[0].same(q[0])) fail("unpack: other codes than were packed");
    cpu::WeightTensors weights{packed[0].view, q[1].view, q[2].view, levels, none, none, none, none, kK, bits, kGroup};
    (split ? weights.outlier_scale : weights.outlier_index) = q[3].view;
    (split ? weights.mask : weights.outlier_value) = q[4].view;
    check("dequantize", cpu::Dequantize{weights});
    check("measure", cpu::Measure{W, weights, 64, 256.0});
    const auto prepacked = check("prepack", cpu::Prepack{weights});
    const cpu::PrepackedWeight whole{
        prepacked[0].view,         kN, kK, bits, kGroup, c, levels.present ? levels.numel() : 0, split,
        split ? "float16" : "e4m3"};
    check("unprepack", cpu::Unprepack{whole});
    for (const char* activations : {"f32", "a16", "a8"}) {
      check("linear", cpu::Linear{x.view, whole, bias.view, activations});
    }
  }
}

// Two callers share the weights, the pool's settings and the choice of kernels.
void two_callers() {
  Tensor w({DType::kFloat32, {kN, kK}});
  w.fill<float>([](int64_t i) { return float((i * 7919) % 1009) - 504.0f; });
  bindings::set_pool_threads(4);
  const auto want = run("quantize_groups", cpu::QuantizeGroups{w.view, {}, 4, kGroup, 1, 0.0, "e4m3", false, 0.6, 1.1});
  std::atomic<bool> equal{true};
  const auto call = [&] {
    for (int i = 0; i < 5; ++i) {
      const auto got =
          run("quantize_groups", cpu::QuantizeGroups{w.view, {}, 4, kGroup, 1, 0.0, "e4m3", false, 0.6, 1.1});
      for (size_t k = 0; k < want.size(); ++k) equal = equal && want[k].same(got[k]);
    }
  };
  std::thread other(call);
  for (int i = 0; i < 5; ++i) {  // settings may change under a call that is running
    bindings::set_pool_threads(1 + i);
    if (!cpu::force_isa(i % 2 ? "scalar" : "").ok()) fail("force_isa: refused");
  }
  call();
  other.join();
  if (!equal) fail("quantize_groups: other bytes with two callers");
}

int race() {
  int64_t counter = 0;
  bindings::set_pool_threads(kMaxThreads);
  parallel_for(0, 100000, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++counter;
  });
  std::printf("counted %lld\n", static_cast<long long>(counter));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  set_parallel_for(bindings::pool_parallel_for);
  if (argc > 1 && std::strcmp(argv[1], "--race") == 0) return race();
  std::string isas = cpu::supported_isas();
  std::replace(isas.begin(), isas.end(), ',', ' ');
  size_t begin = 0;
  while (begin < isas.size()) {
    const size_t end = std::min(isas.find(' ', begin), isas.size());
    const std::string isa = isas.substr(begin, end - begin);
    if (!cpu::force_isa(isa.c_str()).ok()) fail("force_isa: refused");
    std::printf("%s: ", isa.c_str());
    every_op();
    std::printf("\n");
    begin = end + 1;
  }
  two_callers();
  std::printf(g_failed ? "FAILED\n" : "two callers\nsame bytes with 1 to 8 threads\n");
  return g_failed ? 1 : 0;
}
