// SPDX-License-Identifier: Apache-2.0
// Every op on a GPU, for both bindings: what it accepts and what comes out is the CPU op's plan() wherever the tensors
// mean the same; launch() puts the kernels on a stream. Nothing is synchronised, so nothing that only the values of a
// tensor could show is refused here: precal_ext/ops.py says what happens instead.
#pragma once

#include "cpu/ops.h"
#include "cuda/kernels.h"

namespace precal::bindings::gpu {

// Scratch that the caller allocates, on the device, 16-byte aligned.
struct NoWorkspace {
  int64_t workspace_bytes() const { return 0; }
};

struct SoftThreshold : cpu::SoftThreshold, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct SalienceThreshold : cpu::SalienceThreshold {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct SalienceMask : cpu::SalienceMask {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct SpreadCodes : cpu::SpreadCodes, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct KlDivergence : cpu::KlDivergence, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct FitGrid : cpu::FitGrid {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Histogram : cpu::Histogram, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct QuantizeGroups : cpu::QuantizeGroups {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct QuantizeSplit : cpu::QuantizeSplit {
  int64_t workspace_bytes() const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Pack : cpu::Pack, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Unpack : cpu::Unpack, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Dequantize : cpu::Dequantize, NoWorkspace {
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
};

struct Prepack : NoWorkspace {
  static constexpr int kOutputs = 1;
  cpu::WeightTensors weight;
  explicit Prepack(cpu::WeightTensors w) : weight(std::move(w)) {}
  Status plan(TensorSpec* out) const;
  Status launch(const TensorView* out, void* workspace, cudaStream_t stream) const;
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
};

}  // namespace precal::bindings::gpu
