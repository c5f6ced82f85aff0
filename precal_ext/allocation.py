"""Spending a budget: one option of every item, so that the losses add up to the least that the budget allows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

# An option of an item: what it costs, and the loss with it.
Option = tuple[int, float]
# Cells of the knapsack. Where costs have a common divisor, as those of matrices with round sizes, far fewer are needed
# and the result is exact.
CELLS = 1 << 16


def undominated(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other with at most their cost beats, by cost; of equal ones the first."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (*options[i], i)):
        if not kept or options[i][1] < options[kept[-1]][1]:
            kept.append(i)
    return kept


def allocate(items: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The option of every item, least loss in all at no more than ``budget``.

    A knapsack by dynamic programming over the costs above the cheapest, in steps of their greatest common divisor:
    exact where the budget has at most CELLS of them. Else a step is a CELLS-th of what is left to spend, costs are
    rounded up to steps, and what that leaves over is spent greedily.

    Args:
        items: for each item (cost >= 0, finite loss) of its options, at least one.
    Raises:
        ValueError: even the cheapest options cost more than ``budget``.
    """
    kept = [undominated(options) for options in items]
    least = sum(options[k[0]][0] for options, k in zip(items, kept, strict=True))
    if least > budget:
        raise ValueError(f"allocate: budget must be at least {least}, the sum of the cheapest options, got {budget}")
    extras = [[options[i][0] - options[k[0]][0] for i in k] for options, k in zip(items, kept, strict=True)]
    step = math.gcd(*(e for extra in extras for e in extra)) or 1
    room = budget - least
    if room // step > CELLS:
        step = -(-room // CELLS)
    cells = min(room // step, sum(-(-max(extra) // step) for extra in extras))
    best = torch.zeros(cells + 1, dtype=torch.float64)
    taken = torch.zeros((len(items), cells + 1), dtype=torch.int16)
    for n, (options, k, extra) in enumerate(zip(items, kept, extras, strict=True)):
        found = torch.full_like(best, math.inf)
        for which, (i, e) in enumerate(zip(k, extra, strict=True)):
            at = -(-e // step)
            if at > cells:
                break
            with_it = best[: cells + 1 - at] + options[i][1]
            better = with_it < found[at:]
            found[at:][better] = with_it[better]
            taken[n, at:][better] = which
        best = found
    chosen = [0] * len(items)
    at = cells
    for n in reversed(range(len(items))):
        which = int(taken[n, at])
        chosen[n] = which
        at -= -(-extras[n][which] // step)
    return _spend_the_rest(items, [k[c] for k, c in zip(kept, chosen, strict=True)], budget)


def _spend_the_rest(items: Sequence[Sequence[Option]], chosen: list[int], budget: int) -> list[int]:
    """Take the best step that still fits, again and again."""
    rest = budget - sum(options[i][0] for options, i in zip(items, chosen, strict=True))
    while True:
        steps = [
            step for n, options in enumerate(items) for step in _steps_up(n, options, chosen[n]) if step[2] <= rest
        ]
        if not steps:
            return chosen
        _, n, cost, i = max(steps, key=lambda step: (step[0], -step[1]))
        chosen[n] = i
        rest -= cost


def _steps_up(n: int, options: Sequence[Option], now: int) -> list[tuple[float, int, int, int]]:
    """Saved loss per unit of cost, the item, cost, and the option, of options better than the present one."""
    cost, loss = options[now]
    better = [(loss - o[1], o[0] - cost, i) for i, o in enumerate(options) if o[1] < loss]
    return [(saved / c if c > 0 else math.inf, n, c, i) for saved, c, i in better]


def best_step(options: Sequence[Option], now: int) -> float:
    """The most loss that a unit of further cost saves with one item; 0 when nothing is better."""
    return max((step[0] for step in _steps_up(0, options, now)), default=0.0)
