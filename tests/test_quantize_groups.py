"""quantize_groups: every output against the rule it is specified by, and budgets for the error."""

from __future__ import annotations

import math

import pytest
import reference
import shapes
import torch
from conftest import ISAS, THREADS, forced_isa, forced_threads
from shapes import RTN, Recipe
from torch import Tensor

from precal_ext import ops

EPS32 = torch.finfo(torch.float32).eps
GRIDS = {
    3: torch.tensor([shapes.GRID_3], dtype=torch.int8),
    4: torch.tensor([shapes.GRID_4], dtype=torch.int8),
    "positive": torch.tensor([[1, 20, 60, 127]], dtype=torch.int8),  # 2 bits, no zero and nothing below it
    "trellis": torch.tensor([shapes.TRELLIS_4], dtype=torch.int8),
    "trellis3": torch.tensor([shapes.TRELLIS_3], dtype=torch.int8),
    "repeated": torch.tensor([[-127, -127, -20, 0, 0, 0, 30, 90]], dtype=torch.int8),
}
RECIPES = {
    "int4": Recipe(4, 64),
    "int3_outlier": Recipe(3, 32, 1),
    "grid4_outliers": Recipe(4, 32, 4, 1e-3, GRIDS[4]),
    "grid3_long_groups": Recipe(3, 1000, 2, 0.0, GRIDS[3]),
    "int8_odd_groups": Recipe(8, 13, 16),
    "int2": Recipe(2, 128),
    "positive_grid": Recipe(2, 64, 1, 0.0, GRIDS["positive"]),
    "repeated_levels": Recipe(3, 48, 0, 0.0, GRIDS["repeated"]),
    "trellis4_outlier": Recipe(4, 64, 1, 0.0, GRIDS["trellis"]),
    "trellis3_odd_groups": Recipe(3, 33, 4, 1e-3, GRIDS["trellis3"]),
    "trellis3_long_groups": Recipe(3, 1000, 0, 0.0, GRIDS["trellis3"], search=(0.9, 1.0)),
    "wide_search": Recipe(4, 32, 0, 0.0, GRIDS[4], search=(0.05, 1.1)),
    "single_candidate": Recipe(4, 32, 1, math.inf, search=(1.0, 1.0)),
    "rtn": Recipe(4, 128, **RTN),
    "rtn3_outliers": Recipe(3, 64, 2, **RTN),
}
SHAPES = [(1, 1), (5, 63), (17, 300), (2, 2304)]
CASES = [(recipe, matrix) for recipe in RECIPES for matrix in shapes.HARD_MATRICES]
PLAIN = [case for case in CASES if not RECIPES[case[0]].trellis]  # tests/test_trellis.py has the search of the others
SEARCHED = [case for case in PLAIN if RECIPES[case[0]].scale_dtype == "e4m3"]
WITH_OUTLIERS = [case for case in CASES if RECIPES[case[0]].c > 0]


def dense_mask(w: Tensor, recipe: Recipe) -> Tensor:
    """True where a weight is not an outlier: outliers are the c largest |w| with w^2 > lam of their block."""
    dense = torch.ones(w.shape, dtype=torch.bool)
    for begin, end in reference.outlier_blocks(w.shape[1]):
        magnitude = w[:, begin:end].double().abs()
        columns = magnitude.argsort(dim=1, descending=True, stable=True)[:, : recipe.c]  # ties: the lower column
        chosen = magnitude.gather(1, columns) ** 2 > recipe.lam
        dense[:, begin:end].scatter_(1, columns, ~chosen)
    return dense


def extremes(w: Tensor, dense: Tensor, recipe: Recipe) -> Tensor:
    """float32 [N, G]: the dense weight of largest magnitude, positive on a tie; its magnitude when symmetric."""
    groups = torch.where(dense, w, 0).split(recipe.group_size, dim=1)
    high = torch.stack([g.amax(1).clamp(min=0) for g in groups], 1)
    low = torch.stack([g.amin(1).clamp(max=0) for g in groups], 1)
    signed = torch.where(high >= -low, high, low)
    return signed.abs() if recipe.symmetric else signed


def peak_level(recipe: Recipe) -> float:
    levels = reference.levels_of(recipe.grid, recipe.bits)
    return float(levels[0] if not recipe.symmetric and levels[0].abs() > levels[-1].abs() else levels[-1])


def in_row_scales(w: Tensor, row_scale: Tensor) -> Tensor:
    """float32: w / row_scale, the numbers that groups and codes are chosen on; 0 in rows without a scale."""
    return torch.where(row_scale[:, None] > 0, w / row_scale.float()[:, None], 0)


# ---- the rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "matrix"), CASES)
def test_bytes_depend_on_neither_isa_nor_threads(recipe: str, matrix: str) -> None:
    for N, K in [(5, 63), (2, 2304), (33, 1030)]:  # the last is cut into three pieces of rows
        w = shapes.HARD_MATRICES[matrix](N, K)
        with forced_isa("scalar"), forced_threads(1):
            want = RECIPES[recipe].quantize(w)
        for isa, count in [*((isa, 1) for isa in ISAS), *((ISAS[0], count) for count in THREADS)]:
            with forced_isa(isa), forced_threads(count):
                got = RECIPES[recipe].quantize(w)
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("recipe", "matrix"), CASES)
def test_row_scale_is_the_mean_amplitude(recipe: str, matrix: str) -> None:
    r = RECIPES[recipe]
    for N, K in SHAPES:
        w = shapes.HARD_MATRICES[matrix](N, K)
        dense = dense_mask(w, r)
        amplitude = extremes(w, dense, r).abs() / abs(peak_level(r))
        mean = amplitude.double().mean(1).float()
        # every scale must fit: 400 of e4m3's 448, with room for the search; so must every outlier, in units of U
        limit = 400.0 if r.scale_dtype == "e4m3" else 32768.0
        outlier = torch.where(dense, 0, w).abs().amax(1)
        base = torch.stack([mean, amplitude.amax(1) / limit, outlier / (reference.OUTLIER_UNIT * 400)]).amax(0)
        assert torch.equal(r.quantize(w)[2], reference.row_scale(base))


@pytest.mark.parametrize(("recipe", "matrix"), SEARCHED)
def test_no_candidate_scale_has_less_error(recipe: str, matrix: str) -> None:
    r = RECIPES[recipe]
    values, levels, peak = reference.e4m3_values(), reference.levels_of(r.grid, r.bits), peak_level(r)
    N, K = 5, 300
    w = shapes.HARD_MATRICES[matrix](N, K)
    _, scale, row_scale, *_ = r.quantize(w)
    dense, v = dense_mask(w, r), in_row_scales(w, row_scale)
    t = in_row_scales(extremes(w, dense, r), row_scale) / peak
    limits = [(t.abs() * bound).to(torch.float8_e4m3fn).view(torch.uint8).int() for bound in r.search]
    for n in range(N):
        for g in range(t.shape[1]):
            if t[n, g] == 0:
                assert scale[n, g] == 0
                continue
            columns = slice(g * r.group_size, (g + 1) * r.group_size)
            x = v[n, columns][dense[n, columns]].double()
            first = max(1, int(limits[0][n, g]))
            last = max(first, int(limits[1][n, g]))
            candidates = torch.arange(first, last + 1) + (0x80 if t[n, g] < 0 else 0)
            distance = (x[None, :, None] - values[candidates][:, None, None] * levels).abs().amin(-1)
            errors = (distance**2).sum(1)
            assert scale[n, g] in candidates
            chosen = errors[candidates == int(scale[n, g])]
            # The search sums in float32, ceil(group/16) terms a lane and 4 more in the tree; each v - s * level is
            # off by eps * |v|.
            slack = (r.group_size / 16 + 8) * EPS32 * errors.min() + 4 * EPS32 * (
                x**2
            ).sum() ** 0.5 * errors.min() ** 0.5
            assert chosen <= errors.min() + slack + (4 * EPS32) ** 2 * (x**2).sum()


def test_the_first_of_equal_errors_wins(isa: str) -> None:
    # Mean amplitude 8, so the first group sits at 132 / 8 = 16.5 = 12 * 11/8 = 11 * 12/8: two scales without error.
    w = torch.tensor([[132.0] * 4 + [60.0] * 4])
    _, scale, row_scale, *_ = Recipe(2, 4, grid=torch.tensor([0, 1, 11, 12], dtype=torch.int8)).quantize(w)
    assert row_scale.tolist() == [8.0]
    assert reference.scale_values(scale).tolist() == [[11 / 8, 5 / 8]]


@pytest.mark.parametrize(("recipe", "matrix"), PLAIN)
def test_codes_are_the_nearest_levels(recipe: str, matrix: str) -> None:
    r = RECIPES[recipe]
    for N, K in SHAPES:
        w = shapes.HARD_MATRICES[matrix](N, K)
        codes, scale, row_scale, *_ = r.quantize(w)
        levels = reference.levels_of(r.grid, r.bits)
        scales = reference.scale_values(scale)[:, reference.group_of_column(K, r.group_size)]
        v = in_row_scales(w, row_scale).double()
        nearest = (v[..., None] - scales[..., None] * levels).abs().amin(-1)
        chosen = (v - scales * levels[codes.long()]).abs()
        # v * (1 / s) has two roundings, so two levels may be confused where v lies within eps * |v| of their midpoint;
        # the distances then differ by at most twice that.
        assert (chosen <= nearest + 2 * EPS32 * v.abs()).all()


@pytest.mark.parametrize("matrix", shapes.HARD_MATRICES)
def test_float16_scales_meet_the_extreme_weight(matrix: str) -> None:
    r = RECIPES["rtn"]
    w = shapes.HARD_MATRICES[matrix](17, 300)
    _, scale, row_scale, *_ = r.quantize(w)
    t = in_row_scales(extremes(w, torch.ones_like(w, dtype=torch.bool), r), row_scale) / peak_level(r)
    assert torch.equal(scale, t.half())
    assert (scale >= 0).all()


@pytest.mark.parametrize(("recipe", "matrix"), WITH_OUTLIERS)
def test_outliers_are_the_largest_of_their_block(recipe: str, matrix: str) -> None:
    r = RECIPES[recipe]
    for N, K in SHAPES:
        w = shapes.HARD_MATRICES[matrix](N, K)
        codes, scale, row_scale, index, value = r.quantize(w)
        dense = dense_mask(w, r)
        scales = reference.scale_values(scale)[:, reference.group_of_column(K, r.group_size)]
        levels = reference.levels_of(r.grid, r.bits)[reference.level_index(codes, r.trellis)]
        v = in_row_scales(w, row_scale).double()
        residual = (v - scales * levels).float() / reference.OUTLIER_UNIT
        residual = residual.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        want_index, want_value = torch.zeros_like(index), torch.zeros_like(value)
        for n in range(N):
            for b, (begin, end) in enumerate(reference.outlier_blocks(K)):
                used = (~dense[n, begin:end] & (residual[n, begin:end] & 0x7F != 0)).nonzero()[:, 0]
                want_index[n, b, : len(used)] = used.to(torch.uint8)
                want_value[n, b, : len(used)] = residual[n, begin:end][used]
        assert torch.equal(index, want_index)
        assert torch.equal(value, want_value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stored_dtypes_quantize_as_their_float32(isa: str, dtype: torch.dtype) -> None:
    r = RECIPES["grid4_outliers"]
    w = shapes.student_t(5, 300).to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(r.quantize(w), r.quantize(w.float()), strict=True))


def test_a_flat_grid_is_the_same_as_a_square_one() -> None:
    w = shapes.gaussian(5, 65)
    flat, square = (ops.quantize_groups(w, grid, 4, 32) for grid in (GRIDS[4][0], GRIDS[4]))
    assert all(torch.equal(a, b) for a, b in zip(flat, square, strict=True))


@pytest.mark.parametrize(("N", "K"), [(0, 64), (4, 0), (0, 0)])
def test_empty_weights(isa: str, N: int, K: int) -> None:
    codes, scale, row_scale, index, _ = ops.quantize_groups(torch.empty(N, K), None, 4, 32, 2)
    blocks = len(reference.outlier_blocks(K))
    assert (codes.shape, scale.shape, index.shape) == ((N, K), (N, reference.ceil_div(K, 32)), (N, blocks, 2))
    assert row_scale.tolist() == [0.0] * N
