"""Trellis codes: what they mean, and that the search is the one specified and finds the best path."""

from __future__ import annotations

import itertools

import pytest
import reference
import shapes
import torch
from conftest import ISAS, forced_isa
from shapes import Recipe
from test_quantize_groups import dense_mask, extremes, in_row_scales, peak_level
from torch import Tensor

from precal_ext import ops
from precal_ext.grids import constant_grid
from precal_ext.measure import sqnr_db, sum_squares


def grid(bits: int) -> Tensor:
    if bits == 7:
        return torch.arange(-127, 128).repeat(2)[:256].sort().values.to(torch.int8)[None]
    return constant_grid(bits, 64, True)


RECIPES = {
    "2 bits": Recipe(2, 64, 1, 0.0, grid(2)),
    "3 bits": Recipe(3, 64, 1, 0.0, grid(3)),
    "3 bits, groups over blocks": Recipe(3, 300, 2, 1e-3, grid(3)),
    "4 bits": Recipe(4, 64, 1, 0.0, grid(4)),
    "4 bits, groups of 16": Recipe(4, 16, 0, 0.0, grid(4)),
    "4 bits, odd groups": Recipe(4, 13, 3, 0.0, grid(4)),
    "4 bits, whole rows": Recipe(4, 4096, 1, 0.0, grid(4)),
    "4 bits, wide search": Recipe(4, 32, 0, 0.0, grid(4), search=(0.2, 1.1)),
    "4 bits, symmetric": Recipe(4, 32, 0, 0.0, grid(4), symmetric=True),
    "5 bits": Recipe(5, 128, 1, 0.0, grid(5)),
    "6 bits": Recipe(6, 128, 0, 0.0, grid(6)),
    "7 bits": Recipe(7, 64, 1, 0.0, grid(7)),
}


@pytest.mark.parametrize("matrix", shapes.HARD_MATRICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_search_follows_its_specification(recipe: str, matrix: str) -> None:
    r = RECIPES[recipe]
    long = [(3, 513), (1, 2304)] if matrix == "student_t" else []  # the oracle is slow
    for N, K in [(3, 1), (2, 2), (17, 130), (2, 270), *long]:
        w = shapes.HARD_MATRICES[matrix](N, K)
        codes, scale, row_scale, *_ = r.quantize(w)
        dense = dense_mask(w, r)
        t = (in_row_scales(extremes(w, dense, r), row_scale) / peak_level(r)).float()
        levels = reference.levels_of(r.grid, r.bits)
        want = reference.trellis_quantize(in_row_scales(w, row_scale), dense, t, levels, r.group_size, r.search)
        assert torch.equal(scale, want[1])
        assert torch.equal(codes, want[0])


@pytest.mark.parametrize("isa", ISAS)
def test_rows_do_not_meet(isa: str) -> None:
    r = RECIPES["4 bits"]
    w = shapes.student_t(37, 300)
    with forced_isa(isa):
        together = r.quantize(w)
        for n in (0, 15, 16, 36):
            alone = r.quantize(w[n : n + 1])
            assert all(torch.equal(a[n : n + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_no_path_is_better(seed: int) -> None:
    """All 4^6 code sequences of a group, with the scale that was chosen."""
    K, levels = 6, torch.tensor([-120, -70, -30, 0, 25, 60, 95, 127])
    w = torch.randn(1, K, generator=shapes.generator(seed))
    r = Recipe(2, K, 0, 0.0, levels.to(torch.int8)[None])
    codes, scale, row_scale, *_ = r.quantize(w)
    every = torch.tensor(list(itertools.product(range(4), repeat=K)), dtype=torch.uint8)
    s = float(reference.scale_values(scale)[0, 0])
    v = in_row_scales(w, row_scale).double()
    errors = ((v - s * levels.double()[reference.level_index(every, True)]) ** 2).sum(1)
    chosen = ((v - s * levels.double()[reference.level_index(codes, True)]) ** 2).sum()
    assert chosen <= errors.min() * (1 + 1e-5)


def test_a_worked_block() -> None:
    """The example of csrc/format/trellis.h, and the start of the next block."""
    levels = torch.arange(-8, 8, dtype=torch.int8)[None]
    codes = torch.zeros(1, 260, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([5, 2, 7, 1], dtype=torch.uint8)
    codes[0, 254:258] = torch.tensor([7, 7, 2, 4], dtype=torch.uint8)
    one = torch.tensor([[0x38]], dtype=torch.uint8)
    row = torch.ones(1, dtype=torch.bfloat16)
    w = ops.dequantize(ops.pack(codes, 3), one, row, levels, None, None, None, None, 260, 3, 260)
    assert (w[0, :4] + 8).tolist() == [10, 5, 12, 3]
    # Column 256 begins a block and hears nothing of the odd codes before it.
    assert (w[0, 256:258] + 8).tolist() == [4, 8]


@pytest.mark.parametrize(("bits", "gain"), [(2, 1.1), (3, 1.1), (4, 0.9), (5, 0.6), (6, 0.4)])
def test_worth_its_name(bits: int, gain: float) -> None:
    """dB over the best plain grid on Gaussian weights, groups of 64, at the same stored bits but for the grid."""
    w = shapes.gaussian(64, 1024)
    power = sum_squares(w.double())

    def quality(trellis: bool) -> float:
        restored = Recipe(bits, 64, 0, 0.0, constant_grid(bits, 64, trellis)).roundtrip(w)
        return sqnr_db(power, sum_squares((w - restored).double()))

    assert quality(True) - quality(False) >= gain


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_without_outlier_entries_weights_are_clipped_not_lost(bits: int) -> None:
    r = Recipe(bits, 64, 2, 0.0, constant_grid(bits, 64, True))
    w = shapes.student_t(16, 512)
    parts = r.quantize(w)
    dense = r._replace(c=0).dequantize((*parts[:3], None, None))
    outlier = ~dense_mask(w, r)
    assert (dense.sign() == w.sign())[outlier].all()
    assert (dense.abs() <= 1.1 * w.abs())[outlier].float().mean() > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale_dtype": "float16", "search": (1.0, 1.0)}, "scale_dtype must be e4m3 with a trellis grid, got float16"),
        (
            {"bits": 5},
            r"grid must be \[1, 32\] \(1, 2\^bits\), or \[1, 64\] for a trellis of 2 to 7 bits, got \[1, 16\]",
        ),
        ({"grid": torch.zeros(1, 16, dtype=torch.int8)}, "grid must not be all zero"),
        ({"grid": torch.arange(16, 0, -1).to(torch.int8)[None]}, "grid must be non-decreasing"),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"quantize_groups: {message}"):
        Recipe(3, 32, 0, 0.0, constant_grid(3, 32, True))._replace(**change).quantize(torch.ones(2, 64))  # type: ignore[arg-type]
