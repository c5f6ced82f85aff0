"""Weight -> QTensor: fit a grid for a fusion set, quantize its members. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from precal_ext import ops
from precal_ext.config import QuantizeConfig
from precal_ext.grids import constant_grid
from precal_ext.measure import MAX_BINS, level_range, scale_amplitude, without_outliers
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.salience import salient

# Weights of a fusion set that the grid is fitted on; 2**20 put the sampling error of a level far below one step.
SAMPLE = 1 << 20
# A group's weight in the pooled histogram, an integer so that sums do not depend on their order.
_WEIGHT_ONE = 1 << 16


def sample_rows(w: Tensor, limit: int) -> Tensor:
    """Evenly spaced rows with about ``limit`` weights in all, at least one row; deterministic."""
    N, K = w.shape
    rows = max(1, min(N, limit // max(1, K)))
    if rows >= N:
        return w
    return w[torch.arange(rows) * N // rows].contiguous()


def fit_set_grid(weights: Sequence[Tensor], config: QuantizeConfig) -> Tensor | None:
    """One grid for all weights of a fusion set, or None when the recipe has none.

    The constant grid for Gaussian groups is refined ``fit_rounds`` times: quantize with it, pool the histograms of the
    dense w / (row_scale * scale), each group counting by its squared scale, minimise squared error + mu * KL on that.
    With a trellis every code has a histogram of its own; a round moves levels to the means of theirs, and of all the
    grids on the way the one with the least squared error + mu * KL is taken.

    Args:
        weights: [N, K] each, or samples of rows of them.
    Returns:
        int8 [1, config.grid_size], or None for a uniform grid.
    """
    if config.uniform:
        return None
    assert config.group_size is not None
    grid = constant_grid(config.bits, config.group_size, bool(config.trellis))
    if config.grid == "constant" or config.fit_rounds == 0:
        return grid
    half = level_range(False, config.bits)
    if not config.trellis:
        for _ in range(config.fit_rounds):
            grid = ops.fit_grid(_pooled_counts(weights, grid, config), -half, half, grid, config.mu, 1)
        return grid
    best, least = grid, math.inf
    for i in range(config.fit_rounds + 1):
        counts = _pooled_counts(weights, grid, config)
        cost = _composite_objective(counts, half, grid, config.mu)
        if cost < least:
            best, least = grid, cost
        if i < config.fit_rounds:
            grid = ops.fit_grid(counts, -half, half, grid, 0.0, 1)
    return best


def _composite_objective(counts: Tensor, half: float, grid: Tensor, mu: float) -> float:
    """|W - W'|^2 / |W|^2 + mu * KL(P_w || P_w') of a histogram by code, [levels, bins] (arXiv 2405.13358)."""
    bins = counts.shape[1]
    centres = (torch.arange(bins, dtype=torch.float64) + 0.5) * (2 * half / bins) - half
    mass = counts.double()
    error = mass * (centres[None, :] - grid.flatten().double()[:, None]).square()
    power = math.fsum((mass * centres.square()).sum(1).tolist())  # sums of rows: the same for any number of threads
    if power == 0:
        return 0.0
    kl = float(ops.kl_divergence(counts.sum(0), ops.spread_codes(counts, -half, half, grid)))
    return math.fsum(error.sum(1).tolist()) / power + mu * kl


def _pooled_counts(weights: Sequence[Tensor], grid: Tensor, config: QuantizeConfig) -> Tensor:
    """int64 [bins], with a trellis [levels, bins]."""
    half = level_range(False, config.bits)
    pieces = []
    for w in weights:
        q = quantize_weight(w, config, grid)
        pieces.append((w, scale_amplitude(q.tensors["weight_scale"], q.tensors["weight_row_scale"]), q))
    squares = [amplitude.double().square() for _, amplitude, _ in pieces]
    total = sum(int(s.numel()) for s in squares)
    # fsum is exact: torch's own sum depends on the number of threads, and so would the grid.
    mean = math.fsum(value for s in squares for value in s.flatten().tolist()) / max(1, total)
    levels = config.grid_size if config.trellis else 1
    counts = torch.zeros((levels, MAX_BINS) if config.trellis else (MAX_BINS,), dtype=torch.int64)
    if mean == 0:
        return counts
    for (w, amplitude, q), square in zip(pieces, squares, strict=True):
        # At most 2**31 a group, so that 2**32 weights of one bin fit in int64.
        weight = (square / mean * _WEIGHT_ONE).round().clamp(max=2.0**31).long()
        dense = without_outliers(w, q)
        label = q.level_index() if config.trellis else None
        counts += ops.histogram(dense, MAX_BINS, -half, half, amplitude, weight, q.spec.group_size, label, levels)[0]
    return counts


def quantize_weight(w: Tensor, config: QuantizeConfig, grid: Tensor | None) -> QTensor:
    """Quantize one weight with the settings of its module and the grid of its fusion set.

    Args:
        w: [N, K] float32, float16 or bfloat16, finite, contiguous.
        grid: int8 [1, config.grid_size] from ``fit_set_grid``, None for uniform.
    Raises:
        ValueError, TypeError: as ``ops.quantize_groups``.
    """
    spec = WeightSpec.from_config(int(w.shape[0]), int(w.shape[1]), config)
    tensors: dict[str, Tensor] = {}
    if spec.split and config.normalize == "none":
        lam = ops.salience_threshold(w, config.alpha, config.scope, spec.group_size)
        packed, scale, row_scale, other_scale, mask_bytes = ops.quantize_salient(
            w, lam, spec.bits, spec.group_size, config.scope
        )
        tensors = {"weight_outlier_scale": other_scale, "weight_outlier_mask": mask_bytes}
    elif spec.split:
        mask = salient(w, config.alpha, config.scope, spec.group_size, config.normalize)
        codes, scale, row_scale, other_scale, mask_bytes = ops.quantize_split(w, mask, spec.bits, spec.group_size)
        tensors = {"weight_outlier_scale": other_scale, "weight_outlier_mask": mask_bytes}
        packed = ops.pack(codes, spec.bits)
    else:
        baseline = config.recipe == "rtn"
        codes, scale, row_scale, index, value = ops.quantize_groups(
            w,
            grid,
            spec.bits,
            spec.group_size,
            spec.c,
            scale_dtype=spec.scale_dtype,
            symmetric=baseline,
            search_lo=1.0 if baseline else 0.6,
            search_hi=1.0 if baseline else 1.1,
        )
        if spec.c:
            tensors = {"weight_outlier_index": index, "weight_outlier_value": value}
        packed = ops.pack(codes, spec.bits)
    tensors["weight_packed"] = packed
    tensors["weight_scale"], tensors["weight_row_scale"] = scale, row_scale
    if grid is not None:
        tensors["weight_grid"] = grid
    tensors["weight_shape"] = torch.tensor([spec.N, spec.K], dtype=torch.int64)
    return QTensor(spec, {key: tensors[key] for key in spec.tensors()})
