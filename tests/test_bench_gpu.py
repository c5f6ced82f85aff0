"""The parts of bench/gpu.py and bench/gpu_day.sh that need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import gpu


def test_a_line_has_what_was_measured() -> None:
    row = {"what": "linear", "way": "mma", "shape": [1, 2, 3], "format": [4, 64, 1], "us": 12.34, "share": 0.5}
    row["tflops"] = 1.0
    text = gpu.line({**row, "x_bf16": 3.25, "x_torch_int4": None})
    assert "12.3 us" in text and "50.0 % of copy" in text and "int4 g64 c1 mma" in text and "3.25 x bf16" in text
    assert "torch int4" not in text
    assert "2.00 x torch int4" in gpu.line({**row, "x_bf16": 3.25, "x_torch_int4": 2.0})
    assert "0.25 s for 8e9" in gpu.line({"what": "pack", "shape": [1, 1], "us": 1.0, "share": 1.0, "seconds_8b": 0.25})


def test_the_crossover_is_where_all_larger_counts_are_faster(tmp_path: Path) -> None:
    def row(M: int, way: str, us: float, N: int = 64) -> dict[str, object]:
        return {"what": "linear", "way": way, "shape": [M, N, 32], "format": [4, 64, 1], "us": us, "commit": "a"}

    rows = [row(M, "mma", 10.0) for M in (16, 64, 128, 256, 512)]
    rows += [row(M, "dequantize", us) for M, us in ((64, 9.0), (128, 11.0), (256, 5.0), (512, 4.0))]
    rows += [row(64, "mma", 1.0, 8), row(64, "dequantize", 2.0, 8)]
    first, second = gpu.crossover(rows)
    assert first.startswith("64x32 int4 g64 c1  dequantizing is faster from 256 tokens")
    assert "64: 0.90  128: 1.10  256: 0.50" in first and "8x32" in second and "faster never" in second
    file = tmp_path / "gpu.jsonl"
    old = {**row(64, "mma", 1.0, 7), "commit": "b"}
    file.write_text("".join(json.dumps(r) + "\n" for r in [old, *rows]))
    command = [sys.executable, "bench/gpu.py", "--crossover", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.splitlines() == [first, second]


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, "bench/gpu.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "torch sees no CUDA device" in done.stderr


def test_the_parts_of_the_day_run_in_turn_and_say_what_failed(tmp_path: Path) -> None:
    """With stand-ins for the tools of a machine that has a GPU: what is called, with what, and what a failure does."""
    log = tmp_path / "log"
    for name in ("fake-python", "nvcc", "compute-sanitizer"):
        tool = tmp_path / name
        tool.write_text(
            f'#!/bin/sh\necho "{name} $PRECAL_REQUIRE_CUDA $*" >> {log}\ncase "$*" in *gpu.py*) exit 3;; esac\n'
        )
        tool.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "fake-python")}
    environment |= {"OUT": str(tmp_path)}
    command = ["bash", "bench/gpu_day.sh", "test", "sanitize", "bench"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1 and done.stdout.rstrip().endswith("failed: bench")
    calls = log.read_text().splitlines()
    assert calls[0] == "fake-python 1 -m pytest -q -x -m cuda tests"
    assert [c.split()[2] for c in calls[1:4]] == ["memcheck", "racecheck", "synccheck"]
    assert calls[4].split()[-3:] == ["bench/gpu.py", "--out", f"{tmp_path}/gpu.jsonl"]


def test_the_script_refuses_unknown_parts() -> None:
    assert subprocess.run(["bash", "-n", "bench/gpu_day.sh"], cwd=ROOT).returncode == 0
    done = subprocess.run(["bench/gpu_day.sh", "dance"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no such part: dance" in done.stderr
