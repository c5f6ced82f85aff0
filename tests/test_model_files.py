"""Directories of quantized models: what lies in them, the same bytes every time, and damage that must not load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import forced_threads
from models import DEMO, Folder, altered, digests, edit_config, logits, run_python, tiny_model
from torch import Tensor

from precal_ext import CheckpointError, QuantizeConfig, Report, load_quantized, quantize_checkpoint

transformers = pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]


# ---- contents --------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_config_json_keeps_every_field_and_gains_one(tiny_quantized: Path, tiny: Path) -> None:
    before, after = read(tiny / "config.json"), read(tiny_quantized / "config.json")
    settings = after.pop("quantization_config")
    assert after == before
    assert settings.pop("precal_version")
    assert settings == {
        "quant_method": "precal",
        "format_version": 1,
        "recipe": "precal",
        "bits": 4,
        "group_size": 64,
        "c": 1,
        "grid": "fitted",
        "trellis": True,
        "modules_to_not_convert": ["lm_head"],
        "module_overrides": {},
    }


def test_other_files_are_copied(quantized: Folder) -> None:
    names = {p.name for p in quantized("llama-6m", "precal", 4).iterdir()}
    assert names == {p.name for p in DEMO.iterdir()} | {"README.md", "precal_report.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (quantized("llama-6m", "precal", 4) / name).read_bytes() == (DEMO / name).read_bytes()


@pytest.mark.parametrize("recipe", ["precal", "paper"])
def test_the_report_names_every_tensor(tmp_path: Path, tiny: Path, recipe: str) -> None:
    config = QuantizeConfig(recipe=recipe, bits=3, exclude=("o_proj",))
    report = quantize_checkpoint(tiny, tmp_path / "out", config)
    data = read(tmp_path / "out" / "precal_report.json")
    assert data == json.loads(report.to_json())
    assert QuantizeConfig.from_dict(data["config"]) == config
    assert data["notes"] == ["linear layers found by architecture"]
    by_action: dict[str, list[str]] = {"quantize": [], "keep": [], "copy": []}
    for entry in data["tensors"]:
        by_action[entry["action"]].append(entry["tensor"])
        assert entry["dtype"] == "float32"
        assert ("figures" in entry) == (entry["action"] == "quantize")
    reasons = {e["tensor"]: e["reason"] for e in data["tensors"]}
    model = tiny_model()
    assert sorted(reasons) == sorted(model.state_dict())
    assert len(by_action["quantize"]) == 12
    assert {reasons[name] for name in by_action["keep"]} == {"output head", "excluded by 'o_proj'"}
    assert {reasons[name] for name in by_action["copy"]} == {"not a linear weight"}
    figures = {e["tensor"]: e["figures"] for e in data["tensors"] if "figures" in e}
    weights = sum(model.get_parameter(name).numel() for name in figures)
    summary = data["summary"]
    assert [summary[key] for key in ("tensors", "tensors_quantized", "weights_quantized")] == [
        len(reasons),
        12,
        weights,
    ]
    power, noise = (sum(f[key] for f in figures.values()) for key in ("power", "noise"))
    assert summary["sqnr_db"] == pytest.approx(10 * torch.tensor(power / noise).log10().item())
    bits = sum(f["bits_per_weight"] * model.get_parameter(name).numel() for name, f in figures.items()) / weights
    assert summary["bits_per_weight"] == pytest.approx(bits)
    assert summary["bytes_after"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    published = None if recipe == "precal" else pytest.approx(3 + 32 / 128 + 0.05 * 7)
    assert summary["published_bits_per_weight"] == published


def test_the_card_holds_the_lines_that_load_it_and_figures_per_layer(tiny_quantized: Path) -> None:
    text = (tiny_quantized / "README.md").read_text()
    lines = text.split("```python\n")[1].split("```")[0].splitlines()
    assert len(lines) == 3
    assert run_python("-c", "\n".join([*lines, "assert model.is_quantized"]), cwd=tiny_quantized.parent).returncode == 0
    assert "recipe precal, 4 bits, group size 64, c = 1, fitted grid" in text
    for entry in read(tiny_quantized / "precal_report.json")["tensors"]:
        if entry["action"] == "quantize":
            row = next(line for line in text.splitlines() if f"`{entry['tensor']}`" in line)
            assert f"| {entry['figures']['sqnr_db']:.2f} | {entry['figures']['kl_nats']:.4f} |" in row
    assert "`lm_head.weight` (output head)" in text


def test_exact_tensors_have_no_infinity_in_json(tmp_path: Path) -> None:
    model = tiny_model()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "model")
    quantize_checkpoint(tmp_path / "model", tmp_path / "out")

    def no_constant(text: str) -> None:
        pytest.fail(f"{text} is not JSON")

    json.loads((tmp_path / "out" / "precal_report.json").read_text(), parse_constant=no_constant)


def test_an_empty_report_has_no_figures() -> None:
    summary = Report(QuantizeConfig()).summary()
    assert (summary["bits_per_weight"], summary["sqnr_db"], summary["kl_nats"]) == (None, None, None)


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["precal", "paper", "rtn"])
def test_two_runs_give_identical_directories(tiny: Path, tmp_path: Path, recipe: str) -> None:
    for parent, threads in (("a", 1), ("b", 2)):
        with forced_threads(threads):
            quantize_checkpoint(tiny, tmp_path / parent / "out", QuantizeConfig(recipe=recipe, bits=3))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


# ---- damage ----------------------------------------------------------------------------------------------------------

UP = "model.layers.0.mlp.up_proj."


def drop(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda t: t.pop(key)


DAMAGE: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "NaN scale": lambda t: t[UP + "weight_scale"].fill_(0x7F),
    "negative row scale": lambda t: t[UP + "weight_row_scale"].fill_(-1),
    "shape lies": lambda t: t[UP + "weight_shape"].add_(1),
    "wider scales": lambda t: t.update({UP + "weight_scale": t[UP + "weight_scale"].repeat(1, 2)}),
    "another dtype": lambda t: t.update({UP + "weight_packed": t[UP + "weight_packed"].long()}),
    **{f"no {key}": drop(UP + key) for key in (
        "weight_packed", "weight_scale", "weight_row_scale", "weight_grid",
        "weight_outlier_index", "weight_outlier_value", "weight_shape",
    )},
    "no norm": drop("model.norm.weight"),
    "no bias": drop("model.layers.0.self_attn.q_proj.bias"),
    "an extra tensor": lambda t: t.update({UP + "weight_outlier_mask": torch.zeros(3)}),
    "a dense weight beside it": lambda t: t.update({UP + "weight": torch.zeros(48, 32)}),
}  # fmt: skip


def by_precal(folder: Path) -> Any:
    return load_quantized(folder)


def into_a_module(folder: Path) -> Any:
    return load_quantized(folder, model=tiny_model(seed=1))


def by_transformers(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("load", [by_precal, into_a_module])
@pytest.mark.parametrize("name", sorted(DAMAGE))
def test_a_damaged_directory_does_not_load(tiny_quantized: Path, tmp_path: Path, name: str, load: Callable) -> None:
    folder = altered(tiny_quantized, tmp_path / "damaged", DAMAGE[name])
    with pytest.raises(CheckpointError, match=r"up_proj|model\.norm|q_proj\.bias"):
        load(folder)


@pytest.mark.parametrize("name", sorted(n for n in DAMAGE if n not in ("no norm", "no bias") and not n.startswith("a")))
def test_transformers_refuses_a_damaged_weight(tiny_quantized: Path, tmp_path: Path, name: str) -> None:
    """Tensors that are missing would be left at what the memory held before."""
    folder = altered(tiny_quantized, tmp_path / "damaged", DAMAGE[name])
    with pytest.raises((ValueError, RuntimeError)):
        by_transformers(folder)


@pytest.mark.parametrize("load", [by_precal, into_a_module])
def test_a_dense_directory_is_refused(tiny: Path, load: Callable) -> None:
    with pytest.raises(CheckpointError, match="must be a model quantized by precal, got a config"):
        load(tiny)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format_version", 2, "format_version must be 1; install a precal that knows this format, got 2"),
        ("format_version", 0, "format_version must be 1; quantize the model again, got 0"),
        ("quant_method", "awq", "quant_method must be 'precal', got 'awq'"),
        ("bits", 5.5, "bits must be an integer from 2 to 8, got 5.5"),
    ],
)
def test_settings_that_precal_does_not_know_are_refused(
    tiny_quantized: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    folder = shutil.copytree(tiny_quantized, tmp_path / "other")
    edit_config(folder, quantization_config={**read(folder / "config.json")["quantization_config"], field: value})
    with pytest.raises(CheckpointError, match=message):
        load_quantized(folder)


def test_another_architecture_is_refused(tiny_quantized: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must be torch.* got|must belong to the model"):
        load_quantized(tiny_quantized, model=tiny_model(hidden_size=64))


def test_keywords_for_a_given_model_are_refused(tiny_quantized: Path) -> None:
    with pytest.raises(TypeError, match="keyword arguments must go with model=None, got dtype"):
        load_quantized(tiny_quantized, model=tiny_model(), dtype=torch.float16)


# ---- registration with transformers ----------------------------------------------------------------------------------

IMPORTS = {
    "precal first": "import precal_ext; from transformers import AutoModelForCausalLM",
    "precal last": "from transformers import AutoModelForCausalLM; import precal_ext",
}


@pytest.mark.parametrize("order", sorted(IMPORTS))
def test_any_order_of_imports_loads_the_format(tiny_quantized: Path, tmp_path: Path, order: str) -> None:
    code = f"""
{IMPORTS[order]}
import sys, torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model.model.layers[0].mlp.up_proj).__name__ == "PrecalLinear"
ids = torch.arange(24).reshape(2, 12)
torch.save(model(input_ids=ids).logits, sys.argv[2])
"""
    done = run_python("-c", code, str(tiny_quantized), str(tmp_path / "logits"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load_quantized(tiny_quantized)(input_ids=torch.arange(24).reshape(2, 12)).logits
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_importing_precal_does_not_import_transformers(tmp_path: Path) -> None:
    code = "import sys, precal_ext; sys.exit(bool({'transformers', 'torch._dynamo'} & set(sys.modules)))"
    assert run_python("-c", code, cwd=tmp_path).returncode == 0


def test_a_loaded_model_generates(quantized: Folder) -> None:
    model = load_quantized(quantized("llama-6m", "precal", 4))
    tokens = model.generate(torch.tensor([[0, 5, 9]]), max_new_tokens=8, do_sample=False, pad_token_id=1)
    again = load_quantized(quantized("llama-6m", "precal", 4))
    step = again(tokens[:, :-1]).logits.argmax(-1)
    # With and without the cache of keys and values the same tokens come out.
    assert torch.equal(step[:, 2:], tokens[:, 3:])
    assert torch.equal(logits(model), logits(again))


def test_a_transformers_that_does_not_fit_still_imports(tmp_path: Path) -> None:
    """precal is a guest there: what it cannot register with must not break the import of its host."""
    script = """
import logging, sys
logging.basicConfig(format="%(message)s")
import precal_ext
from precal_ext.integrations import transformers as adapter
def register():
    raise ImportError("no such base class")
adapter.register = register
import transformers.quantizers.auto
assert "precal" not in sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZER_MAPPING
"""
    done = run_python("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "precal cannot register with transformers" in done.stderr and "no such base class" in done.stderr
