#!/usr/bin/env python3
"""What bench/cpu.py has no cell for: `linear` of one token from L3, and `prepack` beside memcpy.

    python bench/cpu_extras.py [--rounds 9] [--out bench/results/cpu_extras.jsonl]

L3: one copy of a 4096x4096 weight, which a last level cache of 32 MB keeps and L2 does not; GB/s of packed weights.
One thread: the same, and of 256 rows, which L2 keeps; with the share of reading a buffer that lies in the same cache.
prepack: GB/s of the checkpoint's bytes, and its share of memcpy (`_C.measure_limit`, between buffers that are there;
its own output is new memory), paired inside rounds. Else all threads of the machine; medians. `bench/report.py` puts
the figures into docs/performance.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_worker import Array, Precal, Weights, to_numpy
from recipes import ROOT, commit, facts
from rows import Results, Row

from precal_ext import _C, QuantizeConfig
from precal_ext.quantize import fit_set_grid, quantize_weight

N, K = 4096, 4096
SETTINGS = [
    {"bits": bits, "group_size": group_size, "c": 1, "trellis": True}
    for bits, group_size in ((4, 64), (4, 128), (3, 64), (3, 128))
]


def seconds_of(run: Callable[[], object], least: float = 0.05) -> float:
    """Median over calls for at least that long."""
    times = []
    end = time.perf_counter() + least
    while time.perf_counter() < end or len(times) < 3:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def from_l3(precal: Precal, settings: dict[str, Any], mode: str, rounds: int) -> Row:
    ready = precal.ready(N, K, 1, 0, {**settings, "mode": mode})
    ready.run()
    gbps = [ready.packed_bytes / seconds_of(ready.run) * 1e-9 for _ in range(rounds)]
    return {"gbps": round(statistics.median(gbps), 1), "share": None}


def in_cache(precal: Precal, cache: str, mode: str, rounds: int) -> Row:
    """Of one thread; megabytes of the limit's buffer are those of the packed weight, rounded up."""
    rows, megabytes = {"L2": (256, 1), "L3": (N, 9)}[cache]
    ready = precal.ready(rows, K, 1, 0, {**SETTINGS[0], "mode": mode})
    ready.run()
    gbps, shares = [], []
    for _ in range(rounds):
        gbps.append(ready.packed_bytes / seconds_of(ready.run) * 1e-9)
        shares.append(gbps[-1] / _C.measure_limit("dram_read", 0.05, megabytes)["value"])
    return {"gbps": round(statistics.median(gbps), 1), "share": round(statistics.median(shares), 4)}


def canonical(settings: dict[str, Any]) -> list[Array | None]:
    """The checkpoint's tensors in the order of `prepack`; the base of the weight has fewer rows, which repeat."""
    weights, config = Weights(N, K), QuantizeConfig(**settings)
    base = torch.from_numpy(weights.base)
    q = quantize_weight(base, config, fit_set_grid([base], config))
    rows = torch.from_numpy(weights.order(0))
    names = ("packed", "scale", "row_scale", "grid", "outlier_index", "outlier_value")
    found = [(name, q.tensors.get(f"weight_{name}")) for name in names]
    return [None if t is None else to_numpy(t if name == "grid" else t[rows].contiguous()) for name, t in found]


def prepacking(settings: dict[str, Any], rounds: int) -> Row:
    arrays = canonical(settings)
    stored = sum(a.nbytes for a in arrays if a is not None) * 1e-9
    gbps, shares = [], []
    for _ in range(rounds):
        seconds = seconds_of(lambda: _C.prepack(*arrays, None, None, K, settings["bits"], settings["group_size"]))
        gbps.append(stored / seconds)
        shares.append(stored / seconds / _C.measure_limit("copy", 0.05, 256)["value"])
    return {"gbps": round(statistics.median(gbps), 2), "share": round(statistics.median(shares), 4)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu_extras.jsonl")
    args = p.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    results = Results(
        argparse.Namespace(out=args.out, only="", missing=False), ("cpu", "isa", "threads", "what", "format")
    )
    name = "4b g64 c1 trellis"
    alone = Precal(1)
    for cache, mode in itertools.product(("L2", "L3"), ("a8", "a16")):
        found = in_cache(alone, cache, mode, args.rounds)
        what = f"one thread, {cache}, {mode}"
        base = {"what": what, "format": name, **found, "rounds": args.rounds, "threads": 1, "commit": commit()}
        results.put({**base, **facts("bench/cpu_extras.py")})
        print(f"{what:20} {name:22} {found['gbps']:8.2f} GB/s  {found['share']:.0%} of reading {cache}", flush=True)
    precal = Precal(threads)
    kinds = [("L3, a8", "a8"), ("L3, a16", "a16"), ("prepack", "")]
    for settings, (what, mode) in itertools.product(SETTINGS, kinds):
        found = from_l3(precal, settings, mode, args.rounds) if mode else prepacking(settings, args.rounds)
        name = f"{settings['bits']}b g{settings['group_size']} c1 trellis"
        base = {"what": what, "format": name, **found, "rounds": args.rounds, "threads": threads, "commit": commit()}
        row = {**base, **facts("bench/cpu_extras.py")}
        results.put(row)
        share = "" if mode else f"{row['share']:.0%} of memcpy"
        print(f"{what:10} {name:22} {row['gbps']:8.2f} GB/s  {share}", flush=True)


if __name__ == "__main__":
    main()
