"""Checkpoints written by earlier versions are read to the last bit (tests/golden.py)."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest
import reference
import torch
from conftest import LINEAR_ISAS, forced_isa
from models import same_bytes
from safetensors.torch import load_file
from torch import Tensor

from precal_ext import ops
from precal_ext.checkpoint import read_index
from precal_ext.model import read_format
from precal_ext.qtensor import QTensor, WeightSpec
from precal_ext.survey import quantized_modules

CASES = [(recipe, name) for recipe, cases in golden.CASES.items() for name in cases]
STORED: dict[Path, dict[str, Tensor]] = {}


def stored(file: str) -> dict[str, Tensor]:
    path = golden.FOLDER / file
    if path not in STORED:
        STORED[path] = load_file(path)
    return STORED[path]


def weight(recipe: str, name: str) -> QTensor:
    N, K, _ = golden.CASES[recipe][name]
    spec = WeightSpec.from_config(N, K, read_format(golden.FOLDER / recipe).for_module(name))
    prefix = f"{name}."
    found = stored(f"{recipe}/model.safetensors")
    tensors = {k.removeprefix(prefix): t for k, t in found.items() if k.startswith(prefix)}
    return QTensor(spec, tensors)


@pytest.mark.parametrize(("recipe", "name"), CASES)
def test_what_was_written_is_read(recipe: str, name: str) -> None:
    q, expected = weight(recipe, name), stored(f"{recipe}.expected.safetensors")[name]
    q.validate(name)
    assert torch.equal(golden.dequantized(q), expected)  # the specification
    x = torch.linspace(-1, 1, 2 * q.spec.K).reshape(2, q.spec.K)
    want = reference.linear(x, expected)
    for isa in LINEAR_ISAS:
        with forced_isa(isa):
            assert torch.equal(q.dequantize(), expected)
            prepacked = q.prepack()
            back = QTensor.from_prepacked(q.spec, prepacked)
            assert all(same_bytes(back.tensors[key], tensor) for key, tensor in q.tensors.items())
            y = ops.linear(x, prepacked, None, *q.spec.op_arguments(), "f32")
            assert (y.double() - want).abs().max() <= 1e-5 * (x.abs().double() @ expected.abs().double().T).max()


@pytest.mark.parametrize("recipe", golden.CASES)
def test_a_golden_checkpoint_has_these_modules_and_no_others(recipe: str) -> None:
    index = read_index(golden.FOLDER / recipe)
    assert set(quantized_modules(index)) == set(golden.CASES[recipe])


def test_they_have_every_width_group_and_kind() -> None:
    specs = [weight(recipe, name).spec for recipe, name in CASES]
    assert {s.bits for s in specs if s.trellis} == set(range(2, 7))
    assert {s.bits for s in specs if s.uniform} == set(range(2, 9))
    assert {s.c for s in specs} >= {0, 1, 2, 16} and {s.scale_dtype for s in specs} == {"e4m3", "float16"}
    assert {13, 16, 32, 64, 128} <= {s.group_size for s in specs} and any(s.split for s in specs)
    assert any(s.K * s.bits % 32 for s in specs) and any(s.K < 32 for s in specs)
