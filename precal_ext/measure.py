"""What quantization did to a weight: SQNR in dB, KL in nats, bits. The figures of the report and the checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from precal_ext import ops
from precal_ext.qtensor import QTensor

_ROWS_AT_ONCE = 1 << 18  # weights, so that float64 copies stay small and in the cache
MAX_BINS, MIN_BINS = 2048, 256


@dataclass(frozen=True)
class Figures:
    """Figures of one tensor.

    Args:
        sqnr_db: 10 log10(|W|^2 / |W - W'|^2), dB; inf when exact.
        kl_nats: KL(P_w || P_w') of the dense weights in units of their scales; see ``kl_nats``.
        bits_per_weight: all stored tensors of the weight over its elements.
        salient_share: outliers over elements.
        power, noise: |W|^2 and |W - W'|^2, for pooling.
    """

    sqnr_db: float
    kl_nats: float
    bits_per_weight: float
    salient_share: float
    power: float
    noise: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sqnr_db(power: float, noise: float) -> float:
    """10 log10(power / noise); inf without noise, nan without power and with noise."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(power / noise) if power > 0 else math.nan


def sum_squares(x: Tensor) -> float:
    """Sum of squares of a matrix, in float64, the same for any number of threads: torch splits a sum to one number over
    threads, but not the sum of a row among several, nor one below its grain of 2**15 elements."""
    if x.shape[0] > 1:
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64)
    else:
        norms = torch.stack([torch.linalg.vector_norm(p, dtype=torch.float64) for p in x.flatten().split(1 << 14)])
    return math.fsum(norms.square().tolist())


def measure(w: Tensor, q: QTensor) -> Figures:
    """Compare a weight [N, K] with its quantized form, in one pass over both (``ops.measure``).

    W - W' is rounded to float32, which moves the SQNR by less than 1e-6 dB.
    """
    counts, squares = _measured(w, q)
    power, noise = (math.fsum(squares[:, i].tolist()) for i in (0, 1))
    share = _num_salient(q) / max(1, q.spec.N * q.spec.K)
    return Figures(sqnr_db(power, noise), _kl_of_counts(counts, q), q.spec.bits_per_weight(), share, power, noise)


def row_parts(q: QTensor) -> Iterator[tuple[slice, QTensor]]:
    """The rows of a weight, some 10^5 weights at a time, each part a weight of its own."""
    step = max(1, _ROWS_AT_ONCE // max(1, q.spec.K))
    for first in range(0, q.spec.N, step):
        rows = slice(first, min(q.spec.N, first + step))
        spec = dataclasses.replace(q.spec, N=rows.stop - first)
        shared = ("weight_grid", "weight_shape")
        yield rows, QTensor(spec, {key: t if key in shared else t[rows] for key, t in q.tensors.items()})


def outlier_mask(q: QTensor) -> Tensor | None:
    """bool [N, K] of the positions stored as outliers, or None when the format has none."""
    spec = q.spec
    if spec.split:
        return _split_mask(q)
    if not spec.c:
        return None
    mask = torch.zeros(spec.N, spec.K, dtype=torch.bool)
    mask.view(-1)[outlier_places(q)] = True
    return mask


def _num_salient(q: QTensor) -> int:
    if q.spec.split:
        of_byte = torch.tensor([byte.bit_count() for byte in range(256)])
        return int(torch.bincount(q.tensors["weight_outlier_mask"].flatten(), minlength=256) @ of_byte)
    return int(torch.count_nonzero(q.tensors["weight_outlier_value"] & 0x7F)) if q.spec.c else 0


def _split_mask(q: QTensor) -> Tensor:
    bits = q.tensors["weight_outlier_mask"][:, :, None] >> torch.arange(8, dtype=torch.uint8)
    return (bits & 1).bool().reshape(q.spec.N, -1)[:, : q.spec.K]


def outlier_places(q: QTensor) -> Tensor:
    """int64 [count], n * K + k of every outlier that is stored with an index."""
    spec = q.spec
    if not spec.c:
        return torch.empty(0, dtype=torch.int64)
    starts = (
        torch.tensor([begin for begin, _ in spec.blocks()])[:, None] + (torch.arange(spec.N) * spec.K)[:, None, None]
    )
    used = (q.tensors["weight_outlier_value"] & 0x7F) != 0
    return (q.tensors["weight_outlier_index"] + starts)[used]


def without_outliers(w: Tensor, q: QTensor) -> Tensor:
    """The weight with NaN, which a histogram does not count, in place of outliers that have an index; itself if there
    are none."""
    places = outlier_places(q)
    if not len(places):
        return w
    dense = w.clone(memory_format=torch.contiguous_format)
    dense.view(-1)[places] = math.nan
    return dense


def level_range(uniform: bool, bits: int) -> float:
    """Half-width of the histogram in units of levels: twice the largest level, a power of two, so that cells of int8
    levels fall on bin edges."""
    return float(2**bits) if uniform else 256.0


def scale_amplitude(scale: Tensor, row_scale: Tensor) -> Tensor:
    """float32 [N, G]: what one level is worth, row_scale * scale."""
    values = scale.view(torch.float8_e4m3fn).float() if scale.dtype == torch.uint8 else scale.float()
    return row_scale.float()[:, None] * values


def kl_nats(w: Tensor, q: QTensor) -> float:
    """KL(P_w || P_w'), the estimator of docs/method.md.

    P_w is the histogram of w / (row_scale * scale), outliers left out, over twice the range of the levels; P_w' spreads
    each code's mass over its decision cell, or, with a trellis, over the bins it came from (``ops.spread_codes``). The
    number of bins is the power of two nearest below a 32nd of the number of weights, between 256 and 2048: an empty
    tensor has 0 nats, a small one a positive bias of about bins / (2 * weights).
    """
    return _kl_of_counts(_measured(w, q)[0], q)


def _measured(w: Tensor, q: QTensor) -> tuple[Tensor, Tensor]:
    bins = MIN_BINS
    while bins < MAX_BINS and bins * 2 * 32 <= q.spec.N * q.spec.K:
        bins *= 2
    return q.measure(w.contiguous(), bins, level_range(q.spec.uniform, q.spec.bits))


def _kl_of_counts(counts: Tensor, q: QTensor) -> float:
    """Of the counts of ``ops.measure``."""
    half = level_range(q.spec.uniform, q.spec.bits)
    grid = q.tensors.get("weight_grid")
    if grid is None:
        grid = torch.arange(2**q.spec.bits, dtype=torch.int16).sub(2 ** (q.spec.bits - 1)).clamp(min=-127)
    density = ops.spread_codes(counts if q.spec.trellis else counts[0], -half, half, grid.to(counts.device, torch.int8))
    return float(ops.kl_divergence(counts.sum(0), density))
