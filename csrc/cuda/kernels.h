// SPDX-License-Identifier: Apache-2.0
// CUDA launchers: pointers, sizes and a stream; no torch, no allocation, no synchronisation. Arguments were checked by
// the caller (csrc/bindings/cuda_ops.h). Each returns a Status that names the CUDA error; errors of the running kernel
// appear at the stream's next synchronisation, as always.
#pragma once

#include <cuda_runtime.h>

#include "core/tensor_view.h"
#include "format/cuda_tiles.h"

namespace precal::cuda {

// OK, or what the launch or runtime said. An old driver is named with the version it must have.
Status check_cuda(const char* op, cudaError_t error);

struct SoftThresholdParams {
  const void* w;  // [count] dtype
  void* out;      // [count] dtype
  DType dtype;    // float32, float16 or bfloat16
  int64_t count;
  double lam;
};
Status launch_soft_threshold(const SoftThresholdParams& params, cudaStream_t stream);

// The canonical tensors of a weight (docs/format.md); what it lacks is nullptr.
struct WeightPointers {
  uint32_t* packed;        // [N, words]
  void* scale;             // [N, G] e4m3 or float16
  uint16_t* row_scale;     // [N] bfloat16
  int8_t* grid;            // [grid_size]
  uint8_t* outlier_index;  // [N, blocks, c]
  uint8_t* outlier_value;  // [N, blocks, c]
  void* outlier_scale;     // [N, G]
  uint8_t* mask;           // [N, ceil(K/8)]
};

struct PackParams {
  uint8_t* codes;    // [N, K]; pack takes the lowest `bits` of each
  uint32_t* packed;  // [N, words]
  int64_t N, K;
  int bits;
};
Status launch_pack(const PackParams& params, cudaStream_t stream);
Status launch_unpack(const PackParams& params, cudaStream_t stream);

struct DequantizeParams {
  format::WeightFormat format;
  WeightPointers weight;
  float* out;  // [N, K]
};
Status launch_dequantize(const DequantizeParams& params, cudaStream_t stream);

struct MeasureParams {
  const void* w;  // [N, K] dtype
  DType dtype;
  format::WeightFormat format;
  WeightPointers weight;
  int64_t num_bins, labels;  // powers of two; labels: levels of a trellis, else 1
  double half;               // a power of two
  int64_t* counts;           // [labels, num_bins]
  double* squares;           // [N, 2]: of w, of w' - w
};
Status launch_measure(const MeasureParams& params, cudaStream_t stream);

struct PrepackParams {
  format::WeightFormat format;
  format::CudaLayout layout;
  WeightPointers weight;  // read by prepack, written by unprepack
  uint8_t* prepacked;     // [layout.total_bytes]
};
Status launch_prepack(const PrepackParams& params, cudaStream_t stream);
Status launch_unprepack(const PrepackParams& params, cudaStream_t stream);

struct SalienceParams {
  const void* w;  // [N, K] dtype
  DType dtype;
  int64_t N, K;
  int64_t unit;            // columns of a unit with its own lam; 0: the tensor is one
  int64_t normalize_unit;  // columns that are normalized together; 0: none are
  double alpha;
  double* lam;  // [num_lam]: written by the threshold, read by the mask
  int64_t num_lam;
  uint8_t* mask;    // [N, K]
  void* workspace;  // salience_workspace(N * K, normalize_unit > 0) bytes
};
int64_t salience_workspace(int64_t count, bool normalize);
Status launch_salience_threshold(const SalienceParams& params, cudaStream_t stream);
Status launch_salience_mask(const SalienceParams& params, cudaStream_t stream);

// fit_grid and spread_codes.
struct GridParams {
  const int64_t* counts;  // [bins], or [levels, bins] where by_code
  int64_t bins;
  bool by_code;
  double lo, hi;
  const int8_t* grid;  // [levels]
  int levels;
  double mu;
  int64_t rounds;
  int8_t* out_grid;  // fit_grid: [levels]
  double* out;       // spread_codes: [bins]
  void* workspace;   // fit_grid: grid_workspace(bins) bytes
};
int64_t grid_workspace(int64_t bins);
Status launch_fit_grid(const GridParams& params, cudaStream_t stream);
Status launch_spread_codes(const GridParams& params, cudaStream_t stream);

struct KlParams {
  const void *p, *q;  // [bins] int64 or float64
  bool p_int64, q_int64;
  int64_t bins;
  double smoothing;
  double* out;  // one
};
Status launch_kl_divergence(const KlParams& params, cudaStream_t stream);

struct HistogramParams {
  const void* w;  // [N, K] dtype
  DType dtype;
  int64_t N, K, group_size, groups;
  const float* divisor;   // [N, groups] or nullptr: 1
  const int64_t* weight;  // [N, groups] or nullptr: 1
  const uint8_t* label;   // [N, K] or nullptr: 0
  int64_t num_bins, num_labels;
  double lo, hi;
  int64_t* counts;   // [num_labels, num_bins]
  int64_t* outside;  // [3] below, above, NaN
};
Status launch_histogram(const HistogramParams& params, cudaStream_t stream);

// quantize_groups, or quantize_split where format.split. Workspace: quantize_workspace() bytes, 16-byte aligned.
struct QuantizeParams {
  format::WeightFormat format;
  const void* w;  // [N, K] dtype
  DType dtype;
  const int8_t* grid;  // [format.grid_size]
  bool symmetric;
  double lam;
  float search_lo, search_hi;
  uint8_t* codes;          // [N, K]
  void* scale;             // [N, G]
  uint16_t* row_scale;     // [N] bfloat16
  uint8_t* outlier_index;  // [N, blocks, c]
  uint8_t* outlier_value;  // [N, blocks, c]
  const uint8_t* salient;  // split: [N, K]
  void* outlier_scale;     // split: [N, G] float16
  uint8_t* mask;           // split: [N, ceil(K/8)]
  void* workspace;
};
int64_t quantize_workspace(const format::WeightFormat& format);
Status launch_quantize(const QuantizeParams& params, cudaStream_t stream);

// y = x W'^T + bias. Workspace: linear_workspace() bytes, 16-byte aligned.
struct LinearParams {
  format::WeightFormat format;
  format::CudaLayout layout;
  const uint8_t* prepacked;
  const void* x;     // [M, K] float32, float16 or bfloat16
  const void* bias;  // [N] or nullptr
  void* y;           // [M, N] in x's dtype
  DType x_dtype, bias_dtype;
  int64_t M, groups;  // groups of a row
  void* workspace;
};
// Rows [first_row, first_row + rows) of W', first_row a multiple of 16.
struct DenseRowsParams {
  format::WeightFormat format;
  format::CudaLayout layout;
  const uint8_t* prepacked;
  int64_t groups;  // of a row
  void* out;       // [rows, K] dtype
  DType dtype;     // float32, float16 or bfloat16
  int64_t first_row, rows;
};
Status launch_dense_rows(const DenseRowsParams& params, cudaStream_t stream);

// Major * 10 + minor of the current device.
Status compute_capability(const char* op, int* capability);

Status linear_workspace(const format::WeightFormat& format, int64_t M, DType x_dtype, int64_t* bytes);
Status launch_linear(const LinearParams& params, cudaStream_t stream);

// ---- what only the values of a tensor show
// ---------------------------------------------------------------------------
enum class ValueRule {
  kNotNan,       // floats
  kFinite,       // floats
  kNotNegative,  // int64, or floats that are finite too
  kBelow,        // uint8 or int64 in [0, limit)
  kLevels,       // int8: above -128, non-decreasing, the ends not both zero, the last above zero where limit is 1
};
struct ValueCheck {
  const void* data;
  DType dtype;
  int64_t count;
  ValueRule rule;
  int64_t limit;
};
// *flag becomes 1 where the rule is broken, and is left as it is elsewhere.
Status launch_check_values(const char* op, const ValueCheck& check, uint32_t* flag, cudaStream_t stream);
// Whether a graph is being captured, so that nothing may wait.
bool is_capturing(cudaStream_t stream);

}  // namespace precal::cuda
