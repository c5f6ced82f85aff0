"""Runs numbered cases in worker processes, so that a crash, a hang or an endless allocation is a finding with a number.

The parent starts one worker after another; a worker writes the number of the case at hand into a file that both map.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

HANG_SECONDS = 120  # one case takes less than a second
MAX_FINDINGS = 20

Work = Callable[[int, int, argparse.Namespace, "Progress"], "Counter[str]"]


class Finding(AssertionError):  # noqa: N818
    """Something that must not happen."""


class Progress:
    """The number of the case at hand, seen by both processes."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8)

    def at(self, index: int) -> None:
        self._map[:8] = struct.pack("<q", index)

    def now(self) -> int:
        return int(struct.unpack("<q", self._map[:8])[0])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, help="stop after so many cases")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)


def main(
    script: Path,
    options: argparse.Namespace,
    work: Work,
    wanted: int,
    batch: int,
    extra: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> int:
    """Worker or parent, as ``options`` say. The parent prints what was done as JSON; the exit code is 1 with findings.

    Args:
        work: runs cases [first, first + count) and counts what it did, by outcome.
        wanted: stop after so many, where ``options`` name no number of cases.
        batch: cases of one worker.
        extra: options that workers need besides the seed and their cases.
    """
    if options.worker is not None:
        done = work(options.first, options.cases, options, Progress(options.worker))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(json.dumps({"done": done, "peak_mb": peak}))
        return 0

    start, first, total, peak = time.monotonic(), options.first, Counter[str](), 0
    findings: list[dict[str, object]] = []
    while len(findings) < MAX_FINDINGS:
        count = min(batch, options.first + options.cases - first) if options.cases is not None else batch
        if count <= 0 or (options.cases is None and total.total() >= wanted):
            break
        with tempfile.TemporaryDirectory() as folder:
            shared = Path(folder, "case")
            shared.write_bytes(struct.pack("<q", first))
            command = [sys.executable, str(script), "--worker", str(shared), "--seed", str(options.seed)]
            command += ["--first", str(first), "--cases", str(count), *extra]
            reason, index, text = _watch(command, {**os.environ, **environment}, shared)
        if reason is not None:  # what the worker did before is lost, and not counted
            # A sanitizer says first what was wrong, Python last.
            text = text if len(text) < 4000 else f"{text[:2000]}\n...\n{text[-2000:]}"
            findings.append({"case": index, "what": reason, "output": text})
            print(f"case {index}: {reason}\n{text}", file=sys.stderr)
            first = index + 1
            continue
        result = json.loads(text.strip().splitlines()[-1])
        total += Counter(result["done"])
        peak, first = max(peak, result["peak_mb"]), first + count
        print(f"{total.total()} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    report = {
        "seed": options.seed,
        "cases": first - options.first,
        "done": total.total(),
        "seconds": round(time.monotonic() - start),
        "peak_mb": peak,
        "findings": findings,
        "by_outcome": dict(sorted(total.items())),
    }
    print(json.dumps(report, indent=2))
    return 1 if findings else 0


def _watch(command: list[str], env: dict[str, str], shared: Path) -> tuple[str | None, int, str]:
    """Why the worker failed (None: it did not), at which case, and what it said."""
    progress = Progress(shared)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
        seen, since, reason = progress.now(), time.monotonic(), None
        while child.poll() is None and reason is None:
            time.sleep(0.05)
            if progress.now() != seen:
                seen, since = progress.now(), time.monotonic()
            elif time.monotonic() - since > HANG_SECONDS:
                reason = f"no end after {HANG_SECONDS} s"
                child.kill()
                child.wait()
        if reason is None and child.returncode != 0:
            reason = f"exit code {child.returncode}"
        output.seek(0)
        return reason, progress.now(), output.read()
