"""``precal import``: weights of GPTQ, AWQ and compressed-tensors are what they were, or are refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from models import Run, altered, digests, edit_config, logits, save_tiny, stored_tensors
from packed_models import (
    AWQ,
    GPTQ,
    GROUP,
    Codes,
    asymmetric,
    awq,
    compressed_tensors,
    ct_settings,
    gptq,
    packed_model,
    random_codes,
    reordered,
)
from safetensors.torch import save_file
from torch import Tensor

from precal_ext import CheckpointError, PrecalLinear, import_checkpoint, load_quantized, set_activations
from precal_ext.packed import read_packed
from precal_ext.survey import Stored
from precal_ext.uniform import split_scales, uniform_qtensor, uniform_spec

pytest_plugins = ["package_fixtures"]


def weights_of(folder: Path) -> dict[str, Tensor]:
    stored = Stored.open(folder)
    return {module: stored.read_valid(module).dequantize() for module in stored.modules}


def assert_exact(folder: Path, codes: dict[str, Codes]) -> None:
    found = weights_of(folder)
    assert sorted(found) == sorted(codes)
    for module, w in found.items():
        assert torch.equal(w.double(), codes[module].dense()), module


@pytest.fixture(scope="module")
def symmetric(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Codes]]:
    """A GPTQ model of the first convention; not to be changed."""
    return packed_model(tmp_path_factory.mktemp("gptq"), GPTQ, gptq)


# ---- kept exactly ----------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[dict[str, Any], Callable[[Codes], dict[str, Tensor]], int]] = {
    "gptq 4": (GPTQ, gptq, 4),
    "gptq 4 v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, partial(gptq, version=2), 4),
    "gptq 2": ({**GPTQ, "bits": 2}, gptq, 2),
    "gptq 3": ({**GPTQ, "bits": 3}, gptq, 3),
    "gptq 8 v2": ({**GPTQ, "bits": 8, "checkpoint_format": "gptq_v2"}, partial(gptq, version=2), 8),
    "awq": (AWQ, awq, 4),
    "awq, old names": ({"quant_method": "awq", "w_bit": 4, "q_group_size": GROUP}, awq, 4),
    **{f"compressed-tensors {bits}": (ct_settings(bits), compressed_tensors, bits) for bits in (2, 3, 4, 8)},
}


@pytest.mark.parametrize("case", CASES)
def test_codes_and_scales_are_kept(tmp_path: Path, case: str) -> None:
    settings, pack, bits = CASES[case]
    model, codes = packed_model(tmp_path, settings, pack, bits=bits)
    report = import_checkpoint(model, tmp_path / "out")
    assert_exact(tmp_path / "out", codes)
    assert {e.reason for e in report.quantized} == {"codes kept"}
    assert len(report.quantized) == len(codes)
    for module, c in codes.items():
        q = Stored.open(tmp_path / "out").read_valid(module)
        assert torch.equal(q.level_index(), torch.from_numpy(c.u).to(torch.uint8))
        assert bool((q.tensors["weight_row_scale"] == 1).all())
    before, after = stored_tensors(model), stored_tensors(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.bias"):
        assert torch.equal(before[name], after[name])


def test_the_model_computes_what_its_float64_weights_say(
    symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path
) -> None:
    import transformers

    model, _ = symmetric
    import_checkpoint(model, tmp_path / "out")
    ours = load_quantized(tmp_path / "out")
    assert set_activations(ours, "f32") == 14
    dense = transformers.AutoModelForCausalLM.from_pretrained(model.parent / "dense").eval()
    assert float((logits(ours) - logits(dense)).abs().max()) < 1e-4 * float(logits(dense).abs().max())


def test_a_scale_for_the_whole_row(tmp_path: Path) -> None:
    model, codes = packed_model(tmp_path, ct_settings(group_size=-1), compressed_tensors, group_size=-1)
    import_checkpoint(model, tmp_path / "out")
    assert_exact(tmp_path / "out", codes)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["group_size"] == -1


def test_compressed_tensors_own_decompression_is_the_same(tmp_path: Path) -> None:
    """The whole way through that package: its scheme, its compressor, its bfloat16."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def bf16(codes: Codes) -> Codes:
        return dataclasses.replace(codes, scale=codes.scale.bfloat16())

    model, codes = packed_model(tmp_path, ct_settings(), compressed_tensors, bf16)
    import_checkpoint(model, tmp_path / "out")
    assert_exact(tmp_path / "out", codes)
    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    stored, ours = stored_tensors(model), weights_of(tmp_path / "out")
    for module, w in ours.items():
        own = {k: stored[f"{module}.{k}"] for k in ("weight_packed", "weight_scale", "weight_shape")}
        theirs = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
        assert theirs.dtype == torch.bfloat16
        assert torch.equal(w.bfloat16(), theirs), module


def test_awq_as_compressed_tensors_converts_it(tmp_path: Path) -> None:
    """Zero points too: that package has a reader of its own for AWQ."""
    autoawq = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    model, codes = packed_model(tmp_path, AWQ, awq, asymmetric)
    theirs = autoawq.AutoAWQConverter(group_size=GROUP).process(stored_tensors(model))
    args = QuantizationArgs(num_bits=4, type="int", symmetric=False, strategy="group", group_size=GROUP)
    keys = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    for weight in read_packed(model).weights:
        own = {key: theirs[f"{weight.module}.{key}"] for key in keys}
        w = PackedQuantizationCompressor.decompress(own, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
        ours = weight.load().dequantize(weight.spec)
        assert torch.equal(ours.double(), codes[weight.module].dense())
        assert torch.equal(ours.half(), w)


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1.0, 1e5, 1e30])
def test_scales_of_any_magnitude_in_bfloat16(size: float) -> None:
    scale = (torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1).mul(size).bfloat16()
    scale[3], scale[4, :-1] = 0, 0
    parts = split_scales(scale)
    assert parts is not None
    half, row = parts
    assert half.dtype == torch.float16
    assert torch.equal(half.double() * row.double()[:, None], scale.double())
    assert torch.equal(torch.frexp(row.float())[0], torch.full((64,), 0.5))  # powers of two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("M", [1, 7, 96])
def test_linear_with_row_scales_far_from_1(dtype: torch.dtype, M: int) -> None:
    r = torch.Generator().manual_seed(M)
    scale = (torch.rand(64, 4, generator=r) + 0.5).mul(1e-7).bfloat16()
    scale[0, 1:] *= 2.0**-20  # only at the top of float16 do these have a form
    packed = torch.randint(-(2**31), 2**31 - 1, (64, 32), generator=r, dtype=torch.int32)
    parts = split_scales(scale)
    assert parts is not None
    assert float(parts[0][0].max()) > 2**15 > 2 > float(parts[0][1:].max())
    q = uniform_qtensor(packed, *parts, uniform_spec(64, 256, 4, 64))
    x = torch.randn(M, 256, generator=r).mul(2**12).to(dtype)  # so that float16 holds the result
    expected = x.double() @ q.dequantize().double().t()
    error = (PrecalLinear.from_qtensor(q)(x).double() - expected).abs().max() / expected.abs().max()
    assert float(error) < {torch.float32: 1e-3, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]


def test_scales_that_have_no_form() -> None:
    scale = torch.full((3, 4), 0.1)  # 24 bits of float32
    assert split_scales(scale) is None
    assert split_scales(scale.bfloat16().float()) is not None
    wide = torch.tensor([[2.0**30, 2.0**-12]])  # one row, 2^42 apart
    assert split_scales(wide) is None


def test_a_model_with_modules_of_their_own_width(tmp_path: Path) -> None:
    """GPTQModel's "dynamic": the shapes say it."""
    model, codes = packed_model(tmp_path, GPTQ, gptq)
    name = "model.layers.1.mlp.down_proj"
    wide = random_codes(torch.empty(32, 64), 8, 5, 32)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"{name}.{k}": v for k, v in gptq(wide).items()})

    other = altered(model, tmp_path / "other", change)
    import_checkpoint(other, tmp_path / "out")
    assert_exact(tmp_path / "out", {**codes, name: wide})
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["module_overrides"] == {name: {"bits": 8, "group_size": 32}}
    load_quantized(tmp_path / "out")


def test_a_packed_output_head(tmp_path: Path) -> None:
    """One that the config ties to the embedding, and that has a weight of its own all the same."""
    model, codes = packed_model(tmp_path, GPTQ, gptq, tie_word_embeddings=True)
    head = random_codes(torch.empty(64, 32), 4, 9)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.pop("lm_head.weight", None)
        tensors.update({f"lm_head.{k}": v for k, v in gptq(head).items()})

    other = altered(model, tmp_path / "other", change)
    import_checkpoint(other, tmp_path / "out")
    assert_exact(tmp_path / "out", {**codes, "lm_head": head})
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    loaded = load_quantized(tmp_path / "out")
    assert torch.equal(loaded.lm_head.dequantize().double(), head.dense())


def test_biases_that_nobody_has(symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path) -> None:
    """Early AutoGPTQ: zeros for every layer; this model has them in its attention only."""
    bias = "model.layers.1.mlp.up_proj.bias"
    model = altered(symmetric[0], tmp_path / "model", put(bias, torch.zeros(64).half()))
    report = import_checkpoint(model, tmp_path / "out")
    assert "biases left out that are zero, of layers that have none in the model: 1" in report.notes
    assert sorted(n for n in stored_tensors(tmp_path / "out") if n.endswith("bias")) == sorted(
        n for n in stored_tensors(model) if n.endswith("bias") and n != bias
    )
    load_quantized(tmp_path / "out")
    other = altered(symmetric[0], tmp_path / "other", put(bias, torch.ones(64).half()))
    with pytest.raises(CheckpointError, match=r"up_proj.bias must be zero, the model has no bias there"):
        import_checkpoint(other, tmp_path / "out2")


def test_settings_in_a_file_of_their_own(symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path) -> None:
    """As AutoGPTQ wrote them."""
    model = shutil.copytree(symmetric[0], tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    settings = config.pop("quantization_config")
    (model / "config.json").write_text(json.dumps(config))
    (model / "quantize_config.json").write_text(json.dumps({k: settings[k] for k in ("bits", "group_size", "sym")}))
    import_checkpoint(model, tmp_path / "out")
    assert_exact(tmp_path / "out", symmetric[1])
    assert not (tmp_path / "out/quantize_config.json").exists()


# ---- what has no exact form ------------------------------------------------------------------------------------------


def float32_scales(codes: Codes) -> Codes:
    return dataclasses.replace(codes, scale=codes.scale.float() * 1.0001)


MISFITS: dict[str, tuple[dict[str, Any], Callable[[Codes], dict[str, Tensor]], Callable[[Codes], Codes], str]] = {
    "asymmetric gptq": (GPTQ, gptq, asymmetric, r"qzeros must be 8 everywhere once unpacked, got \d+ for row 0, group"),
    "asymmetric gptq v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        partial(gptq, version=2),
        asymmetric,
        r"qzeros must be 8 .* it is asymmetric; --widen stores it exactly with 8 bits, --requantize",
    ),
    "asymmetric awq": (AWQ, awq, asymmetric, r"qzeros must be 8 everywhere"),
    "asymmetric compressed-tensors": (
        ct_settings(symmetric=False),
        compressed_tensors,
        asymmetric,
        r"weight_zero_point must be 8 everywhere",
    ),
    "reordered": (GPTQ, gptq, reordered, r"g_idx must be k // 16, got group \d for column \d+: .* \(desc_act\); such"),
    "scales": (GPTQ, gptq, float32_scales, r"scales must fit in float16 under a power of two per row, got 0.0\d+ for"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_has_no_exact_form_is_refused_or_quantized_again(tmp_path: Path, run: Run, case: str) -> None:
    settings, pack, change, message = MISFITS[case]
    model, codes = packed_model(tmp_path, settings, pack, change)
    with pytest.raises(CheckpointError, match=r"packed/model.safetensors: model.layers.0.mlp.down_proj." + message):
        import_checkpoint(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "packed"]
    code, out, _ = run("import", model, tmp_path / "out", "--requantize", "--quiet")
    assert code == 0
    assert f"{len(codes)} weights quantized again, against what they were:" in out
    report = json.loads((tmp_path / "out/precal_report.json").read_text())
    figures = {t["tensor"]: t["figures"] for t in report["tensors"] if "figures" in t}
    for module, w in weights_of(tmp_path / "out").items():
        before = codes[module].dense()  # the other package's weight, by its own formula
        noise = float((w - before).square().sum())
        sqnr = 10 * math.log10(float(before.square().sum()) / noise)
        assert 12 < sqnr < 60
        assert figures[f"{module}.weight"]["sqnr_db"] == pytest.approx(sqnr, abs=1e-3)  # the codes times float32


@pytest.mark.parametrize("case", ["asymmetric gptq", "asymmetric awq", "asymmetric compressed-tensors"])
def test_asymmetric_weights_have_an_exact_form_of_8_bits(tmp_path: Path, run: Run, case: str) -> None:
    settings, pack, change, _ = MISFITS[case]
    model, codes = packed_model(tmp_path, settings, pack, change)
    code, out, _ = run("import", model, tmp_path / "out", "--widen", "--quiet")
    assert code == 0
    assert f"0 weights with the codes they had, {8 + 16 / GROUP + 0.4:.1f}" in out
    assert f"{len(codes)} weights kept exactly with codes of 8 bits" in out
    assert_exact(tmp_path / "out", codes)
    assert run("verify", tmp_path / "out")[0] == 0
    assert math.isfinite(float(logits(load_quantized(tmp_path / "out")).abs().max()))


def test_what_is_fused_is_widened_together(tmp_path: Path) -> None:
    def some(codes: Codes) -> Codes:
        return asymmetric(codes) if codes.u[0, 0] < 4 and codes.u.shape == (32, 32) else codes

    model, codes = packed_model(tmp_path, GPTQ, gptq, some)
    odd = {m for m, c in codes.items() if not (c.zero == 8).all()}
    import_checkpoint(model, tmp_path / "out", widen=True)
    assert_exact(tmp_path / "out", codes)
    stored = Stored.open(tmp_path / "out")
    wide = {m for m in codes if stored.spec(m).bits == 8}
    sets = [{f"model.layers.{i}.self_attn.{p}_proj" for p in "qkv"} for i in (0, 1)]
    assert odd and odd < wide < set(codes)
    assert wide == odd.union(*(s for s in sets if s & odd))


def test_columns_in_another_order_are_not_widened(tmp_path: Path) -> None:
    model, _ = packed_model(tmp_path, GPTQ, gptq, lambda codes: reordered(asymmetric(codes)))
    with pytest.raises(CheckpointError, match=r"g_idx must be k // 16"):
        import_checkpoint(model, tmp_path / "out", widen=True)
    report = import_checkpoint(model, tmp_path / "out", widen=True, requantize=True)
    assert {e.reason for e in report.quantized} == {"quantized again: columns reordered"}
    assert report.sqnr_db > 40  # by codes of 8 bits


def test_only_what_must_be_is_quantized_again(tmp_path: Path) -> None:
    def some(codes: Codes) -> Codes:
        return asymmetric(codes) if codes.u.shape == (32, 64) else codes

    model, codes = packed_model(tmp_path, GPTQ, gptq, some)
    report = import_checkpoint(model, tmp_path / "out", requantize=True)
    again = {e.tensor for e in report.quantized if e.reason != "codes kept"}
    assert again == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)}
    assert {e.reason for e in report.quantized if e.tensor in again} == {"quantized again: asymmetric"}
    kept = {m: c for m, c in codes.items() if f"{m}.weight" not in again}
    found = weights_of(tmp_path / "out")
    assert all(torch.equal(found[m].double(), c.dense()) for m, c in kept.items())


def test_zero_points_of_the_other_convention_are_recognized(tmp_path: Path) -> None:
    model, _ = packed_model(tmp_path, GPTQ, partial(gptq, version=2))  # config.json says nothing, which means the first
    with pytest.raises(CheckpointError, match=r"got 9 .*config.json must say checkpoint_format gptq_v2"):
        import_checkpoint(model, tmp_path / "out")
    edit_config(model, quantization_config={**GPTQ, "checkpoint_format": "gptq_v2"})
    import_checkpoint(model, tmp_path / "out")


def test_a_zero_of_0_in_the_first_convention(tmp_path: Path) -> None:
    """It is stored as the largest code: one less, and around."""

    def zeroed(codes: Codes) -> Codes:
        return dataclasses.replace(codes, zero=np.zeros_like(codes.zero))

    model, codes = packed_model(tmp_path, GPTQ, gptq, zeroed)
    for weight in read_packed(model).weights:
        assert torch.equal(weight.load().dequantize(weight.spec).double(), codes[weight.module].dense())


# ---- untrusted input -------------------------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.__setitem__(name, value)


def set_item(name: str, at: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[name].__setitem__(at, value)


DAMAGED_GPTQ: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(f"{Q}.scales"), rf"{Q}.scales must be there, got nothing"),
    "no zeros": (lambda t: t.pop(f"{Q}.qzeros"), rf"{Q}.qzeros must be there, got nothing"),
    "dtype": (put(f"{Q}.qweight", torch.zeros(4, 32)), rf"{Q}.qweight must be torch.int32 with 2 dimensions"),
    "rank": (put(f"{Q}.scales", torch.zeros(64).half()), rf"{Q}.scales must be torch.float16 or .* with 2 dimensions"),
    "rows": (put(f"{Q}.qweight", torch.zeros(5, 32, dtype=torch.int32)), rf"{Q}.qweight must be \[4, 32\] for 32 rows"),
    "columns": (put(f"{Q}.scales", torch.zeros(2, 40).half()), rf"{Q}.qweight must be \[4, 40\]"),
    "groups": (put(f"{Q}.scales", torch.zeros(3, 32).half()), rf"{Q}.scales must be \[2, 32\] for groups of 16"),
    "zeros": (put(f"{Q}.qzeros", torch.zeros(2, 3, dtype=torch.int32)), rf"{Q}.qzeros must be \[2, 4\] for groups"),
    "empty": (put(f"{Q}.scales", torch.zeros(0, 32).half()), rf"{Q}.scales must be \[2, 32\]"),
    "not finite": (set_item(f"{Q}.scales", (1, 3), math.inf), rf"{Q}.scales must be finite, got inf at \[3, 1\]"),
    "groups beyond": (set_item(f"{Q}.g_idx", (5,), 2), rf"{Q}.g_idx must be groups below 2, got 2 for column 5"),
    "negative groups": (set_item(f"{Q}.g_idx", (5,), -1), rf"{Q}.g_idx must be groups below 2, got -1 for column 5"),
    "two weights": (put(f"{Q}.weight", torch.zeros(32, 32)), rf"{Q} must have one weight, got {Q}.weight also"),
    "no layer": (
        lambda t: [t.__setitem__(n.replace(Q, "model.extra"), t.pop(n)) for n in list(t) if n.startswith(Q + ".")],
        "model.extra must be a linear layer of the model, got none of them",
    ),
    "nothing": (
        lambda t: [t.pop(n) for n in list(t) if n.endswith(("qweight", "qzeros", "scales", "g_idx"))],
        "must hold weights of gptq, got none",
    ),
}


@pytest.mark.parametrize("case", DAMAGED_GPTQ)
def test_damaged_gptq(symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path, case: str) -> None:
    change, message = DAMAGED_GPTQ[case]
    model = altered(symmetric[0], tmp_path / "model", change)
    for requantize in (False, True):
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(model, tmp_path / "out", requantize=requantize)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def packed_ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed_model(tmp_path_factory.mktemp("ct"), ct_settings(), compressed_tensors)[0]


DAMAGED_CT: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no shape": (lambda t: t.pop(f"{Q}.weight_shape"), rf"{Q}.weight_shape must be there"),
    "another shape": (put(f"{Q}.weight_shape", torch.tensor([32, 48])), rf"{Q} must have the shapes of one scheme of"),
    "huge": (put(f"{Q}.weight_shape", torch.tensor([32, 2**62])), rf"{Q} must have the shapes of one .* got none"),
    "negative": (put(f"{Q}.weight_shape", torch.tensor([-1, -1])), rf"{Q} must have the shapes of one scheme"),
    "three": (put(f"{Q}.weight_shape", torch.tensor([32, 32, 1])), rf"{Q}.weight_shape must be \[2\] of N and K"),
    "words": (put(f"{Q}.weight_packed", torch.zeros(32, 5, dtype=torch.int32)), rf"{Q} must have the shapes of one"),
    "groups": (put(f"{Q}.weight_scale", torch.zeros(32, 3).half()), rf"{Q} must have the shapes of one scheme"),
    "zero point": (
        put(f"{Q}.weight_zero_point", torch.zeros(4, 2, dtype=torch.int32)),
        rf"{Q}.weight_zero_point must be absent, by symmetric in",
    ),
    "order": (put(f"{Q}.weight_g_idx", torch.zeros(5, dtype=torch.int32)), rf"{Q}.weight_g_idx must be \[32\]"),
}


@pytest.mark.parametrize("case", DAMAGED_CT)
def test_damaged_compressed_tensors(packed_ct: Path, tmp_path: Path, case: str) -> None:
    change, message = DAMAGED_CT[case]
    model = altered(packed_ct, tmp_path / "model", change)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def scheme(**fields: Any) -> dict[str, Any]:
    settings = ct_settings()
    settings["config_groups"]["group_0"]["weights"].update(fields)
    return settings


SETTINGS: list[tuple[Any, str]] = [
    (None, "must be quantized by gptq, awq, compressed-tensors, got a config.json without quantization_config"),
    ({"quant_method": "bitsandbytes"}, "quant_method must be one of gptq, awq, compressed-tensors, got 'bitsandbytes'"),
    ({"quant_method": "precal"}, "quant_method must be one of .*, got 'precal'"),
    ({**GPTQ, "bits": 5}, "config.json: bits must be one of 2, 3, 4, 8 for gptq, got '5'"),
    ({**GPTQ, "bits": True}, "bits must be one of 2, 3, 4, 8 for gptq, got 'True'"),
    ({**GPTQ, "bits": "4"}, "bits must be one of 2, 3, 4, 8 for gptq, got '4'"),
    ({**GPTQ, "group_size": 0}, r"group_size must be an integer from 1 to 2\*\*20, or -1, got '0'"),
    ({**GPTQ, "group_size": 2**30}, r"group_size must be an integer from 1 to 2\*\*20"),
    ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format must be 'gptq' or 'gptq_v2', got 'marlin'"),
    ({**AWQ, "bits": 3}, "bits must be one of 4 for awq, got '3'"),
    ({**AWQ, "version": "gemv"}, "version must be 'gemm', got 'gemv'"),
    ({**ct_settings(), "format": "int-quantized"}, "format must be 'pack-quantized', got 'int-quantized'"),
    ({**ct_settings(), "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be null"),
    ({**ct_settings(), "transform_config": {"R1": {}}}, "transform_config must be null"),
    ({**ct_settings(), "sparsity_config": {"format": "sparse-24"}}, "sparsity_config must be absent or of format"),
    ({**ct_settings(), "config_groups": {}}, "config_groups must be groups of modules by name"),
    ({**ct_settings(), "config_groups": {"W4A16": ["Linear"]}}, r"config_groups.W4A16.weights must be a scheme"),
    (scheme(num_bits=16), "weights.num_bits must be an integer from 2 to 8, got '16'"),
    (scheme(type="float"), "weights.type must be 'int', got 'float'"),
    (scheme(strategy="block"), "weights.strategy must be one of group, channel, got 'block'"),
    (scheme(group_size="x"), "weights.group_size must be an integer"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_that_are_refused(
    symmetric: tuple[Path, dict[str, Codes]], packed_ct: Path, tmp_path: Path, settings: Any, message: str
) -> None:
    of_ct = isinstance(settings, dict) and settings["quant_method"] == "compressed-tensors"
    model = shutil.copytree(packed_ct if of_ct else symmetric[0], tmp_path / "model")
    edit_config(model, quantization_config=settings)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_activations_that_the_settings_quantize(packed_ct: Path, tmp_path: Path) -> None:
    model = shutil.copytree(packed_ct, tmp_path / "model")
    settings = ct_settings()
    settings["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}
    edit_config(model, quantization_config=settings)
    with pytest.raises(CheckpointError, match="input_activations must be null: only weights are quantized"):
        import_checkpoint(model, tmp_path / "out")


def test_codes_of_which_nobody_knows_how_they_are_packed(tmp_path: Path) -> None:
    """40 codes of 3 bits: four words as a stream, and four with ten codes each, as older versions pack."""
    sizes = {"hidden_size": 40, "intermediate_size": 40}
    settings = ct_settings(3, group_size=40)
    model, _ = packed_model(tmp_path, settings, compressed_tensors, bits=3, group_size=40, **sizes)
    with pytest.raises(CheckpointError, match="must show how its codes are packed, got 4 words of 40 codes of 3 bits"):
        import_checkpoint(model, tmp_path / "out")


MIXTURES: dict[str, dict[str, Any]] = {"Mixtral": {}, "Qwen3Moe": {"moe_intermediate_size": 32}}


@pytest.mark.parametrize("architecture", MIXTURES)
@pytest.mark.parametrize(("settings", "pack"), [(GPTQ, gptq), (ct_settings(), compressed_tensors)])
def test_experts_are_kept_too(
    tmp_path: Path, architecture: str, settings: dict[str, Any], pack: Callable[[Codes], dict[str, Tensor]]
) -> None:
    import transformers

    model, codes = packed_model(tmp_path, settings, pack, architecture=architecture, **MIXTURES[architecture])
    assert sum(".experts." in module for module in codes) >= 18
    import_checkpoint(model, tmp_path / "out")
    assert_exact(tmp_path / "out", codes)
    ours = load_quantized(tmp_path / "out")
    assert set_activations(ours, "f32") == len(codes)
    dense = transformers.AutoModelForCausalLM.from_pretrained(model.parent / "dense").eval()
    assert float((logits(ours) - logits(dense)).abs().max()) < 1e-4 * float(logits(dense).abs().max())


def test_layers_whose_experts_are_dense_stay_so(tmp_path: Path) -> None:
    model, codes = packed_model(
        tmp_path, GPTQ, gptq, architecture="Mixtral", keep=lambda module: "layers.1." in module and "experts" in module
    )
    import_checkpoint(model, tmp_path / "out")
    assert_exact(tmp_path / "out", codes)
    kept = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert [name for name in kept if "experts" in name] == ["model.layers.1.mlp.experts"]
    assert set_activations(load_quantized(tmp_path / "out"), "f32") == len(codes)


def test_experts_of_which_some_are_dense_are_refused(tmp_path: Path) -> None:
    model, _ = packed_model(
        tmp_path, GPTQ, gptq, architecture="Mixtral", keep=lambda m: "layers.1." in m and m.endswith("2.w2")
    )
    message = r"layers.1.*experts.2.w2 must be quantized as .*experts.*w. is, got a dense weight"
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(model, tmp_path / "out")


def test_experts_that_cannot_be_loaded_are_refused(tmp_path: Path) -> None:
    """A Llama has none."""
    model, _ = packed_model(tmp_path, GPTQ, gptq)
    name = "model.layers.0.mlp.experts.0.w1"

    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"{name}.{k}": v for k, v in gptq(random_codes(torch.empty(64, 32), 4, 0)).items()})

    packed = altered(model, tmp_path / "other", change)
    with pytest.raises(
        CheckpointError, match=r"experts.0.w1 must be a linear layer .* an expert of a kind that cannot"
    ):
        import_checkpoint(packed, tmp_path / "out")


def test_a_conv1d_is_imported_as_the_linear_layer_it_is(tmp_path: Path) -> None:
    """GPTQ packs the weight of GPT-2's Conv1D turned, as that of a linear layer; so do we."""
    model = save_tiny(tmp_path / "model", "GPT2")
    codes: dict[str, Codes] = {}

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))]:
            module = name.removesuffix(".weight")
            codes[module] = random_codes(tensors.pop(name).t(), 4, len(codes))
            tensors.update({f"{module}.{k}": v for k, v in gptq(codes[module]).items()})

    def dense(tensors: dict[str, Tensor]) -> None:
        for module, c in codes.items():
            tensors[f"{module}.weight"] = c.dense().t().float().contiguous()

    packed = altered(model, tmp_path / "packed", pack)
    edit_config(packed, quantization_config=GPTQ)
    import_checkpoint(packed, tmp_path / "out")
    assert_exact(tmp_path / "out", codes)
    expected = logits(load_dense(altered(model, tmp_path / "dense", dense)))
    assert (logits(load_quantized(tmp_path / "out")) - expected).norm() < 1e-3 * expected.norm()


def load_dense(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def random_tensor(r: np.random.Generator) -> Tensor:
    dtypes = [torch.int32, torch.int32, torch.float16, torch.int64, torch.float32, torch.bfloat16, torch.uint8]
    shape = [int(r.choice([0, 1, 2, 4, 8, 32, 33])) for _ in range(r.integers(1, 4))]
    return torch.from_numpy(r.integers(-3, 100, shape)).to(dtypes[r.integers(len(dtypes))])


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_any_tensors_are_a_weight_or_refused(
    symmetric: tuple[Path, dict[str, Codes]], packed_ct: Path, tmp_path: Path, method: str
) -> None:
    """Tensors of any dtype and shape in the place of a layer's: nothing but a refusal or a weight comes of them."""
    of_ct = method == "compressed-tensors"
    settings = {"gptq": GPTQ, "awq": AWQ, "compressed-tensors": ct_settings()}[method]
    stored = stored_tensors(packed_ct if of_ct else symmetric[0])
    true = {
        name.removeprefix(Q + "."): t for name, t in stored.items() if name.startswith(Q + ".") and "bias" not in name
    }
    if method == "awq":
        true = awq(random_codes(torch.empty(32, 32), 4, 0))
    keys = ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"]
    keys = keys if of_ct else ["qweight", "qzeros", "scales", "g_idx"]
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    outcomes = {"weight": 0, "refused": 0}
    for seed in range(150):
        r = np.random.default_rng(seed)
        tensors = dict(true)
        for key in r.choice(keys, r.integers(1, 3)):
            tensors[key] = random_tensor(r) if r.random() < 0.7 or key not in true else true[key].roll(1)
        save_file({f"{Q}.{k}": t.contiguous() for k, t in tensors.items()}, tmp_path / "model.safetensors")
        try:
            (weight,) = read_packed(tmp_path).weights
            loaded = weight.load()
            assert weight.misfit(loaded) is not None or weight.exactly(loaded).validate(Q) is None
            assert loaded.dequantize(weight.spec).shape == (weight.spec.N, weight.spec.K)
            outcomes["weight"] += 1
        except CheckpointError as error:
            assert Q in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_command_and_those_that_look_at_its_output(
    symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path, run: Run
) -> None:
    model, codes = symmetric
    out = tmp_path / "out"
    code, text, err = run("import", model, out)
    assert code == 0, err
    assert f"{len(codes)} weights with the codes they had" in text
    assert f"{len(stored_tensors(model)) - 3 * len(codes)}/" in err  # progress counts weights, not their tensors
    code, text, _ = run("verify", out, "--original", model.parent / "dense")
    assert (code, text.splitlines()[-1]) == (0, f"{out}: sound")
    code, text, _ = run("inspect", out, "--json")
    assert code == 0
    rows = json.loads(text)["tensors"]
    assert {(row["bits"], row["group_size"], row["c"], row["sqnr_db"]) for row in rows} == {(4, GROUP, 0, None)}
    code, text, _ = run("inspect", out, "--original", model.parent / "dense", "--json")
    assert {(row["noise"], row["sqnr_db"]) for row in json.loads(text)["tensors"]} == {(0, None)}  # exact
    assert run("report", out, "--html", tmp_path / "page.html")[0] == 0
    code, text, _ = run("import", model, out, "--overwrite", "--json", "--quiet")
    assert code == 0
    assert json.loads(text)["tensors_quantized"] == len(codes)


def test_the_example_of_the_docs(
    symmetric: tuple[Path, dict[str, Codes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs/serving.md").read_text()
    (code,) = re.findall(r"```python\n(.*?import_checkpoint.*?)```", text[text.index("## Interchange") :], re.DOTALL)
    shutil.copytree(symmetric[0], tmp_path / "GPTQ_MODEL")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out == f"{math.inf}\n"
    assert (tmp_path / "FOR_VLLM/config.json").exists()


def test_where_the_output_may_lie(symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path, run: Run) -> None:
    model = shutil.copytree(symmetric[0], tmp_path / "model")
    for out, message in (
        (model / "inside", "must lie outside the model's directory"),
        (model, "must lie outside the model's directory"),
        (tmp_path, "must not contain the model"),
    ):
        code, _, err = run("import", model, out, "--quiet")
        assert code == 3
        assert message in err
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    code, _, err = run("import", model, tmp_path / "full", "--quiet")
    assert code == 3
    assert "must be new or empty" in err
    assert run("import", tmp_path / "nothing", tmp_path / "out", "--quiet")[0] == 3


def test_an_interrupted_import_continues(symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path) -> None:
    model, _ = symmetric
    import_checkpoint(model, tmp_path / "whole")

    def stop(p: Any) -> None:
        if p.tensors_done == 5:
            raise KeyboardInterrupt

    out, seen = tmp_path / "out", []
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(model, out, progress=stop)
    assert not out.exists()
    with pytest.raises(CheckpointError, match="must be continued with the same settings requantize, got True after"):
        import_checkpoint(model, out, requantize=True)
    import_checkpoint(model, out, progress=seen.append)
    assert seen[0].bytes_before > 0
    assert len(seen) == seen[-1].tensors - (seen[0].tensors_done - 1)
    whole, continued = digests(tmp_path / "whole"), digests(out)
    assert whole.pop("README.md") != continued.pop("README.md")  # has the directory's name
    assert whole == continued
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


def test_shards_have_the_same_tensors(symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path) -> None:
    model, codes = symmetric
    import_checkpoint(model, tmp_path / "out", max_shard_bytes=10_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_exact(tmp_path / "out", codes)


def test_disks_that_fail(
    symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = symmetric[0], tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage)
        code, _, err = run("import", model, out, "--quiet")
    assert code == 3
    assert "out: must have room for" in err
    assert list(tmp_path.iterdir()) == []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        code, _, err = run("import", model, out, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 3
    assert "File too large" in err
    assert not out.exists()
    assert run("import", model, out, "--quiet")[0] == 0


def test_a_model_that_changes_meanwhile(symmetric: tuple[Path, dict[str, Codes]], tmp_path: Path) -> None:
    model = shutil.copytree(symmetric[0], tmp_path / "model")

    def touch(p: Any) -> None:
        os.utime(model / "model.safetensors", ns=(1, 1))

    with pytest.raises(CheckpointError, match="must stay as it is while it is read, got changed files"):
        import_checkpoint(model, tmp_path / "out", progress=touch)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
