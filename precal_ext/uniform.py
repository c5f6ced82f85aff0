"""Weights that other formats have too: a uniform grid, one scale per group, no outliers.

W'[n, k] = scale[n, k // group_size] * (u[n, k] - 2^(bits-1)). They are weights of recipe ``rtn`` (docs/format.md),
whose scales are float16 under a bfloat16 scale per row. Here the row's is a power of two, so that the product of the
two is exactly the one scale that the other format has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from precal_ext import ops
from precal_ext.qtensor import QTensor, WeightSpec

_ROWS_AT_ONCE = 1 << 20  # weights


def uniform_spec(N: int, K: int, bits: int, group_size: int) -> WeightSpec:
    """The spec of such a weight; ``group_size`` -1 is the whole row."""
    return WeightSpec(N, K, bits, max(K, 1) if group_size == -1 else group_size, 0, 0, False, "float16")


def is_uniform(spec: WeightSpec) -> bool:
    """Whether codes and scales are all there is to a weight."""
    return spec.uniform and spec.c == 0 and not spec.split


def split_scales(scale: Tensor) -> tuple[Tensor, Tensor] | None:
    """One scale per group as float16 under a power of two per row, exactly; None when some scale has no such form.

    Rows that are float16 have a row scale of 1. Others fit when their scales have at most 11 significant bits, bfloat16
    has 8, and the least is within 2**32 of the largest.

    Args:
        scale: [N, G] finite, of a floating dtype.
    Returns:
        float16 [N, G], bfloat16 [N].
    """
    exact = scale.double()
    row_scale = torch.ones(len(scale), dtype=torch.float64)
    if scale.numel():
        exponent = torch.frexp(exact.abs().amax(1))[1].double()  # of the largest, which is below 2^exponent
        # Below 2, where no product with a level leaves float16; where that loses small ones, at the top of float16.
        for top in (1, 16):
            inexact = ((exact / row_scale[:, None]).half().double() * row_scale[:, None] != exact).any(1)
            row_scale[inexact] = torch.exp2(exponent[inexact] - top)
    half, outer = (exact / row_scale[:, None]).half(), row_scale.bfloat16()
    if not bool((half.double() * outer.double()[:, None] == exact).all()):
        return None
    return half, outer


def first_unsplit(scale: Tensor) -> tuple[int, int]:
    """Row and group of a scale for which ``split_scales`` gives None."""
    for n in range(len(scale)):
        if split_scales(scale[n : n + 1]) is None:
            one = scale[n].double().abs()
            bad = [g for g in range(one.numel()) if split_scales(scale[n : n + 1, g : g + 1]) is None]
            return n, bad[0] if bad else int(one.argmin())
    raise ValueError("first_unsplit: some scale must have no exact form, got only ones that have")


def uniform_qtensor(packed: Tensor, scale: Tensor, row_scale: Tensor, spec: WeightSpec) -> QTensor:
    """The weight of codes and scales; bits behind the last code of a row, which others may leave set, become 0."""
    used = spec.K * spec.bits % 32
    if used and spec.N:
        packed = packed.clone()
        packed[:, -1] &= (1 << used) - 1
    shape = torch.tensor([spec.N, spec.K], dtype=torch.int64)
    found = {
        "weight_packed": packed.contiguous(),
        "weight_scale": scale.contiguous(),
        "weight_row_scale": row_scale,
        "weight_shape": shape,
    }
    return QTensor(spec, found)


def group_scales(q: QTensor) -> Tensor:
    """float32 [N, G]: the scale of each group of a uniform weight, row scale included.

    The product of a bfloat16 and a float16 or e4m3 has at most 19 significant bits: exact in float32.
    """
    scale = q.tensors["weight_scale"]
    values = scale.view(torch.float8_e4m3fn).float() if scale.dtype == torch.uint8 else scale.float()
    return values * q.tensors["weight_row_scale"].float()[:, None]


def quantize_uniform(w: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight: the scale with the least squared error among those of ``ops.quantize_groups``,
    rounded to ``dtype``, then the codes nearest under it. A scale may be negative, so that the longer tail of a group
    meets the longer side of the grid.

    Args:
        w: [N, K] float32, float16 or bfloat16, finite, contiguous.
        dtype: of the scales; as float32 they have the 8 bits of bfloat16, so that ``split_scales`` finds a form.
    Returns:
        weight_packed int32 [N, words], scales [N, G] in ``dtype``.
    """
    N, K = w.shape
    spec = uniform_spec(N, K, bits, group_size)
    codes, scale, row_scale, *_ = ops.quantize_groups(w, None, bits, spec.group_size)
    made = QTensor(spec, {"weight_scale": scale, "weight_row_scale": row_scale})
    rounded = group_scales(made).to(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"quantize_uniform: scales must fit in {dtype}, got {float(group_scales(made).abs().max())}")
    half, step = 2 ** (bits - 1), max(1, _ROWS_AT_ONCE // max(1, K))
    for begin in range(0, N, step):
        rows = slice(begin, begin + step)
        width = rounded[rows].float().repeat_interleave(spec.group_size, 1)[:, :K]
        level = (w[rows].float() / width).nan_to_num_(0.0, 0.0, 0.0)  # by a scale of 0
        codes[rows] = level.round_().clamp_(-half, half - 1).add_(half).to(torch.uint8)
    return ops.pack(codes, bits), rounded
