"""Builds csrc/cuda for the CPU (tests/cuda_on_cpu), once per session and only what changed."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        for command in (configure, ["cmake", "--build", BUILD]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return BUILD


def sanitizer_environment(preload: bool = False) -> dict[str, str]:
    """``preload``: for a Python that loads a module with ASan."""
    # A block that failed is abandoned with what its threads hold.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    if preload:
        names = ["libasan.so", "libstdc++.so"]  # the second, or ASan does not see who throws
        files = [subprocess.run(["g++", f"-print-file-name={n}"], capture_output=True, text=True) for n in names]
        environment["LD_PRELOAD"] = " ".join(f.stdout.strip() for f in files)
    return environment


class Emulated:
    """``_C_cuda`` on CPU tensors: the same bindings, launchers and kernels."""

    def __init__(self, variant: str) -> None:
        path = str(build())
        if path not in sys.path:
            sys.path.insert(0, path)
        self.module = importlib.import_module(f"_C_cuda_{variant}")
        self.library = ctypes.CDLL(self.module.__file__)
        self.device()

    def device(self, seed: int = 0, multiprocessors: int = 3, shared_bytes: int = 227 << 10) -> None:
        """Order of blocks and threads, and the device that launchers see."""
        self.library.precal_shim_set(ctypes.c_uint64(seed), multiprocessors, shared_bytes, 0)

    def call(self, name: str, arguments: Sequence[Any], like: Sequence[Tensor], workspace: int = 0) -> list[Tensor]:
        """Outputs of the shape and dtype of ``like``, which hold 0xFF before the call."""
        out = [torch.empty_like(t) for t in like]
        for t in out:
            t.view(torch.uint8).fill_(0xFF) if t.dim() else t.fill_(torch.nan)
        scratch = torch.full([workspace], 0xFF, dtype=torch.uint8) if workspace else None
        getattr(self.module, name)(*arguments, out=out[0] if len(out) == 1 else out, workspace=scratch)
        return out


class EmulatedTorch:
    """``torch.ops.precal`` of a GPU on CPU tensors: torch's bindings, with its allocator, and the same kernels."""

    def __init__(self, variant: str) -> None:
        path = build() / f"libprecal_emulated_{variant}.so"
        torch.ops.load_library(str(path))
        self.ops = getattr(torch.ops, f"precal_emulated_{variant}")
        self.library = ctypes.CDLL(str(path))
        self.device()

    def device(self, seed: int = 2, multiprocessors: int = 3, capturing: bool = False) -> None:
        """``capturing``: a CUDA graph; the host may not wait then."""
        self.library.precal_shim_set(ctypes.c_uint64(seed), multiprocessors, 227 << 10, int(capturing))

    @property
    def waits(self) -> int:
        """How often the host waited for the device so far."""
        return int(self.library.precal_shim_waits())


def run_sanitized(tests: str) -> None:
    """The tests of a file again, on the kernels that are built with ASan and UBSan."""
    build()
    environment = {**sanitizer_environment(preload=True), "PRECAL_EMULATOR": "sanitize"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
