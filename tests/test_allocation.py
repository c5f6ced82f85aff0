"""The budget's knapsack against brute force, its edges, and what it means for equal sensitivities."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precal_ext import allocation
from precal_ext.allocation import allocate, best_step, undominated

Items = list[list[tuple[int, float]]]

OPTION = st.tuples(st.integers(0, 40), st.integers(0, 1000).map(lambda n: n / 8))  # eighths: sums are exact
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=5), min_size=1, max_size=5)


def cost(items: Items, chosen: list[int]) -> int:
    return sum(options[i][0] for options, i in zip(items, chosen, strict=True))


def loss(items: Items, chosen: list[int]) -> float:
    return math.fsum(options[i][1] for options, i in zip(items, chosen, strict=True))


def cheapest(items: Items) -> int:
    return sum(min(c for c, _ in options) for options in items)


def least_loss(items: Items, budget: int) -> float:
    every = itertools.product(*(range(len(options)) for options in items))
    return min(loss(items, list(chosen)) for chosen in every if cost(items, list(chosen)) <= budget)


@given(ITEMS, st.integers(0, 120))
def test_it_is_what_brute_force_finds(items: Items, above: int) -> None:
    budget = cheapest(items) + above
    chosen = allocate(items, budget)
    assert cost(items, chosen) <= budget
    assert loss(items, chosen) == least_loss(items, budget)


@given(ITEMS, st.integers(1, 50))
def test_scaled_costs_give_the_same_choice(items: Items, factor: int) -> None:
    """Matrices of round sizes: costs have a large common divisor."""
    budget = cheapest(items) + 7
    scaled = [[(c * factor, value) for c, value in options] for options in items]
    assert allocate(scaled, budget * factor) == allocate(items, budget)


@given(ITEMS, st.integers(0, 120), st.sampled_from([1, 2, 5, 11]))
def test_with_few_cells_it_stays_within_the_budget_and_near_the_best(items: Items, above: int, cells: int) -> None:
    budget = cheapest(items) + above
    before = allocation.CELLS
    allocation.CELLS = cells
    try:
        chosen = allocate(items, budget)
    finally:
        allocation.CELLS = before
    assert cost(items, chosen) <= budget
    # Every cost is rounded up by less than a step, so nothing is lost against a budget that is smaller by as much.
    step = -(-above // cells)
    smaller = max(cheapest(items), budget - step * (len(items) + 1))
    assert loss(items, chosen) <= least_loss(items, smaller)
    # And nothing that fits is left.
    rest = budget - cost(items, chosen)
    for options, i in zip(items, chosen, strict=True):
        assert not any(c - options[i][0] <= rest and value < options[i][1] for c, value in options)


@given(ITEMS)
def test_the_cheapest_is_feasible_and_less_is_not(items: Items) -> None:
    least = cheapest(items)
    assert cost(items, allocate(items, least)) == least
    with pytest.raises(ValueError, match=f"budget must be at least {least}, the sum of the cheapest options"):
        allocate(items, least - 1)


@given(ITEMS)
def test_with_all_the_money_everything_is_best(items: Items) -> None:
    chosen = allocate(items, sum(max(c for c, _ in options) for options in items))
    assert loss(items, chosen) == sum(min(value for _, value in options) for options in items)


@given(st.lists(OPTION, min_size=1, max_size=8))
def test_undominated_options_rise_in_cost_and_fall_in_loss(options: list[tuple[int, float]]) -> None:
    kept = [options[i] for i in undominated(options)]
    assert kept == sorted(kept, key=lambda o: (o[0], -o[1]))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(kept))
    for c, value in options:
        assert any(k[0] <= c and k[1] <= value for k in kept)


def test_the_best_step() -> None:
    options = [(10, 8.0), (12, 7.0), (20, 2.0), (30, 1.0)]
    assert best_step(options, 0) == pytest.approx(0.6)  # 6 for 10, not 1 for 2
    assert best_step(options, 3) == 0
    assert best_step([(10, 8.0), (9, 7.0)], 0) == math.inf


def test_many_items_take_seconds_and_nearly_all_of_the_budget() -> None:
    rng = random.Random(0)
    items: Items = []
    for _ in range(120):
        size, hard = rng.randrange(10**6, 10**8), 10 ** rng.uniform(-1.5, 1.5)
        items.append([(size * bits + rng.randrange(1000), hard * size * 4.0**-bits) for bits in (2, 3, 4, 5, 6)])
    budget = sum(options[2][0] for options in items)
    chosen = allocate(items, budget)
    assert 0.9999 * budget <= cost(items, chosen) <= budget
    # Lagrange's bound: no choice within the budget has less.
    prices = [1e-3 * 1.02**i for i in range(300)]
    bound = max(sum(min(value + p * c for c, value in options) for options in items) - p * budget for p in prices)
    assert bound * (1 - 1e-9) <= loss(items, chosen) <= 1.002 * bound


@pytest.mark.parametrize("seed", range(4))
def test_equal_weights_equalise_the_error(seed: int) -> None:
    """Loss n t^2 with t^2 = h 4^-bits in fine steps: whatever its size and hardness, every set ends at one SQNR."""
    rng = random.Random(seed)
    sets = [(rng.randrange(1, 9) * 1024, rng.uniform(0.3, 3.0)) for _ in range(12)]
    widths = [2 + i / 8 for i in range(33)]  # a step is 0.75 dB
    items = [[(round(n * b), n * h * 4.0**-b) for b in widths] for n, h in sets]
    chosen = allocate(items, round(3.6 * sum(n for n, _ in sets)))
    decibels = [-10 * math.log10(items[i][k][1] / n) for i, ((n, _), k) in enumerate(zip(sets, chosen, strict=True))]
    spread = [-10 * math.log10(h) for _, h in sets]
    assert max(spread) - min(spread) > 5
    assert max(decibels) - min(decibels) < 1.1


def test_a_sensitive_set_gets_a_higher_sqnr_by_its_sensitivity() -> None:
    """d loss / d bit is a n t^2: where a is four times as large, t^2 ends at a quarter, 6 dB higher."""
    widths = [2 + i / 8 for i in range(33)]  # a step is 0.75 dB
    items = [[(round(1024 * b), a * 1024 * 4.0**-b) for b in widths] for a in (1.0, 4.0, 1.0, 1.0)]
    chosen = allocate(items, round(3.5 * 4096))
    decibels = [-10 * math.log10(4.0 ** -widths[k]) for k in chosen]
    assert decibels[1] - decibels[0] == pytest.approx(6.02, abs=1.1)
