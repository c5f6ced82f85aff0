// SPDX-License-Identifier: Apache-2.0
// Every op's signature. Shapes, ranges and errors: precal_ext/ops.py.
#include <torch/csrc/stable/library.h>

#if !defined(PRECAL_NAMESPACE)  // tests/cuda_on_cpu has one of its own
#define PRECAL_NAMESPACE precal
#endif
#define PRECAL_TORCH_LIBRARY(space, m) STABLE_TORCH_LIBRARY(space, m)  // the macro of torch pastes its arguments

PRECAL_TORCH_LIBRARY(PRECAL_NAMESPACE, m) {
  // salience
  m.def("soft_threshold(Tensor w, float lam) -> Tensor");
  m.def(
      "salience_threshold(Tensor w, float alpha, str scope=\"tensor\", int group_size=128, str normalize=\"none\")"
      " -> Tensor");
  m.def(
      "salience_mask(Tensor w, Tensor lam, str scope=\"tensor\", int group_size=128, str normalize=\"none\")"
      " -> Tensor");
  // histograms and grids
  m.def(
      "histogram(Tensor w, int num_bins, float lo, float hi, Tensor? divisor=None, Tensor? weight=None,"
      " int group_size=128, Tensor? label=None, int num_labels=1) -> (Tensor counts, Tensor outside)");
  m.def("spread_codes(Tensor counts, float lo, float hi, Tensor grid) -> Tensor");
  m.def("kl_divergence(Tensor p, Tensor q, float smoothing=0.0) -> Tensor");
  m.def("fit_grid(Tensor counts, float lo, float hi, Tensor grid, float mu=0.0, int rounds=1) -> Tensor");
  // quantization
  m.def(
      "quantize_groups(Tensor w, Tensor? grid, int bits, int group_size, int c=0, float lam=0.0,"
      " str scale_dtype=\"e4m3\", bool symmetric=False, float search_lo=0.6, float search_hi=1.1)"
      " -> (Tensor codes, Tensor scale, Tensor row_scale, Tensor outlier_index, Tensor outlier_value)");
  m.def(
      "quantize_split(Tensor w, Tensor salient, int bits, int group_size)"
      " -> (Tensor codes, Tensor scale, Tensor row_scale, Tensor outlier_scale, Tensor outlier_mask)");
  m.def(
      "quantize_salient(Tensor w, Tensor lam, int bits, int group_size, str scope=\"tensor\")"
      " -> (Tensor packed, Tensor scale, Tensor row_scale, Tensor outlier_scale, Tensor outlier_mask)");
  m.def("pack(Tensor codes, int bits) -> Tensor");
  m.def("unpack(Tensor packed, int bits, int K) -> Tensor");
  m.def(
      "dequantize(Tensor packed, Tensor scale, Tensor row_scale, Tensor? grid, Tensor? outlier_index,"
      " Tensor? outlier_value, Tensor? outlier_scale, Tensor? outlier_mask, int K, int bits, int group_size,"
      " int segment=0) -> Tensor");
  m.def(
      "measure(Tensor w, Tensor packed, Tensor scale, Tensor row_scale, Tensor? grid, Tensor? outlier_index,"
      " Tensor? outlier_value, Tensor? outlier_scale, Tensor? outlier_mask, int K, int bits, int group_size,"
      " int num_bins, float half, int segment=0) -> (Tensor counts, Tensor squares)");
  // execution
  m.def(
      "prepack(Tensor packed, Tensor scale, Tensor row_scale, Tensor? grid, Tensor? outlier_index,"
      " Tensor? outlier_value, Tensor? outlier_scale, Tensor? outlier_mask, int K, int bits, int group_size,"
      " int segment=0) -> Tensor");
  m.def(
      "unprepack(Tensor prepacked, int N, int K, int bits, int group_size, int c, int grid_size, bool split,"
      " str scale_dtype, int segment=0) -> (Tensor packed, Tensor scale, Tensor row_scale, Tensor grid, Tensor "
      "outlier_index,"
      " Tensor outlier_value, Tensor outlier_scale, Tensor outlier_mask)");
  m.def(
      "linear(Tensor x, Tensor prepacked, Tensor? bias, int N, int K, int bits, int group_size, int c, int grid_size,"
      " bool split, str scale_dtype, int segment=0, str activations=\"a16\") -> Tensor");
}
