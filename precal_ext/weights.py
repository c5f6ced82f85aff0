"""A model's weights as they are read to be quantized: whole, by a sample of their rows, or looked through in pieces."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from precal_ext.checkpoint import CheckpointError, TensorInfo, read_rows, read_tensor
from precal_ext.quantize import sample_rows

_ROWS_AT_ONCE = 1 << 20  # weights that are looked at or converted together


def read_sample(info: TensorInfo, limit: int, conv1d: bool = False) -> Tensor:
    """``sample_rows`` of a weight of which only those rows are read; one that is stored as [K, N] is read through."""
    N, K = reversed(info.shape) if conv1d else info.shape
    rows = sample_rows(torch.arange(N)[:, None].expand(N, K), limit)[:, 0]
    if conv1d:
        return _read_turned(info, rows)
    w = read_rows(info, rows.tolist())
    return w.float() if w.dtype == torch.float64 else w


def _read_turned(info: TensorInfo, columns: Tensor) -> Tensor:
    """Columns of a matrix, as rows."""
    dtype = torch.float32 if info.dtype == torch.float64 else info.dtype
    w = torch.empty((len(columns), info.shape[0]), dtype=dtype)
    for begin, end in pieces(info):
        w[:, begin:end] = read_rows(info, range(begin, end))[:, columns].t()
    return w


def pieces(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of parts that are small beside the weight."""
    N, K = info.shape
    step = max(1, _ROWS_AT_ONCE // K)
    return ((begin, min(N, begin + step)) for begin in range(0, N, step))


def read_weight(info: TensorInfo, conv1d: bool = False) -> Tensor:
    """The weight [N, K], of a tensor [K, N] if ``conv1d``; float64 becomes float32 on the way."""
    if conv1d:
        return _read_turned(info, torch.arange(info.shape[1]))
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


def check_finite(info: TensorInfo, w: Tensor, conv1d: bool = False) -> None:
    """Raises CheckpointError that names file, tensor and place, in the file, of the first NaN or infinity."""
    step = max(1, _ROWS_AT_ONCE // w.shape[1])
    for begin in range(0, w.shape[0], step):
        found = first_nonfinite(w[begin : begin + step])
        if found is not None:
            n, k = begin + found[0], found[1]
            place = [k, n] if conv1d else [n, k]
            raise CheckpointError(
                f"{info.file}: {info.name} must be finite, got {w[n, k].item()} at {place}; the model is damaged, "
                "or leave the tensor as it is with --skip-nonfinite or --exclude"
            )
