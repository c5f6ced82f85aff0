// SPDX-License-Identifier: Apache-2.0
// What only the values of a tensor show, on a GPU: a kernel finds that something is wrong, and the CPU's op, on copies
// of the tensors, says what. So both refuse the same in the same words.
#include <initializer_list>
#include <vector>

#include "bindings/cuda_ops.h"

namespace precal::bindings::gpu {

namespace {

using cuda::ValueCheck;
using cuda::ValueRule;

ValueCheck rule(const TensorView& t, ValueRule r, int64_t limit = 0) {
  return {t.data, t.dtype, t.present ? t.numel() : 0, r, limit};
}

// Whether one of the rules is broken; waits for the device.
Status find(const char* op, std::initializer_list<ValueCheck> checks, uint32_t* flag, cudaStream_t stream, bool* bad) {
  uint32_t found = 0;
  PRECAL_RETURN_IF_ERROR(cuda::check_cuda(op, cudaMemsetAsync(flag, 0, sizeof(*flag), stream)));
  for (const ValueCheck& check : checks) {
    PRECAL_RETURN_IF_ERROR(cuda::launch_check_values(op, check, flag, stream));
  }
  PRECAL_RETURN_IF_ERROR(
      cuda::check_cuda(op, cudaMemcpyAsync(&found, flag, sizeof(found), cudaMemcpyDeviceToHost, stream)));
  PRECAL_RETURN_IF_ERROR(cuda::check_cuda(op, cudaStreamSynchronize(stream)));
  *bad = found != 0;
  return {};
}

using Memory = std::vector<std::vector<uint8_t>>;

uint8_t* allocate(int64_t bytes, Memory* memory) {
  memory->emplace_back(size_t(bytes > 0 ? bytes : 1));
  return memory->back().data();
}

// What the CPU's op says of `op`, whose tensors `inputs` are.
template <typename Op>
Status ask_cpu(const char* name, Op op, std::initializer_list<TensorView Op::*> inputs, cudaStream_t stream) {
  Memory memory;
  for (TensorView Op::* input : inputs) {
    TensorView& t = op.*input;
    if (!t.present) continue;
    const int64_t bytes = t.numel() * dtype_bytes(t.dtype);
    uint8_t* copy = allocate(bytes, &memory);
    PRECAL_RETURN_IF_ERROR(
        cuda::check_cuda(name, cudaMemcpyAsync(copy, t.data, size_t(bytes), cudaMemcpyDeviceToHost, stream)));
    t.data = copy;
  }
  PRECAL_RETURN_IF_ERROR(cuda::check_cuda(name, cudaStreamSynchronize(stream)));
  TensorSpec specs[Op::kOutputs];
  PRECAL_RETURN_IF_ERROR(op.plan(specs));
  TensorView outputs[Op::kOutputs];
  for (int i = 0; i < Op::kOutputs; ++i) {
    int64_t count = 1;
    outputs[i].dtype = specs[i].dtype;
    outputs[i].ndim = specs[i].ndim;
    for (int d = 0; d < specs[i].ndim; ++d) count *= outputs[i].shape[d] = specs[i].shape[d];
    outputs[i].data = allocate(count * dtype_bytes(specs[i].dtype), &memory);
    outputs[i].present = outputs[i].contiguous = true;
  }
  return op.run(outputs);
}

}  // namespace

Status SalienceThreshold::verify(const TensorView* out, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;  // a unit with a weight that is not finite has lam = NaN
  PRECAL_RETURN_IF_ERROR(find("salience_threshold", {rule(out[0], ValueRule::kNotNan)}, flag, stream, &bad));
  using Op = cpu::SalienceThreshold;
  return bad ? ask_cpu<Op>("salience_threshold", *this, {&Op::w}, stream) : Status();
}

Status SalienceMask::verify(const TensorView*, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(find("salience_mask", {rule(w, ValueRule::kFinite)}, flag, stream, &bad));
  using Op = cpu::SalienceMask;
  return bad ? ask_cpu<Op>("salience_mask", *this, {&Op::w, &Op::lam}, stream) : Status();
}

Status SpreadCodes::verify(const TensorView*, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(find("spread_codes", {rule(counts, ValueRule::kNotNegative), rule(grid, ValueRule::kLevels)},
                              flag, stream, &bad));
  using Op = cpu::SpreadCodes;
  return bad ? ask_cpu<Op>("spread_codes", *this, {&Op::counts, &Op::grid}, stream) : Status();
}

Status KlDivergence::verify(const TensorView*, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(
      find("kl_divergence", {rule(p, ValueRule::kNotNegative), rule(q, ValueRule::kNotNegative)}, flag, stream, &bad));
  using Op = cpu::KlDivergence;
  return bad ? ask_cpu<Op>("kl_divergence", *this, {&Op::p, &Op::q}, stream) : Status();
}

Status FitGrid::verify(const TensorView*, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(
      find("fit_grid", {rule(counts, ValueRule::kNotNegative), rule(grid, ValueRule::kLevels)}, flag, stream, &bad));
  using Op = cpu::FitGrid;
  return bad ? ask_cpu<Op>("fit_grid", *this, {&Op::counts, &Op::grid}, stream) : Status();
}

Status Histogram::verify(const TensorView*, uint32_t* flag, cudaStream_t stream) const {
  if (!weight.present && !label.present) return {};
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(
      find("histogram",
           {rule(weight, ValueRule::kBelow, (int64_t(1) << 31) + 1), rule(label, ValueRule::kBelow, num_labels)}, flag,
           stream, &bad));
  using Op = cpu::Histogram;
  return bad ? ask_cpu<Op>("histogram", *this, {&Op::w, &Op::divisor, &Op::weight, &Op::label}, stream) : Status();
}

Status QuantizeGroups::verify(const TensorView* out, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;  // a row that was refused has row_scale = NaN
  PRECAL_RETURN_IF_ERROR(find("quantize_groups",
                              {rule(out[2], ValueRule::kNotNan), rule(grid, ValueRule::kLevels, symmetric ? 1 : 0)},
                              flag, stream, &bad));
  using Op = cpu::QuantizeGroups;
  return bad ? ask_cpu<Op>("quantize_groups", *this, {&Op::w, &Op::grid}, stream) : Status();
}

Status QuantizeSplit::verify(const TensorView* out, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(find("quantize_split", {rule(out[2], ValueRule::kNotNan)}, flag, stream, &bad));
  using Op = cpu::QuantizeSplit;
  return bad ? ask_cpu<Op>("quantize_split", *this, {&Op::w, &Op::salient}, stream) : Status();
}

Status QuantizeSalient::verify(const TensorView* out, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(find("quantize_salient", {rule(out[2], ValueRule::kNotNan)}, flag, stream, &bad));
  using Op = cpu::QuantizeSalient;
  return bad ? ask_cpu<Op>("quantize_salient", *this, {&Op::w, &Op::lam}, stream) : Status();
}

Status Pack::verify(const TensorView*, uint32_t* flag, cudaStream_t stream) const {
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(find("pack", {rule(codes, ValueRule::kBelow, int64_t(1) << bits)}, flag, stream, &bad));
  using Op = cpu::Pack;
  return bad ? ask_cpu<Op>("pack", *this, {&Op::codes}, stream) : Status();
}

Status Prepack::verify(const TensorView*, uint32_t* flag, cudaStream_t stream) const {
  if (!weight.grid.present) return {};
  bool bad = false;
  PRECAL_RETURN_IF_ERROR(find("prepack", {rule(weight.grid, ValueRule::kLevels)}, flag, stream, &bad));
  if (!bad) return {};
  int8_t levels[256];
  float as_floats[256];
  TensorView grid = weight.grid;
  PRECAL_RETURN_IF_ERROR(cuda::check_cuda(
      "prepack", cudaMemcpyAsync(levels, grid.data, size_t(grid.numel()), cudaMemcpyDeviceToHost, stream)));
  PRECAL_RETURN_IF_ERROR(cuda::check_cuda("prepack", cudaStreamSynchronize(stream)));
  grid.data = levels;
  return cpu::make_levels("prepack", grid, int(weight.bits), as_floats);
}

}  // namespace precal::bindings::gpu
