"""Other codes on the same levels: against every sequence of codes there is, and what must stay."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from conftest import forced_threads
from models import same_bytes
from torch import Tensor

from precal_ext import QTensor, QuantizeConfig, ops
from precal_ext.quantize import fit_set_grid, quantize_weight
from precal_ext.requantize import requantize

SETTINGS: list[dict[str, Any]] = [
    {"bits": 3},
    {"bits": 4, "c": 2, "group_size": 16},
    {"bits": 2, "group_size": 8},
    {"bits": 6, "c": 0},
    {"bits": 3, "trellis": False},
    {"bits": 4, "grid": "uniform"},
    {"bits": 8, "c": 3},
    {"bits": 3, "group_size": -1},
    {"bits": 3, "recipe": "paper"},
    {"bits": 2, "recipe": "paper", "alpha": 0.3, "group_size": 4},
    {"bits": 4, "recipe": "rtn"},
]


def quantized(w: Tensor, **setting: Any) -> QTensor:
    config = QuantizeConfig(**setting)
    return quantize_weight(w, config, fit_set_grid([w], config))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("K", [5, 300, 2048 + 256])
def test_its_own_weight_changes_nothing_and_others_come_nearer(setting: dict[str, Any], K: int) -> None:
    w = normal(7, K)
    q = quantized(w, **setting)
    before = q.dequantize()
    assert same_bytes(requantize(q, before).tensors["weight_packed"], q.tensors["weight_packed"])
    target = w + 0.3 * normal(7, K, seed=1)
    r = requantize(q, target)
    r.validate()
    assert [key for key in q.tensors if not same_bytes(q.tensors[key], r.tensors[key])] == ["weight_packed"]
    errors = [(target - x).double().square().sum(1) for x in (before, r.dequantize())]
    assert bool((errors[1] <= errors[0]).all())
    assert bool((errors[1] < errors[0]).any())


@pytest.mark.parametrize("K", [1, 2, 5])
@pytest.mark.parametrize(
    "setting", [s for s in SETTINGS if s["bits"] == 2] + [{"bits": 3, "c": 1}, {"bits": 2, "trellis": False}], ids=str
)
def test_no_sequence_of_codes_is_nearer(setting: dict[str, Any], K: int) -> None:
    """The decoder itself reads every sequence: as many rows of one weight."""
    w = normal(6, K)
    q = quantized(w, **setting)
    target = w + 0.5 * normal(6, K, seed=1)
    found = requantize(q, target).dequantize()
    codes = torch.tensor(list(itertools.product(range(1 << q.spec.bits), repeat=K)), dtype=torch.uint8)
    packed = ops.pack(codes, q.spec.bits)
    for n in range(6):
        tensors = {
            key: t if key in ("weight_grid", "weight_shape") else t[n : n + 1].expand(len(codes), *t.shape[1:])
            for key, t in q.tensors.items()
        }
        spec = dataclasses.replace(q.spec, N=len(codes))
        every = QTensor(spec, {key: t.contiguous() for key, t in {**tensors, "weight_packed": packed}.items()})
        errors = (target[n] - every.dequantize()).double().square().sum(1)
        error = (target[n] - found[n]).double().square().sum()
        assert float(error) <= float(errors.min()) * (1 + 1e-5)


def test_blocks_of_a_trellis_know_nothing_of_each_other() -> None:
    w = normal(3, 300)
    q = quantized(w, bits=3, c=0, group_size=4)
    target = w + 0.3 * normal(3, 300, seed=1)
    whole = requantize(q, target).dequantize()
    target[:, :256] = 0  # another first block
    assert torch.equal(requantize(q, target).dequantize()[:, 256:], whole[:, 256:])


def test_groups_of_zeros_keep_their_codes() -> None:
    w = normal(4, 128)
    w[:, 64:] = 0
    q = quantized(w, bits=3)
    r = requantize(q, torch.cat([w[:, :64], torch.ones(4, 64)], 1))
    assert torch.equal(r.dequantize()[:, 64:], q.dequantize()[:, 64:])


@pytest.mark.parametrize("bits", [3, 4])
def test_the_number_of_threads_changes_nothing(bits: int) -> None:
    w = normal(200, 700)
    q = quantized(w, bits=bits)
    target = w + 0.2 * normal(200, 700, seed=1)
    found = []
    for count in (1, 3):
        with forced_threads(count):
            found.append(requantize(q, target).tensors["weight_packed"])
    assert same_bytes(*found)


def test_many_rows_are_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(9, 600)
    q, target = quantized(w, bits=3), w + 0.2 * normal(9, 600, seed=1)
    at_once = requantize(q, target)
    monkeypatch.setattr("precal_ext.requantize._BLOCKS_AT_ONCE", 7)
    assert same_bytes(requantize(q, target).tensors["weight_packed"], at_once.tensors["weight_packed"])


def test_empty_weights_and_wrong_targets() -> None:
    q = quantized(torch.zeros(0, 8), bits=3)
    assert requantize(q, torch.zeros(0, 8)) is q
    q = quantized(normal(4, 8), bits=3)
    with pytest.raises(ValueError, match=r"requantize: target must be float32 \[4, 8\], got torch.float32 \[4, 9\]"):
        requantize(q, torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"target must be float32 \[4, 8\], got torch.float16"):
        requantize(q, torch.zeros(4, 8, dtype=torch.float16))
