"""quantize_split: two symmetric min-max grids per group, one for the salient weights and one for the rest.

And quantize_salient, which decides by a threshold and packs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
import reference
import shapes
import torch
from conftest import ISAS, THREADS, forced_isa, forced_threads
from torch import Tensor

from precal_ext import ops

EPS32 = torch.finfo(torch.float32).eps
SHAPES = [(1, 1), (5, 63), (17, 300), (2, 2304)]


def salient_of(w: Tensor, share: float = 0.1) -> Tensor:
    return w.abs() >= torch.quantile(w.abs(), 1 - share)


def roundtrip(w: Tensor, salient: Tensor, bits: int, group_size: int) -> Tensor:
    codes, scale, row_scale, other, mask = ops.quantize_split(w, salient, bits, group_size)
    packed = ops.pack(codes, bits)
    return ops.dequantize(packed, scale, row_scale, None, None, None, other, mask, w.shape[1], bits, group_size)


@pytest.mark.parametrize("matrix", shapes.HARD_MATRICES)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 128), (4, 50), (8, 1000)])
def test_scales_codes_and_mask(matrix: str, bits: int, group_size: int) -> None:
    top = 2 ** (bits - 1) - 1
    for N, K in SHAPES:
        w = shapes.HARD_MATRICES[matrix](N, K)
        salient = salient_of(w)
        codes, scale, row_scale, other, mask = ops.quantize_split(w, salient, bits, group_size)
        assert torch.equal(mask, torch.from_numpy(np.packbits(salient.numpy(), axis=1, bitorder="little")))

        def largest(part: Tensor, w: Tensor = w) -> Tensor:
            return torch.stack([g.abs().amax(1) for g in torch.where(part, w, 0).split(group_size, 1)], 1)

        # the mean amplitude of the rest, but no less than what keeps the salient scales inside float16
        amplitudes = largest(~salient) / top, largest(salient) / top
        limit = torch.maximum(*amplitudes).amax(1) / 32768
        base = torch.maximum(amplitudes[0].double().mean(1).float(), limit)
        assert torch.equal(row_scale, reference.row_scale(base))
        divisor = row_scale.float()[:, None]
        for got, part in ((scale, ~salient), (other, salient)):
            want = torch.where(divisor > 0, largest(part) / divisor / top, 0)
            assert torch.equal(got, torch.where(want > 0, want.half().clamp(min=2.0**-24), 0))

        columns = reference.group_of_column(K, group_size)
        scales = torch.where(salient, other[:, columns], scale[:, columns]).double()
        v = torch.where(divisor > 0, w / divisor, 0).double()
        levels = reference.levels_of(None, bits)
        chosen = (v - scales * levels[codes.long()]).abs()
        # as in test_quantize_groups: two roundings of v * (1 / s) may confuse levels on either side of a midpoint
        assert (chosen <= (v[..., None] - scales[..., None] * levels).abs().amin(-1) + 2 * EPS32 * v.abs()).all()


@pytest.mark.parametrize("matrix", shapes.HARD_MATRICES)
def test_bytes_depend_on_neither_isa_nor_threads(matrix: str) -> None:
    w = shapes.HARD_MATRICES[matrix](33, 1030)
    salient = salient_of(w)
    with forced_isa("scalar"), forced_threads(1):
        want = ops.quantize_split(w, salient, 3, 100)
    for isa in ISAS:
        for count in THREADS:
            with forced_isa(isa), forced_threads(count):
                got = ops.quantize_split(w, salient, 3, 100)
            assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("bits", [3, 4])
def test_the_split_pays_on_heavy_tails(isa: str, bits: int) -> None:
    w = shapes.student_t(33, 1024)
    plain = reference.sqnr_db(w, roundtrip(w, torch.zeros_like(w, dtype=torch.bool), bits, 128))
    split = reference.sqnr_db(w, roundtrip(w, salient_of(w, 0.05), bits, 128))
    assert split > plain + 3  # measured: 5 dB and more


def test_nothing_salient_is_round_to_nearest(isa: str) -> None:
    w = shapes.student_t(9, 300)
    split = ops.quantize_split(w, torch.zeros_like(w, dtype=torch.bool), 4, 128)
    plain = shapes.Recipe(4, 128, **shapes.RTN).quantize(w)
    assert all(torch.equal(a, b) for a, b in zip(split[:3], plain[:3], strict=True))
    assert (split[3] == 0).all() and (split[4] == 0).all()


def test_everything_salient_moves_to_the_other_scale(isa: str) -> None:
    w = shapes.gaussian(9, 300)
    everything = torch.ones_like(w, dtype=torch.bool)
    _, scale, _, other, _ = ops.quantize_split(w, everything, 4, 128)
    assert (scale == 0).all() and (other > 0).all()
    assert reference.sqnr_db(w, roundtrip(w, everything, 4, 128)) > 18


@pytest.mark.parametrize(("N", "K"), [(0, 64), (4, 0)])
def test_empty_weights(isa: str, N: int, K: int) -> None:
    parts = ops.quantize_split(torch.empty(N, K), torch.empty(N, K, dtype=torch.bool), 4, 32)
    G = reference.ceil_div(K, 32)
    assert [tuple(p.shape) for p in parts] == [(N, K), (N, G), (N,), (N, G), (N, reference.ceil_div(K, 8))]


# ---- every code is that of the specified roundings -------------------------------------------------------------------


def codes_of(w: Tensor, scale: Tensor, row_scale: Tensor, bits: int, group_size: int) -> Tensor:
    """x = (w / row_scale) * (1 / s), each rounded once to float32; the nearest level, between two the lower one."""
    s = scale.float()[:, reference.group_of_column(w.shape[1], group_size)]
    inverse = torch.where(s > 0, 1 / s, 0)
    d = row_scale.float()[:, None]
    x = (torch.where(d > 0, w.float() / d, 0) * inverse).double()
    half = 2 ** (bits - 1)
    return (torch.ceil(x - 0.5).clamp(-half, half - 1) + half).to(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("matrix", shapes.HARD_MATRICES)
def test_no_code_is_rounded_otherwise(isa: str, matrix: str, dtype: torch.dtype) -> None:
    w = shapes.HARD_MATRICES[matrix](7, 2000).to(dtype)
    w = torch.where(w.isfinite(), w, 1)  # beyond float16
    for bits, group_size in ((4, 128), (8, 100)):
        codes, scale, row_scale, other, _ = ops.quantize_split(w, salient := salient_of(w.float()), bits, group_size)
        want = [codes_of(w, s, row_scale, bits, group_size) for s in (scale, other)]
        assert torch.equal(codes, torch.where(salient, want[1], want[0]))


@pytest.mark.parametrize("exponent", [-126, -100, -64, -58, 0, 57, 61, 100, 122])
def test_numbers_between_two_levels_and_beside(isa: str, exponent: int) -> None:
    """Weights that are, and all but are, half way between two levels, for every row scale of eight bits."""
    rows = []
    for mantissa in range(128):
        peak = (1 + mantissa / 128) * 7  # sets the row scale and group scales of 1
        middle = (torch.arange(-8, 7) + 0.5) / 7 * peak
        near = [torch.nextafter(middle.float(), torch.tensor(to)) for to in (9.0, -9.0)]
        rows.append(torch.cat([torch.tensor([peak]), middle.float(), *near, torch.tensor([1e-30, -1e-38, 0.0])]))
    w = torch.ldexp(torch.stack(rows), torch.tensor(exponent))
    codes, scale, row_scale, _, _ = ops.quantize_split(w, torch.zeros_like(w, dtype=torch.bool), 4, 64)
    assert torch.equal(codes, codes_of(w, scale, row_scale, 4, 64))


# ---- quantize_salient ------------------------------------------------------------------------------------------------


def three_ops(w: Tensor, lam: Tensor, bits: int, group_size: int, scope: str) -> list[Tensor]:
    codes, *rest = ops.quantize_split(w, ops.salience_mask(w, lam, scope, group_size), bits, group_size)
    return [ops.pack(codes, bits), *rest]


def same_bytes(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
@pytest.mark.parametrize("bits", shapes.ALL_BITS)
def test_salient_is_mask_split_and_pack(isa: str, bits: int, scope: str) -> None:
    for N, K, group_size in [(1, 1, 1), (5, 63, 7), (3, 300, 50), (2, 2304, 128), (4, 130, 64), (2, 200, 1000)]:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            w = shapes.student_t(N, K, seed=K).to(dtype)
            lam = ops.salience_threshold(w, 0.1, scope, group_size)
            want = three_ops(w, lam, bits, group_size, scope)
            assert same_bytes(ops.quantize_salient(w, lam, bits, group_size, scope), want)


@pytest.mark.parametrize("matrix", shapes.HARD_MATRICES)
def test_salient_bytes_depend_on_neither_isa_nor_threads(matrix: str) -> None:
    w = shapes.HARD_MATRICES[matrix](33, 1030)
    lam = reference.salience_threshold(w, 0.05, "tensor", 100, "none")
    with forced_isa("scalar"), forced_threads(1):
        want = three_ops(w, lam, 3, 100, "tensor")
    for isa in ISAS:
        for count in THREADS:
            with forced_isa(isa), forced_threads(count):
                assert same_bytes(ops.quantize_salient(w, lam, 3, 100), want)


@pytest.mark.parametrize("lam", [-1.0, -torch.inf, 0.0, 5e-324, 1e300, torch.inf, torch.nan])
def test_salient_by_any_threshold(isa: str, lam: float) -> None:
    w = shapes.student_t(3, 100)
    w[0, :5] = torch.tensor([0.0, -0.0, 2.0**126, -(2.0**126), 1e-40])
    limit = torch.tensor([lam], dtype=torch.float64)
    assert same_bytes(ops.quantize_salient(w, limit, 4, 32), three_ops(w, limit, 4, 32, "tensor"))


@pytest.mark.parametrize(("N", "K"), [(0, 64), (4, 0), (0, 0)])
@pytest.mark.parametrize("scope", ["tensor", "row", "group"])
def test_salient_empty_weights(isa: str, N: int, K: int, scope: str) -> None:
    w = torch.empty(N, K)
    parts = ops.quantize_salient(w, ops.salience_threshold(w, 0.1, scope, 32), 4, 32, scope)
    G = reference.ceil_div(K, 32)
    want = [(N, reference.ceil_div(K, 8)), (N, G), (N,), (N, G), (N, reference.ceil_div(K, 8))]
    assert [tuple(p.shape) for p in parts] == want


W = shapes.gaussian(4, 10)
SALIENT = W > 0
LAM = torch.tensor([0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.quantize_split(W.double(), SALIENT, 4, 4), TypeError, "quantize_split: w must have dtype float32"),
        (lambda: ops.quantize_split(W, SALIENT.byte(), 4, 4), TypeError, "salient must have dtype bool, got uint8"),
        (lambda: ops.quantize_split(W, SALIENT[:3], 4, 4), ValueError, "salient must be [4, 10] (N, K), got [3, 10]"),
        (lambda: ops.quantize_split(W.T, SALIENT, 4, 4), ValueError, "w must be contiguous"),
        (lambda: ops.quantize_split(W, SALIENT, 1, 4), ValueError, "bits must lie in [2, 8], got 1"),
        (lambda: ops.quantize_split(W, SALIENT, 9, 4), ValueError, "bits must lie in [2, 8], got 9"),
        (lambda: ops.quantize_split(W, SALIENT, 4, 0), ValueError, "group_size must lie in [1, 2^30], got 0"),
        (lambda: ops.quantize_split(W / 0, SALIENT, 4, 4), ValueError, "quantize_split: w must be finite, got "),
        (lambda: ops.quantize_salient(W.double(), LAM, 4, 4), TypeError, "quantize_salient: w must have dtype float32"),
        (lambda: ops.quantize_salient(W, LAM.float(), 4, 4), TypeError, "lam must have dtype float64, got float32"),
        (lambda: ops.quantize_salient(W, LAM, 4, 4, "row"), ValueError, "lam must be [4] (one per unit of scope), got"),
        (lambda: ops.quantize_salient(W, LAM, 4, 4, "all"), ValueError, "scope must be tensor, row or group, got "),
        (lambda: ops.quantize_salient(W.T, LAM, 4, 4), ValueError, "w must be contiguous"),
        (lambda: ops.quantize_salient(W, LAM, 9, 4), ValueError, "bits must lie in [2, 8], got 9"),
        (lambda: ops.quantize_salient(W, LAM, 4, 0), ValueError, "group_size must lie in [1, 2^30], got 0"),
        (lambda: ops.quantize_salient(W / 0, LAM, 4, 4), ValueError, "quantize_salient: w must be finite, got "),
        (
            lambda: ops.quantize_salient(torch.full((2, 20), 1e38), LAM, 4, 4),
            ValueError,
            "quantize_salient: w must be at most 2^126 in magnitude, got 1e+38 at [0, 0]",
        ),
    ],
)
def test_errors(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
