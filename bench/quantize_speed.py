#!/usr/bin/env python3
"""Speed of quantizing on the CPU, op by op and recipe by recipe, beside other packages and memory, in one run.

    python bench/quantize_speed.py [--only REGEX] [--rounds N] [--out bench/results/quantize_speed.jsonl]

Everything runs in one process, so in an environment that has precal and the other packages (bench/README.md); what does
not import is left out. Rounds go through all contenders, the limits first: memcpy and a read of as much memory as the
weight has, and float32 multiply-adds, from which the frequency follows (--flops-per-cycle: 64 on two 512-bit pipes).
A row is the median over rounds of wall time, and of CPU time of the whole process in core-cycles per weight, which
other processes disturb less. Slow peers get fewer rows of the weight. With the default settings it takes about four
minutes. `bench/report.py` makes the tables of docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cpu import commit
from recipes import ROOT, facts
from rows import Results
from torch import Tensor

from precal_ext import _C, measure, ops
from precal_ext.config import QuantizeConfig
from precal_ext.quantize import fit_set_grid, quantize_weight

SHAPE = (4096, 4096)
Run = Callable[[], Any]


@dataclass
class Case:
    """One contender on one input, and (wall seconds, CPU seconds, GHz) of its turns."""

    name: str
    dtype: torch.dtype
    threads: int
    weights: int
    run: Run
    source: str = "precal"
    turns: list[tuple[float, float, float]] = field(default_factory=list)


def ours(w: Tensor, threads: int) -> list[Case]:
    def case(name: str, run: Run) -> Case:
        return Case(name, w.dtype, threads, w.numel(), run)

    found = []
    for bits in (4, 3):
        config = QuantizeConfig(bits=bits)
        grid = fit_set_grid([w[:256].float()], config)
        found.append(case(f"recipe precal, {bits} bits", lambda c=config, g=grid: quantize_weight(w, c, g)))
    q = quantize_weight(w, QuantizeConfig(), fit_set_grid([w[:256].float()], QuantizeConfig()))
    plain = QuantizeConfig(trellis=False)
    plain_grid = fit_set_grid([w[:256].float()], plain)
    lam, few = ops.salience_threshold(w, 0.05), w[: (1 << 20) // w.shape[1]]
    return [
        *found,
        case("recipe precal, 4 bits, no trellis", lambda: quantize_weight(w, plain, plain_grid)),
        case("recipe paper, 4 bits", lambda: quantize_weight(w, QuantizeConfig(recipe="paper"), None)),
        case("recipe rtn, 4 bits", lambda: quantize_weight(w, QuantizeConfig(recipe="rtn"), None)),
        Case(
            "fit of a grid, a weight of its sample",
            w.dtype,
            threads,
            1 << 20,
            lambda: fit_set_grid([few], QuantizeConfig()),
        ),
        case("salience_threshold", lambda: ops.salience_threshold(w, 0.05)),
        case("salience_mask", lambda: ops.salience_mask(w, lam)),
        case("histogram, 2048 bins", lambda: ops.histogram(w, 2048, -0.25, 0.25)),
        case("kl_nats (measure)", lambda: measure.kl_nats(w, q)),
    ]


def limits(w: Tensor, threads: int) -> list[Case]:
    other = torch.empty_like(w)
    words = w.view(torch.int64)
    return [
        Case("memcpy", w.dtype, threads, w.numel(), lambda: other.copy_(w), "limit"),
        Case("read", w.dtype, threads, w.numel(), lambda: words.sum(), "limit"),
    ]


def hqq(w: Tensor, threads: int) -> list[Case]:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    few = w[:256].contiguous()

    def run() -> Any:
        options = {"nbits": 4, "group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": w.dtype}
        return quantizer.quantize(few, optimize=True, **options)

    return [Case("hqq, 4 bits g64, optimize", w.dtype, threads, few.numel(), run, version("hqq"))]


def auto_adpq(w: Tensor, threads: int) -> list[Case]:
    package = importlib.import_module("auto_adpq")
    few = w[:512, :512].float().numpy().copy()
    config = package.AutoAdpQConfig(
        group_size=128, n_iters=250, alpha=0.02, q_bit=4, symmetrical_quantization=True, data_packing=False
    )
    worker = package.Auto_AdpQ(config=config)
    return [
        Case(
            "auto_adpq, 4 bits g128",
            w.dtype,
            threads,
            few.size,
            lambda: worker.AdpQ_quantize(few),
            version("auto_adpq"),
        )
    ]


def bitsandbytes(w: Tensor, threads: int) -> list[Case]:
    quantize = importlib.import_module("bitsandbytes.functional").quantize_4bit
    few = w[:1024].contiguous()
    run = lambda: quantize(few, blocksize=64, quant_type="nf4")  # noqa: E731
    return [Case("bitsandbytes, NF4 g64", w.dtype, threads, few.numel(), run, version("bitsandbytes"))]


def compiled(w: Tensor, threads: int) -> list[Case]:
    def rtn(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        groups = v.float().view(v.shape[0], -1, 128)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-8)
        codes = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8).view(v.shape)
        return codes[:, ::2] | codes[:, 1::2] << 4, scale, low

    run = torch.compile(rtn)
    return [Case("torch.compile, RTN 4 bits g128", w.dtype, threads, w.numel(), lambda: run(w), version("torch"))]


def version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def gigahertz(flops_per_cycle: float, threads: int) -> float:
    _C.set_num_threads(threads)
    value: float = _C.measure_limit("fp32_fma", 0.02)["value"]
    return value / flops_per_cycle / threads


def all_cases(wanted: re.Pattern[str]) -> list[Case]:
    w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02
    found: list[Case] = []
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        for dtype in (torch.float32, torch.bfloat16):
            for make in (limits, ours, hqq, auto_adpq, bitsandbytes, compiled):
                torch.set_num_threads(threads)
                try:
                    cases = [case for case in make(w.to(dtype), threads) if wanted.search(case.name)]
                    for case in cases:
                        case.run()
                except Exception as error:  # a package that is not there, or refuses in its own way
                    if make in (limits, ours):
                        raise
                    print(f"{make.__name__} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
                    continue
                found += cases
    return found


def turn(case: Case, flops_per_cycle: float) -> None:
    torch.set_num_threads(case.threads)
    clock = gigahertz(flops_per_cycle, case.threads)
    wall, cpu = time.perf_counter(), time.process_time()
    case.run()
    case.turns.append((time.perf_counter() - wall, time.process_time() - cpu, clock))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", default="", help="names to run, with memcpy and read")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--flops-per-cycle", type=float, default=64.0, help="of one core, float32")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "quantize_speed.jsonl")
    args = parser.parse_args()
    results = Results(
        argparse.Namespace(out=args.out, only="", missing=False), ("cpu", "isa", "threads", "dtype", "name")
    )
    cases = all_cases(re.compile(f"^(memcpy|read)$|{args.only}" if args.only else ""))
    for _ in range(args.rounds):
        for case in cases:
            turn(case, args.flops_per_cycle)
    # Others only ever take from the frequency that multiply-adds show: the best of all turns is nearest to the core's.
    clock = max(clock for case in cases for _, _, clock in case.turns)
    memory: dict[tuple[int, torch.dtype], float] = {}
    for case in cases:
        seconds = statistics.median(wall for wall, _, _ in case.turns) / case.weights
        cycles = statistics.median(cpu for _, cpu, _ in case.turns) * clock * 1e9 / case.weights
        key = (case.threads, case.dtype)
        memory.setdefault(key, seconds)  # memcpy comes first
        row = {
            "name": case.name,
            "source": case.source,
            "dtype": str(case.dtype).removeprefix("torch."),
            "threads": case.threads,
            "weights": case.weights,
            "mweights_per_s": round(1e-6 / seconds, 3),
            "cycles_per_weight": round(cycles, 2),
            "cycles_min": round(min(cpu for _, cpu, _ in case.turns) * clock * 1e9 / case.weights, 2),
            "x_memcpy": round(memory[key] / seconds, 5),
            "ghz": round(clock, 2),
            "rounds": args.rounds,
            "commit": commit(),
            **facts("bench/quantize_speed.py"),
        }
        results.put({**row, "isa": _C.cpu_isa()})
        print(
            f"{row['name']:36}{row['dtype']:9}{case.threads} threads{row['mweights_per_s']:12.2f} M/s"
            f"{row['cycles_per_weight']:10.2f} cycles/weight{row['x_memcpy']:9.4f} x memcpy",
            flush=True,
        )


if __name__ == "__main__":
    main()
