"""Other codes for a quantized weight: those nearest to a target, on the levels, scales and outliers that it has."""

from __future__ import annotations

import torch
from torch import Tensor

from precal_ext import _C, ops
from precal_ext.measure import outlier_mask, scale_amplitude
from precal_ext.qtensor import QTensor

_BLOCKS_AT_ONCE = 1 << 12  # of a trellis: some 40 MB


def requantize(q: QTensor, target: Tensor) -> QTensor:
    """The codes with the least squared error from a target; only ``weight_packed`` is new.

    With a trellis that is a Viterbi search over each block of columns, else each code by itself. What has no less error
    than before keeps its codes, so the target W' changes nothing. Every row is for itself: the result does not depend
    on the number of threads.

    Args:
        target: [N, K] float32, finite.
    """
    N, K = q.spec.N, q.spec.K
    if tuple(target.shape) != (N, K) or target.dtype != torch.float32:
        raise ValueError(
            f"requantize: target must be float32 [{N}, {K}], got {target.dtype} {list(target.shape)}"
        )  # fmt: skip
    if N * K == 0:
        return q
    step, added = steps_and_outliers(q)
    wanted = target if added is None else target - added
    codes = ops.unpack(q.tensors["weight_packed"], q.spec.bits, K)
    codes = _searched(q, codes, wanted, step) if q.spec.trellis else _nearest(q, codes, wanted, step)
    return QTensor(q.spec, {**q.tensors, "weight_packed": ops.pack(codes, q.spec.bits)})


def steps_and_outliers(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """What a level is worth, and what outliers add to it: W' = step * level + added, up to rounding; float32 [N, K]."""
    spec, tensors = q.spec, q.tensors
    group = torch.arange(spec.K) // spec.group_size
    row_scale = tensors["weight_row_scale"]
    step = scale_amplitude(tensors["weight_scale"], row_scale)[:, group]
    mask = outlier_mask(q)
    if mask is None:
        return step, None
    if spec.split:
        other = scale_amplitude(tensors["weight_outlier_scale"], row_scale)[:, group]
        return torch.where(mask, other, step), None
    value = tensors["weight_outlier_value"]
    used = (value & 0x7F) != 0
    added = torch.zeros_like(step)
    # In row-major order as the mask's: entries of a row lie in ascending blocks, and ascend within one.
    added[mask] = value.view(torch.float8_e4m3fn).float()[used]
    return step, added * (_C.OUTLIER_UNIT * row_scale.float())[:, None]


def _levels(q: QTensor) -> Tensor:
    """float32 levels, ascending; without a trellis, by code."""
    if q.spec.uniform:
        half = 1 << (q.spec.bits - 1)
        return torch.arange(-half, half, dtype=torch.float32)
    return q.tensors["weight_grid"].flatten().float()


def _index_of_nearest(position: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(position, (levels[1:] + levels[:-1]) / 2)


def _positions(wanted: Tensor, step: Tensor) -> Tensor:
    """In units of levels; 0 where every level means the same."""
    return torch.where(step == 0, 0.0, wanted / step).contiguous()


def _nearest(q: QTensor, codes: Tensor, wanted: Tensor, step: Tensor) -> Tensor:
    levels = _levels(q)
    index = _index_of_nearest(_positions(wanted, step), levels)
    before, after = ((wanted - step * levels[i]).square_() for i in (codes.long(), index))
    return torch.where(after < before, index.to(torch.uint8), codes)


# ---- trellis ---------------------------------------------------------------------------------------------------------


def _searched(q: QTensor, codes: Tensor, wanted: Tensor, step: Tensor) -> Tensor:
    """A block of every row is a row of its own here, padded with columns that cost nothing."""
    levels, found = _levels(q), codes.clone()
    index = q.level_index()
    blocks = q.spec.blocks()
    begins = torch.tensor([begin for begin, _ in blocks])
    ends = torch.tensor([end for _, end in blocks])
    width = int((ends - begins).max())
    column = begins[:, None] + torch.arange(width)
    inside = column < ends[:, None]
    column = column.clamp(max=q.spec.K - 1)
    for rows in torch.arange(q.spec.N).split(max(1, _BLOCKS_AT_ONCE // len(blocks))):
        part = slice(int(rows[0]), int(rows[-1]) + 1)

        def cut(t: Tensor, part: slice = part) -> Tensor:
            """[N, K] -> [blocks of these rows, width]"""
            return t[part][:, column].flatten(0, 1)

        x, a = cut(wanted), cut(step)
        counts = inside.to(x.dtype).expand(len(rows), -1, -1).flatten(0, 1)
        new, new_index = _viterbi(x, a, counts, levels)
        error = [((x - a * levels[i.long()]).square_() * counts).sum(1) for i in (cut(index), new_index)]
        kept = torch.where((error[1] < error[0])[:, None], new, cut(codes)).view(len(rows), len(blocks), width)
        found[part, column[inside]] = kept[:, inside]
    return found


def _viterbi(x: Tensor, step: Tensor, counts: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and level numbers, uint8 [rows, columns], of the cheapest path through format/trellis.h's states from 0.

    A state is (b_{k-2}, b_{k-1}); the next code's lowest bit b leads to (b_{k-1}, b), over a level of subset
    2 * (b ^ b_{k-2}) + b_{k-1}.
    """
    rows, columns = x.shape
    position = _positions(x, step).t().contiguous()
    x, step, counts = (t.t().contiguous() for t in (x, step, counts))
    nearest = torch.empty((columns, 4, rows), dtype=torch.uint8)
    cost = torch.empty((columns, 2, 2, rows))  # [b_{k-1}, b ^ b_{k-2}]
    for z in range(4):
        own = levels[z::4].contiguous()
        i = _index_of_nearest(position, own)
        nearest[:, z] = i
        cost[:, z & 1, z >> 1] = (x - step * own[i]).square_() * counts
    swapped = cost.flip(2)
    total = torch.full((2, 2, rows), torch.inf)
    total[0, 0] = 0
    came_from = torch.empty((columns, 2, 2, rows), dtype=torch.bool)  # b_{k-2} of the cheaper way into a state
    for k in range(columns):
        stay, other = total[0][:, None] + cost[k], total[1][:, None] + swapped[k]
        torch.lt(other, stay, out=came_from[k])
        total = torch.minimum(stay, other)
    before = came_from.view(columns, 4, rows).long()
    before = 2 * before + torch.tensor([0, 0, 1, 1])[:, None]
    state = torch.empty((columns + 1, rows), dtype=torch.long)
    state[columns] = total.view(4, rows).min(0).indices  # the lowest of equals
    for k in range(columns - 1, -1, -1):
        torch.gather(before[k], 0, state[k + 1][None], out=state[k][None])
    oldest, previous, bit = state[:-1] >> 1, state[:-1] & 1, state[1:] & 1
    subset = 2 * (bit ^ oldest) + previous
    index = 4 * nearest.gather(1, subset[:, None])[:, 0] + subset.to(torch.uint8)
    codes = (index >> 1) ^ oldest.to(torch.uint8)
    return codes.t(), index.t()
