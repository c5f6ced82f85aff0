"""GPTQ on a settled format: the oracle in float64, exhaustive search on tiny blocks, and what must never get worse."""

from __future__ import annotations

import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import forced_threads
from models import same_bytes
from torch import Tensor

from precal_ext import QTensor, QuantizeConfig, ops
from precal_ext.gptq import ROWS, Factor, factor, gptq, outlier_values, round_columns, steps
from precal_ext.gptq import blocks as blocks_of
from precal_ext.gptq import levels as levels_of
from precal_ext.grids import constant_grid
from precal_ext.quantize import fit_set_grid, quantize_weight

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "3 bits": {"bits": 3},
    "2 bits, c = 2": {"bits": 2, "c": 2},
    "6 bits, c = 0": {"bits": 6, "c": 0},
    "groups of 40": {"group_size": 40},
    "whole rows": {"group_size": -1},
    "no trellis": {"trellis": False},
    "uniform, 5 bits": {"bits": 5, "grid": "uniform"},
    "8 bits": {"bits": 8},
    "rtn": {"recipe": "rtn", "bits": 3},
    "paper": {"recipe": "paper", "bits": 3},
}


def inputs(tokens: int, K: int, seed: int = 1) -> Tensor:
    """Correlated, of unequal power, with a mean: like what a layer gets."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5 * torch.linspace(0.1, 2, K)
    return torch.randn(tokens, K, generator=generator) @ mix + 0.3


def hessian_of(x: Tensor) -> Tensor:
    return (x.double().t() @ x.double() / len(x)).float()


def weight(N: int, K: int, seed: int = 0) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) * 0.02


def quantized(w: Tensor, **settings: Any) -> QTensor:
    config = QuantizeConfig(**settings)
    return quantize_weight(w, config, fit_set_grid([w], config))


def rounded(w: Tensor, q: QTensor, h: Tensor, damping: float = 0.01) -> Any:
    return gptq(w, q, h, factor(h, damping))


def output_error(w: Tensor, q: QTensor, x: Tensor) -> float:
    d, x = (w - q.dequantize()).double(), x.double()
    return float((x @ d.t()).square().sum() / (x @ w.double().t()).square().sum())


# ---- the factor ------------------------------------------------------------------------------------------------------


def test_the_factor_is_that_of_the_inverse() -> None:
    h = hessian_of(inputs(300, 40))
    parts = factor(h, 0.05)
    damped = h.double() + 0.05 * h.double().diagonal().mean() * torch.eye(40)
    u = parts.carry.double() / parts.weight.double().sqrt()[:, None]
    assert torch.equal(parts.carry, parts.carry.triu())
    torch.testing.assert_close(u.t() @ u, torch.linalg.inv(damped), rtol=1e-4, atol=1e-4 * float(u.abs().max()))
    assert parts.damping == pytest.approx(0.05 * float(h.diagonal().mean()))


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan, math.inf])
def test_damping_must_be_positive(damping: float) -> None:
    with pytest.raises(ValueError, match="gptq: damping must be finite and > 0, got"):
        factor(torch.eye(3), damping)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_inputs_must_be_finite(value: float) -> None:
    h = torch.eye(3)
    h[1, 1] = value
    with pytest.raises(ValueError, match="gptq: hessian must be finite, got"):
        factor(h, 0.01)


def test_damping_grows_until_there_is_a_factor() -> None:
    h = torch.eye(4)
    h[0, 0] = -0.5  # no sum of squares; what rounding may leave of one
    parts = factor(h, 0.01)
    assert parts.damping > 0.5 and bool(torch.isfinite(parts.carry).all())


def test_inputs_that_are_all_zero_say_nothing() -> None:
    parts = factor(torch.zeros(5, 5), 0.01)
    assert torch.equal(parts.carry, torch.eye(5))


# ---- against oracles -------------------------------------------------------------------------------------------------


def oracle(
    target: np.ndarray,
    step: np.ndarray,
    levels: np.ndarray,
    blocks: list[tuple[int, int]],
    trellis: bool,
    parts: Factor,
) -> list[int]:
    """Codes of one row in float64: every code of every survivor is tried; ties are not."""
    carry, cost_of, target = (
        parts.carry.double().numpy(),
        parts.weight.double().numpy(),
        target.astype(np.float64).copy(),
    )
    count, codes = len(levels) // 2 if trellis else len(levels), []
    for begin, end in blocks:
        survivors: dict[tuple[int, int], tuple[float, list[int], list[float]]] = {(0, 0): (0.0, [], [])}
        for k in range(begin, end):
            found: dict[tuple[int, int], tuple[float, list[int], list[float]]] = {}
            for (b1, b2), (cost, path, errors) in survivors.items():
                value = target[k] - sum(e * carry[begin + j, k] for j, e in enumerate(errors))
                for code in range(count):
                    level = levels[2 * (code ^ b2) + b1] if trellis else levels[code]
                    error = value - step[k] * level
                    total = cost + error**2 * cost_of[k]
                    state = (code & 1, b1) if trellis else (0, 0)
                    if state not in found or total < found[state][0]:
                        found[state] = total, [*path, code], [*errors, error]
            survivors = found
        _, path, errors = min(survivors.values(), key=lambda s: s[0])
        codes += path
        for j, e in enumerate(errors):
            target[end:] -= e * carry[begin + j, end:]
    return codes


@pytest.mark.parametrize("trellis", [False, True])
@pytest.mark.parametrize("blocks", [[(0, 50)], [(0, 7), (7, 40), (40, 50)]], ids=["one block", "three"])
@pytest.mark.parametrize("bits", [2, 3])
def test_codes_are_the_oracles(bits: int, blocks: list[tuple[int, int]], trellis: bool) -> None:
    N, K = 6, 50
    parts = factor(hessian_of(inputs(400, K)), 0.01)
    generator = torch.Generator().manual_seed(bits)
    target = torch.randn(K, N, generator=generator) * 40
    step = torch.rand(K, N, generator=generator) + 0.5
    step[:, 1] *= -1
    step[10:12, 2] = 0  # groups without weights
    levels = constant_grid(bits, 64, trellis).flatten().float()
    codes = round_columns(target.clone(), step, levels, blocks, trellis, parts)
    for n in range(N):
        wanted = oracle(target[:, n].numpy(), step[:, n].numpy(), levels.numpy(), blocks, trellis, parts)
        free = step[:, n] == 0  # any code will do
        assert [c for c, f in zip(codes[:, n].tolist(), free, strict=True) if not f] == [
            c for c, f in zip(wanted, free, strict=True) if not f
        ]


def damped_error(d: Tensor, h: Tensor, added: float) -> float:
    """tr(D (H + added) D^T)."""
    d = d.double()
    return float(((d @ h.double()) * d).sum() + added * d.square().sum())


def exhaustive(target: Tensor, levels: Tensor, h: Tensor, added: float) -> float:
    """The least error of any sequence of codes of 2 bits, for one row of one block."""
    K = len(target)
    codes = torch.tensor(list(itertools.product(range(4), repeat=K)), dtype=torch.uint8)
    values = levels[reference.level_index(codes, True).long()]
    d = (target[None] - values).double()
    return float((((d @ h.double()) * d).sum(1) + added * d.square().sum(1)).min())


def greedy(target: Tensor, levels: Tensor, parts: Factor) -> Tensor:
    """Levels by rounding each column as if nothing followed it, within what the codes before leave."""
    target, b1, b2, found = target.clone(), 0, 0, []
    for k in range(len(target)):
        options = [levels[2 * (code ^ b2) + b1] for code in range(4)]
        code = min(range(4), key=lambda c: abs(float(target[k] - options[c])))
        found.append(options[code])
        target[k + 1 :] -= parts.carry[k, k + 1 :] * (target[k] - options[code])
        b1, b2 = code & 1, b1
    return torch.stack(found)


def test_survivors_come_near_the_best_of_all_sequences() -> None:
    """Exactly there where errors are not carried on; else nearer than rounding column by column."""
    K, levels = 7, constant_grid(2, 64, True).flatten().float()
    generator = torch.Generator().manual_seed(5)
    sums = {"best": 0.0, "survivors": 0.0, "greedy": 0.0}
    for trial in range(12):
        target = torch.randn(K, generator=generator) * 50
        for h in (torch.eye(K), hessian_of(inputs(200, K, seed=trial))):
            parts = factor(h, 0.01)
            codes = round_columns(target[:, None].clone(), torch.ones(K, 1), levels, [(0, K)], True, parts)
            found = levels[reference.level_index(codes.t(), True).long()][0]
            best = exhaustive(target, levels, h, parts.damping)
            error = damped_error(target - found, h, parts.damping)
            if torch.equal(h, torch.eye(K)):
                assert error == pytest.approx(best, rel=1e-5)
            else:
                assert error >= best * (1 - 1e-5)
                sums["best"] += best
                sums["survivors"] += error
                sums["greedy"] += damped_error(target - greedy(target, levels, parts), h, parts.damping)
    assert sums["survivors"] < 1.5 * sums["best"]
    assert sums["greedy"] > 1.5 * sums["survivors"]


# ---- on quantized weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("K", [64, 300])
def test_what_is_settled_adds_up_to_the_weight(K: int, settings: dict[str, Any]) -> None:
    w = weight(9, K)
    q = quantized(w, **settings)
    level = levels_of(q)[q.level_index().long()]
    together = (steps(q) * level + outlier_values(q)) * q.tensors["weight_row_scale"].float()[:, None]
    torch.testing.assert_close(together, q.dequantize(), rtol=1e-5, atol=1e-7)
    assert blocks_of(q)[0][0] == 0 and blocks_of(q)[-1][1] == K


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("K", [64, 300])
def test_outputs_are_better_and_all_but_codes_stays(K: int, settings: dict[str, Any]) -> None:
    w, x = weight(40, K), inputs(2000, K)
    q = quantized(w, **settings)
    found = rounded(w, q, hessian_of(x))
    found.q.validate()
    assert found.q.spec == q.spec
    assert all(same_bytes(q.tensors[k], t) for k, t in found.q.tensors.items() if k != "weight_packed")
    before, after = output_error(w, q, x), output_error(w, found.q, x)
    assert found.error_before == pytest.approx(before, rel=1e-3)
    assert found.error_after == pytest.approx(after, rel=1e-3)
    assert after < 0.9 * before


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_inputs_without_correlation_change_nothing_for_the_worse(settings: dict[str, Any]) -> None:
    w = weight(70, 300)
    q = quantized(w, **settings)
    found = rounded(w, q, torch.eye(300))
    errors = [(w - r.dequantize()).double().square().sum(1) for r in (q, found.q)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-6)).all())
    before, after = (ops.unpack(r.tensors["weight_packed"], q.spec.bits, 300) for r in (q, found.q))
    same = (before == after)[outlier_values(q) == 0]
    # Where codes know nothing of each other they are the nearest already; the trellis search counts in 16 bits.
    assert float(same.float().mean()) > (0.9 if q.spec.trellis else 0.9999)


def test_no_row_gets_worse() -> None:
    w, x = weight(200, 256), inputs(600, 256)
    h = hessian_of(x)
    q = quantized(w, bits=3)
    parts = factor(h, 0.01)
    found = gptq(w, q, h, parts)
    for n in range(200):
        before, after = (damped_error(w[n : n + 1] - r.dequantize()[n : n + 1], h, parts.damping) for r in (q, found.q))
        assert after <= before * (1 + 1e-5)


def test_much_damping_keeps_the_data_free_codes() -> None:
    w, h = weight(40, 256), hessian_of(inputs(600, 256))
    q = quantized(w)
    low, high = (rounded(w, q, h, damping) for damping in (0.01, 1e6))
    loss = [float((w - r.dequantize()).square().sum()) for r in (q, high.q, low.q)]
    assert loss[1] <= loss[0] * (1 + 1e-6) < 0.9 * loss[2]


@pytest.mark.parametrize("settings", [{}, {"recipe": "paper"}, {"trellis": False}], ids=["default", "paper", "plain"])
def test_rows_and_groups_of_zeros(settings: dict[str, Any]) -> None:
    w = weight(6, 256)
    w[1] = 0
    w[2, 64:128] = 0
    found = rounded(w, quantized(w, **settings), hessian_of(inputs(500, 256)))
    found.q.validate()
    assert not found.q.dequantize()[1].any()
    assert torch.isfinite(found.q.dequantize()).all()


def test_a_weight_of_zeros_has_no_error() -> None:
    w = torch.zeros(3, 64)
    found = rounded(w, quantized(w), torch.eye(64))
    assert (found.error_before, found.error_after) == (0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    w, x = weight(8, 128).to(dtype), inputs(500, 128)
    q = quantized(w)
    found = rounded(w, q, hessian_of(x))
    assert output_error(w.float(), found.q, x) < output_error(w.float(), q, x)


def test_bytes_do_not_depend_on_threads_or_on_other_rows() -> None:
    w, h = weight(ROWS + 40, 128), hessian_of(inputs(500, 128))
    q = quantized(w, bits=3)
    with forced_threads(1):
        parts = factor(h, 0.01)
        alone = gptq(w, q, h, parts)
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            together = gptq(w, q, h, parts, pool.map)
        last = QTensor(
            dataclasses.replace(q.spec, N=40),
            {k: t[ROWS:] if t.shape[0] == ROWS + 40 else t for k, t in q.tensors.items()},
        )
        rest = gptq(w[ROWS:], last, h, parts)
    assert same_bytes(alone.q.tensors["weight_packed"], together.q.tensors["weight_packed"])
    assert (alone.error_before, alone.error_after) == (together.error_before, together.error_after)
    assert same_bytes(alone.q.tensors["weight_packed"][ROWS:].contiguous(), rest.q.tensors["weight_packed"])
