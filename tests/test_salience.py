"""soft_threshold, salience_threshold, salience_mask."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import reference
import shapes
import torch
from conftest import THREADS, forced_threads
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from precal_ext import ops

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCOPES = ["tensor", "row", "group"]
NORMALIZE = ["none", "row", "group"]
EPS32 = torch.finfo(torch.float32).eps

float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)


# ---- soft_threshold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [0.0, 1e-4, 0.01, 3.0])
def test_soft_threshold_is_the_formula(isa: str, dtype: torch.dtype, lam: float) -> None:
    w = shapes.student_t(17, 301).to(dtype)
    assert torch.equal(ops.soft_threshold(w, lam), reference.soft_threshold(w, lam))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (15,), (16,), (17,), (3, 5, 7), (2, 0, 3)])
def test_soft_threshold_keeps_any_shape(isa: str, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=shapes.generator(0))
    out = ops.soft_threshold(w, 0.5)
    assert out.shape == w.shape
    assert torch.equal(out, reference.soft_threshold(w, 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_threshold_of_special_values(isa: str, dtype: torch.dtype) -> None:
    w = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 2.0, -2.0, 1.0, -1.0], dtype=dtype)
    out = ops.soft_threshold(w, 1.0)
    # |w| = 1 sits on the threshold, w^2 > lam is false: it goes
    assert out[[0, 1, 2, 3, 5, 6, 7, 8]].tolist() == [0, 0, torch.inf, -torch.inf, 1.5, -1.5, 0, 0]
    assert out[4].isnan()


def test_soft_threshold_does_not_depend_on_threads(isa: str) -> None:
    w = shapes.student_t(100, 2304)
    results = []
    for count in THREADS:
        with forced_threads(count):
            results.append(ops.soft_threshold(w, 1e-3))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_threshold_on_cuda_gives_the_same_bits(dtype: torch.dtype) -> None:
    w = shapes.student_t(257, 1001).to(dtype)
    w[0, :4] = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan])
    on_gpu = ops.soft_threshold(w.cuda(), 1e-3).cpu()
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(on_gpu.nan_to_num(7.0).view(bits), ops.soft_threshold(w, 1e-3).nan_to_num(7.0).view(bits))


@given(st.lists(float32s, min_size=1, max_size=40), st.floats(0, 1e6), st.floats(0, 1e6))
def test_a_larger_lam_never_adds_a_nonzero(values: list[float], a: float, b: float) -> None:
    w = torch.tensor(values)
    low, high = min(a, b), max(a, b)
    assert not (ops.soft_threshold(w, high).bool() & ~ops.soft_threshold(w, low).bool()).any()


@given(st.lists(float32s, min_size=1, max_size=40), st.floats(0, 1e6))
def test_soft_threshold_shrinks_and_keeps_the_sign(values: list[float], lam: float) -> None:
    w = torch.tensor(values)
    out = ops.soft_threshold(w, lam)
    assert (out.abs() <= w.abs()).all()
    assert (out * w >= 0).all()


# ---- salience_threshold and salience_mask ----------------------------------------------------------------------------


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("alpha", [0.0, 0.003, 0.05, 0.5, 0.997, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_is_the_order_statistic(isa: str, scope: str, alpha: float, dtype: torch.dtype) -> None:
    for N, K in [(1, 1), (7, 33), (17, 300), (2, 2048)]:
        w = shapes.student_t(N, K, seed=N).to(dtype)
        lam = ops.salience_threshold(w, alpha, scope, 32)
        assert torch.equal(lam.flatten(), reference.salience_threshold(w, alpha, scope, 32, "none"))
        want = {"tensor": [1], "row": [N], "group": [N, reference.ceil_div(K, 32)]}
        assert (lam.dtype, list(lam.shape)) == (torch.float64, want[scope])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", ["row", "group"])
def test_threshold_of_normalized_weights(isa: str, scope: str, normalize: str) -> None:
    w = shapes.student_t(9, 300) + 0.01
    lam = ops.salience_threshold(w, 0.05, scope, 64, normalize).flatten()
    want = reference.salience_threshold(w, 0.05, scope, 64, normalize)
    # The order of the sums is free, so a score may round to the neighbouring float32: twice that in its square.
    torch.testing.assert_close(lam, want, rtol=4 * EPS32, atol=0)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3, 1.0])
def test_the_wanted_share_survives(isa: str, scope: str, normalize: str, alpha: float) -> None:
    w = shapes.student_t(6, 172)  # continuous: no ties, no zeros
    lam = ops.salience_threshold(w, alpha, scope, 64, normalize)
    mask = ops.salience_mask(w, lam, scope, 64, normalize)
    score = reference.salience_score(w, normalize, 64).abs()
    for unit in reference.units((6, 172), scope, 64):
        kept, dropped = score[unit][mask[unit]], score[unit][~mask[unit]]
        assert kept.numel() == int(alpha * score[unit].numel() + 0.5)
        # one float32 of slack: the reference's score may round the other way
        assert kept.numel() == 0 or dropped.numel() == 0 or kept.min() >= dropped.max() * (1 - EPS32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [0.01, 0.2, 1.0])
def test_soft_threshold_survivors_are_the_mask(dtype: torch.dtype, alpha: float) -> None:
    w = shapes.student_t(33, 300).to(dtype)
    lam = ops.salience_threshold(w, alpha)
    survivors = ops.soft_threshold(w, lam.item()) != 0
    assert torch.equal(survivors, ops.salience_mask(w, lam))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_mask_is_the_comparison(isa: str, scope: str, normalize: str) -> None:
    w = shapes.HARD_MATRICES["rounded"](6, 172)
    lam = torch.full_like(ops.salience_threshold(w, 0.1, scope, 50, normalize), 1.5**2)
    want = reference.salience_mask(w, lam, scope, 50, normalize)
    assert want.any() and not want.all()
    assert torch.equal(ops.salience_mask(w, lam, scope, 50, normalize), want)


def test_equal_magnitudes_survive_together(isa: str) -> None:
    w = torch.tensor([[1.0, -3.0, 3.0, 0.0, 3.0, 2.0, 0.0, 0.0]])
    for scope in SCOPES:
        mask = ops.salience_mask(w, ops.salience_threshold(w, 1 / 8, scope, 8), scope, 8)
        assert mask.tolist() == [[False, True, True, False, True, False, False, False]]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("normalize", NORMALIZE)
def test_zeros_never_survive(isa: str, scope: str, normalize: str) -> None:
    w = torch.full((3, 40), 0.1)  # normalized: std = 0, so all scores are 0
    if normalize == "none":
        w.zero_()
    lam = ops.salience_threshold(w, 1.0, scope, 16, normalize)
    assert (lam == 0).all()
    assert not ops.salience_mask(w, lam, scope, 16, normalize).any()


def test_alpha_0_keeps_nothing_and_alpha_1_all_but_zeros(isa: str) -> None:
    w = shapes.zero_rows(5, 63)
    for scope in SCOPES:
        assert not ops.salience_mask(w, ops.salience_threshold(w, 0.0, scope, 32), scope, 32).any()
        assert torch.equal(ops.salience_mask(w, ops.salience_threshold(w, 1.0, scope, 32), scope, 32), w != 0)


def test_empty_units_have_threshold_0(isa: str) -> None:
    assert ops.salience_threshold(torch.empty(0, 5), 0.5).tolist() == [0.0]
    assert ops.salience_threshold(torch.empty(3, 0), 0.5, "row").tolist() == [0.0] * 3
    assert ops.salience_threshold(torch.empty(3, 0), 0.5, "group").shape == (3, 0)
    assert ops.salience_mask(torch.empty(0, 5), torch.zeros(1, dtype=torch.float64)).shape == (0, 5)


@pytest.mark.parametrize("name", ["denormal", "huge", "one_huge_outlier", "constant"])
def test_threshold_of_hard_matrices(isa: str, name: str) -> None:
    w = shapes.HARD_MATRICES[name](9, 257)
    for scope in SCOPES:
        lam = ops.salience_threshold(w, 0.1, scope, 64)
        assert torch.equal(lam.flatten(), reference.salience_threshold(w, 0.1, scope, 64, "none"))


LONG: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda w: w,
    "few values": lambda w: (w * 20).round(),
    "mostly zeros": lambda w: torch.where(w.abs() > 0.1, w, 0),
    "sorted": lambda w: w.flatten().sort().values.view(w.shape),
    "two columns of a size": lambda w: w * torch.tensor([1.0, 100.0]).repeat_interleave(32).repeat(64),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LONG)
def test_threshold_of_many_weights(isa: str, kind: str, dtype: torch.dtype) -> None:
    """A sample's bracket that holds the threshold, and one that does not."""
    w = LONG[kind](shapes.student_t(129, 4096)).to(dtype)
    for alpha in (0.0, 1e-5, 0.05, 0.5, 0.9999, 1.0):
        lam = ops.salience_threshold(w, alpha)
        assert torch.equal(lam, reference.salience_threshold(w, alpha, "tensor", 1, "none"))


def test_threshold_does_not_depend_on_threads(isa: str) -> None:
    w = shapes.student_t(300, 2304)
    results = []
    for count in THREADS:
        with forced_threads(count):
            results.append([ops.salience_threshold(w, 0.01, s, 128, "group") for s in SCOPES])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@given(st.lists(float32s, min_size=1, max_size=60), st.floats(0, 1))
def test_at_least_k_survive_and_no_fewer_would_do(values: list[float], alpha: float) -> None:
    w = torch.tensor([values])
    mask = ops.salience_mask(w, ops.salience_threshold(w, alpha))
    k = int(alpha * len(values) + 0.5)
    assert mask.sum() >= min(k, int((w != 0).sum()))
    if mask.any():
        weakest = w.abs()[mask].min()
        assert (w.abs() > weakest).sum() < k  # without the ties of the weakest survivor there are too few


# ---- errors ----------------------------------------------------------------------------------------------------------

W = shapes.gaussian(4, 10)
LAM = torch.zeros(1, dtype=torch.float64)


def _with(value: float) -> Tensor:
    w = W.clone()
    w[2, 3] = value
    return w


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.soft_threshold(W.double(), 0), TypeError, "soft_threshold: w must have dtype float32 or float16"),
        (lambda: ops.soft_threshold(W.to(torch.complex64), 0), TypeError, "soft_threshold: w must have dtype bool"),
        (lambda: ops.soft_threshold(W.T, 0), ValueError, "soft_threshold: w must be contiguous, got a strided view"),
        (lambda: ops.soft_threshold(W, -1), ValueError, "soft_threshold: lam must be finite and >= 0, got -1"),
        (lambda: ops.soft_threshold(W, float("nan")), ValueError, "lam must be finite and >= 0, got nan"),
        (lambda: ops.soft_threshold(W, float("inf")), ValueError, "lam must be finite and >= 0, got inf"),
        (lambda: ops.salience_threshold(W.int(), 0.1), TypeError, "salience_threshold: w must have dtype float32"),
        (lambda: ops.salience_threshold(W[0], 0.1), ValueError, "w must be [N, K], got [10]"),
        (lambda: ops.salience_threshold(W.T, 0.1), ValueError, "w must be contiguous"),
        (lambda: ops.salience_threshold(W, 1.1), ValueError, "alpha must lie in [0, 1], got 1.1"),
        (lambda: ops.salience_threshold(W, -0.1), ValueError, "alpha must lie in [0, 1], got -0.1"),
        (lambda: ops.salience_threshold(W, float("nan")), ValueError, "alpha must lie in [0, 1], got nan"),
        (
            lambda: ops.salience_threshold(W, 0.1, "column"),
            ValueError,
            "scope must be tensor, row or group, got column",
        ),
        (lambda: ops.salience_threshold(W, 0.1, "group", 0), ValueError, "group_size must be at least 1, got 0"),
        (lambda: ops.salience_threshold(W, 0.1, normalize="x"), ValueError, "normalize must be none, row or group"),
        (lambda: ops.salience_threshold(_with(torch.nan), 0.1), ValueError, "w must be finite, got nan at [2, 3]"),
        (lambda: ops.salience_threshold(_with(-torch.inf), 0.1), ValueError, "w must be finite, got -inf at [2, 3]"),
        (
            lambda: ops.salience_mask(_with(torch.nan), LAM),
            ValueError,
            "salience_mask: w must be finite, got nan at [2",
        ),
        (lambda: ops.salience_mask(W, LAM.float()), TypeError, "salience_mask: lam must have dtype float64"),
        (lambda: ops.salience_mask(W, LAM, "row"), ValueError, "lam must be [4] (one per unit of scope), got [1]"),
        (lambda: ops.salience_mask(W, LAM, "group", 4), ValueError, "lam must be [4, 3] (one per unit of scope)"),
        (lambda: ops.salience_mask(W, LAM, "all"), ValueError, "scope must be tensor, row or group, got all"),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_the_largest_group_size_is_one_group() -> None:
    lam = ops.salience_threshold(W, 0.5, "group", 2**63 - 1)
    assert torch.equal(lam, ops.salience_threshold(W, 0.5, "group", 10))
