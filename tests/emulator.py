"""Builds csrc/cuda for the CPU (tests/cuda_on_cpu), once per session and only what changed."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "cuda_on_cpu"
VARIANTS = ["sanitize", "races"]
SEEDS = [0, 1, 2, 3]  # ascending, descending, two shuffles


@functools.cache
def build() -> Path:
    """The build folder, up to date."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("needs cmake and ninja")
    options = [f"-DPython_EXECUTABLE={sys.executable}"]
    configure = ["cmake", "-G", "Ninja", "-S", ROOT / "tests" / "cuda_on_cpu", "-B", BUILD, *options]
    for command in (configure, ["cmake", "--build", BUILD]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD


def sanitizer_environment() -> dict[str, str]:
    # A block that failed is abandoned with what its threads hold.
    return {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
