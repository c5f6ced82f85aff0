"""What a plan will cost: memory, disk, time, and the table of its tensors."""

from __future__ import annotations

import math
import resource
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from precal_ext.checkpoint import read_chunks
from precal_ext.measure import measure
from precal_ext.pipeline import DEPTH
from precal_ext.plan import Job, Plan, what_is_copied
from precal_ext.quantize import SAMPLE, fit_set_grid, quantize_weight

# Scratch of the ops and of the figures, which work on about a million weights at a time, and what malloc keeps.
SCRATCH_BYTES = 100_000_000
_TRIAL = (256, 1024)  # rows and columns that are quantized to see how fast this machine is


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds. ``seconds`` is the longer of computing and reading, which overlap."""

    memory_bytes: int
    disk_bytes: int
    free_bytes: int
    seconds: float
    tensors: int
    recorded: int
    processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        each = "" if self.processes == 1 else f" in each of {self.processes} processes"
        lines = [
            f"memory at most {readable_size(self.memory_bytes)}{each}, disk {readable_size(self.disk_bytes)} of "
            f"{readable_size(self.free_bytes)} free, time about {readable_time(self.seconds)}"
        ]
        if self.recorded:
            lines.append(f"continues an unfinished run: {self.recorded} of {self.tensors} tensors are recorded")
        return lines


def estimate(plan: Plan, processes: int = 1) -> Estimate:
    """Memory from the sizes of what is under way at once, time from a trial of the settings on this machine, which is
    taken for that of each process."""
    held = sorted((job.memory for job in plan.jobs), reverse=True)
    # One tensor is read, one computed, one written, and DEPTH wait on either side.
    under_way = max(held[0], min(plan.memory_limit, sum(held[: 3 + 2 * DEPTH])))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    disk = sum(plan.writer(plan.out).sizes.values())
    folder = plan.out.absolute()
    while not folder.exists():
        folder = folder.parent
    return Estimate(
        base + under_way + SCRATCH_BYTES,
        disk,
        shutil.disk_usage(folder).free,
        max(_computing(plan), _reading(plan)) / processes,
        len(plan.jobs),
        plan.recorded(),
        processes,
    )


def _computing(plan: Plan) -> float:
    """Every weight is quantized and measured once, and a sample of every set another time to fit its grid."""
    w = torch.randn(_TRIAL, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    settings = plan.config._with({})
    grid = fit_set_grid([w], settings)
    best = math.inf
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        measure(w, quantize_weight(w, settings, grid))
        best = min(best, time.perf_counter() - started)
    sets: dict[str, int] = {}
    for job in plan.jobs:
        if job.spec is not None and job.decision is not None:
            name = job.decision.fusion_set
            sets[name] = sets.get(name, 0) + job.spec.N * job.spec.K
    rounds = settings.fit_rounds + bool(settings.trellis and settings.fit_rounds)  # a trellis judges the last one too
    fitted = 0 if settings.uniform else rounds * sum(min(SAMPLE, size) for size in sets.values())
    return best / w.numel() * (sum(sets.values()) + fitted)


def _reading(plan: Plan) -> float:
    """All bytes at the rate of the first piece of the largest tensor."""
    largest = max((job.info for job in plan.jobs), key=lambda info: info.nbytes)
    started = time.perf_counter()
    piece = len(next(read_chunks(largest), b""))
    rate = piece / (time.perf_counter() - started)
    return sum(job.info.nbytes for job in plan.jobs) / rate if piece else 0.0


def table(plan: Plan) -> list[str]:
    """A line per tensor: what becomes of it, shape, dtype, settings, bits per weight, bytes before and after."""
    head = "tensor", "shape", "dtype", "action", "bits", "group", "c", "grid", "bits/w", "bytes", "bytes after"
    rows: list[tuple[str, ...]] = [head, *(_row(plan, job) for job in plan.jobs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 4 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _row(plan: Plan, job: Job) -> tuple[str, ...]:
    d = describe(plan, job)
    settings = [str(d[key]) if key in d else "-" for key in ("bits", "group_size", "c", "grid")]
    shape = " x ".join(map(str, d["shape"])) or "scalar"
    action = d["action"] if d["action"] != "keep" else f"keep: {d['reason']}"
    sizes = f"{d['bits_per_weight']:.3f}", f"{d['bytes_before']:,}", f"{d['bytes_after']:,}"
    return (d["tensor"], shape, d["dtype"], action, *settings, *sizes)


def describe(plan: Plan, job: Job) -> dict[str, Any]:
    """One tensor of the plan as JSON."""
    data: dict[str, Any] = {"tensor": job.info.name, "shape": list(job.info.shape)}
    data["dtype"] = str(job.info.dtype).removeprefix("torch.")
    if job.spec is None or job.decision is None:
        data["action"], data["reason"] = what_is_copied(job)
        data["bits_per_weight"] = 8.0 * job.info.dtype.itemsize
    else:
        s = job.spec
        data.update(action="quantize", reason=job.decision.reason, fusion_set=job.decision.fusion_set, bits=s.bits)
        settings = job.decision.settings(plan.config)
        data.update(group_size=s.group_size, c=s.c, grid=settings.grid, trellis=s.trellis)
        data["bits_per_weight"] = s.bits_per_weight()
    return {**data, "bytes_before": job.nbytes_in, "bytes_after": job.nbytes_out}


def to_dict(plan: Plan, cost: Estimate) -> dict[str, Any]:
    """Plan and estimate as JSON."""
    shards = plan.writer(Path(plan.out)).sizes
    return {"estimate": cost.to_dict(), "files": shards, "tensors": [describe(plan, job) for job in plan.jobs]}


def readable_size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def readable_time(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
