#!/usr/bin/env python3
"""Speed of `linear` on the CPU beside other packages' kernels and the limits of the machine, in one run.

    python bench/cpu.py [--full] [--only REGEX] [--peers REGEX|none] [--out bench/results/cpu.jsonl]
    python bench/cpu.py --cells '4096x4096 M=1 4b g64 c1 trellis a8' ...      # exactly these
    PRECAL_ISA=avx2 python bench/cpu.py --peers none

A cell is shape x M x bits x group x c x coding x activation mode. About 60 cells are the default, --full has every
combination; --only picks cells by name. Shapes are N x K. Where `linear` has no activation modes, its one is "f32".

Every contender is a process of its own and one of them works at a time. Rounds go through all contenders of a (shape,
M), the limits first; a turn is the median of --turn-ms. Turns in which others used 10 % or more of the CPU are dropped
and rounds added (at most 3 x as many), so this wants a quiet machine. A row is the median over turns; its share of the
limit and its ratios to other rows are paired inside rounds, because memory bandwidth drifts. For M < 64 weights are
cold: copies that differ, more than 4 x L3 in all, one after the other; turns are shorter then and rounds more
(--cold-turn-ms, --cold-rounds). Every result is checked against float64 on the dequantized weight first.
`bench/report.py` makes docs/performance.md from the results.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from cpu_peers import PEERS
from cpu_worker import mode_argument
from recipes import ROOT, commit, facts
from rows import Results, Row

from precal_ext import _C

SHAPES = [(4096, 4096), (11008, 4096), (14336, 4096), (4096, 14336)]
TOKENS = [1, 4, 16, 64, 256, 512]
COLD_BELOW = 64  # from here on a weight is used so often that where it lies matters little
FOREIGN_LIMIT = 0.10
# Which peak bounds a mode; a16 falls back on float32 where there is no bfloat16 dot product.
PEAKS = {"f32": ["fp32_fma"], "bf16": ["bf16_dot", "fp32_fma"], "a16": ["bf16_dot", "fp32_fma"], "a8": ["int8_dot"]}


@dataclass(frozen=True)
class Cell:
    N: int
    K: int
    M: int
    bits: int
    group_size: int
    c: int
    trellis: bool
    mode: str

    @property
    def format(self) -> str:
        coding = "trellis" if self.trellis else "plain"
        return f"precal {self.bits}b g{self.group_size} c{self.c} {coding} {self.mode}"

    @property
    def name(self) -> str:
        return f"{self.N}x{self.K} M={self.M} {self.format.removeprefix('precal ')}"

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("bits", "group_size", "c", "trellis", "mode")}


def parse_cell(name: str) -> Cell:
    """Inverse of ``Cell.name``."""
    found = re.fullmatch(r"(\d+)x(\d+) M=(\d+) ([2-8])b g(\d+) c(\d+) (trellis|plain) (a16|a8|f32)", name)
    if found is None:
        raise SystemExit(f"cpu.py: a cell must look like '4096x4096 M=1 4b g64 c1 trellis a8', got {name!r}")
    N, K, M, bits, group_size, c = map(int, found.groups()[:6])
    return Cell(N, K, M, bits, group_size, c, found[7] == "trellis", found[8])


def default_cells() -> list[Cell]:
    """The default setting on two shapes at every M; the other shapes and settings at a few."""
    modes, cells = ("a16", "a8"), []
    for (N, K), M, bits, mode in itertools.product([SHAPES[0], SHAPES[3]], TOKENS, (4, 3), modes):
        cells.append(Cell(N, K, M, bits, 64, 1, True, mode))
    for (N, K), M, mode in itertools.product(SHAPES[1:3], (1, 64), modes):
        cells.append(Cell(N, K, M, 4, 64, 1, True, mode))
    for M, (group_size, c, trellis) in itertools.product((1, 256), ((32, 1, True), (128, 1, True), (64, 0, True))):
        cells.append(Cell(*SHAPES[0], M, 4, group_size, c, trellis, "a8"))
    for M in (1, 256):
        cells.append(Cell(*SHAPES[0], M, 4, 64, 1, False, "a8"))
    return cells


def full_cells() -> list[Cell]:
    tokens = sorted([*TOKENS, 2, 8, 32, 128])
    choices = itertools.product(SHAPES, tokens, (4, 3), (32, 64, 128), (0, 1), (True, False), ("a16", "a8"))
    return [Cell(*shape, M, *rest) for shape, M, *rest in choices]


def chosen_cells(args: argparse.Namespace) -> list[Cell]:
    cells = [parse_cell(name) for name in args.cells] or (full_cells() if args.full else default_cells())
    if mode_argument(_C) is None:
        cells = list(dict.fromkeys(replace(cell, mode="f32") for cell in cells))
    cells = [cell for cell in cells if re.search(args.only, cell.name)]
    if not cells:
        raise SystemExit(f"cpu.py: --only must match the name of a cell, got {args.only!r}")
    return cells


class Worker:
    """A contender in its process; a failure is an answer, not an exception."""

    def __init__(self, name: str, threads: int, timeout: float) -> None:
        self.name, self.timeout = name, timeout
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        command = [sys.executable, str(ROOT / "bench" / "cpu_worker.py"), name, str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        hello = self._answer()
        self.versions: str = hello.get("versions", "")
        self.failed: str | None = hello.get("failed")

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        try:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # the answer will say so
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        alarm = threading.Timer(self.timeout, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        return {"failed": f"its process ended with status {self.process.wait()} (limit {self.timeout:g} s)"}

    def close(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Turn:
    """A clean one: microseconds of a call, its round, and what the limits were in that round where that is known."""

    us: float
    round: int
    limits: dict[str, float | None] | None


@dataclass
class Entry:
    """A contender's case at one point."""

    worker: Worker
    format: str
    facts: dict[str, Any]
    turns: list[Turn]
    dropped: int = 0
    foreign: float = 0.0


def bound(facts: dict[str, Any], ops: float, limits: dict[str, float | None]) -> tuple[float, str] | None:
    """Microseconds below which the machine cannot do it, and the limit that says so."""
    peak = next((name for name in PEAKS[facts["mode"]] if limits.get(name)), None)
    found = [(facts["packed_bytes"] / limits["dram_read"] * 1e-3, "dram_read")] if limits.get("dram_read") else []
    if peak is not None:
        found.append((ops / (limits[peak] or 0.0) * 1e-3, peak))
    return max(found, default=None)


def figures(entry: Entry, N: int, K: int, M: int) -> Row:
    ops = 2.0 * M * N * K
    us = statistics.median(t.us for t in entry.turns)
    pairs = [(t.us, t.limits) for t in entry.turns if t.limits is not None]
    bounds = [(b, us_) for us_, limits in pairs if (b := bound(entry.facts, ops, limits)) is not None]
    names = [b[1] for b, _ in bounds]
    shares = [b[0] / us_ for b, us_ in bounds]
    return {
        "us": round(us, 2),
        "us_min": round(min(t.us for t in entry.turns), 2),
        "us_max": round(max(t.us for t in entry.turns), 2),
        "us_of_rounds": {str(t.round): round(t.us, 2) for t in entry.turns},
        "gbps": round(entry.facts["packed_bytes"] / us * 1e-3, 2),
        "gops": round(ops / us * 1e-3, 2),
        "limit": statistics.mode(names) if names else None,
        "share": round(statistics.median(shares), 4) if shares else None,
        "limits": {
            name: round(statistics.median(values), 1)
            for name in (pairs[0][1] if pairs else {})
            if (values := [v for _, limits in pairs if (v := limits[name]) is not None])
        },
        "turns": len(entry.turns),
        "dropped": entry.dropped,
        "foreign_max": round(entry.foreign, 3),
    }


class Bench:
    def __init__(self, args: argparse.Namespace, cells: list[Cell]) -> None:
        self.args, self.cells = args, cells
        self.results = Results(
            argparse.Namespace(out=args.out, only="", missing=False),
            ("cpu", "isa", "threads", "shape", "M", "format"),
        )
        self.run = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.cold_mb: int = args.cold_mb or cold_megabytes()
        self.missing: list[str] = []
        self.limits = self.start("limits")
        self.precal = self.start("precal")
        wanted = [] if args.peers == "none" else [name for name in PEERS if re.search(args.peers, name)]
        self.peers = [worker for worker in map(self.start, wanted) if worker.failed is None]
        for worker in (self.limits, self.precal):
            if worker.failed is not None:
                raise SystemExit(f"cpu.py: {worker.name}: {worker.failed}")

    def start(self, name: str) -> Worker:
        worker = Worker(name, self.args.threads, self.args.timeout)
        if worker.failed is not None:
            print(f"peers: {name} is left out: {worker.failed}", file=sys.stderr)
        return worker

    def close(self) -> None:
        for worker in (self.limits, self.precal, *self.peers):
            worker.close()

    def point(self, N: int, K: int, M: int) -> None:
        """Everything at one shape and M: prepare and check, rounds, rows."""
        cells = [cell for cell in self.cells if (cell.N, cell.K, cell.M) == (N, K, M)]
        asked = [(self.precal, cell.format, cell.settings()) for cell in cells]
        asked += [(worker, worker.name, {}) for worker in self.peers]
        entries: list[Entry] = []
        shape = {"N": N, "K": K, "M": M, "cold_bytes": self.cold_mb << 20 if M < COLD_BELOW else 0}
        for worker, format_, settings in asked:
            first = worker is not self.precal or format_ == cells[0].format
            answer = worker.ask("case", case=format_, first=first, settings=settings, **shape)
            if "failed" in answer:
                self.leave_out(worker, f"{N}x{K} M={M} {format_}", answer["failed"])
            else:
                entries.append(Entry(worker, format_, answer, []))
        self.rounds(entries, cold=M < COLD_BELOW)
        for entry in entries:
            name = f"{N}x{K} M={M} {entry.format}"
            if not entry.turns:
                self.leave_out(entry.worker, name, f"none of {entry.dropped} turns was free of others' work")
                continue
            self.put(entry, N, K, M)

    def turns(self, cold: bool) -> tuple[int, float]:
        """How many rounds, and milliseconds of a turn."""
        return (self.args.cold_rounds, self.args.cold_turn_ms) if cold else (self.args.rounds, self.args.turn_ms)

    def leave_out(self, worker: Worker, name: str, why: str) -> None:
        print(f"{name} is left out: {why}", file=sys.stderr)
        if worker is self.precal:
            self.missing.append(name)

    def rounds(self, entries: list[Entry], cold: bool) -> None:
        rounds, turn_ms = self.turns(cold)
        for i in range(3 * rounds):
            waiting = [e for e in entries if len(e.turns) < rounds]
            if not waiting:
                break
            limits = self.measured_limits()
            for entry in itertools.islice(itertools.cycle(waiting), i % len(waiting), i % len(waiting) + len(waiting)):
                time.sleep(self.args.pause_ms / 1000)  # the last one's threads stop spinning
                answer = entry.worker.ask("turn", case=entry.format, seconds=turn_ms / 1000)
                foreign = answer.get("foreign") or 0.0
                if "failed" in answer or foreign >= self.args.foreign:
                    entry.dropped += 1
                    continue
                entry.turns.append(Turn(answer["us"], i, limits))
                entry.foreign = max(entry.foreign, foreign)

    def measured_limits(self) -> dict[str, float | None] | None:
        """None where others worked meanwhile."""
        time.sleep(self.args.pause_ms / 1000)
        answer = self.limits.ask("limits", seconds=2 * self.args.turn_ms / 1000, megabytes=max(1, self.cold_mb))
        if "failed" in answer:
            raise SystemExit(f"cpu.py: limits: {answer['failed']}")
        clean = (answer["foreign"] or 0.0) < self.args.foreign
        found: dict[str, float | None] = answer["limits"]
        return found if clean else None

    def put(self, entry: Entry, N: int, K: int, M: int) -> None:
        ours = entry.worker is self.precal
        rounds, turn_ms = self.turns(M < COLD_BELOW)
        row = {
            "shape": f"{N}x{K}",
            "M": M,
            "format": entry.format,
            "source": "precal" if ours else entry.worker.versions,
            **{name: entry.facts[name] for name in ("bits", "group_size", "c", "trellis", "mode")},
            **figures(entry, N, K, M),
            "packed_bytes": entry.facts["packed_bytes"],
            "copies": entry.facts["copies"],
            "error": float(f"{entry.facts['error']:.3g}"),
            "run": self.run,
            "rounds": rounds,
            "turn_ms": turn_ms,
            "threads": self.args.threads,
            "commit": commit(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            **facts("bench/cpu.py"),
        }
        self.results.put(row)
        share = f"{row['share']:.0%} of {row['limit']}" if row["share"] is not None else ""
        print(
            f"{row['shape']:12} M={M:<4} {entry.format:46}{row['us']:10.1f} us  {row['error']:.1e}  {share}", flush=True
        )


def cold_megabytes() -> int:
    """More than four times the last level cache."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    last = max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)
    return 4 * last // (1 << 20) + 4


def parser() -> argparse.ArgumentParser:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--full", action="store_true", help="every combination instead of about 60 cells")
    p.add_argument("--only", metavar="REGEX", default="", help="cells by name")
    p.add_argument("--cells", metavar="NAME", nargs="+", default=[], help="exactly these cells")
    p.add_argument("--peers", metavar="REGEX", default="", help="other packages by name, or none")
    p.add_argument("--threads", type=int, default=cpus)
    p.add_argument("--rounds", type=int, default=5, help="clean turns of every contender")
    p.add_argument("--turn-ms", type=float, default=150)
    p.add_argument("--cold-rounds", type=int, default=15, help="the same for M < 64, where memory drifts")
    p.add_argument("--cold-turn-ms", type=float, default=50)
    p.add_argument("--pause-ms", type=float, default=15, help="between turns")
    p.add_argument("--foreign", type=float, default=FOREIGN_LIMIT, help="share of others' CPU time that spoils a turn")
    p.add_argument("--cold-mb", type=int, default=0, help="weights of M < 64 in all (default: 4 x L3)")
    p.add_argument("--timeout", type=float, default=300, help="seconds a contender may take for one answer")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu.jsonl")
    return p


def main() -> None:
    args = parser().parse_args()
    cells = chosen_cells(args)
    bench = Bench(args, cells)
    try:
        for N, K, M in dict.fromkeys((cell.N, cell.K, cell.M) for cell in sorted(cells, key=lambda c: (c.N, c.K, c.M))):
            bench.point(N, K, M)
    finally:
        bench.close()
    if bench.missing:
        sys.exit(f"cpu.py: {len(bench.missing)} of {len(cells)} cells have no figure: " + "; ".join(bench.missing))


if __name__ == "__main__":
    main()
