"""Weights as they should not be, and as small models have them: through the whole of quantize_checkpoint and back."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import shapes
import torch
from safetensors.torch import load_file, save_file

from precal_ext import QTensor, QuantizeConfig, WeightSpec, quantize_checkpoint
from precal_ext.checkpoint import CheckpointError
from precal_ext.measure import sqnr_db, sum_squares

SHAPES = [(5, 1), (7, 172), (3, 255), (4, 257), (1, 64), (1, 1), (2, 2304)]
KINDS = {
    "gaussian": shapes.gaussian,
    "constant": lambda N, K: torch.full((N, K), 0.37),
    "all zero": lambda N, K: torch.zeros(N, K),
    "denormal": lambda N, K: shapes.gaussian(N, K) * 1e-37,
    "1e30": lambda N, K: shapes.gaussian(N, K) * 1e31,
    "one large group": shapes.one_large_group,
}
# What a dtype can hold of them.
DTYPES = {
    torch.float32: set(KINDS),
    torch.float64: set(KINDS),
    torch.bfloat16: set(KINDS),
    torch.float16: {"gaussian", "constant", "all zero", "one large group"},
}
CASES = [(kind, dtype) for dtype, kinds in DTYPES.items() for kind in sorted(kinds)]


@pytest.fixture(autouse=True)
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear layers are those that are named; asking transformers about an unknown model takes seconds."""
    monkeypatch.setitem(sys.modules, "transformers", None)


def make(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A model of an unknown architecture."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "odd"}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=[f"{k}, {str(d)[6:]}" for k, d in CASES])
@pytest.mark.parametrize("config", [QuantizeConfig(), QuantizeConfig(bits=3, c=0), QuantizeConfig(recipe="paper")])
def test_odd_shapes_and_values(tmp_path: Path, kind: str, dtype: torch.dtype, config: QuantizeConfig) -> None:
    weights = {f"model.layers.{i}.mlp.up_proj": KINDS[kind](N, K).to(dtype) for i, (N, K) in enumerate(SHAPES)}
    model = make(tmp_path / "model", {f"{name}.weight": w for name, w in weights.items()})
    quantize_checkpoint(model, tmp_path / "out", dataclasses.replace(config, include=("up_proj",)))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, w in weights.items():
        spec = WeightSpec.from_config(*w.shape, config)
        q = QTensor(spec, {key: stored[f"{name}.{key}"] for key in spec.tensors()})
        q.validate(name)
        restored = q.dequantize()
        assert restored.isfinite().all()
        error, power = sum_squares(w.double() - restored.double()), sum_squares(w.double())
        if kind == "all zero":
            assert error == 0
        elif kind != "denormal":  # of those bfloat16 row scales keep what they can
            least = 8 if config.recipe == "paper" else 13
            assert sqnr_db(power, error) > least, (name, w.shape)


def test_a_weight_beyond_the_scales_is_named(tmp_path: Path) -> None:
    """3e38 is finite, and its row scale would not be."""
    weights = {f"model.layers.0.mlp.{name}_proj.weight": shapes.gaussian(4, 64) for name in ("gate", "up")}
    weights["model.layers.0.mlp.up_proj.weight"][1, 2] = 3e38
    model = make(tmp_path / "model", weights)
    for config, at in (
        (QuantizeConfig(include=("_proj",)), r"gate_proj\.weight or model\.layers\.0\.mlp\.up_proj\.weight"),
        (QuantizeConfig(include=("_proj",), grid="constant"), r"up_proj\.weight"),
    ):
        message = rf"model\.safetensors: model\.layers\.0\.mlp\.{at} cannot be quantized: .* got 3e\+38 at \[1, 2\]"
        with pytest.raises(CheckpointError, match=message):
            quantize_checkpoint(model, tmp_path / "out", config)
        assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_in_a_few_bits_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    w = shapes.gaussian(4, 64).to(dtype)
    model = make(tmp_path / "model", {"model.layers.0.mlp.up_proj.weight": w})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight must be float32, float16, bfloat16 or float64"):
        quantize_checkpoint(model, tmp_path / "out", QuantizeConfig(include=("up_proj",)))
    assert not (tmp_path / "out").exists()


def test_a_model_without_linear_layers_is_refused(tmp_path: Path) -> None:
    model = make(tmp_path / "model", {"model.norm.weight": torch.ones(8)})
    with pytest.raises(ValueError, match=r"--include"):
        quantize_checkpoint(model, tmp_path / "out", QuantizeConfig(include=("up_proj",)))
    assert not (tmp_path / "out").exists()
