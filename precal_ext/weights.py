"""A model's weights as they are read to be quantized: whole, by a sample of their rows, or looked through in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from precal_ext.checkpoint import CheckpointError, TensorInfo, read_rows, read_tensor
from precal_ext.quantize import sample_rows

_ROWS_AT_ONCE = 1 << 20  # weights that are looked at or converted together


def read_sample(info: TensorInfo, limit: int) -> Tensor:
    """``sample_rows`` of a weight of which only those rows are read."""
    N, K = info.shape
    rows = sample_rows(torch.arange(N)[:, None].expand(N, K), limit)[:, 0]
    w = read_rows(info, rows.tolist())
    return w.float() if w.dtype == torch.float64 else w


def pieces(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of parts that are small beside the weight."""
    N, K = info.shape
    step = max(1, _ROWS_AT_ONCE // K)
    return ((begin, min(N, begin + step)) for begin in range(0, N, step))


def read_weight(info: TensorInfo) -> Tensor:
    """The tensor; float64 becomes float32 on the way."""
    if info.dtype != torch.float64:
        return read_tensor(info)
    w = torch.empty(info.shape, dtype=torch.float32)
    for begin, end in pieces(info):
        w[begin:end] = read_rows(info, range(begin, end))
    return w


def first_nonfinite(w: Tensor) -> tuple[int, int] | None:
    """Row and column of the first NaN or infinity of a matrix."""
    finite = torch.isfinite(w)
    if bool(finite.all()):
        return None
    n, k = (~finite).nonzero()[0].tolist()
    return n, k


def check_finite(info: TensorInfo, w: Tensor) -> None:
    """Raises CheckpointError that names file, tensor and place of the first NaN or infinity."""
    for begin, end in pieces(info):
        found = first_nonfinite(w[begin:end])
        if found is not None:
            n, k = begin + found[0], found[1]
            raise CheckpointError(
                f"{info.file}: {info.name} must be finite, got {w[n, k].item()} at [{n}, {k}]; the model is damaged, "
                "or leave the tensor as it is with --skip-nonfinite or --exclude"
            )
