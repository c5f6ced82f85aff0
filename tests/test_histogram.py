"""histogram, spread_codes, kl_divergence."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import pytest
import reference
import shapes
import torch
from conftest import ROOT, THREADS, forced_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from precal_ext import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRID = torch.tensor([shapes.GRID_4], dtype=torch.int8)
masses = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=30)


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---- histogram -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bins", [1, 2, 100, 4096])
@pytest.mark.parametrize("with_divisor", [False, True])
@pytest.mark.parametrize("with_weight", [False, True])
def test_histogram(isa: str, dtype: torch.dtype, num_bins: int, with_divisor: bool, with_weight: bool) -> None:
    for N, K, group_size in [(1, 1, 128), (7, 33, 32), (17, 300, 64), (3, 2304, 1000)]:
        G, random = reference.ceil_div(K, group_size), shapes.generator(K)
        w = shapes.student_t(N, K).to(dtype)
        divisor = torch.rand(N, G, generator=random) * 2 - 1 if with_divisor else None
        weight = torch.randint(0, 4, (N, G), generator=random) if with_weight else None
        arguments = (num_bins, -0.0625, 0.03125, divisor, weight, group_size)  # a dyadic range: every edge is exact
        got, want = ops.histogram(w, *arguments), reference.histogram(w, *arguments)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(("lo", "hi", "num_bins"), [(-8.0, 8.0, 16), (-127.0, 127.0, 300), (0.0, 7.0, 100)])
def test_histogram_of_values_on_the_edges(isa: str, lo: float, hi: float, num_bins: int) -> None:
    h = (hi - lo) / num_bins
    edges = torch.tensor([lo + b * h for b in range(num_bins + 1)]).float()
    steps = torch.cat([edges, torch.nextafter(edges, torch.tensor(lo)), torch.nextafter(edges, torch.tensor(hi))])
    steps = steps[(steps.abs() > 1e-30) & (steps >= lo) & (steps <= hi)]
    for x in steps:  # one by one, so that two errors cannot cancel
        w = x.reshape(1, 1)
        assert torch.equal(ops.histogram(w, num_bins, lo, hi)[0], reference.histogram(w, num_bins, lo, hi)[0]), x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divisor", [1.0, 3.0])
@pytest.mark.parametrize(("lo", "hi", "num_bins"), [(-8.0, 8.0, 2048), (-127.0, 127.0, 300), (0.0, 8.0, 4096)])
def test_histogram_of_whole_vectors_on_the_edges(
    isa: str, lo: float, hi: float, num_bins: int, divisor: float, dtype: torch.dtype
) -> None:
    edges = torch.arange(num_bins + 1, dtype=torch.float64).mul((hi - lo) / num_bins).add(lo).mul(divisor).float()
    around = [torch.nextafter(edges, torch.tensor(to)) for to in (-1e9, 1e9)]
    beyond = torch.tensor(
        [0.0, -0.0, 1e-40, -1e-40, 65504.0, -3e9, 3e9, -(2.0**31), 1e38, torch.inf, -torch.inf, torch.nan]
    )
    w = torch.cat([edges, *around, beyond]).to(dtype)[None].repeat(3, 1)
    arguments = (num_bins, lo, hi, torch.full((3, 1), divisor), None, w.shape[1])
    got, want = ops.histogram(w, *arguments), reference.histogram(w, *arguments)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_histogram_counts_everything_once(isa: str) -> None:
    w = torch.tensor([[-1.0, -0.5, 0.5, 1.0, 1.5, -1.5, torch.inf, -torch.inf, torch.nan, 0.0]])
    counts, outside = ops.histogram(w, 2, -1.0, 1.0)
    assert counts.tolist() == [2, 3]  # the last bin includes hi
    assert outside.tolist() == [2, 2, 1]  # below, above, NaN


def test_histogram_divides_in_float32(isa: str) -> None:
    # 1/3 in float32 lies above 1/3, where bin 1 begins in double
    counts, _ = ops.histogram(torch.ones(1, 1), 3, 0.0, 1.0, torch.full((1, 1), 3.0))
    assert counts.tolist() == [0, 1, 0]


def test_histogram_of_zero_divisors_is_outside(isa: str) -> None:
    _, outside = ops.histogram(torch.tensor([[1.0, -1.0, 0.0, 2.0]]), 8, -1.0, 1.0, torch.zeros(1, 1))
    assert outside.tolist() == [1, 2, 1]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_histogram_of_nothing(isa: str, shape: tuple[int, int]) -> None:
    counts, outside = ops.histogram(torch.empty(shape), 4, 0.0, 1.0)
    assert (counts.tolist(), outside.tolist()) == ([0] * 4, [0] * 3)


def test_histogram_does_not_depend_on_threads(isa: str) -> None:
    w = shapes.student_t(300, 1000)
    results = []
    for count in THREADS:
        with forced_threads(count):
            results.append(ops.histogram(w, 1000, -0.1, 0.1))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0]) and torch.equal(results[0][1], other[1])


def test_histogram_of_the_largest_group_size() -> None:
    counts, _ = ops.histogram(torch.full((2, 10), 0.25), 2, 0.0, 1.0, group_size=2**63 - 1)
    assert counts.tolist() == [20, 0]


def test_histogram_of_the_narrowest_range() -> None:
    # num_bins / (hi - lo) is beyond double here; the formula of the bins, lo + b * h, is not
    counts, _ = ops.histogram(torch.zeros(1, 1), 256, -1e-307, 1e-307)
    assert counts.nonzero().tolist() == [[128]]


def test_bins_narrower_than_double_end_the_op() -> None:
    """In a process of its own with a limit: h = (hi - lo) / num_bins is 0 here, and nothing could interrupt a loop."""
    script = """
import torch
from precal_ext import ops
try:
    counts, _ = ops.histogram(torch.zeros(1, 1), 2, 0.0, 5e-324)
    assert counts.sum() == 1
except ValueError as error:
    assert "num_bins" in str(error) or "hi" in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("num_labels", [1, 3, 256])
def test_histogram_by_label(isa: str, num_labels: int) -> None:
    w, random = shapes.student_t(17, 300), shapes.generator(1)
    label = torch.randint(0, num_labels, (17, 300), generator=random, dtype=torch.uint8)
    divisor, weight = torch.rand(17, 5, generator=random) + 0.5, torch.randint(0, 4, (17, 5), generator=random)
    arguments = (50, -0.0625, 0.0625, divisor, weight, 64)
    got, outside = ops.histogram(w, *arguments, label, num_labels)
    want, want_outside = reference.histogram(w, *arguments, label, num_labels)
    assert torch.equal(got, want)
    assert torch.equal(outside, want_outside)
    assert torch.equal(got.sum(0), ops.histogram(w, *arguments)[0])


# ---- spread_codes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [[0, 0], [-127, 127], shapes.GRID_3, shapes.GRID_4, list(range(-127, 127))])
@pytest.mark.parametrize("num_bins", [1, 5, 512, 3000])
def test_spread_codes(grid: list[int], num_bins: int) -> None:
    counts, _ = reference.histogram(shapes.student_t(9, 300) * 800, num_bins, -128.0, 128.0)
    levels = torch.tensor(grid, dtype=torch.int8)
    got = ops.spread_codes(counts, -128.0, 128.0, levels)
    # a cell's mass is an exact integer, divided once: half an ulp here, half an ulp in the reference
    torch.testing.assert_close(got, reference.spread_codes(counts, -128.0, 128.0, levels), rtol=3e-16, atol=0)
    torch.testing.assert_close(got.sum(), counts.sum().double(), rtol=1e-12, atol=0)


def test_spread_codes_is_flat_in_every_cell() -> None:
    counts = torch.tensor([0, 1, 5, 0, 0, 2, 4, 0])
    # levels 2 and 6 over [0, 8]: the cut is at 4; the cells end at the outermost occupied bins
    got = ops.spread_codes(counts, 0.0, 8.0, torch.tensor([2, 6], dtype=torch.int8))
    assert got.tolist() == [0, 2, 2, 2, 2, 2, 2, 0]


def test_spread_codes_by_code() -> None:
    counts = torch.tensor([[1, 0, 3, 0], [0, 2, 0, 0], [0, 0, 0, 0]])
    got = ops.spread_codes(counts, 0.0, 4.0, torch.tensor([0, 1, 3], dtype=torch.int8))
    assert got.tolist() == [4 / 3, 4 / 3 + 2, 4 / 3, 0]
    assert torch.equal(got, reference.spread_codes(counts, 0.0, 4.0, GRID))


def test_spread_codes_of_nothing_is_nothing() -> None:
    assert ops.spread_codes(torch.zeros(5, dtype=torch.int64), -1.0, 1.0, GRID).tolist() == [0] * 5


# ---- kl_divergence ---------------------------------------------------------------------------------------------------


@given(masses, st.randoms(use_true_random=False), st.sampled_from([0.0, 0.5, 1e-3]))
def test_kl_divergence(values: list[float], random, smoothing: float) -> None:
    other = [random.choice([0.0, v, v * random.uniform(0.5, 2), 1.0]) for v in values]
    p, q = float64(*values), float64(*other)
    got, want = ops.kl_divergence(p, q, smoothing).item(), reference.kl_divergence(p, q, smoothing)
    # 64 eps of the bins' rounding; both are sums of at most 30 terms of size about 1
    assert got == want if math.isinf(want) else abs(got - want) <= 64 * torch.finfo(torch.float64).eps * (1 + want)
    assert got >= 0


@given(masses, st.floats(1e-3, 1e3))
def test_kl_divergence_of_equal_histograms_is_0(values: list[float], factor: float) -> None:
    p = float64(*values)
    assert ops.kl_divergence(p, p).item() == 0
    assert ops.kl_divergence(p, p, 0.5).item() == 0
    assert ops.kl_divergence(p, p * factor).item() <= 1e-30  # the same after normalizing, up to rounding, squared


def test_kl_divergence_of_a_known_pair() -> None:
    got = ops.kl_divergence(torch.tensor([3, 1]), torch.tensor([1, 1])).item()
    assert got == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-15)


def test_kl_divergence_without_support() -> None:
    empty, full, half = float64(0, 0), float64(1, 1), float64(1, 0)
    assert ops.kl_divergence(empty, empty).item() == 0
    assert ops.kl_divergence(full, half).item() == math.inf
    assert ops.kl_divergence(empty, full).item() == ops.kl_divergence(full, empty).item() == math.inf
    assert ops.kl_divergence(half, full).item() == pytest.approx(math.log(2))
    assert math.isfinite(ops.kl_divergence(full, half, 1e-3).item())


@pytest.mark.parametrize(
    ("p", "q"),
    [
        ((1.0, 1.0), (1e-310, 1.0)),
        ((1.0, 1.0), (1e-307, 1.0)),
        ((1e308, 1e308), (1.0, 3.0)),
        ((1.0, 3.0), (9e307, 9e307)),
    ],
)
def test_kl_divergence_of_extreme_masses(p: tuple[float, ...], q: tuple[float, ...]) -> None:
    want = reference.kl_divergence(float64(*p), float64(*q))
    assert ops.kl_divergence(float64(*p), float64(*q)).item() == pytest.approx(want, rel=1e-12)


def test_kl_divergence_takes_counts() -> None:
    p, q = torch.tensor([5, 0, 7]), torch.tensor([1, 2, 3])
    assert ops.kl_divergence(p, q).item() == ops.kl_divergence(p.double(), q.double()).item()


# ---- errors ----------------------------------------------------------------------------------------------------------

W = shapes.gaussian(4, 10)
COUNTS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.histogram(W.long(), 4, 0, 1), TypeError, "histogram: w must have dtype float32 or float16"),
        (lambda: ops.histogram(W.T, 4, 0, 1), ValueError, "histogram: w must be contiguous"),
        (lambda: ops.histogram(W[0], 4, 0, 1), ValueError, "histogram: w must be [N, K], got [10]"),
        (lambda: ops.histogram(W, 0, 0, 1), ValueError, "num_bins must lie in [1, 2^24], got 0"),
        (lambda: ops.histogram(W, 2**24 + 1, 0, 1), ValueError, "num_bins must lie in [1, 2^24], got 16777217"),
        (lambda: ops.histogram(W, 4, 1, 1), ValueError, "lo and hi must be finite with lo < hi, got [1, 1]"),
        (lambda: ops.histogram(W, 4, math.nan, 1), ValueError, "lo and hi must be finite with lo < hi, got [nan, 1]"),
        (lambda: ops.histogram(W, 4, 0, math.inf), ValueError, "lo and hi must be finite with lo < hi, got [0, inf]"),
        (lambda: ops.histogram(W, 4, 0, 1, group_size=0), ValueError, "group_size must be at least 1, got 0"),
        (lambda: ops.histogram(W, 4, 0, 1, W.double()), TypeError, "divisor must have dtype float32, got float64"),
        (
            lambda: ops.histogram(W, 4, 0, 1, W),
            ValueError,
            "divisor must be [4, 1] (N, ceil(K/group_size)), got [4, 10]",
        ),
        (lambda: ops.histogram(W, 4, 0, 1, None, W), TypeError, "weight must have dtype int64, got float32"),
        (lambda: ops.histogram(W, 4, 0, 1, None, COUNTS), ValueError, "weight must be [4, 1] (N, ceil(K/group_size))"),
        (
            lambda: ops.histogram(W, 4, 0, 1, None, torch.tensor([[1], [0], [-1], [1]])),
            ValueError,
            "histogram: weight must lie in [0, 2^31], got -1 for group 2",
        ),
        (
            lambda: ops.histogram(W, 4, 0, 1, None, torch.full((4, 1), 2**31 + 1)),
            ValueError,
            "histogram: weight must lie in [0, 2^31], got 2147483649 for group 0",
        ),
        (lambda: ops.histogram(W, 4, 0, 1, label=W), TypeError, "label must have dtype uint8, got float32"),
        (lambda: ops.histogram(W, 4, 0, 1, num_labels=2), ValueError, "num_labels must be 1 without label, got 2"),
        (
            lambda: ops.histogram(W, 4, 0, 1, label=W[1:].byte()),
            ValueError,
            "label must be [4, 10] (N, K), got [3, 10]",
        ),
        (
            lambda: ops.histogram(W, 4, 0, 1, label=torch.full((4, 10), 2, dtype=torch.uint8), num_labels=2),
            ValueError,
            "label must be below num_labels = 2, got a larger one",
        ),
        (
            lambda: ops.histogram(W, 4, 0, 1, label=W.byte(), num_labels=257),
            ValueError,
            "num_labels must lie in [1, 256] with at most 2^24 bins in all, got 257",
        ),
        (lambda: ops.spread_codes(COUNTS.int(), 0, 1, GRID), TypeError, "spread_codes: counts must have dtype int64"),
        (
            lambda: ops.spread_codes(COUNTS[None], 0, 1, GRID),
            ValueError,
            "counts must be [bins] or [levels, bins] with at most 2^24 in all",
        ),
        (
            lambda: ops.spread_codes(COUNTS[:0], 0, 1, GRID),
            ValueError,
            "counts must be [bins] or [levels, bins] with at most 2^24 in all",
        ),
        (lambda: ops.spread_codes(COUNTS, 1, 0, GRID), ValueError, "lo and hi must be finite with lo < hi, got [1, 0]"),
        (lambda: ops.spread_codes(COUNTS, 0, 1e101, GRID), ValueError, "lo and hi must lie in [-1e100, 1e100]"),
        (lambda: ops.spread_codes(COUNTS, 0, 1, GRID.int()), TypeError, "grid must have dtype int8, got int32"),
        (lambda: ops.spread_codes(COUNTS, 0, 1, GRID[:, ::2]), ValueError, "grid must be contiguous"),
        (lambda: ops.spread_codes(COUNTS, 0, 1, GRID[0, :1]), ValueError, "grid must hold 2 to 256 levels, got [1]"),
        (
            lambda: ops.spread_codes(COUNTS, 0, 1, GRID.flip(1)),
            ValueError,
            "grid must be non-decreasing, got 92 before 70",
        ),
        (lambda: ops.spread_codes(COUNTS, 0, 1, GRID - 1), ValueError, "grid must lie in [-127, 127], got -128"),
        (
            lambda: ops.kl_divergence(COUNTS.float(), COUNTS),
            TypeError,
            "kl_divergence: p must have dtype int64 or float64",
        ),
        (lambda: ops.kl_divergence(COUNTS, COUNTS[:2]), ValueError, "q must be [3] (the bins of p), got [2]"),
        (lambda: ops.kl_divergence(COUNTS[:0], COUNTS[:0]), ValueError, "p must be [bins], got [0]"),
        (lambda: ops.kl_divergence(COUNTS, COUNTS, -1), ValueError, "smoothing must be finite and >= 0, got -1"),
        (lambda: ops.kl_divergence(COUNTS - 2, COUNTS), ValueError, "p must be finite and >= 0, got -1 at [0]"),
        (
            lambda: ops.kl_divergence(COUNTS, float64(1, 1, math.nan)),
            ValueError,
            "q must be finite and >= 0, got nan at [2]",
        ),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_spread_codes_refuses_negative_counts() -> None:
    with pytest.raises(ValueError, match=r"^spread_codes: counts must be >= 0, got -5 at \[0\]"):
        ops.spread_codes(torch.tensor([-5, 3, 4]), -1.0, 1.0, torch.tensor([-1, 1], dtype=torch.int8))


def test_spread_codes_sums_counts_beyond_int64() -> None:
    counts = torch.full((4,), 2**62)
    grid = torch.tensor([-1, 1], dtype=torch.int8)
    assert ops.spread_codes(counts, -2.0, 2.0, grid).tolist() == [2.0**62] * 4
    assert ops.spread_codes(counts.repeat(2, 1), -2.0, 2.0, grid).tolist() == [2.0**63] * 4
