"""GPTQ on one weight whose format is settled: other codes, so that the layer's outputs change least on given inputs.

Grid, scales and outliers stay those of the data-free quantization. The change of the outputs is tr(D H D^T) with
D = W - W' and H the mean of x x^T over the inputs x; with (H + damping)^-1 = U^T U, U upper triangular, it is the sum
over the columns k of (e_k / U_kk)^2, e_k what a code misses of its weight after the errors of the columns before were
carried to it (GPTQ, Frantar et al., arXiv 2210.17323; in blocks as the "Enhanced GPTQ" of Sharify et al., 2024).

With a trellis a code decides over the two after it, so columns cannot be rounded one by one. Each of the four survivors
of the Viterbi search carries its own errors on (per-survivor processing: Raheli, Polydoros and Tzou, IEEE Trans.
Commun. 43(2-4), 1995); where a block of the trellis ends the cheapest is taken and its errors go to what follows.

Everything is done by one thread a chunk of rows, and chunks never meet: bytes do not depend on the number of threads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from precal_ext import _C, ops
from precal_ext.measure import scale_amplitude
from precal_ext.qtensor import QTensor

ROWS = 512  # of a chunk: what four survivors hold of a block then fits in a second-level cache
PIECE = 32  # columns after which errors go to the rest of a block; before, to the other columns of the piece alone
BLOCK = 128  # columns between updates of all that follow, without a trellis

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Rounded:
    """A weight with other codes, and its errors on the inputs: |(W - W') x|^2 over |W x|^2, before and after."""

    q: QTensor
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Factor:
    """Of a Hessian: carry [K, K], row k is U_k / U_kk; weight [K], 1 / U_kk^2. float32."""

    carry: Tensor
    weight: Tensor
    damping: float  # what was added to the diagonal


def factor(hessian: Tensor, damping: float) -> Factor:
    """The factor of ``hessian + damping * mean(diagonal)``, in float64 on the way; ten times the damping until there is
    one.

    Args:
        hessian: float32 or float64 [K, K], symmetric, positive semidefinite.  damping: > 0.
    """
    if not damping > 0 or not math.isfinite(damping):
        raise ValueError(f"gptq: damping must be finite and > 0, got {damping}")
    mean = math.fsum(hessian.diagonal().tolist()) / max(1, len(hessian))
    if not math.isfinite(mean):
        raise ValueError(f"gptq: hessian must be finite, got {mean} on its diagonal; the inputs have no finite squares")
    added = damping * mean if mean > 0 else 1.0  # inputs that are all zero: nothing is known
    # H = M M^T with M upper triangular, the Cholesky factor of H with both orders turned; then U = M^-1.
    turned = hessian.flip(0, 1).double()
    turned.diagonal().add_(added)
    lower, failed = torch.linalg.cholesky_ex(turned)
    while int(failed):  # rounding of the sums outweighs a small damping where a few inputs are huge
        turned.diagonal().add_(9 * added)
        added *= 10
        lower, failed = torch.linalg.cholesky_ex(turned)
    del turned  # a matrix may have a gigabyte: three at once, and no more
    upper = lower.flip(0, 1)
    del lower
    u = torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)
    diagonal = u.diagonal().clone()
    return Factor(u.div_(diagonal[:, None]).float(), diagonal.square().reciprocal().float(), added)


def gptq(w: Tensor, q: QTensor, hessian: Tensor, parts: Factor, over: Map = map) -> Rounded:
    """Round a weight again, onto the grid, scales and outliers of its data-free quantization.

    A row whose outputs the old codes keep better, damping counted, keeps them.

    Args:
        w: [N, K] float32, float16 or bfloat16, finite.
        q: ``quantize_weight`` of it.
        hessian: float32 [K, K], mean of x x^T over inputs x.
        parts: ``factor`` of it.
        over: applies a function to chunks of rows, in order; ``map`` or that of an executor.
    """
    h = hessian.float()
    chunks = [slice(n, min(q.spec.N, n + ROWS)) for n in range(0, q.spec.N, ROWS)]
    found = list(over(lambda rows: _round_rows(w[rows], _rows_of(q, rows), h, parts), chunks))
    tensors = {**q.tensors, "weight_packed": torch.cat([packed for packed, _ in found])}
    power, before, after = (math.fsum(sums[i] for _, sums in found) for i in range(3))
    relative = [0.0 if power == 0 else error / power for error in (before, after)]
    return Rounded(QTensor(q.spec, tensors), *relative)


def _rows_of(q: QTensor, rows: slice) -> QTensor:
    spec = dataclasses.replace(q.spec, N=rows.stop - rows.start)
    shared = ("weight_grid", "weight_shape")
    return QTensor(spec, {key: t if key in shared else t[rows] for key, t in q.tensors.items()})


def _round_rows(w: Tensor, q: QTensor, h: Tensor, parts: Factor) -> tuple[Tensor, tuple[float, float, float]]:
    """Packed codes of some rows, and sums over them: |W x|^2, |(W - W') x|^2 before and after."""
    spec, w = q.spec, w.float()
    row_scale = q.tensors["weight_row_scale"].float()[:, None]
    inverse = torch.where(row_scale > 0, 1 / row_scale, torch.zeros_like(row_scale))
    target = (w * inverse - outlier_values(q)).t().contiguous()
    codes = round_columns(target, steps(q).t().contiguous(), levels(q), blocks(q), spec.trellis, parts).t().contiguous()
    rounded = QTensor(spec, {**q.tensors, "weight_packed": ops.pack(codes, spec.bits)})
    powers = _output_power(w, h)
    missed = [w - part.dequantize() for part in (q, rounded)]
    before, after = (_output_power(d, h) for d in missed)
    damped = [e + parts.damping * d.double().square().sum(1) for e, d in zip((before, after), missed, strict=True)]
    better = damped[1] < damped[0]
    packed = torch.where(better[:, None], rounded.tensors["weight_packed"], q.tensors["weight_packed"])
    kept = torch.where(better, after, before)
    sums = [math.fsum(s.tolist()) for s in (powers, before, kept)]
    return packed, (sums[0], sums[1], sums[2])


def _output_power(d: Tensor, h: Tensor) -> Tensor:
    """float64 [N]: d_n H d_n^T."""
    return ((d @ h).double() * d).sum(1).clamp(min=0)


# ---- what is settled, in units of the row scale ---------------------------------------------------------------------


def outlier_values(q: QTensor) -> Tensor:
    """float32 [N, K]: what outliers add."""
    spec = q.spec
    values = torch.zeros(spec.N, spec.K)
    if spec.c:
        index = q.tensors["weight_outlier_index"].long()
        index += torch.tensor([begin for begin, _ in spec.blocks()])[None, :, None]
        entries = q.tensors["weight_outlier_value"].view(torch.float8_e4m3fn).float() * _C.OUTLIER_UNIT
        # Unused entries are 0 at a block's first column, where a used one may be too.
        values.scatter_add_(1, index.flatten(1), entries.flatten(1))
    return values


def steps(q: QTensor) -> Tensor:
    """float32 [N, K]: what one level is worth."""
    one = torch.ones(q.spec.N)

    def spread(key: str) -> Tensor:
        return scale_amplitude(q.tensors[key], one).repeat_interleave(q.spec.group_size, 1)[:, : q.spec.K]

    if not q.spec.split:
        return spread("weight_scale")
    bits = q.tensors["weight_outlier_mask"][:, :, None] >> torch.arange(8, dtype=torch.uint8)
    salient = (bits & 1).bool().reshape(q.spec.N, -1)[:, : q.spec.K]
    return torch.where(salient, spread("weight_outlier_scale"), spread("weight_scale"))


def levels(q: QTensor) -> Tensor:
    """float32 [L], non-decreasing."""
    grid = q.tensors.get("weight_grid")
    half = 2 ** (q.spec.bits - 1)
    return torch.arange(-half, half, dtype=torch.float32) if grid is None else grid.flatten().float()


def blocks(q: QTensor) -> list[tuple[int, int]]:
    """Columns that are rounded before their errors go to all that follow."""
    if q.spec.trellis:
        return q.spec.blocks()
    return [(k, min(q.spec.K, k + BLOCK)) for k in range(0, q.spec.K, BLOCK)]


# ---- the columns, rows side by side ---------------------------------------------------------------------------------


def round_columns(
    target: Tensor, step: Tensor, levels: Tensor, blocks: Iterable[tuple[int, int]], trellis: bool, parts: Factor
) -> Tensor:
    """Codes for ``step * level`` near ``target``.

    Args:
        target: float32 [K, N], changed.  step: float32 [K, N].
        levels: float32, 2**bits, or 2**(bits+1) for a trellis.
        blocks: first column and end of what is decided together; those of the trellis, where there is one.
    Returns:
        uint8 [K, N].
    """
    codes = torch.empty(target.shape, dtype=torch.uint8)
    for begin, end in blocks:
        t, s = target[begin:end], step[begin:end]
        carry, weight = parts.carry[begin:end, begin:end].contiguous(), parts.weight[begin:end]
        if trellis:
            codes[begin:end], errors = _search_block(t, s, levels, carry, weight)
        else:
            codes[begin:end], errors = _round_block(t, s, levels, carry)
        if end < len(target):
            target[end:] -= parts.carry[begin:end, end:].t() @ errors
    return codes


def _inverse(step: Tensor) -> Tensor:
    return torch.where(step != 0, 1 / step, torch.zeros_like(step))


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


def _round_block(target: Tensor, step: Tensor, levels: Tensor, carry: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and errors [B, N], column by column to the nearest level."""
    inverse, cuts = _inverse(step), _midpoints(levels)
    codes, errors = torch.empty(target.shape, dtype=torch.uint8), torch.empty_like(target)
    for k in range(len(target)):
        code = torch.bucketize(target[k] * inverse[k], cuts)
        codes[k], errors[k] = code, target[k] - step[k] * levels[code]
        target[k + 1 :] -= carry[k, k + 1 :, None] * errors[k]
    return codes, errors


class _Survivors:
    """Four paths a row through one block of the trellis. State 2 * b1 + b2: the low bits of the last code and of the
    one before. Of every column and state is kept: the number of the level in its subset, the error, and b2 of the state
    before, which with the state itself tells that state."""

    def __init__(self, columns: int, rows: int) -> None:
        self.index = torch.empty(columns, 4, rows, dtype=torch.uint8)
        self.errors = torch.empty(columns, 4, rows)
        self.before = torch.empty(columns, 4, rows, dtype=torch.int64)

    def back(self, state: Tensor, first: int, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """From column last - 1 down to first: the column, the state after it, and before it."""
        for k in range(last - 1, first - 1, -1):
            previous = 2 * (state & 1) + self.before[k].gather(0, state)
            yield k, state, previous
            state = previous


def _search_block(target: Tensor, step: Tensor, levels: Tensor, carry: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and errors [B, N] of the cheapest of the four survivors."""
    columns, rows = target.shape
    inverse = _inverse(step)
    subsets = [levels[z::4].contiguous() for z in range(4)]
    cuts = [_midpoints(subset) for subset in subsets]
    paths = _Survivors(columns, rows)
    cost = torch.full((2, 2, rows), math.inf)
    cost[0, 0] = 0.0
    rest = target[None].expand(4, columns, rows)  # what each survivor still has to meet, from column `first` on
    every = torch.arange(4)[:, None].expand(4, rows)
    weights = weight.tolist()
    for first in range(0, columns, PIECE):
        last = min(columns, first + PIECE)
        near = rest[:, : last - first].reshape(2, 2, last - first, rows)
        for k in range(first, last):
            cost, near = _step(
                paths, k, cost, near, step[k], inverse[k], subsets, cuts, carry[k, k + 1 : last], weights[k]
            )
        if last == columns:
            break
        errors = torch.empty(4, last - first, rows)
        for k, state, previous in paths.back(every, first, last):
            errors[:, k - first] = paths.errors[k].gather(0, state)
            ancestor = previous
        far = rest[:, last - first :]
        rest = far.gather(0, ancestor[:, None].expand(far.shape)) - carry[first:last, last:].t() @ errors
    codes, errors = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
    cheapest = cost.reshape(4, rows).argmin(0, keepdim=True)
    for k, state, _ in paths.back(cheapest, 0, columns):
        codes[k] = (2 * paths.index[k].gather(0, state) + (state >> 1))[0]
        errors[k] = paths.errors[k].gather(0, state)[0]
    return codes, errors


def _step(
    paths: _Survivors,
    k: int,
    cost: Tensor,
    near: Tensor,
    step: Tensor,
    inverse: Tensor,
    subsets: list[Tensor],
    cuts: list[Tensor],
    carry: Tensor,
    weight: float,
) -> tuple[Tensor, Tensor]:
    """One column: cost [b1, b2, N], near [b1, b2, columns left in the piece, N], before and after.

    A code with low bit b takes its level from subset 2 * (b ^ b2) + b1 (csrc/format/trellis.h).
    """
    rows = near.shape[-1]
    value = near[:, :, 0]
    scaled = value * inverse
    index = torch.empty(2, 2, 2, rows, dtype=torch.int64)  # b1, b2, upper bit of the subset
    level = torch.empty(2, 2, 2, rows)
    for b1 in range(2):
        for upper in range(2):
            z = 2 * upper + b1
            index[b1, :, upper] = torch.bucketize(scaled[b1].contiguous(), cuts[z])
            level[b1, :, upper] = subsets[z][index[b1, :, upper]]
    error = value[:, :, None] - step * level
    total = cost[:, :, None] + error.square() * weight
    # Into the state (b, b1): from b2 = 0 through upper = b, or from b2 = 1 through upper = 1 - b.
    other = total[:, 1].flip(1)
    taken = (other < total[:, 0]).transpose(0, 1)  # b, b1

    def choose(x: Tensor) -> Tensor:
        return torch.where(taken, x[:, 1].flip(1).transpose(0, 1), x[:, 0].transpose(0, 1))

    found = choose(error)
    paths.index[k] = choose(index).reshape(4, rows)
    paths.errors[k] = found.reshape(4, rows)
    paths.before[k] = taken.reshape(4, rows)
    left = torch.where(taken[:, :, None], near[None, :, 1, 1:], near[None, :, 0, 1:])
    left -= found[:, :, None] * carry[:, None]
    return choose(total), left
