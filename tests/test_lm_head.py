"""The output head, quantized on demand: its own weight, or one made from the embedding that it was tied to."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    Run,
    altered,
    assert_same_tensors,
    digests,
    edit_config,
    logits,
    same_bytes,
    save_tiny,
    sha256,
    stored_tensors,
    tiny_model,
)
from safetensors.torch import load_file

from precal_ext import (
    CheckpointError,
    PrecalLinear,
    QuantizeConfig,
    SelectionError,
    load_quantized,
    quantize_checkpoint,
    quantize_model,
    save_quantized,
)
from precal_ext.convert import Progress
from precal_ext.quantize import fit_set_grid, quantize_weight
from precal_ext.staging import read_journal
from precal_ext.verify import verify

transformers = pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

EMBEDDINGS = {"Llama": "model.embed_tokens.weight", "OPT": "model.decoder.embed_tokens.weight"}
# Architecture, whether its head shares the embedding's weight.
CASES = [("Llama", False), ("Llama", True), ("OPT", True)]
every_case = pytest.mark.parametrize(("architecture", "tied"), CASES, ids=lambda v: v if isinstance(v, str) else "")
every_width = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(architecture, tied) -> its directory."""
    made: dict[tuple[str, bool], Path] = {}

    def folder(architecture: str, tied: bool) -> Path:
        if (architecture, tied) not in made:
            path = tmp_path_factory.mktemp("dense") / f"{architecture}-{tied}"
            made[architecture, tied] = save_tiny(path, architecture, tie_word_embeddings=tied)
        return made[architecture, tied]

    return folder


@pytest.fixture(scope="module")
def with_head(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(architecture, tied, bits of the head) -> its directory, quantized to 4 bits."""
    made: dict[tuple[str, bool, int], Path] = {}

    def folder(architecture: str, tied: bool, bits: int) -> Path:
        key = (architecture, tied, bits)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("with-head") / f"{architecture}-{bits}"
            quantize_checkpoint(dense(architecture, tied), made[key], QuantizeConfig(lm_head=bits))
        return made[key]

    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "precal_report.json").read_text())


# ---- what is stored --------------------------------------------------------------------------------------------------


@every_case
@every_width
def test_the_head_has_a_weight_of_its_own(dense: Any, with_head: Any, architecture: str, tied: bool, bits: int) -> None:
    folder, original = with_head(architecture, tied, bits), dense(architecture, tied)
    stored, before = stored_tensors(folder), stored_tensors(original)
    source = EMBEDDINGS[architecture]
    head = before[source if tied else "lm_head.weight"]
    # The same tensors as the head's weight quantized alone, with the settings that config.json names.
    settings = QuantizeConfig(bits=bits)
    q = quantize_weight(head, settings, fit_set_grid([head], settings))
    assert_same_tensors({k: v for k, v in stored.items() if k.startswith("lm_head.")}, {
        f"lm_head.{key}": tensor for key, tensor in q.tensors.items()
    })  # fmt: skip
    assert same_bytes(stored[source], before[source])
    found = config_of(folder)
    assert found["tie_word_embeddings"] is False
    assert "lm_head" not in found["quantization_config"]["modules_to_not_convert"]
    own = found["quantization_config"]["module_overrides"].get("lm_head", {})
    assert own == ({"bits": 8, "grid": "uniform", "trellis": False} if bits == 8 else {})
    assert ("weight_grid" in {k.partition(".")[2] for k in stored if k.startswith("lm_head.")}) == (bits == 4)


@every_case
def test_the_report_counts_what_a_tied_head_adds(dense: Any, with_head: Any, architecture: str, tied: bool) -> None:
    report = report_of(with_head(architecture, tied, 8))
    entry = next(e for e in report["tensors"] if e["tensor"] == "lm_head.weight")
    assert entry["reason"] == ("output head, apart from the embedding" if tied else "output head")
    assert entry["settings"]["bits"] == 8 and entry["figures"]["sqnr_db"] > 35
    dense_bytes = sum(t.nbytes for t in stored_tensors(dense(architecture, tied)).values())
    assert report["summary"]["bytes_before"] == dense_bytes
    head = [t.nbytes for k, t in stored_tensors(with_head(architecture, tied, 8)).items() if k.startswith("lm_head.")]
    notes = [n for n in report["notes"] if "a weight of its own" in n]
    assert notes == ([f"the output head has a weight of its own now, beside the embedding's: {sum(head):,} bytes"]
                     if tied else [])  # fmt: skip


def test_the_default_leaves_the_head_alone(dense: Any, tmp_path: Path) -> None:
    for tied in (False, True):
        out = tmp_path / str(tied)
        quantize_checkpoint(dense("Llama", tied), out)
        assert not any(name.startswith("lm_head.weight_") for name in stored_tensors(out))
        assert config_of(out)["tie_word_embeddings"] is tied
        assert "lm_head" in config_of(out)["quantization_config"]["modules_to_not_convert"]


def test_other_settings_of_the_head_are_overrides(dense: Any, tmp_path: Path) -> None:
    config = QuantizeConfig(bits=3, lm_head=4, overrides={"lm_head": {"group_size": 16, "c": 0}})
    quantize_checkpoint(dense("Llama", True), tmp_path / "out", config)
    found = config_of(tmp_path / "out")["quantization_config"]["module_overrides"]
    assert found == {"lm_head": {"bits": 4, "group_size": 16, "c": 0}}
    assert torch.isfinite(logits(load_quantized(tmp_path / "out"))).all()


def test_a_tied_head_that_is_stored_all_the_same(dense: Any, tmp_path: Path) -> None:
    """Some writers store both copies; the head's is the one that is quantized."""

    def store_both(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors[EMBEDDINGS["Llama"]].clone()

    both = altered(dense("Llama", True), tmp_path / "both", store_both)
    quantize_checkpoint(both, tmp_path / "a", QuantizeConfig(lm_head=8))
    quantize_checkpoint(dense("Llama", True), tmp_path / "b", QuantizeConfig(lm_head=8))
    assert_same_tensors(stored_tensors(tmp_path / "a"), stored_tensors(tmp_path / "b"))
    assert config_of(tmp_path / "a")["tie_word_embeddings"] is False


def test_without_transformers_the_embedding_is_found_by_name(
    dense: Any, with_head: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for architecture, tied in CASES:
        out = tmp_path / f"{architecture}-{tied}"
        quantize_checkpoint(dense(architecture, tied), out, QuantizeConfig(lm_head=8))
        assert_same_tensors(stored_tensors(out), stored_tensors(with_head(architecture, tied, 8)))
        assert config_of(out)["tie_word_embeddings"] is False


@pytest.mark.parametrize("recipe", ["paper", "rtn"])
def test_the_baselines_have_heads_of_theirs(dense: Any, tmp_path: Path, recipe: str) -> None:
    quantize_checkpoint(dense("Llama", True), tmp_path / "out", QuantizeConfig(recipe=recipe, lm_head=8))
    assert config_of(tmp_path / "out")["quantization_config"]["module_overrides"] == {"lm_head": {"bits": 8}}
    assert verify(tmp_path / "out", dense("Llama", True)).sound
    assert torch.isfinite(logits(load_quantized(tmp_path / "out"))).all()


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4 refuses a base model's file with a head in it"
)
def test_a_base_model_without_prefix_or_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied, its head is made from the embedding; untied, there is none to be had."""
    tied = tiny_model(tie_word_embeddings=True)
    tied.model.save_pretrained(tmp_path / "tied")
    quantize_checkpoint(tmp_path / "tied", tmp_path / "out", QuantizeConfig(lm_head=8))
    expected = tiny_model(tie_word_embeddings=True)
    quantize_model(expected, QuantizeConfig(lm_head=8))
    assert torch.equal(logits(load_quantized(tmp_path / "out")), logits(expected))
    tiny_model().model.save_pretrained(tmp_path / "untied")
    quantize_checkpoint(tmp_path / "untied", tmp_path / "base")  # for who wants no head
    assert transformers.AutoModel.from_pretrained(tmp_path / "base").layers[0].mlp.up_proj.is_prepacked
    for installed in (True, False):
        if not installed:
            edit_config(tmp_path / "untied", architectures=["LlamaForCausalLM"])
            monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(SelectionError, match="must find an output head that is not excluded, got none"):
            quantize_checkpoint(tmp_path / "untied", tmp_path / "none", QuantizeConfig(lm_head=8))


# ---- every door ------------------------------------------------------------------------------------------------------


@every_case
@every_width
def test_logits_are_the_same_bits_through_every_door(
    dense: Any, with_head: Any, tmp_path: Path, architecture: str, tied: bool, bits: int
) -> None:
    folder, original = with_head(architecture, tied, bits), dense(architecture, tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(original)
    report = quantize_model(model, QuantizeConfig(lm_head=bits))
    assert isinstance(model.get_output_embeddings(), PrecalLinear)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    entry = next(e for e in report.entries if e.tensor == "lm_head.weight")
    assert entry.settings is not None and entry.settings["bits"] == bits
    expected = logits(model)
    assert torch.equal(logits(load_quantized(folder)), expected)
    built = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(original))
    assert torch.equal(logits(load_quantized(folder, model=built)), expected)  # a model that is still tied
    save_quantized(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    load_quantized(folder).save_pretrained(tmp_path / "again")
    for door in ("ours", "theirs", "again"):
        assert sha256(tmp_path / door / "model.safetensors") == sha256(folder / "model.safetensors")
        assert config_of(tmp_path / door)["tie_word_embeddings"] is False
        assert torch.equal(logits(load_quantized(tmp_path / door)), expected)
    near, far = expected.float().softmax(-1), logits(tiny_model(architecture, seed=1)).float().softmax(-1)
    true = logits(transformers.AutoModelForCausalLM.from_pretrained(original)).float().softmax(-1)
    assert 0 < float((near - true).abs().sum()) < 0.2 * float((far - true).abs().sum())


@every_case
def test_verify_and_inspect_know_the_head(
    dense: Any, with_head: Any, tmp_path: Path, run: Run, architecture: str, tied: bool
) -> None:
    folder, original = with_head(architecture, tied, 4), dense(architecture, tied)
    result = verify(folder, original)
    assert result.sound, result.errors
    assert [c.name for c in result.checks if c.passed] == [
        "config", "headers", "shapes", "values", "digests", "original", "model",
    ]  # fmt: skip
    code, out, _ = run("inspect", folder, "--original", original, "--json")
    row = next(r for r in json.loads(out)["tensors"] if r["tensor"] == "lm_head.weight")
    recorded = next(e for e in report_of(folder)["tensors"] if e["tensor"] == "lm_head.weight")["figures"]
    assert code == 0 and (row["bits"], row["sqnr_db"]) == (4, pytest.approx(recorded["sqnr_db"]))

    def another(tensors: dict[str, torch.Tensor]) -> None:
        name = EMBEDDINGS[architecture] if tied else "lm_head.weight"
        tensors[name] = tensors[name].flip(0).contiguous()

    found = verify(folder, altered(original, tmp_path / "another", another))
    assert any("lm_head must have SQNR" in message for _, message in found.errors)


def test_the_page_and_the_dry_run_list_it(dense: Any, with_head: Any, tmp_path: Path, run: Run) -> None:
    page = tmp_path / "page.html"
    code, _, err = run("report", with_head("Llama", True, 8), "--html", page, "--original", dense("Llama", True))
    assert code == 0, err
    assert "lm_head" in page.read_text()
    code, out, _ = run("quantize", dense("Llama", True), tmp_path / "out", "--lm-head", 8, "--dry-run", "--json")
    line = next(t for t in json.loads(out)["tensors"] if t["tensor"] == "lm_head.weight")
    assert code == 0 and (line["bits"], line["bytes_before"]) == (8, 0) and line["bytes_after"] > 64 * 32
    assert not (tmp_path / "out").exists()
    code, _, err = run("quantize", dense("Llama", True), tmp_path / "out", "--lm-head", 8, "--quiet")
    assert code == 0, err
    assert digests(tmp_path / "out")["model.safetensors"] == digests(with_head("Llama", True, 8))["model.safetensors"]
    assert "output head 8 bits" in (tmp_path / "out" / "README.md").read_text()


# ---- interrupted, refused --------------------------------------------------------------------------------------------


class Interruption(BaseException):
    pass


def test_an_interrupted_run_continues_with_the_same_head_only(dense: Any, with_head: Any, tmp_path: Path) -> None:
    model, out = dense("Llama", True), tmp_path / "Llama-8"
    seen: list[str] = []

    def stop_at_the_head(p: Progress) -> None:
        seen.append(p.tensor)
        if p.tensors_done == p.tensors - 1:
            raise Interruption

    with pytest.raises(Interruption):
        quantize_checkpoint(model, out, QuantizeConfig(lm_head=8), progress=stop_at_the_head)
    assert read_journal(out)[1]
    for other in (QuantizeConfig(lm_head=4), QuantizeConfig()):
        with pytest.raises(CheckpointError, match="settings"):
            quantize_checkpoint(model, out, other)
    seen.clear()
    quantize_checkpoint(model, out, QuantizeConfig(lm_head=8), progress=lambda p: seen.append(p.tensor))
    assert "lm_head.weight" in seen and len(seen) < 10
    assert digests(out) == digests(with_head("Llama", True, 8))


def test_a_head_that_is_not_finite_stays_tied(dense: Any, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[EMBEDDINGS["Llama"]][3, 5] = float("nan")

    model = altered(dense("Llama", True), tmp_path / "model", damage)
    with pytest.raises(CheckpointError, match=r"lm_head.weight must be finite, got nan at \[3, 5\]"):
        quantize_checkpoint(model, tmp_path / "out", QuantizeConfig(lm_head=8))
    report = quantize_checkpoint(model, tmp_path / "out", QuantizeConfig(lm_head=8, skip_nonfinite=True))
    assert "lm_head.weight" not in {e.tensor for e in report.entries}
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert "lm_head" in config_of(tmp_path / "out")["quantization_config"]["modules_to_not_convert"]
    assert set(load_file(tmp_path / "out" / "model.safetensors")) >= {EMBEDDINGS["Llama"]}


@pytest.mark.parametrize("bits", [3, 16, True, "8"])
def test_other_widths_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match="config: lm_head must be one of 8, 4, or none, got"):
        QuantizeConfig(lm_head=bits)


def test_a_head_must_be_there(dense: Any, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="--lm-head must find an output head that is not excluded, got lm_head"):
        quantize_checkpoint(dense("Llama", False), tmp_path / "out", QuantizeConfig(lm_head=8, exclude=("lm_head",)))
    headless = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(SelectionError, match="must find an output head that is not excluded, got none"):
        quantize_model(headless, QuantizeConfig(lm_head=4))
    with pytest.raises(SelectionError, match=r"lm_head must not be included, .*--lm-head BITS gives it one of its own"):
        quantize_model(tiny_model(tie_word_embeddings=True), QuantizeConfig(include=("lm_head",)))
