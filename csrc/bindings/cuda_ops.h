// SPDX-License-Identifier: Apache-2.0
// Every op on a GPU, for both bindings: what it accepts and what comes out is the CPU op's plan() wherever the tensors
// mean the same; launch() puts the kernels on a stream and waits for nothing. What only the values of a tensor show is
// refused by verify(), which waits for the device: ops that run while a model is quantized or loaded have one, and
// torch's binding calls it unless a graph is being captured. precal_ext/ops.py says what happens without.
#pragma once

#include <type_traits>

#include "cpu/ops.h"
#include "cuda/kernels.h"

namespace precal::bindings::gpu {

// Scratch that the caller allocates, on the device, 16-byte aligned.
struct NoWorkspace {
  int64_t workspace_bytes() const { return 0; }
};

// Of ops that have one: for after the launch; `flag` is four bytes on the device.
#define PRECAL_VERIFY Status verify(const TensorView* out, uint32_t* flag, cudaStream_t stream) const

struct SoftThreshold : cpu::SoftThreshold, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct SalienceThreshold : cpu::SalienceThreshold {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct SalienceMask : cpu::SalienceMask {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct SpreadCodes : cpu::SpreadCodes, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct KlDivergence : cpu::KlDivergence, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct FitGrid : cpu::FitGrid {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct Histogram : cpu::Histogram, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct QuantizeGroups : cpu::QuantizeGroups {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct QuantizeSplit : cpu::QuantizeSplit {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

// Mask and codes pass through the workspace.
struct QuantizeSalient : cpu::QuantizeSalient {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct Pack : cpu::Pack, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct Unpack : cpu::Unpack, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Dequantize : cpu::Dequantize, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Measure : cpu::Measure, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Prepack : NoWorkspace {
  static constexpr int kOutputs = 1;
  cpu::WeightTensors weight;
  explicit Prepack(cpu::WeightTensors w) : weight(std::move(w)) {}
  Status plan(TensorSpec* out) const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  PRECAL_VERIFY;
};

struct Unprepack : NoWorkspace {
  static constexpr int kOutputs = 8;
  cpu::PrepackedWeight weight;
  explicit Unprepack(cpu::PrepackedWeight w) : weight(std::move(w)) {}
  Status plan(TensorSpec* out) const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Linear {
  static constexpr int kOutputs = 1;
  TensorView x;
  cpu::PrepackedWeight weight;
  TensorView bias;          // optional
  std::string activations;  // f32, a16, a8: how a CPU may round x; a GPU takes it as it is
  Status plan(TensorSpec* out) const;
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
  // Whether torch's product of dense matrices is faster (cuda/linear_config.h).
  Status prefers_dense(bool* dense) const;
};

// Rows of W' in the dtype of the activations: the first half of linear by a product of dense matrices.
struct DenseRows : NoWorkspace {
  static constexpr int kOutputs = 1;
  cpu::PrepackedWeight weight;
  DType dtype;
  int64_t first_row, rows;
  DenseRows(cpu::PrepackedWeight w, DType type, int64_t first, int64_t count)
      : weight(std::move(w)), dtype(type), first_row(first), rows(count) {}
  Status plan(TensorSpec* out) const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

#undef PRECAL_VERIFY

template <typename Op, typename = void>
struct HasVerify : std::false_type {};
template <typename Op>
struct HasVerify<Op, std::void_t<decltype(&Op::verify)>> : std::true_type {};

}  // namespace precal::bindings::gpu
