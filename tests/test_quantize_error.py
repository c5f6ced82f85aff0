"""quantize_groups, end to end: budgets of reconstruction error, what must stay finite, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import reference
import shapes
import torch
from shapes import RTN, Recipe
from torch import Tensor

from precal_ext import ops

GRID_3 = torch.tensor([shapes.GRID_3], dtype=torch.int8)
GRID_4 = torch.tensor([shapes.GRID_4], dtype=torch.int8)
FLOAT32_MAX = torch.finfo(torch.float32).max

# Least SQNR in dB on Gaussian weights by (bits, group_size), uniform levels and searched scales: what was measured on
# 64 x 2048 weights less 0.2 dB. A change of method may raise these, none may lower them.
SQNR_BUDGET_DB = {
    (2, 32): 9.3,
    (2, 128): 8.4,
    (3, 32): 15.5,
    (3, 64): 14.8,
    (3, 128): 14.3,
    (4, 32): 21.3,
    (4, 64): 20.5,
    (4, 128): 19.9,
    (5, 64): 26.3,
    (6, 64): 32.1,
    (7, 64): 38.0,
    (8, 64): 44.0,
}
GRID_BUDGET_DB = {(3, 32): 15.9, (3, 64): 15.2, (3, 128): 14.8, (4, 32): 21.1, (4, 64): 20.8, (4, 128): 20.5}
RTN_BUDGET_DB = {(3, 128): 11.0, (4, 32): 20.0, (4, 128): 18.3, (8, 128): 43.5}


@pytest.mark.parametrize(("bits", "group_size"), SQNR_BUDGET_DB)
def test_error_budget_of_uniform_levels(bits: int, group_size: int) -> None:
    w = shapes.gaussian(64, 2048)
    assert reference.sqnr_db(w, Recipe(bits, group_size).roundtrip(w)) >= SQNR_BUDGET_DB[bits, group_size]


@pytest.mark.parametrize(("bits", "group_size"), GRID_BUDGET_DB)
def test_error_budget_of_a_gaussian_grid(bits: int, group_size: int) -> None:
    w = shapes.gaussian(64, 2048)
    r = Recipe(bits, group_size, grid=GRID_3 if bits == 3 else GRID_4)
    assert reference.sqnr_db(w, r.roundtrip(w)) >= GRID_BUDGET_DB[bits, group_size]


@pytest.mark.parametrize(("bits", "group_size"), RTN_BUDGET_DB)
def test_error_budget_of_round_to_nearest(bits: int, group_size: int) -> None:
    w = shapes.gaussian(64, 2048)
    assert reference.sqnr_db(w, Recipe(bits, group_size, **RTN).roundtrip(w)) >= RTN_BUDGET_DB[bits, group_size]


@pytest.mark.parametrize("bits", [3, 4])
def test_outliers_pay_on_heavy_tails(isa: str, bits: int) -> None:
    w = shapes.student_t(33, 2048)
    sqnr = [reference.sqnr_db(w, Recipe(bits, 64, c).roundtrip(w)) for c in (0, 1, 2, 4)]
    assert sqnr == sorted(sqnr)
    assert sqnr[1] > sqnr[0] + 1  # measured: about 3 dB


@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_pays(bits: int) -> None:
    w = shapes.student_t(33, 1024)
    searched, fixed = (reference.sqnr_db(w, Recipe(bits, 64, search=s).roundtrip(w)) for s in ((0.6, 1.1), (1.0, 1.0)))
    assert searched > fixed


@pytest.mark.parametrize("bits", [3, 4])
def test_one_large_group_leaves_the_others_alone(isa: str, bits: int) -> None:
    """Why scales are floats: int8 scales under a row maximum lose 18 dB here."""
    alone, disturbed = shapes.gaussian(17, 2048), shapes.one_large_group(17, 2048)
    r = Recipe(bits, 32)
    want = reference.sqnr_db(alone[:, 32:], r.roundtrip(alone)[:, 32:])
    got = reference.sqnr_db(disturbed[:, 32:], r.roundtrip(disturbed)[:, 32:])
    assert got >= want - 1


@pytest.mark.parametrize("matrix", shapes.HARD_MATRICES)
@pytest.mark.parametrize("c", [0, 2])
@pytest.mark.parametrize("grid", [None, GRID_4], ids=["uniform", "grid"])
def test_every_weight_is_within_a_step_of_its_group(matrix: str, c: int, grid: Tensor | None) -> None:
    for N, K in [(1, 1), (17, 300), (2, 2304)]:
        w = shapes.HARD_MATRICES[matrix](N, K)
        approximation = Recipe(4, 64, c, grid=grid).roundtrip(w)
        assert approximation.isfinite().all()
        largest = torch.stack([g.abs().amax(1) for g in w.split(64, 1)], 1)
        # Clipping: the search goes down to 0.6, the shorter end of the grid is 92/127: 1 - 0.6 * 0.72 = 0.57.
        # Vanishing: the least scale is 2^-9 of the mean amplitude, and a level is at least 1/8 of the largest: 2^-12.
        # (float32 has nothing below 2^-149, row scales nothing below 2^-133.)
        bound = 0.6 * largest[:, reference.group_of_column(K, 64)] + largest.mean(1, keepdim=True) * 2**-12 + 2.0**-126
        assert ((w - approximation).abs() <= bound).all()


@pytest.mark.parametrize("K", [1, 2, 3])
def test_blocks_of_outliers_only(isa: str, K: int) -> None:
    w = torch.tensor([[0.5, -3.0, 1e-3], [0.0, 7e4, -2.0]])[:, :K].contiguous()
    approximation = Recipe(3, 32, 4).roundtrip(w)
    # no dense weight is left: row_scale follows the outlier, 2^-4 is half an ulp of its e4m3; half of the spacing near
    # zero is 2^-10, of outliers that end at 400
    bound = 2.0**-4 * w.abs() + 2.0**-10 / 400 * w.abs().amax(1, keepdim=True)
    assert ((w - approximation).abs() <= bound * (1 + 2**-8)).all()


@pytest.mark.parametrize("grid", [None, GRID_4], ids=["uniform", "grid"])
@pytest.mark.parametrize("c", [0, 1])
def test_the_largest_weights_stay_finite(grid: Tensor | None, c: int) -> None:
    for seed in range(20):
        shrink = torch.rand(4, 64, generator=shapes.generator(seed)) * 10.0 ** -(seed % 8)
        approximation = Recipe(4, 16, c, grid=grid).roundtrip(2.0**126 * (1 - shrink))
        assert approximation.isfinite().all()


def test_weights_whose_scales_would_leave_float32_are_refused() -> None:
    w = torch.ones(2, 8)
    w[1, 3] = -(2.0**126) * 1.0001
    with pytest.raises(
        ValueError, match=r"^quantize_groups: w must be at most 2\^126 in magnitude, got -8.5\d*e\+37 at \[1, 3\]"
    ):
        Recipe(4, 8).quantize(w)


@pytest.mark.parametrize("grid", [None, GRID_4], ids=["uniform", "grid"])
@pytest.mark.parametrize("size", [1e-36, 1e-37, 1e-38, 1e-39])
def test_rows_at_the_other_end_of_float32(grid: Tensor | None, size: float) -> None:
    w = shapes.gaussian(8, 256) * 50 * size
    # 3 dB less than the budget: row scales near the end of bfloat16 have few bits
    assert reference.sqnr_db(w, Recipe(4, 64, grid=grid).roundtrip(w)) > SQNR_BUDGET_DB[4, 64] - 3


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**-7, 2.0**40])
def test_powers_of_two_pass_through(isa: str, factor: float) -> None:
    w = shapes.student_t(9, 300)
    r = Recipe(4, 32, 1, grid=GRID_4)
    codes, scale, row_scale, index, value = r.quantize(w)
    scaled = r.quantize(w * factor)
    for got, want in zip(scaled, (codes, scale, row_scale * factor, index, value), strict=True):
        assert torch.equal(got, want)


def test_negated_weights_negate_the_scales(isa: str) -> None:
    w = shapes.student_t(9, 300)
    codes, scale, row_scale, _, _ = Recipe(4, 32, grid=GRID_4).quantize(w)
    negated = Recipe(4, 32, grid=GRID_4).quantize(-w)
    assert torch.equal(negated[0], codes)
    assert torch.equal(negated[1], scale ^ 0x80)
    assert torch.equal(negated[2], row_scale)


# ---- errors ----------------------------------------------------------------------------------------------------------

W = shapes.gaussian(4, 10)


def with_value(value: float) -> Tensor:
    w = shapes.gaussian(40, 3000)  # several pieces: the first bad weight of all of them is named
    w[7, 2999] = w[31, 5] = value
    return w


def levels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W.double(), None, 4, 4), TypeError, "w must have dtype float32 or float16 or bfloat16, got float64"),
        ((W.T, None, 4, 4), ValueError, "w must be contiguous, got a strided view; call .contiguous() first"),
        ((W[0], None, 4, 4), ValueError, "w must be [N, K], got [10]"),
        ((W, None, 1, 4), ValueError, "bits must lie in [2, 8], got 1"),
        ((W, None, 9, 4), ValueError, "bits must lie in [2, 8], got 9"),
        ((W, None, 4, 0), ValueError, "group_size must lie in [1, 2^30], got 0"),
        ((W, None, 4, 2**63 - 1), ValueError, "group_size must lie in [1, 2^30], got 9223372036854775807"),
        ((W, None, 4, 4, -1), ValueError, "c must lie in [0, 16], got -1"),
        ((W, None, 4, 4, 17), ValueError, "c must lie in [0, 16], got 17"),
        ((W, None, 4, 4, 1, -1.0), ValueError, "lam must be >= 0, got -1"),
        ((W, None, 4, 4, 1, math.nan), ValueError, "lam must be >= 0, got nan"),
        ((W, None, 4, 4, 0, 0, "int8"), ValueError, "scale_dtype must be e4m3 or float16, got int8"),
        ((W, None, 4, 4, 0, 0, "float16"), ValueError, "search_lo and search_hi must be 1 for float16 scales"),
        (
            (W, None, 4, 4, 0, 0, "e4m3", False, 0.0),
            ValueError,
            "search must satisfy 0 < search_lo <= search_hi <= 1.1",
        ),
        ((W, None, 4, 4, 0, 0, "e4m3", False, 0.9, 0.8), ValueError, "search must satisfy 0 < search_lo <= search_hi"),
        ((W, None, 4, 4, 0, 0, "e4m3", False, 0.9, 1.2), ValueError, "search_hi <= 1.1, got [0.9, 1.2]"),
        ((W, None, 4, 4, 0, 0, "e4m3", False, math.nan), ValueError, "search must satisfy 0 < search_lo"),
        ((W, GRID_4.int(), 4, 4), TypeError, "grid must have dtype int8, got int32"),
        (
            (W, GRID_4, 2, 4),
            ValueError,
            "grid must be [1, 4] (1, 2^bits), or [1, 8] for a trellis of 2 to 7 bits, got [1, 16]",
        ),
        ((W, GRID_4.reshape(4, 4), 4, 4), ValueError, "grid must be [1, 16] (1, 2^bits), or [1, 32] for a"),
        ((W, GRID_4.flip(1), 4, 4), ValueError, "grid must be non-decreasing, got 92 before 70"),
        ((W, levels(-128, 0, 1, 2), 2, 4), ValueError, "grid must lie in [-127, 127], got -128"),
        ((W, levels(0, 0, 0, 0), 2, 4), ValueError, "grid must not be all zero"),
        ((W, levels(-9, -3, -1, 0), 2, 4, 0, 0.0, "e4m3", True), ValueError, "grid must end above zero when symmetric"),
        ((with_value(math.nan), None, 4, 4), ValueError, "w must be finite, got nan at [7, 2999]"),
        ((with_value(-math.inf), None, 4, 4), ValueError, "w must be finite, got -inf at [7, 2999]"),
    ],
)
def test_errors(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        ops.quantize_groups(*arguments)
    assert str(caught.value).startswith("quantize_groups: ")
