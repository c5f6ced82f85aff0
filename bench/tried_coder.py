"""A quantizer in plain torch with the choices that precal's own does not offer: `bench/tried.py` measures them.

Groups of weights, a scale each, no outliers; scales are tried group by group, levels are fitted once. It searches
scales before paths, precal's own (`csrc/cpu/trellis-inl.h`) both at once, so their figures differ a little.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FACTORS = [0.6 + 0.05 * i for i in range(11)]  # of the scale at which the extreme weight meets the last level

# states: (taps of the parity, delay) on the low bits of the codes so far, the newest in bit 0. The subset of levels
# that a code chooses from is 2 * parity + the delayed bit: Ungerboeck's codes for one dimension.
CODES = {4: (0b101, 1), 8: (0b1011, 2), 16: (0b10011, 2)}


@dataclass(frozen=True)
class Choice:
    bits: int = 4
    group_size: int = 64
    states: int = 4  # 1: plain
    restart: int = 256  # columns after which the state is 0 again
    scale_by: str = "trellis"  # what judges a scale: the search itself, or one of PROXIES
    signed: bool = True  # scales: the extreme weight of a group always meets the last level
    steps: int | None = None  # an octave that scales may take; None: e4m3


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)


def _proxy(x: Tensor, levels: Tensor, name: str) -> Tensor:
    """Squared error of every weight where codes know nothing of each other."""
    if name == "all levels":
        return (levels[nearest(x, levels)] - x).square()
    even, odd = ((half[nearest(x, half)] - x).square() for half in (levels[0::2], levels[1::2]))
    return even if name == "half of the levels" else (even + odd) / 4 + torch.minimum(even, odd) / 2


PROXIES = ("all levels", "half of the levels", "a mixture")


def search(x: Tensor, weight: Tensor, levels: Tensor, states: int, path: bool = True) -> tuple[Tensor, Tensor]:
    """The sequences of levels with the least weighted squared error, from state 0.

    Args:
        x, weight: [B, T].  levels: all of them, ascending; subset z is every fourth from z.
        path: whether the indices are wanted.
    Returns:
        Errors [B] and indices into the levels [B, T].
    """
    if states == 1:
        index = nearest(x, levels)
        return ((levels[index] - x).square() * weight).sum(-1), index
    taps, delay = CODES[states]
    x, weight = x.T.contiguous(), weight.expand_as(x).T.contiguous()  # [T, B], so that a step reads whole rows
    inside = [nearest(x, levels[z::4]) for z in range(4)]
    error = torch.stack([(levels[z::4][i] - x).square_().mul_(weight) for z, i in enumerate(inside)], 1)
    # The two ways into a state: the bit that falls out of the register was 0 or 1.
    ways = []
    for fallen in (0, states):
        history = [state | fallen for state in range(states)]
        subset = [2 * (bin(h & taps).count("1") & 1) + (h >> delay & 1) for h in history]
        ways.append((torch.tensor(subset), torch.tensor(history) >> 1))
    (subset0, before0), (subset1, before1) = ways
    cost = torch.full((states, x.shape[1]), torch.inf)
    cost[0] = 0
    chosen = []
    for e in error:
        one = cost.index_select(0, before0).add_(e.index_select(0, subset0))
        two = cost.index_select(0, before1).add_(e.index_select(0, subset1))
        if path:
            chosen.append(two < one)
        cost = torch.minimum(one, two)
    least, state = cost.min(0)
    if not path:
        return least, state
    index = torch.empty(x.shape, dtype=torch.long)
    for t in reversed(range(len(x))):
        second = chosen[t].gather(0, state[None])[0]
        z = torch.where(second, subset1[state], subset0[state])
        index[t] = 4 * torch.stack([i[t] for i in inside]).gather(0, z[None])[0] + z
        state = torch.where(second, before1[state], before0[state])
    return least, index.T


def _rounded(scale: Tensor, row: Tensor, steps: int | None) -> Tensor:
    x = scale / row
    if steps is None:
        return x.sign() * x.abs().clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * row
    return x.sign() * torch.exp2((x.abs().log2() * steps).round() / steps) * row


def _code(
    v: Tensor, weight: Tensor, full: Tensor, row: Tensor, levels: Tensor, choice: Choice
) -> tuple[Tensor, Tensor]:
    """Scales [groups, 1] and indices [groups, group_size]."""
    scale, least = full, torch.full((len(v),), torch.inf)
    for factor in FACTORS:
        trial = _rounded(full * factor, row, choice.steps)
        x = v / trial
        if choice.scale_by == "trellis":
            error = search(x, weight, levels, choice.states, path=False)[0]
        else:
            error = (_proxy(x, levels, choice.scale_by) * weight).sum(-1)
        error = error * trial[:, 0].square()
        scale = torch.where((error < least)[:, None], trial, scale)
        least = torch.minimum(error, least)
    x, weight = v / scale, weight * scale.square()
    if choice.states > 1:
        x, weight = x.reshape(-1, choice.restart), weight.reshape(-1, choice.restart)
    return scale, search(x, weight, levels, choice.states)[1].reshape(v.shape)


def _moved(v: Tensor, weight: Tensor, scale: Tensor, index: Tensor, levels: Tensor) -> Tensor:
    """Every level at the mean of its weights, in 127ths of the largest."""
    mass = (weight * scale.square()).expand_as(v).flatten()
    total = torch.zeros(len(levels)).scatter_add_(0, index.flatten(), mass)
    sums = torch.zeros(len(levels)).scatter_add_(0, index.flatten(), mass * (v / scale).flatten())
    levels = torch.where(total > 0, sums / total.clamp(min=1e-20), levels).sort().values
    return (levels / levels.abs().max() * 127).round() / 127


@functools.cache
def _gaussian_levels(choice: Choice) -> Tensor:
    w = torch.randn(64, 32 * choice.group_size, generator=torch.Generator().manual_seed(0))
    levels = torch.linspace(-0.95, 1, 2 ** (choice.bits + (choice.states > 1)))
    for _ in range(6):
        levels = _quantize(w, choice, torch.ones(1), levels)[1]
    return levels


def _quantize(w: Tensor, choice: Choice, importance: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """W' and the levels that would have been better."""
    v = w.reshape(-1, choice.group_size)
    weight = importance.expand_as(w).reshape(v.shape)
    high, low = v.amax(-1, keepdim=True), v.amin(-1, keepdim=True)
    full = torch.maximum(high, -low).clamp(min=1e-9)
    row = full.reshape(len(w), -1).mean(1).bfloat16().float().repeat_interleave(len(v) // len(w))[:, None]
    if choice.signed:
        full = torch.where(high >= -low, full, -full)
    scale, index = _code(v, weight, full, row, levels, choice)
    return (levels[index] * scale).reshape(w.shape), _moved(v, weight, scale, index, levels)


def quantize(w: Tensor, choice: Choice, importance: Tensor | None = None) -> Tensor:
    """W' of [N, K] float32; groups and restarts must divide a row.

    Args:
        importance: [K] weights of the squared error of a column.
    """
    importance = torch.ones(1) if importance is None else importance / importance.mean()
    start = replace(choice, restart=choice.group_size, scale_by="trellis", signed=True, steps=None)
    levels = _quantize(w, choice, importance, _gaussian_levels(start))[1]
    return _quantize(w, choice, importance, levels)[0]
