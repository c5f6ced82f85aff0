"""``precal compensate``: a directory in, one with other codes out; interrupted, continued, refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    DEMO,
    Run,
    Source,
    add_tokenizer,
    altered,
    digests,
    environment,
    save_tiny,
    stored_tensors,
)
from safetensors.torch import load_file

from precal_ext import CheckpointError, CompensateConfig, QuantizeConfig, compensate_checkpoint, quantize_checkpoint
from precal_ext.compensate import CRITERIA, SPACES, Progress, Search
from precal_ext.compensating import find_reference
from precal_ext.evaluate import evaluate, load, read_windows
from precal_ext.recycling import CRITERIA as OFFERED_CRITERIA
from precal_ext.recycling import SPACES as OFFERED_SPACES
from precal_ext.staging import folder_of
from precal_ext.verify import verify

pytest_plugins = ["package_fixtures"]

TEXT = DEMO.parent / "text.txt"
CONFIG = CompensateConfig(samples=6, window=64, rounds=1)
OPTIONS = ["--samples", 6, "--window", 64, "--rounds", 1, "--quiet"]


class Interruption(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own."""


def interrupt(p: Progress) -> None:
    raise Interruption


@pytest.fixture(scope="session")
def made(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the embedded model, ``llama-6m``, and beside them the same at 3 bits, ``q``. Not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(source("llama-6m"), folder / "llama-6m")
    quantize_checkpoint(folder / "llama-6m", folder / "q", QuantizeConfig(bits=3))
    return folder


@pytest.fixture(scope="session")
def whole(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``q`` compensated without disturbance."""
    out = tmp_path_factory.mktemp("whole") / "out"
    compensate_checkpoint(made / "q", out, TEXT, CONFIG)
    return out


def test_only_codes_change_and_the_files_have_the_same_size(made: Path, whole: Path) -> None:
    before, after = stored_tensors(made / "q"), stored_tensors(whole)
    assert sorted(before) == sorted(after)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(name.endswith(".weight_packed") for name in changed)
    sizes = [{p.name: p.stat().st_size for p in folder.glob("*.safetensors")} for folder in (made / "q", whole)]
    assert sizes[0] == sizes[1]
    others = {name: digest for name, digest in digests(made / "q").items() if name not in changed_files()}
    assert {name: digests(whole)[name] for name in others} == others


def changed_files() -> set[str]:
    return {"model.safetensors", "precal_report.json", "README.md"}


def test_the_loss_falls_and_the_report_tells_by_how_much(made: Path, whole: Path) -> None:
    reference, tokenizer = load(made / "llama-6m", torch.float32)
    windows = read_windows(tokenizer, TEXT, 64)
    losses = [evaluate(load(f, torch.float32)[0], windows, reference).kld_nats for f in (made / "q", whole)]
    assert None not in losses and losses[1] < 0.95 * losses[0]
    data = json.loads((whole / "precal_report.json").read_text())
    (told,) = data["compensations"]
    assert told["text"] == "text.txt" and told["config"]["samples"] == 6
    assert told["after"] < told["before"] and told["held_out_after"] <= told["held_out_before"]
    for block in told["blocks"]:
        for change in block["changes"]:
            assert set(change) == {
                "block", "round", "k", "gain", "before", "after", "held_out_before", "held_out_after", "codes",
            }  # fmt: skip
            assert change["after"] < change["before"]
    card = (whole / "README.md").read_text()
    assert "## Compensated" in card and "No data was used." not in card
    assert str(f"{told['after']:.5f}") in card


def test_the_result_is_sound_and_its_figures_are_its_own(made: Path, whole: Path) -> None:
    result = verify(whole, made / "llama-6m")
    assert result.sound, result.errors
    before, after = (json.loads((f / "precal_report.json").read_text()) for f in (made / "q", whole))
    assert after["summary"]["sqnr_db"] < before["summary"]["sqnr_db"]  # nearest codes have the best
    assert after["summary"]["bits_per_weight"] == before["summary"]["bits_per_weight"]
    names = [n for n, d in before["sha256"].items() if after["sha256"][n] != d]
    assert names and all(n.endswith(".weight_packed") for n in names)


def test_the_command_writes_the_same_bytes_and_leaves_its_input(run: Run, made: Path, whole: Path) -> None:
    before = digests(made)
    out = made / "q-compensated"
    try:
        code, stdout, stderr = run("compensate", made / "q", "--text", TEXT, *OPTIONS[:-1])
        assert code == 0, stderr
        assert "KLD on 378 tokens: " in stdout and "codes changed in" in stdout and str(out) in stdout
        assert stderr.count("s left") == 2
        assert digests(out) == digests(whole)
        code, _, stderr = run("compensate", made / "q", "--text", TEXT, *OPTIONS)
        assert code == 3 and "must be new or empty" in stderr
        code, stdout, _ = run("compensate", made / "q", out, "--text", TEXT, *OPTIONS, "--overwrite", "--json")
        assert code == 0 and json.loads(stdout)["out"] == str(out)
        assert digests(out) == digests(whole)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    assert digests(made) == before


def test_in_place(run: Run, made: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "q", tmp_path / "q")
    options = ["--text", TEXT, "--reference", made / "llama-6m", *OPTIONS, "--in-place"]
    code, _, err = run("compensate", tmp_path / "q", tmp_path / "out", *options)
    assert code == 3 and "OUT must be left out with --in-place" in err
    assert run("compensate", tmp_path / "q", *options)[0] == 0
    assert digests(tmp_path / "q") == digests(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def test_quantize_and_compensate_in_one_command(run: Run, talking: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:2500])
    command = ["quantize", talking, tmp_path / "out", "--bits", 3, "--compensate", "--quiet", "--text", text]
    code, stdout, err = run(*command)
    assert code == 0, err
    assert "bits per weight" in stdout and "codes changed in" in stdout
    quantize_checkpoint(talking, tmp_path / "q", QuantizeConfig(bits=3))
    result = compensate_checkpoint(tmp_path / "q", tmp_path / "other", text, reference=talking)
    assert result.changes
    assert digests(tmp_path / "out")["model.safetensors"] == digests(tmp_path / "other")["model.safetensors"]
    assert run(*command)[0] == 3  # OUT is there


def test_quantize_goes_on_with_what_was_being_compensated(
    run: Run, talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:2500])
    command = ["quantize", talking, tmp_path / "out", "--bits", 3, "--compensate", "--quiet", "--text", text]
    assert run(*command)[0] == 0
    whole = digests(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    real = Search.run

    def stopped(search: Search, finished: Any, done: Any, progress: Any) -> Any:
        return real(search, finished, done, interrupt)

    with monkeypatch.context() as patched, pytest.raises(Interruption):
        patched.setattr(Search, "run", stopped)
        run(*command)
    assert verify(tmp_path / "out", talking).sound and digests(tmp_path / "out") != whole
    code, stdout, err = run(*command)
    assert code == 0, err
    assert "bits per weight" not in stdout and "codes changed in" in stdout
    assert digests(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compensate"], "--compensate must come with --text FILE"),
        (["--text", TEXT], "--text must come with --target-bits, --calibrate or --compensate"),
        (["--compensate", "--text", "none"], "none: must be a readable UTF-8 text file"),
    ],
)
def test_options_of_quantize_that_do_not_fit(
    run: Run, talking: Path, tmp_path: Path, options: Any, message: str
) -> None:
    code, _, err = run("quantize", talking, tmp_path / "out", *options)
    assert code == 3 and message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", ["GPT2", "Mixtral"])
def test_other_architectures(tmp_path: Path, architecture: str) -> None:
    """Conv1D, names without the base model's prefix, experts; and a second search on what the first one found."""
    model = add_tokenizer(save_tiny(tmp_path / "model", architecture, vocab_size=4096, initializer_range=0.2))
    quantize_checkpoint(model, tmp_path / "q", QuantizeConfig(bits=3))
    config = CompensateConfig(samples=60, window=32, rounds=1, held_out=0)
    given = {"reference": model}
    result = compensate_checkpoint(tmp_path / "q", tmp_path / "out", TEXT, config, **given)
    assert result.changes and result.after < result.before
    assert verify(tmp_path / "out", model).sound
    if architecture != "GPT2":
        return
    again = compensate_checkpoint(tmp_path / "out", tmp_path / "again", TEXT, config, **given)
    assert again.before == pytest.approx(result.after, rel=1e-4)
    assert len(json.loads((tmp_path / "again" / "precal_report.json").read_text())["compensations"]) == 2


def test_what_the_command_offers_is_what_there_is() -> None:
    assert (OFFERED_SPACES, OFFERED_CRITERIA) == (SPACES, CRITERIA)


# ---- interrupted -----------------------------------------------------------------------------------------------------


def begin(made: Path, out: Path, **options: Any) -> None:
    """Up to the end of the first of two blocks."""
    with pytest.raises(Interruption):
        compensate_checkpoint(made / "q", out, TEXT, CONFIG, progress=interrupt, **options)


def test_the_same_call_continues_to_the_same_bytes(made: Path, whole: Path, tmp_path: Path) -> None:
    begin(made, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    seen: list[Progress] = []
    compensate_checkpoint(made / "q", tmp_path / "out", TEXT, CONFIG, progress=seen.append)
    assert [p.done for p in seen] == [1, 2]
    assert digests(tmp_path / "out") == digests(whole)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["data", "line"])
def test_what_was_damaged_is_made_again(made: Path, whole: Path, tmp_path: Path, damage: str) -> None:
    begin(made, tmp_path / "out")
    folder = folder_of(tmp_path / "out")
    if damage == "data":
        path = folder / "new" / "model.safetensors"
        data = path.read_bytes()
        at = data.index(load_file(path)["model.layers.0.mlp.up_proj.weight_packed"].numpy().tobytes())
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        path = folder / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
    compensate_checkpoint(made / "q", tmp_path / "out", TEXT, CONFIG)
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.parametrize("in_place", [False, True])
def test_killed_and_continued(made: Path, whole: Path, tmp_path: Path, in_place: bool) -> None:
    shutil.copytree(made / "q", tmp_path / "q")
    before = digests(tmp_path / "q")
    out = None if in_place else tmp_path / "out"
    script = f"""
import os
from precal_ext import CompensateConfig, compensate_checkpoint
compensate_checkpoint({str(tmp_path / "q")!r}, {None if out is None else str(out)!r}, {str(TEXT)!r},
    CompensateConfig(samples=6, window=64, rounds=1), reference={str(made / "llama-6m")!r},
    progress=lambda p: os.kill(os.getpid(), 9))
"""
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert digests(tmp_path / "q") == before
    seen: list[Progress] = []
    given: dict[str, Any] = {"reference": made / "llama-6m", "progress": seen.append}
    compensate_checkpoint(tmp_path / "q", out, TEXT, CONFIG, **given)
    assert digests(out or tmp_path / "q") == digests(whole)


def test_another_run_is_not_continued(made: Path, tmp_path: Path) -> None:
    begin(made, tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text() + "more")
    with pytest.raises(CheckpointError, match=r"continued with the same settings rounds, got 4 after 1; --overwrite"):
        compensate_checkpoint(made / "q", tmp_path / "out", TEXT, CompensateConfig(samples=6, window=64))
    with pytest.raises(CheckpointError, match="continued with the same text"):
        compensate_checkpoint(made / "q", tmp_path / "out", text, CONFIG)


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "must be a readable UTF-8 text file, got none there"),
        (b"\xff\xfe\x00", "must be a readable UTF-8 text file, got: "),
        (b"", "must have at least 2 tokens of text, got fewer"),
        (b"Once upon a time", "text must have at least 2 windows of 64 tokens, got 1"),
    ],
)
def test_texts_that_cannot_be_used(run: Run, made: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    code, _, err = run("compensate", made / "q", tmp_path / "out", "--text", text, *OPTIONS)
    assert code == 3 and message in err
    assert not (tmp_path / "out").exists() and not folder_of(tmp_path / "out").exists()


def test_the_reference_must_be_there_and_be_the_one(run: Run, made: Path, tmp_path: Path) -> None:
    assert find_reference(made / "q").resolve() == (made / "llama-6m").resolve()
    alone = tmp_path / "q"
    shutil.copytree(made / "q", alone)
    code, _, err = run("compensate", alone, "--text", TEXT, *OPTIONS)
    assert code == 3 and "must be given with --reference MODEL, got none; 'llama-6m', which its README names" in err
    (alone / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"must be given with --reference MODEL, got none$"):
        find_reference(alone)

    def shuffle(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].flip(0).contiguous()

    other = altered(made / "llama-6m", tmp_path / "other", shuffle)
    given = ["compensate", alone, "--text", TEXT, *OPTIONS, "--reference"]
    code, _, err = run(*given, other)
    assert code == 3 and "got model.layers.1.mlp.up_proj with SQNR -" in err
    shape = add_tokenizer(save_tiny(tmp_path / "shape", vocab_size=4096, hidden_size=64, max_position_embeddings=512))
    code, _, err = run(*given, shape)
    assert code == 3 and "must have shape" in err
    code, _, err = run(*given, made / "q")
    assert code == 3 and "must be the model before quantization, got a quantized one" in err


def test_directories_that_precal_did_not_write(run: Run, made: Path, tmp_path: Path) -> None:
    for folder, message in (
        (made / "llama-6m", "must be a model quantized by precal"),
        (tmp_path / "none", "must be given a model directory, got nothing there"),
    ):
        for more in ([], ["--in-place"]):
            code, _, err = run("compensate", folder, "--text", TEXT, "--reference", made / "llama-6m", *OPTIONS, *more)
            assert code == 3 and message in err
    code, _, err = run("compensate", made / "q", made / "llama-6m" / "out", "--text", TEXT, *OPTIONS)
    assert code == 3 and "must lie outside the model's directory" in err


@pytest.mark.parametrize("gain", ["0", "1,-2", "x", ""])
def test_gains_that_are_none(run: Run, made: Path, gain: str) -> None:
    code, _, err = run("compensate", made / "q", "--text", TEXT, "--gain", gain)
    assert code == 2 and "must be positive numbers" in err
