"""How the command ends: signals leave nothing behind, wrong usage, help, bugs."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from models import Run, digests, environment, sha256

from precal_ext import __version__

pytest_plugins = ["package_fixtures"]


# ---- signals ---------------------------------------------------------------------------------------------------------

# Says that it has begun and stops, in the middle of the tensor whose number is given, counted from 0.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born with SIGINT ignored
from precal_ext import convert
from precal_ext.cli import main

real, left = convert.quantize_weight, int(sys.argv.pop(1))

def quantize_weight(*arguments):
    global left
    if left == 0:
        print("begun", flush=True)
        for _ in range(600):  # Python looks for signals between sleeps; one right before a sleep does not end it
            time.sleep(0.1)
    left -= 1
    return real(*arguments)

convert.quantize_weight = quantize_weight
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("there_before", [True, False])
def test_a_signal_leaves_what_was_there_and_the_command_continues(
    run: Run, tiny: Path, tmp_path: Path, number: signal.Signals, code: int, there_before: bool
) -> None:
    out = tmp_path / "out"
    if there_before:
        out.mkdir()
        (out / "file").write_text("precious")
    options = ["--recipe", "rtn", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "9", "quantize", str(tiny), str(out), *options, "--overwrite"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert (
        f"what is finished lies in {tmp_path / '.out.partial'}; the same command without --overwrite continues" in err
    )
    assert out.exists() == there_before
    if there_before:
        assert digests(out).keys() == {"file"}
    assert run("quantize", tiny, out, *options)[0] == 0
    assert run("quantize", tiny, tmp_path / "whole" / "out", *options)[0] == 0
    assert digests(out) == digests(tmp_path / "whole" / "out")


@pytest.mark.parametrize("options", [["--quiet"], []], ids=["quiet", "estimate"])
def test_a_reader_that_leaves_is_no_error(tiny: Path, tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "precal_ext.cli", "quantize", str(tiny), "out", *options]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert [line for line in err.splitlines() if " tensors, " not in line] == []
    assert process.wait() == 0
    assert sha256(tmp_path / "out" / "model.safetensors")


# ---- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["convert"], ["quantize"], ["quantize", "m"], ["quantize", "m", "o", "--fast"],
        ["quantize", "m", "o", "--max-shard-size", "9" * 400 + "GB"], ["quantize", "m", "o", "--max-shard-size", "0"],
        ["quantize", "m", "o", "--bits", "four"], ["quantize", "m", "o", "--recipe", "awq"],
        ["eval", "m"], ["eval", "m", "--text", "t", "--window", "0"], ["generate", "m"],
        ["generate", "m", "p", "--temperature", "-1"], ["generate", "m", "p", "--temperature", "nan"],
        ["verify"], ["inspect", "m", "--sort", "size"], ["report", "m"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert "usage: precal" in err


def test_a_number_that_is_none_is_called_a_number(run: Run) -> None:
    """argparse puts the name of the function in its message."""
    _, _, err = run("eval", "m", "--text", "t", "--window", "many")
    assert "many" in err
    assert "_positive" not in err


def test_help_and_version(run: Run) -> None:
    assert run("--version") == (0, f"precal {__version__}\n", "")
    for command in ("quantize", "eval", "generate", "demo", "verify", "inspect", "report"):
        code, out, _ = run(command, "--help")
        assert code == 0
        # argparse wraps the line
        assert "2 wrong usage, 3 input or output refused" in " ".join(out.split())


def test_a_failure_of_its_own_shows_where(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("precal_ext.convert.quantize_weight", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("quantize", tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refusal_shows_where_when_asked_to(run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRECAL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="must lie outside"):
        run("quantize", tiny, tiny)
