// SPDX-License-Identifier: Apache-2.0
// linear by torch's own product of dense matrices: W' is made in slices of rows, in the dtype of x, and each slice is
// multiplied as soon as it is made. All of it is put on the current stream; memory comes from torch alone.
//
// The weight is rounded to that dtype as it would be in a dense checkpoint, row scale and all: in float16 a W' below
// 6e-5 loses bits, and above 65504 it is infinite. A bias is rounded to it too.
#pragma once

#include "bindings/torch_tensor.h"

namespace precal::bindings {

// Gradients are the business of whoever called the op; `linear.out` would refuse a tensor that wants one.
inline Tensor detached(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// y = x weight^T + bias, written into y, which may be columns of a larger matrix.
inline void linear_into(Tensor& y, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 4> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias), torch::stable::detail::from(y)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

// `x` [..., K] contiguous; `fill(first, slice)` writes rows [first, first + slice.size(0)) of W' into `slice`.
template <typename Fill>
Tensor dense_linear(const Tensor& x, const std::optional<Tensor>& bias, int64_t N, int64_t K, int64_t slice_rows,
                    const Fill& fill) {
  std::vector<int64_t> shape;
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) {
    shape.push_back(x.size(i));
    M *= x.size(i);
  }
  shape.push_back(N);
  const Tensor rows = torch::stable::view(detached(x), {M, K});
  Tensor y = torch::stable::new_empty(rows, shape, rows.scalar_type());
  Tensor columns = torch::stable::view(y, {M, N});
  const int64_t most = slice_rows < N ? slice_rows : N;
  Tensor weight = torch::stable::new_empty(rows, {most, K}, rows.scalar_type());
  std::optional<Tensor> all;
  if (bias.has_value()) all = torch::stable::to(detached(*bias), rows.scalar_type());
  for (int64_t n = 0; n < N; n += slice_rows) {
    const int64_t count = N - n < slice_rows ? N - n : slice_rows;
    Tensor slice = torch::stable::narrow(weight, 0, 0, count), part = torch::stable::narrow(columns, 1, n, count);
    std::optional<Tensor> of_part;
    if (all.has_value()) of_part = torch::stable::narrow(*all, 0, n, count);
    fill(n, slice);
    linear_into(part, rows, slice, of_part);
  }
  return y;
}

}  // namespace precal::bindings
