// SPDX-License-Identifier: Apache-2.0
// Every op, free of any framework: a struct of inputs with
//   plan()  checks all of them and tells shape and dtype of each output, before anything is allocated;
//   run()   computes into outputs of that shape, on the threads of core/parallel.h.
// Both bindings (torch, pybind11) are thin loops over these. The contracts are written once, in precal_ext/ops.py.
#pragma once

#include <cstdint>
#include <string>

#include "core/tensor_view.h"
#include "format/prepacked.h"

namespace precal::cpu {

struct SoftThreshold {
  static constexpr int kOutputs = 1;
  TensorView w;
  double lam;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

enum class Scope { kTensor, kRow, kGroup };
enum class Normalize { kNone, kRow, kGroup };

struct SalienceThreshold {
  static constexpr int kOutputs = 1;
  TensorView w;
  double alpha;
  std::string scope;
  int64_t group_size;
  std::string normalize;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct SalienceMask {
  static constexpr int kOutputs = 1;
  TensorView w, lam;
  std::string scope;
  int64_t group_size;
  std::string normalize;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct Histogram {
  static constexpr int kOutputs = 2;  // counts [num_bins] or [num_labels, num_bins]; outside [3] = below, above, NaN
  TensorView w;
  int64_t num_bins;
  double lo, hi;
  TensorView divisor, weight;  // optional [N, G]
  int64_t group_size;
  TensorView label;  // optional [N, K]
  int64_t num_labels;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct SpreadCodes {
  static constexpr int kOutputs = 1;
  TensorView counts;
  double lo, hi;
  TensorView grid;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct KlDivergence {
  static constexpr int kOutputs = 1;
  TensorView p, q;
  double smoothing;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct FitGrid {
  static constexpr int kOutputs = 1;
  TensorView counts;
  double lo, hi;
  TensorView grid;
  double mu;
  int64_t rounds;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct QuantizeGroups {
  static constexpr int kOutputs = 5;  // codes, scale, row_scale, outlier_index, outlier_value
  TensorView w, grid;                 // grid optional
  int64_t bits, group_size, c;
  double lam;
  std::string scale_dtype;  // "e4m3" or "float16"
  bool symmetric;
  double search_lo, search_hi;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct QuantizeSplit {
  static constexpr int kOutputs = 5;  // codes, scale, row_scale, outlier_scale, mask
  TensorView w, salient;
  int64_t bits, group_size;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

// SalienceMask without normalization, QuantizeSplit and Pack in one look at each row.
struct QuantizeSalient {
  static constexpr int kOutputs = 5;  // packed, scale, row_scale, outlier_scale, mask
  TensorView w, lam;
  int64_t bits, group_size;
  std::string scope;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct Pack {
  static constexpr int kOutputs = 1;
  TensorView codes;
  int64_t bits;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct Unpack {
  static constexpr int kOutputs = 1;
  TensorView packed;
  int64_t bits, K;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

// Levels as floats, of a grid of checked shape or of the uniform one when it is absent; repeated up to 256 entries, so
// that a lookup by 4 or 5 bits needs no masking. Refuses levels out of order or range.
Status make_levels(const char* op, const TensorView& grid, int bits, float* levels);

// lam as salience_threshold gives it without normalization, per unit of scope.
Status check_lam(const char* op, const TensorView& w, const TensorView& lam, const std::string& scope,
                 int64_t group_size);

// The largest magnitude whose square is not above lam, as bits of a float32; -1 where that of 0 is.
int32_t salience_limit(const TensorView& w, double lam);

// Columns after which the blocks of outliers and of the trellis start anew: 0, or what kernels can do with.
Status check_segment(const char* op, int64_t segment, int64_t K);

// The canonical tensors of one weight, as dequantize and prepack take them.
struct WeightTensors {
  TensorView packed, scale, row_scale, grid, outlier_index, outlier_value, outlier_scale, mask;
  int64_t K, bits, group_size, segment = 0;
  // Checks every tensor against the integers and fills `f`.
  Status check(const char* op, format::WeightFormat* f) const;
};

struct Dequantize {
  static constexpr int kOutputs = 1;
  WeightTensors weight;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

// What quantization did to a weight.
struct Measure {
  static constexpr int kOutputs = 2;  // counts [levels or 1, num_bins], squares [N, 2]
  TensorView w;
  WeightTensors weight;
  int64_t num_bins;
  double half;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
  // Bins are counted by code where codes overlap: with a trellis.
  static int64_t num_labels(const format::WeightFormat& f) { return format::is_trellis(f) ? f.grid_size : 1; }
};

struct Prepack {
  static constexpr int kOutputs = 1;
  WeightTensors weight;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

// A prepacked weight and its integers.
struct PrepackedWeight {
  TensorView data;
  int64_t N, K, bits, group_size, c, grid_size;
  bool split;
  std::string scale_dtype;
  int64_t segment = 0;
  // What holds on every device: dtype and strides of `data`, ranges of the integers. Fills `f`.
  Status check_numbers(const char* op, format::WeightFormat* f) const;
  // And what holds on the CPU: the size, the header.
  Status check(const char* op, format::WeightFormat* f) const;
};

// What unprepack gives back of a weight.
void unprepacked_specs(const format::WeightFormat& f, TensorSpec* out);

struct Unprepack {
  static constexpr int kOutputs = 8;  // packed, scale, row_scale, grid, outlier_index, outlier_value, outlier_scale,
                                      // mask; what the weight lacks has no elements
  PrepackedWeight weight;
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

struct Linear {
  static constexpr int kOutputs = 1;
  TensorView x;
  PrepackedWeight weight;
  TensorView bias;          // optional
  std::string activations;  // f32, a16, a8
  Status plan(TensorSpec* out) const;
  Status run(const TensorView* out) const;
};

}  // namespace precal::cpu
