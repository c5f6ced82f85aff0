"""Architectures: tiny random ones, quantized on disk, in memory and while they are loaded; always the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    altered,
    assert_same_tensors,
    edit_config,
    logits,
    same_bytes,
    save_tiny,
    sha256,
    stored_tensors,
    tiny_model,
)
from torch import nn

import precal_ext
from precal_ext import (
    CheckpointError,
    PrecalLinear,
    QuantizeConfig,
    load_quantized,
    quantize_checkpoint,
    quantize_model,
)
from precal_ext.config import same_experts
from precal_ext.verify import verify

transformers = pytest.importorskip("transformers")
AutoModel = transformers.AutoModelForCausalLM
PrecalConfig = precal_ext.PrecalConfig

DENSE = ["Llama", "Qwen3", "Mistral", "Gemma", "Phi", "OPT", "GPT2", "Falcon", "GPTNeoX"]
MIXTURES = ["Mixtral", "Qwen2Moe", "Qwen3Moe"]
# 5.0 saves Mixtral's experts under the name that their block has in memory, whatever it was on the disk.
KEEPS_THE_BLOCK = not transformers.__version__.startswith("5.0.")


def dense_linears(model: nn.Module) -> set[str]:
    """Of those that are left alone, what comes after the last dot."""
    found = {name for name, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    return {name.rpartition(".")[2] for name in found}


def assert_same_files(a: Path, b: Path) -> None:
    if KEEPS_THE_BLOCK:
        assert sha256(a / "model.safetensors") == sha256(b / "model.safetensors")
    else:
        one, other = ({same_experts(k): t for k, t in stored_tensors(f).items()} for f in (a, b))
        assert_same_tensors(one, other)


@pytest.mark.parametrize("architecture", DENSE + MIXTURES)
def test_every_way_to_quantize_it_gives_the_same(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny(tmp_path / "model", architecture)
    report = quantize_checkpoint(folder, tmp_path / "disk")
    in_memory = AutoModel.from_pretrained(folder, dtype="auto")
    assert quantize_model(in_memory).weights == report.weights
    flying = AutoModel.from_pretrained(folder, dtype="auto", quantization_config=PrecalConfig())
    loaded = AutoModel.from_pretrained(tmp_path / "disk", dtype="auto")
    expected = logits(in_memory)
    assert torch.isfinite(expected).all()
    doors = [flying, loaded, load_quantized(tmp_path / "disk", dtype="auto")]
    if architecture not in ("Mixtral", "GPTNeoX"):  # whose tensors transformers renames while it loads
        config = transformers.AutoConfig.from_pretrained(folder)
        doors.append(load_quantized(tmp_path / "disk", model=AutoModel.from_config(config)))
    for model in doors:
        # Routers are linear layers in transformers 4.
        assert dense_linears(model) <= {"lm_head", "embed_out", "shared_expert_gate", "gate"}
        assert torch.equal(logits(model), expected)
    for name, model in (("memory", in_memory), ("flying", flying), ("loaded", loaded)):
        model.save_pretrained(tmp_path / name)
        assert_same_files(tmp_path / name, tmp_path / "disk")
    prompt = torch.tensor([[3, 1, 4, 1, 5]])
    tokens = loaded.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    # Without the cache of keys and values, and by the model that was never on the disk, the same tokens.
    assert torch.equal(
        in_memory.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False), tokens
    )
    result = verify(tmp_path / "disk", folder)
    assert result.sound, result.errors


@pytest.mark.parametrize("architecture", DENSE + MIXTURES)
def test_it_stands_for_the_dense_model(tmp_path: Path, architecture: str) -> None:
    """A transposed, permuted or forgotten weight would be far away; 8 bits are near."""
    dense = tiny_model(architecture)
    expected = logits(dense)
    with torch.no_grad():
        for parameter in dense.parameters():  # a random model's own weights hardly reach its logits
            if parameter.dim() >= 2:
                parameter.mul_(4)
    expected = logits(dense)
    quantize_model(dense, QuantizeConfig(bits=8))
    assert (logits(dense) - expected).norm() < 0.05 * expected.norm()


# ---- Conv1D ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gpt2") / "gpt2", "GPT2")


@pytest.fixture(scope="module")
def gpt2_quantized(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpt2-quantized") / "gpt2"
    quantize_checkpoint(gpt2, out)
    return out


def test_a_conv1d_is_stored_as_the_linear_layer_it_is(gpt2: Path, gpt2_quantized: Path) -> None:
    from precal_ext.quantize import fit_set_grid, quantize_weight

    before, after = stored_tensors(gpt2), stored_tensors(gpt2_quantized)
    for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        name = f"transformer.h.1.{leaf}"
        w = before[f"{name}.weight"].t().contiguous()
        assert after[f"{name}.weight_shape"].tolist() == list(w.shape)
        q = quantize_weight(w, QuantizeConfig(), fit_set_grid([w], QuantizeConfig()))
        assert all(same_bytes(after[f"{name}.{key}"], tensor) for key, tensor in q.tensors.items())
        assert same_bytes(after[f"{name}.bias"], before[f"{name}.bias"])
    config = json.loads((gpt2_quantized / "config.json").read_text())["quantization_config"]
    assert len(config["conv1d_modules"]) == 8
    entries = json.loads((gpt2_quantized / "precal_report.json").read_text())["tensors"]
    found = {e["tensor"]: e for e in entries}["transformer.h.0.attn.c_attn.weight"]
    assert found["shape"] == [96, 32] and found["reason"] == "Conv1D, stored as the linear layer it is"


def test_no_other_model_has_the_field(tmp_path: Path) -> None:
    quantize_checkpoint(save_tiny(tmp_path / "model"), tmp_path / "out")
    assert "conv1d_modules" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_conv1d_in_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("GPT2").to(dtype).save_pretrained(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "model", dtype=dtype)
    quantize_model(model)
    stored = {k: t for k, t in stored_tensors(tmp_path / "out").items() if ".weight_" in k}
    state = model.state_dict()
    assert_same_tensors({k: state[k] for k in stored}, stored)


def test_a_conv1d_longer_than_a_piece_is_sampled_and_read_alike(tmp_path: Path, monkeypatch: Any) -> None:
    """A checkpoint is read in pieces and its grid fitted on some of the columns, a model in memory has all at once."""
    monkeypatch.setattr("precal_ext.weights._ROWS_AT_ONCE", 500)
    for module in ("convert", "inplace"):
        monkeypatch.setattr(f"precal_ext.{module}.SAMPLE", 700)
    folder = save_tiny(tmp_path / "model", "GPT2")
    quantize_checkpoint(folder, tmp_path / "out")
    model = AutoModel.from_pretrained(folder, dtype="auto")
    quantize_model(model)
    assert torch.equal(logits(load_quantized(tmp_path / "out")), logits(model))


def test_a_conv1d_that_is_not_finite_is_named_where_it_is(gpt2: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["transformer.h.1.mlp.c_fc.weight"][5, 77] = float("inf")

    folder = altered(gpt2, tmp_path / "model", damage)
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight must be finite, got inf at \[5, 77\]"):
        quantize_checkpoint(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight must be finite, got inf at \[5, 77\]"):
        AutoModel.from_pretrained(folder, quantization_config=PrecalConfig())


def test_an_expert_that_is_not_finite_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.{}.experts.2.w2.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name.format("block_sparse_moe")][5, 7] = float("nan")

    folder = altered(save_tiny(tmp_path / "dense", "Mixtral"), tmp_path / "model", damage)
    message = r"layers\.1\..*experts\.2\.w2\.weight must be finite, got nan at \[5, 7\]"
    with pytest.raises(CheckpointError, match=message):
        quantize_checkpoint(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(folder, quantization_config=PrecalConfig())
    report = quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig(skip_nonfinite=True))
    kept = {e.tensor for e in report.entries if e.action == "keep"} - {"lm_head.weight"}
    assert {k for k in kept if "gate" not in k} == {
        name.format("block_sparse_moe").replace("experts.2.w2", f"experts.{e}.{w}")
        for e in range(3)
        for w in ("w1", "w2", "w3")
    }
    flying = AutoModel.from_pretrained(folder, quantization_config=PrecalConfig(skip_nonfinite=True), dtype="auto")
    flying.save_pretrained(tmp_path / "flying")
    assert_same_files(tmp_path / "flying", tmp_path / "out")


def test_a_conv1d_that_the_config_does_not_name_is_refused(gpt2_quantized: Path, tmp_path: Path) -> None:
    """Nothing else would tell a square one from its transpose."""
    folder = altered(gpt2_quantized, tmp_path / "other", lambda tensors: None)
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    settings["conv1d_modules"].remove("transformer.h.1.attn.c_proj")
    edit_config(folder, quantization_config=settings)
    with pytest.raises(
        CheckpointError, match=r"conv1d_modules of config.json must name transformer\.h\.1\.attn\.c_proj"
    ):
        load_quantized(folder)


def test_dequantize_gives_a_conv1d_back(gpt2_quantized: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(gpt2_quantized)
    weight, expected = model.transformer.h[0].mlp.c_fc.dequantize(), logits(model)
    dense = model.dequantize()
    assert type(dense.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    assert same_bytes(dense.transformer.h[0].mlp.c_fc.weight.data, weight.t().contiguous())
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModel.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(dense))
    assert (logits(again) - expected).norm() < 1e-3 * expected.norm()
    assert not any(isinstance(m, PrecalLinear) for m in again.modules())


# ---- mixtures of experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", MIXTURES)
def test_experts_are_quantized_and_routers_are_not(tmp_path: Path, architecture: str) -> None:
    folder = save_tiny(tmp_path / "model", architecture)
    quantize_checkpoint(folder, tmp_path / "out")
    before, after = stored_tensors(folder), stored_tensors(tmp_path / "out")
    experts = {name.removesuffix(".weight") for name in before if ".experts." in name}
    assert len(experts) == 2 * 3 * {"Mixtral": 3, "Qwen2Moe": 2, "Qwen3Moe": 4}[architecture]
    assert {name for name in experts if f"{name}.weight" in after} == set()
    assert {name for name in experts if f"{name}.weight_packed" not in after} == set()
    routers = {name for name in before if name.endswith(("gate.weight", "gate_weight", "router.weight"))}
    assert len(routers) >= 2
    assert all(same_bytes(before[name], after[name]) for name in routers)
    # All experts of a layer have one grid for each of the matrices that servers make of them.
    grids = {name: after[f"{name}.weight_grid"].tolist() for name in sorted(experts) if ".layers.0." in name}
    assert len({str(grid) for grid in grids.values()}) == 2


FUSED = int(transformers.__version__.split(".")[0]) >= 5  # before, experts are modules


@pytest.mark.skipif(not FUSED, reason="transformers 4 has a module for each expert")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_experts_compute_what_the_fused_ones_do(dtype: torch.dtype) -> None:
    model = tiny_model("Qwen3Moe").to(dtype)
    before = model.model.layers[0].mlp.experts
    before.config._experts_implementation = "eager"  # the one that skips an index beyond the experts
    quantize_model(model, QuantizeConfig(bits=8))
    after = model.model.layers[0].mlp.experts
    with torch.no_grad():  # the fused ones with the weights that the quantized ones stand for
        for e in range(4):
            expert = after.get_submodule(str(e))
            up = torch.cat([expert.gate_proj.dequantize(), expert.up_proj.dequantize()])
            before.gate_up_proj[e], before.down_proj[e] = up.to(dtype), expert.down_proj.dequantize().to(dtype)
        torch.manual_seed(1)
        x = torch.randn(11, 32).to(dtype)
        index = torch.randint(0, 3, (11, 2))  # nobody asks for the last one
        index[:, 1] = (index[:, 0] + 1) % 3
        weights = torch.rand(11, 2).to(dtype)
        expected, got = before(x, index, weights), after(x, index, weights)
        index[5] = 4  # a token whose experts are on another machine
        elsewhere = after(x, index, weights)
    assert got.dtype == dtype
    assert (got - expected).norm() < (2e-3 if dtype == torch.float32 else 2e-2) * expected.norm()
    assert elsewhere[5].abs().sum() == 0 and torch.equal(elsewhere[:5], got[:5])


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_an_expert_that_is_kept_keeps_those_beside_it(tmp_path: Path, architecture: str) -> None:
    """They are one module in memory; those of another layer, and other linears, are their own."""
    folder = save_tiny(tmp_path / "model", architecture)
    settings = {"exclude": [r"layers\.1\..*experts\.0\.(w2|down_proj)"]}
    report = quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig.from_dict(settings))
    kept = {e.tensor: e.reason for e in report.entries if e.action == "keep" and "experts" in e.tensor}
    assert len(kept) == 3 * {"Mixtral": 3, "Qwen3Moe": 4}[architecture]
    assert all(".layers.1." in name for name in kept)
    assert sum(reason.startswith("excluded by") for reason in kept.values()) == 1
    assert sum("which is kept" in reason for reason in kept.values()) == len(kept) - 1
    names = [name for name in report.left_alone() if "experts" in name]  # one, not all of them
    assert len(names) == 1 and names[0].endswith(".experts.*") and ".layers.1." in names[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    skipped = [name for name in config["modules_to_not_convert"] if not name.endswith("gate")]
    assert [name for name in skipped if name.endswith(".experts")] == skipped[1:] and len(skipped) == 2
    flying = AutoModel.from_pretrained(folder, quantization_config=PrecalConfig(**settings), dtype="auto")
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(flying), logits(loaded))
    flying.save_pretrained(tmp_path / "again")
    assert_same_files(tmp_path / "again", tmp_path / "out")


def test_experts_with_settings_of_their_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "Mixtral")
    settings = {"overrides": {"experts": {"bits": 3, "c": 0}}}
    quantize_checkpoint(folder, tmp_path / "out", QuantizeConfig.from_dict(settings))
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    specs = {n: m.spec for n, m in loaded.named_modules() if isinstance(m, PrecalLinear)}
    assert {(s.bits, s.c) for n, s in specs.items() if "experts" in n} == {(3, 0)}
    assert {(s.bits, s.c) for n, s in specs.items() if "experts" not in n} == {(4, 1)}
    flying = AutoModel.from_pretrained(folder, quantization_config=PrecalConfig(**settings), dtype="auto")
    assert torch.equal(logits(flying), logits(loaded))


@pytest.mark.parametrize("missing", ["weight_scale", ""])
def test_an_expert_that_is_missing_is_named(tmp_path: Path, missing: str) -> None:
    folder = save_tiny(tmp_path / "model", "Mixtral")
    quantize_checkpoint(folder, tmp_path / "out")
    name = "model.layers.1.block_sparse_moe.experts.2.w3"

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if k.startswith(f"{name}.{missing}")]:
            del tensors[key]

    damaged = altered(tmp_path / "out", tmp_path / "damaged", drop)
    with pytest.raises(CheckpointError, match=r"layers\.1\..*\.experts\.2\.w3.* must be"):
        AutoModel.from_pretrained(damaged)


def test_dequantized_experts_are_the_checkpoints_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "Mixtral")
    model = AutoModel.from_pretrained(folder, quantization_config=PrecalConfig(), dtype="auto")
    expected = logits(model)
    dense = model.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    if not KEEPS_THE_BLOCK:
        return
    assert sorted(stored_tensors(tmp_path / "dense")) == sorted(stored_tensors(folder))
    again = AutoModel.from_pretrained(tmp_path / "dense")
    assert (logits(again) - expected).norm() < 2e-3 * expected.norm()
