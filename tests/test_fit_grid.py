"""fit_grid: what comes out is a valid grid, a local optimum, and no worse than what went in."""

from __future__ import annotations

import math
import re

import pytest
import reference
import shapes
import torch
from torch import Tensor

from precal_ext import ops

LO, HI, BINS = -128.0, 128.0, 512
STARTS = {
    2: [-127, -40, 40, 127],
    3: shapes.GRID_3,
    4: shapes.GRID_4,
    5: [round(i * 254 / 31 - 127) for i in range(32)],
}


def levels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int8)


def group_histogram(w: Tensor) -> Tensor:
    """Groups of 50 measured by their largest weight, in levels: what the grid is fitted on."""
    groups = w.reshape(-1, 50)
    x = groups / groups.abs().amax(1, keepdim=True) * 127
    return reference.histogram(x, BINS, LO, HI)[0]


HISTOGRAMS = {
    "gaussian": group_histogram(shapes.gaussian(20, 500)),
    "student_t": group_histogram(shapes.student_t(20, 500)),
    "one_sided": group_histogram(shapes.gaussian(20, 500, 3).abs() + 0.01),
    "student_t_7": group_histogram(shapes.student_t(20, 500, 7)),
}


def fit(counts: Tensor, grid: Tensor, mu: float = 0.0, rounds: int = 1) -> Tensor:
    return ops.fit_grid(counts, LO, HI, grid, mu, rounds)


def objective(counts: Tensor, grid: Tensor, mu: float) -> float:
    return reference.grid_objective(counts, LO, HI, grid, mu)


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("bits", STARTS)
@pytest.mark.parametrize("mu", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rounds", [1, 4])
def test_the_grid_is_valid(name: str, bits: int, mu: float, rounds: int) -> None:
    grid = levels(*STARTS[bits])
    got = fit(HISTOGRAMS[name], grid, mu, rounds)
    assert (got.dtype, got.shape) == (torch.int8, grid.shape)
    assert (got.int().diff() >= 0).all()
    assert got.int().abs().max() == 127  # stretched to use all of int8


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("bits", STARTS)
@pytest.mark.parametrize("mu", [0.0, 0.1, 1.0])
def test_no_level_can_move_by_one(name: str, bits: int, mu: float) -> None:
    counts = HISTOGRAMS[name]
    got = fit(counts, levels(*STARTS[bits]), mu).tolist()
    best = objective(counts, levels(*got), mu)
    peak = 0 if abs(got[0]) > abs(got[-1]) else len(got) - 1  # stays: scales are measured by it
    for i in range(len(got)):
        for step in (-1, 1):
            moved = [*got[:i], got[i] + step, *got[i + 1 :]]
            if i != peak and moved == sorted(moved) and abs(moved[i]) <= 127:
                # the op sums bins in another order: a gain of 1e-12 is no gain
                assert objective(counts, levels(*moved), mu) >= best - 1e-12


@pytest.mark.parametrize("name", HISTOGRAMS)
@pytest.mark.parametrize("bits", STARTS)
@pytest.mark.parametrize("mu", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("rounds", [1, 4])
def test_the_objective_is_never_worse_than_at_the_start(name: str, bits: int, mu: float, rounds: int) -> None:
    counts, grid = HISTOGRAMS[name], levels(*STARTS[bits])
    assert objective(counts, fit(counts, grid, mu, rounds), mu) <= objective(counts, grid, mu) + 1e-12


def test_a_bad_start_is_left_behind() -> None:
    # Equal steps cost a Gaussian 0.5 dB and more; these levels, all on one side, cost far more than that.
    counts, grid = HISTOGRAMS["gaussian"], levels(*range(112, 128))
    assert objective(counts, fit(counts, grid, rounds=50), 0.0) < 0.02 < objective(counts, grid, 0.0)


def test_mass_at_every_level_is_a_fixed_point() -> None:
    counts = torch.zeros(BINS, dtype=torch.int64)
    grid = levels(-127, -50, 10, 90)
    # width 1/2: the bin whose centre is level + 1/4; centroids and levels then agree to a quarter
    counts[(grid.long() + 128) * 2] = torch.tensor([5, 9, 9, 5])
    assert torch.equal(fit(counts, grid), grid)


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_only_proportions_matter(mu: float) -> None:
    counts, grid = HISTOGRAMS["student_t"], levels(*shapes.GRID_4)
    assert torch.equal(fit(counts, grid, mu), fit(counts * 1024, grid, mu))


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_no_rounds_or_no_weights_return_the_grid(mu: float) -> None:
    grid = levels(-100, -3, -3, 90)
    assert torch.equal(fit(HISTOGRAMS["gaussian"], grid, mu, 0), grid)
    assert torch.equal(fit(torch.zeros(BINS, dtype=torch.int64), grid, mu, 5), grid)


def test_a_grid_of_two_dimensions_keeps_its_shape() -> None:
    grid = levels(*shapes.GRID_4)
    flat, square = fit(HISTOGRAMS["gaussian"], grid), fit(HISTOGRAMS["gaussian"], grid[None])
    assert square.shape == (1, 16)
    assert torch.equal(square[0], flat)


def test_all_mass_at_zero() -> None:
    counts = torch.zeros(3, dtype=torch.int64)
    counts[1] = 7  # the middle bin of an odd number: its centre is 0, relative error is 0/0
    got = ops.fit_grid(counts, LO, HI, levels(-127, 0, 0, 127), 0.5, 3)
    assert 0 in got.tolist()
    assert (got.int().diff() >= 0).all()


# ---- a histogram by code ---------------------------------------------------------------------------------------------


def test_levels_move_to_the_means_of_their_codes() -> None:
    # over [-4, 4]: bin centres -3.5 ... 3.5; means -3, 0 (nothing there: it stays), 2; stretched by 127 / 3
    counts = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0], [0] * 8, [0, 0, 0, 0, 1, 0, 0, 1]])
    assert ops.fit_grid(counts, -4.0, 4.0, levels(-2, 0, 3)).tolist() == [-127, 0, 85]


@pytest.mark.parametrize("bits", STARTS)
def test_given_the_nearest_codes_it_is_a_step_of_lloyd(bits: int) -> None:
    grid = levels(*STARTS[bits])
    counts = HISTOGRAMS["gaussian"]
    cells = torch.from_numpy(reference.cell_of_bin(len(counts), LO, HI, grid))
    by_code = torch.zeros(grid.numel(), len(counts), dtype=torch.int64)
    by_code[cells, torch.arange(len(counts))] = counts
    centres = LO + (torch.arange(len(counts)).double() + 0.5) * ((HI - LO) / len(counts))
    mass = by_code.sum(1)
    means = torch.where(mass > 0, (by_code * centres).sum(1) / mass.clamp(min=1), grid.flatten().double())
    want = torch.floor(means.sort().values / means.abs().max() * 127 + 0.5)
    assert torch.equal(ops.fit_grid(by_code, LO, HI, grid).flatten().double(), want)


def test_nothing_by_code_returns_the_grid() -> None:
    grid = levels(-5, 1, 9)
    assert torch.equal(ops.fit_grid(torch.zeros(3, 10, dtype=torch.int64), -1.0, 1.0, grid), grid)
    counts = torch.ones(3, 10, dtype=torch.int64)
    assert torch.equal(ops.fit_grid(counts, -1.0, 1.0, grid, 0.0, 0), grid)


COUNTS, GRID = torch.tensor([1, 2, 3]), levels(-3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.fit_grid(COUNTS.int(), 0, 1, GRID),
            TypeError,
            "fit_grid: counts must have dtype int64, got int32",
        ),
        (lambda: ops.fit_grid(COUNTS - 2, 0, 1, GRID), ValueError, "fit_grid: counts must be >= 0, got -1 at [0]"),
        (
            lambda: ops.fit_grid(COUNTS[None], 0, 1, GRID),
            ValueError,
            "counts must be [bins] or [levels, bins] with at most 2^24 in all, got [1, 3]",
        ),
        (lambda: ops.fit_grid(COUNTS[::2], 0, 1, GRID), ValueError, "counts must be contiguous"),
        (lambda: ops.fit_grid(COUNTS, 1, 0, GRID), ValueError, "lo and hi must be finite with lo < hi, got [1, 0]"),
        (
            lambda: ops.fit_grid(COUNTS, -1e200, 1, GRID),
            ValueError,
            "lo and hi must lie in [-1e100, 1e100], got [-1e+200",
        ),
        (lambda: ops.fit_grid(COUNTS, 0, 1, GRID.int()), TypeError, "grid must have dtype int8, got int32"),
        (lambda: ops.fit_grid(COUNTS, 0, 1, GRID.flip(0)), ValueError, "grid must be non-decreasing, got 4 before -3"),
        (lambda: ops.fit_grid(COUNTS, 0, 1, levels(-128, 5)), ValueError, "grid must lie in [-127, 127], got -128"),
        (lambda: ops.fit_grid(COUNTS, 0, 1, levels(5)), ValueError, "grid must hold 2 to 256 levels, got [1]"),
        (lambda: ops.fit_grid(COUNTS, 0, 1, GRID, -1), ValueError, "mu must be finite and >= 0, got -1"),
        (lambda: ops.fit_grid(COUNTS, 0, 1, GRID, math.nan), ValueError, "mu must be finite and >= 0, got nan"),
        (lambda: ops.fit_grid(COUNTS, 0, 1, GRID, 0, -1), ValueError, "rounds must lie in [0, 1000], got -1"),
        (lambda: ops.fit_grid(COUNTS, 0, 1, GRID, 0, 1001), ValueError, "rounds must lie in [0, 1000], got 1001"),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
