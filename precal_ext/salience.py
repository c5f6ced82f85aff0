"""Which weights are salient: the explicit adaptive-LASSO loop, and the mask both ways give."""

from __future__ import annotations

import torch
from torch import Tensor

from precal_ext import ops


def shrink_lam(w: Tensor, alpha: float, factor: float = 0.5, max_steps: int = 4096) -> float:
    """The published loop: start with a lam that shrinks every weight to zero, lower it until a share alpha survives.

    Each step applies ``soft_threshold`` and counts what is left. Once enough survive, lam is bisected between the last
    two steps down to neighbouring floats, so that no more survive than must: the mask is then exactly that of
    ``salience_threshold`` (which needs one pass instead of a hundred).

    Args:
        w: [N, K] float32, float16 or bfloat16, finite.
        alpha: wanted share of survivors, in [0, 1]; k = floor(alpha * N * K + 1/2) must survive, fewer if the rest is
            zero.
        factor: how fast lam shrinks, in (0, 1).
    Returns:
        lam in squared units of ``w``.
    Raises:
        ValueError: alpha or factor out of range, or no end within ``max_steps``.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"shrink_lam: alpha must lie in [0, 1], got {alpha}")
    if not 0 < factor < 1:
        raise ValueError(f"shrink_lam: factor must lie in (0, 1), got {factor}")
    # As float32, so that a survivor's shrunk value never rounds to zero in a narrower dtype before it is counted.
    w = w.float()

    def survivors(lam: float) -> int:
        return int(torch.count_nonzero(ops.soft_threshold(w, lam)))

    k = min(int(torch.count_nonzero(w)), int(alpha * w.numel() + 0.5))
    high = float(w.double().square().max()) if w.numel() else 0.0
    if k == 0:
        return high
    low = high
    for _ in range(max_steps):
        low *= factor
        if survivors(low) >= k:
            break
        high = low
    else:
        raise ValueError(f"shrink_lam: lam must reach a share {alpha} within {max_steps} steps, got no end")
    for _ in range(max_steps):
        middle = low + (high - low) / 2
        if middle in (low, high):
            return low
        if survivors(middle) >= k:
            low = middle
        else:
            high = middle
    return low


def salient(w: Tensor, alpha: float, scope: str = "tensor", group_size: int = 128, normalize: str = "none") -> Tensor:
    """bool [N, K]: the weights that survive the exact threshold (``ops.salience_threshold``)."""
    lam = ops.salience_threshold(w, alpha, scope, group_size, normalize)
    return ops.salience_mask(w, lam, scope, group_size, normalize)
