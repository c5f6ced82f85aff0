"""precal quantize: options, what is printed where, and that a refusal leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Run, altered, digests, edit_config, environment

from precal_ext import QuantizeConfig, console, quantize_checkpoint, quantize_model
from precal_ext.convert import Progress

transformers = pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]


# ---- quantize --------------------------------------------------------------------------------------------------------


def test_quantize_writes_what_the_library_writes(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, _ = run("quantize", tiny, tmp_path / "cli" / "out")
    quantize_checkpoint(tiny, tmp_path / "library" / "out")
    assert code == 0
    assert digests(tmp_path / "cli") == digests(tmp_path / "library")
    lines = [line.strip() for line in out.splitlines()]
    at = lines.index("load it with:")
    assert lines[at + 1 :] == [
        "import precal_ext",
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{tmp_path / "cli" / "out"}")',
    ]
    assert "14 of 29 tensors quantized" in out
    assert "lm_head (output head)" in out


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        (["--bits", "3"], {"bits": 3}),
        (["--recipe", "rtn", "--bits=3", "--group-size", "32"], {"recipe": "rtn", "bits": 3, "group_size": 32}),
        (["--outliers", "2", "--grid", "constant"], {"c": 2, "grid": "constant"}),
        (["--recipe", "paper", "--alpha", "0.1"], {"recipe": "paper", "alpha": 0.1}),
        (["--group-size", "-1"], {"group_size": -1}),
        (["--exclude", "o_proj", "--exclude", "down", "--include", "lm_head"],
         {"exclude": ("o_proj", "down"), "include": ("lm_head",)}),
    ],
)  # fmt: skip
def test_options_are_the_fields_of_the_config(
    run: Run, tiny: Path, tmp_path: Path, options: list[str], fields: dict[str, Any]
) -> None:
    assert run("quantize", tiny, tmp_path / "a" / "out", *options)[0] == 0
    quantize_checkpoint(tiny, tmp_path / "b" / "out", QuantizeConfig(**fields))
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_settings_from_a_file_and_options_on_top(run: Run, tiny: Path, tmp_path: Path) -> None:
    config = QuantizeConfig(bits=3, c=2, overrides={"down_proj": {"bits": 5}})
    (tmp_path / "settings.json").write_text(config.to_json())
    assert run("quantize", tiny, tmp_path / "out", "--config", tmp_path / "settings.json", "--outliers", 0)[0] == 0
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["c"]) == (3, 0)
    assert {name.split(".")[-1]: fields["bits"] for name, fields in settings["module_overrides"].items()} == {
        "down_proj": 5
    }


def test_json_is_the_only_thing_on_stdout(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, out, err = run("quantize", tiny, tmp_path / "out", "--json", "--quiet")
    summary = json.loads((tmp_path / "out" / "precal_report.json").read_text())["summary"]
    data = json.loads(out)
    assert code == 0
    assert data.pop("out") == str(tmp_path / "out")
    assert data.pop("seconds") > 0
    assert data == summary
    assert err == ""


def test_progress_off_a_terminal_is_plain_lines_on_stderr(run: Run, tiny: Path, tmp_path: Path) -> None:
    _, _, err = run("quantize", tiny, tmp_path / "out")
    lines = err.splitlines()
    assert all(re.fullmatch(r"\d+/29 tensors, [\d.]+ of [\d.]+ GB, [\d.]+ GB/s, \d+ s left", line) for line in lines)
    assert lines[0].startswith("1/29 ")
    assert lines[-1].startswith("29/29 ")


def test_progress_on_a_terminal_is_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    display = console.ProgressDisplay(stream)
    for i in (1, 2):
        display(Progress(f"t{i}", i, 2, i * 500_000, 1_000_000))
    display.close()
    assert "2/2 tensors: 100%" in stream.getvalue()
    assert "1.00M/1.00M" in stream.getvalue()


def test_overwrite_replaces(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny, tmp_path / "out")[0] == 0
    first = digests(tmp_path)
    (tmp_path / "out" / "stale").touch()
    assert run("quantize", tiny, tmp_path / "out", "--overwrite")[0] == 0
    assert digests(tmp_path) == first


def test_a_hub_name_is_fetched_when_a_hub_answers(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.bin" not in allow_patterns
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert run("quantize", "someone/some-model", tmp_path / "out")[0] == 0
    assert asked == ["someone/some-model"]

    def silent(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", silent)
    code, _, err = run("quantize", "someone/some-model", tmp_path / "other")
    assert (code, err) == (
        3,
        "precal: someone/some-model: must be a model directory or a hub name that answers, got: no route to the hub\n",
    )


# ---- refusals --------------------------------------------------------------------------------------------------------


def make_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][7, 3] = float("nan")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_linears(folder: Path) -> None:
    edit_config(folder, architectures=["NewForCausalLM"], model_type="new-and-unknown")


UP = r"model\.layers\.1\.mlp\.up_proj\.weight"
# Name -> what is done to the copy of the model in "model", the arguments, the message.
REFUSED: dict[str, tuple[Callable[[Path], Any] | None, list[str], str]] = {
    "out inside model": (None, ["model", "model/out"], "must lie outside the model's directory"),
    "out is model": (None, ["model", "model"], "must lie outside the model's directory"),
    "out is model, spelled otherwise": (None, ["model", "other/../model"], "must lie outside the model's directory"),
    "out holds model": (None, ["model", "."], "must not contain the model"),
    "out has files": (None, ["model", "full"], "must be new or empty, .*--overwrite"),
    "out is a file": (None, ["model", "full/file"], "must be a directory or new"),
    "out below a file": (None, ["model", "full/file/out"], "must be writable"),
    "model is a file": (None, ["full/file", "out"], "must be a model directory, got a file"),
    "nothing there": (None, ["./nothing", "out"], "must be a model directory or a hub name, got nothing there"),
    "no config": (lambda f: (f / "config.json").unlink(), ["model", "out"], "got no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["model", "out"], "got neither"),
    "pickled": (pickled, ["model", "out"], r"must be safetensors, .*save_pretrained\(NEW\)"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes(b"1234"),
        ["model", "out"],
        "a whole safetensors",
    ),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "awq"}), ["model", "out"], "by 'awq'"),
    "quantized somehow": (
        lambda f: edit_config(f, quantization_config="int4"),
        ["model", "out"],
        "must not be quantized",
    ),
    "unknown architecture": (no_linears, ["model", "out"], "must be known, got NewForCausalLM; .*--include REGEX"),
    "a billion layers": (
        lambda f: edit_config(f, num_hidden_layers=10**9),
        ["model", "out"],
        r"model/config\.json: num_hidden_layers must be an integer, at most 128 with 29 tensors, got 1000000000",
    ),
    "a billion layers inside": (
        lambda f: edit_config(f, text_config={"num_layers": 10**9}),
        ["model", "out"],
        "num_layers must be an integer, at most 128",
    ),
    "a billion labels": (lambda f: edit_config(f, num_labels=10**9), ["model", "out"], "num_labels must be an integer"),
    "attention of the hub": (
        lambda f: edit_config(f, _attn_implementation="someone/attention"),
        ["model", "out"],
        "_attn_implementation must be attention that transformers has, got code of the hub: someone/attention",
    ),
    "all excluded": (None, ["model", "out", "--exclude", "."], "must have linear layers to quantize"),
    "bad pattern": (None, ["model", "out", "--include", "("], "include must hold regular expressions"),
    "settings that contradict": (None, ["model", "out", "--recipe", "rtn", "--outliers", "1"], "c must be"),
    "no settings file": (None, ["model", "out", "--config", "none.json"], "must be a JSON file with settings"),
    "unknown setting": (None, ["model", "out", "--config", "unknown.json"], "got groups"),
    "settings without end": (None, ["model", "out", "--config", "deep.json"], "must be a JSON file with settings"),
    "out not writable": (None, ["model", "/sys/out"], r"/sys/out: must be writable, got .* for /sys/\.out\.partial"),
    "settings of no object": (None, ["model", "out", "--config", "list.json"], "must hold a JSON object, got list"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refusal_has_a_message_and_leaves_nothing(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    damage, arguments, message = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, "model")
    Path("full").mkdir()
    Path("other").mkdir()
    Path("full/file").write_text("precious")
    Path("unknown.json").write_text('{"groups": 3}')
    Path("list.json").write_text("[]")
    Path("deep.json").write_text("[" * 100_000)
    if damage is not None:
        damage(Path("model"))
    before = sorted(tmp_path.rglob("*")), digests(tmp_path)
    code, out, err = run("quantize", *arguments)
    assert (code, out) == (3, "")
    assert re.search(message, err)
    assert err.splitlines()[-1].startswith("precal: ")
    assert "Traceback" not in err
    assert (sorted(tmp_path.rglob("*")), digests(tmp_path)) == before


def test_names_that_are_no_text(tmp_path: Path, tiny: Path) -> None:
    """A folder may have any bytes for a name, and JSON half a character: neither ends the work at its last step."""
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "config.json").write_text((model / "config.json").read_text().replace("{", '{"half": "\\ud800",', 1))
    out = os.fsencode(tmp_path) + b"/o\xff"
    done = subprocess.run(
        [sys.executable, "-m", "precal_ext", "quantize", str(model), out], env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"weight files: " in done.stdout
    written = Path(os.fsdecode(out))
    assert json.loads((written / "config.json").read_text())["half"] == "\ud800"
    assert (written / "README.md").read_text().startswith("# model, quantized")


@pytest.mark.parametrize("recipe", ["precal", "rtn", "paper"])
def test_a_weight_that_is_not_finite_is_named(run: Run, tiny: Path, tmp_path: Path, recipe: str) -> None:
    folder = altered(tiny, tmp_path / "model", make_nan)
    code, _, err = run("quantize", folder, tmp_path / "out", "--recipe", recipe, "--quiet")
    assert code == 3
    assert re.search(rf"model\.safetensors: {UP} must be finite, got nan at \[7, 3\]", err)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert run("quantize", folder, tmp_path / "out", "--recipe", recipe, "--exclude", r"1\.mlp\.up_proj")[0] == 0


def test_a_weight_that_is_not_finite_is_skipped_on_demand(run: Run, tiny: Path, tmp_path: Path) -> None:
    folder, out = altered(tiny, tmp_path / "model", make_nan), tmp_path / "out"
    code, _, err = run("quantize", folder, out, "--skip-nonfinite", "--quiet")
    assert (code, err) == (0, "")
    report = json.loads((out / "precal_report.json").read_text())
    kept = {e["tensor"]: e["reason"] for e in report["tensors"] if e["action"] == "keep"}
    up, gate = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("up", "gate"))  # servers fuse the two
    assert kept[up] == "holds nan at [7, 3]"
    assert kept[gate] == f"fused with {up.removesuffix('.weight')}, which is kept"
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {name.removesuffix(".weight") for name in (up, gate)} < set(settings["modules_to_not_convert"])
    assert run("verify", out)[0] == 0
    # In memory the same modules are kept.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = quantize_model(model, QuantizeConfig(skip_nonfinite=True))
    assert {e.tensor: e.reason for e in found.entries if e.action == "keep"} == kept
