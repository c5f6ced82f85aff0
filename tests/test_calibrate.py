"""Calibration of whole models: streamed layers are the model's, results load and fit the text, runs can be resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import forced_threads
from models import (
    ARCHITECTURES,
    DEMO,
    Interruption,
    Run,
    add_tokenizer,
    altered,
    digests,
    edit_config,
    environment,
    first_layers,
    save_tiny,
    shared,
    stop_after,
    stored_tensors,
)
from torch import Tensor

from precal_ext import Calibration, CheckpointError, QuantizeConfig, calibrate_checkpoint, quantize_checkpoint
from precal_ext.calibrate import FEW, calibrated, estimate_calibration
from precal_ext.checkpoint import read_index
from precal_ext.convert import Progress, plan_quantization
from precal_ext.evaluate import evaluate, load, load_model, read_windows
from precal_ext.staging import folder_of, read_journal
from precal_ext.streaming import HiddenStates, Skeleton
from precal_ext.verify import verify

transformers = pytest.importorskip("transformers")
pytest_plugins = ["package_fixtures"]

TEXT = DEMO.parent / "text.txt"
WINDOWS, LENGTH = 12, 32
CONFIG = QuantizeConfig(bits=3)
# Besides those that are calibrated whole: settings beyond the common ones.
MORE: dict[str, dict[str, Any]] = {
    "Qwen2": {"num_key_value_heads": 2},
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "Gemma3Text": {"num_key_value_heads": 2, "head_dim": 8},
    "Phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Olmoe": {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2},
}


def calibration(**fields: Any) -> Calibration:
    return Calibration(**{"text": TEXT, "windows": WINDOWS, "length": LENGTH, **fields})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random model of an architecture, with a tokenizer."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            path = tmp_path_factory.mktemp(architecture) / architecture
            made[architecture] = add_tokenizer(save_tiny(path, architecture, vocab_size=4096))
        return made[architecture]

    return folder


@pytest.fixture(scope="module")
def whole(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    calibrate_checkpoint(model("Llama"), out, CONFIG, calibration=calibration())
    return out


def windows_of(folder: Path) -> list[list[int]]:
    plan = plan_quantization(folder, folder.parent / "nowhere", CONFIG)
    return calibrated(plan, calibration())[1].windows


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE])
def test_layers_alone_do_what_the_model_does(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture in MORE:
        monkeypatch.setitem(ARCHITECTURES, architecture, MORE[architecture])
    folder = save_tiny(tmp_path / "model", architecture)
    index = read_index(folder)
    plan = plan_quantization(folder, tmp_path / "out")
    skeleton = Skeleton(folder, index, plan.found.names)
    windows = [list(range(5, 29)), list(range(30, 54))]
    hidden = list(skeleton.first_inputs(windows))
    for layer in range(len(skeleton.layers)):
        with skeleton.layer_filled(layer):
            hidden = [skeleton.run(layer, h) for h in hidden]
    # Nothing stays.
    held = [p for n, p in skeleton.model.named_parameters() if p.device.type != "meta" and p.numel() > 4096]
    assert held == []
    whole = load_model(folder, torch.float32)
    seen: list[Tensor] = []
    whole.get_submodule(skeleton.stack)[-1].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        for window in windows:
            whole(input_ids=torch.tensor([window]))
    for mine, theirs in zip(hidden, seen, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_hidden_states_come_back(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path, 5, 3)
    first, second = torch.randn(1, 5, 3), torch.randn(1, 3, 5).mT
    states.write(7, first)
    states.write(0, second)
    assert torch.equal(states.read(7), first)
    assert torch.equal(states.read(0), second)
    with pytest.raises(OSError, match="ended early"):
        states.read(8)
    assert list(tmp_path.iterdir()) == []
    states.close()


def test_a_model_that_is_no_stack_of_layers_is_refused(tmp_path: Path) -> None:
    folder = add_tokenizer(save_tiny(tmp_path / "model", "Llama", vocab_size=4096))
    plan = plan_quantization(folder, tmp_path / "out")
    skeleton = Skeleton(folder, read_index(folder), plan.found.names)
    skeleton.layers.reverse()
    with pytest.raises(CheckpointError, match="layers that follow one another and nothing else, got layer 1 called as"):
        list(skeleton.first_inputs([[1, 2, 3]]))
    with pytest.raises(CheckpointError, match="must have its decoder layers in one list of modules, got none"):
        Skeleton(folder, read_index(folder), ["lm_head"])


def test_rwkv_is_refused(tmp_path: Path) -> None:
    """Its layers hand a state on; it has no tokenizer either, but that comes later."""
    with pytest.raises(CheckpointError):
        calibrate_checkpoint(shared("models", "tiny-rwkv-660K"), tmp_path / "out", calibration=calibration())
    assert list(tmp_path.iterdir()) == []


# ---- what comes out --------------------------------------------------------------------------------------------------


def hidden_error(folder: Path, out: Path) -> float:
    """Relative squared error of the last hidden states on the calibration windows."""
    reference, quantized = load_model(folder, torch.float32), load_model(out, torch.float32)
    ids = torch.tensor(windows_of(folder))
    with torch.no_grad():
        want, got = (m.base_model(input_ids=ids)[0].double() for m in (reference, quantized))
    return float((want - got).square().sum() / want.square().sum())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(model: Callable[[str], Path], architecture: str, tmp_path: Path) -> None:
    folder, free, out = model(architecture), tmp_path / "free", tmp_path / "out"
    quantize_checkpoint(folder, free, CONFIG)
    report = calibrate_checkpoint(folder, out, CONFIG, calibration=calibration())
    for e in report.quantized:
        assert e.calibration is not None
        if e.calibration.get("reason") == FEW:
            assert ".experts." in e.tensor and e.calibration["tokens"] < e.shape[1]
        else:
            assert 0 < e.calibration["output_error"] <= e.calibration["output_error_before"]
            assert e.calibration["tokens"] <= WINDOWS * LENGTH
    before, after = stored_tensors(free), stored_tensors(out)
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different and all(name.endswith(".weight_packed") for name in different)
    assert hidden_error(folder, out) < hidden_error(folder, free)
    assert verify(out, folder).sound


@pytest.mark.parametrize("settings", [{"recipe": "rtn"}, {"recipe": "paper"}, {"bits": 8}, {"c": 0, "group_size": -1}])
def test_other_recipes(model: Callable[[str], Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    report = calibrate_checkpoint(
        model("Llama"), tmp_path / "out", QuantizeConfig(**settings), calibration=calibration()
    )
    done = [e.calibration for e in report.quantized if e.calibration is not None]
    assert sum(c["output_error"] for c in done) < 0.95 * sum(c["output_error_before"] for c in done)
    assert verify(tmp_path / "out", model("Llama")).sound


def test_a_trained_model_gets_nearer_to_itself(tmp_path: Path) -> None:
    folder = first_layers(DEMO, tmp_path / "model", 2)
    reference, tokenizer = load(folder)
    windows = read_windows(tokenizer, TEXT, 128, 16)
    kld = {}
    for name, make in (("free", quantize_checkpoint), ("calibrated", calibrate_checkpoint)):
        more: dict[str, Any] = {"calibration": calibration(length=128, windows=16)} if name == "calibrated" else {}
        make(folder, tmp_path / name, CONFIG, **more)
        kld[name] = evaluate(load_model(tmp_path / name), windows, reference).kld_nats
    assert kld["calibrated"] < 0.8 * kld["free"]


def test_experts_that_saw_too_little_keep_their_codes(model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model("Qwen3Moe")
    quantize_checkpoint(folder, tmp_path / "free", CONFIG)
    short = calibration(windows=2, length=24)  # 48 tokens: half of them for each of four experts
    report = calibrate_checkpoint(folder, tmp_path / "out", CONFIG, calibration=short)
    few = [e for e in report.quantized if e.calibration is not None and e.calibration.get("reason") == FEW]
    assert few and all(".experts." in e.tensor for e in few)
    assert any(note.startswith(f"{len(few)} weights keep their data-free codes, each {FEW}: ") for note in report.notes)
    before, after = stored_tensors(tmp_path / "free"), stored_tensors(tmp_path / "out")
    for e in few:
        name = e.tensor.removesuffix("weight") + "weight_packed"
        assert torch.equal(before[name], after[name])


def test_a_quantized_head_keeps_its_codes(model: Callable[[str], Path], tmp_path: Path) -> None:
    config = QuantizeConfig(bits=3, lm_head=8)
    report = calibrate_checkpoint(model("Llama"), tmp_path / "out", config, calibration=calibration())
    head = next(e for e in report.quantized if e.tensor == "lm_head.weight")
    assert head.calibration is None
    assert "1 weights keep their data-free codes, they are in no decoder layer" in report.notes


def test_what_is_said_of_it(model: Callable[[str], Path], whole: Path, run: Run) -> None:
    data = json.loads((whole / "precal_report.json").read_text())
    said = data["calibration"]
    assert (said["method"], said["windows"], said["window_length"], said["tokens"]) == ("gptq", WINDOWS, LENGTH, 384)
    assert said["text"] == TEXT.name and len(said["text_sha256"]) == 64
    weights = [t for t in data["tensors"] if t["action"] == "quantize"]
    assert all(t["calibration"]["tokens"] == 384 for t in weights)
    card = (whole / "README.md").read_text()
    assert f"Codes were chosen by gptq on 384 tokens of {TEXT.name} (SHA-256 {said['text_sha256']}" in card
    assert "output error, before" in card and "No data was used" not in card
    code, out, _ = run("inspect", whole)
    assert code == 0 and f"calibrated by gptq on 384 tokens of {TEXT.name} (SHA-256 {said['text_sha256']})" in out
    assert json.loads(run("inspect", whole, "--json")[1])["calibration"] == said


def test_what_is_said_is_not_trusted(whole: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    data = json.loads((folder / "precal_report.json").read_text())
    data["calibration"] = {"method": "\x1b[2J", "tokens": "many"}
    (folder / "precal_report.json").write_text(json.dumps(data))
    code, out, _ = run("inspect", folder)
    assert code == 0 and "\x1b" not in out and "calibrated by" in out
    data["calibration"] = ["gptq"]
    (folder / "precal_report.json").write_text(json.dumps(data))
    code, _, err = run("inspect", folder)
    assert code == 3 and "calibration must be a dict" in err


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [9, 17, 25])
def test_the_same_call_continues(model: Callable[[str], Path], whole: Path, tmp_path: Path, after: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interruption):
        calibrate_checkpoint(model("Llama"), out, CONFIG, calibration=calibration(), progress=stop_after(after))
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    seen: list[Progress] = []
    calibrate_checkpoint(model("Llama"), out, CONFIG, calibration=calibration(), progress=seen.append)
    assert 0 < len(seen) < 29
    assert digests(out) == digests(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_killed_and_continued(model: Callable[[str], Path], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", model("Llama"), out, "--bits", 3, "--calibrate", "gptq", "--text", TEXT, "--quiet"]
    arguments += ["--calibration-windows", WINDOWS, "--window-length", LENGTH]
    command = [sys.executable, "-m", "precal_ext", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    while process.poll() is None and len(read_journal(out)[1]) < 12:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists(), "it ended before it could be killed"
    recorded = len(read_journal(out)[1])
    seen: list[Progress] = []
    calibrate_checkpoint(model("Llama"), out, CONFIG, calibration=calibration(), progress=seen.append)
    assert len(seen) == 29 - recorded
    assert digests(out) == digests(whole)
    assert not folder_of(out).exists()


@pytest.mark.parametrize("architecture", ["Llama", "Mixtral"])
def test_bytes_do_not_depend_on_threads(model: Callable[[str], Path], tmp_path: Path, architecture: str) -> None:
    for count in (1, 2):
        with forced_threads(count):
            out = tmp_path / str(count)
            calibrate_checkpoint(model(architecture), out, CONFIG, calibration=calibration(length=48))
            assert torch.get_num_threads() == count
    ignored = {"README.md"}  # names its directory
    one, two = (digests(tmp_path / n) for n in "12")
    assert {k: v for k, v in one.items() if k not in ignored} == {k: v for k, v in two.items() if k not in ignored}


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"windows": WINDOWS - 1}, "tokens_sha256"),
        ({"damping": 0.5}, "damping"),
        (None, "calibration"),
    ],
    ids=["windows", "damping", "none"],
)
def test_an_unfinished_run_is_not_continued_otherwise(
    model: Callable[[str], Path], tmp_path: Path, other: dict[str, Any] | None, field: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interruption):
        calibrate_checkpoint(model("Llama"), out, CONFIG, calibration=calibration(), progress=stop_after(17))
    with pytest.raises(CheckpointError, match=f"must be continued with the same .*{field}"):
        if other is None:
            quantize_checkpoint(model("Llama"), out, CONFIG)
        else:
            calibrate_checkpoint(model("Llama"), out, CONFIG, calibration=calibration(**other))


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(folder: Path, tmp_path: Path, text: bytes | None, name: str = "text.txt", **fields: Any) -> str:
    path = tmp_path / name
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(CheckpointError) as error:
        calibrate_checkpoint(folder, tmp_path / "out", calibration=calibration(text=path, **fields))
    assert not (tmp_path / "out").exists() and not folder_of(tmp_path / "out").exists()
    return str(error.value)


def test_texts_that_will_not_do(model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model("Llama")
    for empty in (b"", b"\n \n"):
        assert "must have 384 tokens of text, got an empty file" in refused(folder, tmp_path, empty)
    short = refused(folder, tmp_path, b"one two three")
    assert "must have 384 tokens for 12 windows of 32, got 4; give a longer text, or shorter windows" in short
    message = refused(folder, tmp_path, b"one two three four five six seven eight nine ten " * 12)
    assert "or at most " in message and "--calibration-windows" in message
    assert "must be a readable UTF-8 text file" in refused(folder, tmp_path, b"\xff\xfe\x00 not UTF-8 \xc3\x28")
    assert "must be a readable UTF-8 text file" in refused(folder, tmp_path, None, "absent.txt")
    assert 'a JSON object with a "text" field' in refused(folder, tmp_path, b'{"no": 1}\n', "text.jsonl")
    assert 'a JSON object with a "text" field' in refused(folder, tmp_path, b'{"text": 1}\n', "text.jsonl")
    text = TEXT.read_bytes()
    assert "windows must have at most the model's 64 tokens, got 65" in refused(folder, tmp_path, text, length=65)
    few = refused(folder, tmp_path, text, windows=2, length=8)
    assert "as many tokens as the widest layer has columns, 48, got 16: 2 windows of 8" in few


def test_documents_are_read_one_after_another(model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    parts = TEXT.read_text().split("\n\n")
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    plan = plan_quantization(model("Llama"), tmp_path / "out")
    windows = calibrated(plan, calibration(text=path))[1].windows
    assert len(windows) == WINDOWS and all(len(w) == LENGTH for w in windows)
    assert any(1 in w for w in windows)  # the end of a document


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    folder = add_tokenizer(save_tiny(tmp_path / "model"))  # 64 tokens
    message = refused(folder, tmp_path, TEXT.read_bytes())
    assert "the tokenizer must give tokens below 64" in message


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    assert "must have a tokenizer that transformers can load" in refused(
        save_tiny(tmp_path / "model"), tmp_path, TEXT.read_bytes()
    )


def test_a_tensor_that_is_missing(model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = altered(model("Llama"), tmp_path / "model", lambda t: t.pop("model.layers.1.input_layernorm.weight"))
    message = refused(folder, tmp_path, TEXT.read_bytes())
    assert "got none for model.layers.1.input_layernorm.weight" in message


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"])
def test_a_tensor_that_is_not_finite(model: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    folder = altered(model("Llama"), tmp_path / "model", lambda t: t[name].view(-1)[3:4].fill_(float("inf")))
    assert f"{name} must be finite, got " in refused(folder, tmp_path, TEXT.read_bytes())


def test_nothing_in_a_layer_to_quantize(model: Callable[[str], Path], tmp_path: Path) -> None:
    config = QuantizeConfig(include=("lm_head",), exclude=("layers",))
    with pytest.raises(CheckpointError, match="must have a weight to quantize in a decoder layer, got none"):
        calibrate_checkpoint(model("Llama"), tmp_path / "out", config, calibration=calibration())


def test_several_processes_are_refused(
    model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CheckpointError, match="calibrate: must run in one process, got one of several"):
        calibrate_checkpoint(model("Llama"), tmp_path / "out", calibration=calibration())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"windows": 0}, "windows must be an integer >= 1, got 0"),
        ({"length": 1}, "length must be an integer >= 2, got 1"),
        ({"damping": 0}, "damping must be a finite number > 0, got 0"),
        ({"damping": float("nan")}, "damping must be a finite number > 0, got nan"),
        ({"method": "awq"}, "method must be one of gptq, got 'awq'"),
    ],
)
def test_settings_that_will_not_do(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration(**fields)


def test_code_of_the_model_stays_off(tmp_path: Path) -> None:
    folder = add_tokenizer(save_tiny(tmp_path / "model", vocab_size=4096))
    (folder / "modeling_own.py").write_text("raise SystemExit('ran')\n")
    edit_config(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    )
    assert "must be a model that transformers can build" in refused(folder, tmp_path, TEXT.read_bytes())


# ---- the command -----------------------------------------------------------------------------------------------------


def test_options_go_together(model: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    where = "quantize", model("Llama"), tmp_path / "out"
    assert run(*where, "--calibrate", "gptq")[::2] == (
        3,
        "precal: quantize: --calibrate must come with --text FILE, got no text\n",
    )
    for option, value in (("--damping", 1), ("--window-length", 8), ("--calibration-windows", 8)):
        code, _, err = run(*where, option, value)
        assert code == 3 and f"quantize: {option} must come with --calibrate gptq, got it alone" in err
    assert run(*where, "--calibrate", "awq", "--text", TEXT)[0] == 2


def test_the_cost_is_told_before(model: Callable[[str], Path], tmp_path: Path, run: Run) -> None:
    arguments = ["quantize", model("Llama"), tmp_path / "out", "--calibrate", "gptq", "--text", TEXT, "--dry-run"]
    arguments += ["--calibration-windows", 8, "--window-length", 64]
    code, out, _ = run(*arguments)
    assert code == 0 and "calibration on 512 tokens (8 windows of 64): memory " in out and "disk 0.1 MB more" in out
    data = json.loads(run(*arguments, "--json")[1])["calibration"]
    assert data["tokens"] == 512 and data["disk_bytes"] == 512 * 32 * 4 and data["seconds"] > 0
    assert not (tmp_path / "out").exists()


def test_memory_of_the_estimate_is_that_of_layers(model: Callable[[str], Path], tmp_path: Path) -> None:
    plan, stage = calibrated(plan_quantization(DEMO, tmp_path / "out"), calibration(length=128, windows=16))
    cost = estimate_calibration(plan, stage)
    layer = sum(i.nbytes // i.dtype.itemsize * 4 for i in stage.skeleton.info(0))
    assert layer < cost.memory_bytes < 1e9
