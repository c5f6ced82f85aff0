"""What the trellis costs: time of `linear` and of `quantize_groups` beside a plain grid. Part of `bench/tried.py`.

    PRECAL_ISA=avx2 OMP_NUM_THREADS=1 python bench/tried_times.py linear 4      # bits; JSON lines

One thread, its own CPU clock, plain and trellis by turns. An instruction set is chosen when the library is loaded, so
each has a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rows import Row

from precal_ext import _C, ops
from precal_ext.config import QuantizeConfig
from precal_ext.grids import constant_grid
from precal_ext.quantize import quantize_weight

ISAS = ("avx512", "avx2", "scalar")
# Where rows are told apart, in the order in which they come.
CELLS = {
    "linear": [f"{mode}, M = {M}" for mode in ("f32", "a16", "a8") for M in (1, 4, 16, 64)],
    "cost": ["one core"],
}


def measured(isa: str, job: str, bits: int, quick: bool) -> list[Row]:
    """Rows of a process of its own, one for every cell of the job."""
    environment = {**os.environ, "PRECAL_ISA": isa, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), job, str(bits), *(["--quick"] if quick else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"tried: {job} for {isa} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_turns(calls: list[Callable[[], Any]], seconds: float, turns: int) -> list[float]:
    """The least CPU time of the thread in each call, in seconds; every other turn goes backwards."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.monotonic() + seconds
    order = list(zip(calls, times, strict=True))
    while len(times[0]) < 5 or (len(times[0]) < turns and time.monotonic() < end):
        for call, found in order:
            started = time.thread_time()
            call()
            found.append(time.thread_time() - started)
        order.reverse()
    return [min(found) for found in times]


def linear(bits: int, quick: bool) -> Iterator[Row]:
    N, K = (16, 512) if quick else (128 if _C.cpu_isa() == "scalar" else 2048, 4096)
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(1)) * 0.02
    weights = []
    for trellis in (False, True):
        q = quantize_weight(w, QuantizeConfig(bits=bits, trellis=trellis), constant_grid(bits, 64, trellis))
        weights.append((q.prepack(), q.spec.op_arguments()))
    for cell in CELLS["linear"]:
        mode, M = cell.split(", M = ")
        x = torch.randn(int(M), K, generator=torch.Generator().manual_seed(int(M)))
        calls = [functools.partial(ops.linear, x, p, None, *numbers, mode) for p, numbers in weights]
        plain, searched = by_turns(calls, 0.0 if quick else 1.0, 61)
        times = {"plain_us": 1e6 * plain, "trellis_us": 1e6 * searched, "ratio": searched / plain}
        yield {"mode": mode, "M": int(M), "shape": [N, K], **times}


def cost(bits: int, quick: bool) -> Iterator[Row]:
    w = torch.randn(4 if quick else 128, 4096, generator=torch.Generator().manual_seed(1)) * 0.02
    grids = [constant_grid(bits, 64, trellis) for trellis in (False, True)]
    calls = [functools.partial(ops.quantize_groups, w, grid, bits, 64, 1) for grid in grids]
    plain, searched = (1e9 * t / w.numel() for t in by_turns(calls, 0.0 if quick else 4.0, 61))
    yield {"plain_ns": plain, "trellis_ns": searched, "shape": list(w.shape)}


def main() -> None:
    job, bits, quick = sys.argv[1], int(sys.argv[2]), "--quick" in sys.argv
    torch.set_num_threads(1)
    for row in {"linear": linear, "cost": cost}[job](bits, quick):
        print(json.dumps({"isa": _C.cpu_isa(), **row}))


if __name__ == "__main__":
    main()
