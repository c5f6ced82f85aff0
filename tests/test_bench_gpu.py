"""The parts of bench/gpu.py and bench/gpu_day.sh that need no GPU."""

from __future__ import annotations

import subprocess
import sys

import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import gpu


def test_a_line_has_what_was_measured() -> None:
    row = {"what": "linear", "shape": [1, 2, 3], "format": [4, 64, 1], "us": 12.34, "share": 0.5, "tflops": 1.0}
    text = gpu.line({**row, "x_bf16": 3.25, "x_torch_int4": None})
    assert "12.3 us" in text and "50.0 % of copy" in text and "int4 g64 c1" in text and "3.25 x bf16" in text
    assert "torch int4" not in text
    assert "2.00 x torch int4" in gpu.line({**row, "x_bf16": 3.25, "x_torch_int4": 2.0})
    assert "0.25 s for 8e9" in gpu.line({"what": "pack", "shape": [1, 1], "us": 1.0, "share": 1.0, "seconds_8b": 0.25})


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        return
    done = subprocess.run([sys.executable, "bench/gpu.py"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "torch sees no CUDA device" in done.stderr


def test_the_script_refuses_unknown_parts() -> None:
    assert subprocess.run(["bash", "-n", "bench/gpu_day.sh"], cwd=ROOT).returncode == 0
    done = subprocess.run(["bench/gpu_day.sh", "dance"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "no such part: dance" in done.stderr
