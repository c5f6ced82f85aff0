"""One contender of bench/cpu.py in a process of its own: what it computes, the check against float64, the clock.

Commands come as JSON lines on stdin, answers go to stdout; between commands the process sleeps. `bench/cpu.py` starts
it as `python bench/cpu_worker.py NAME THREADS`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DISTINCT = 256  # rows of a weight that differ; the others repeat them, so that quantizing takes no time
ROLL = 37  # copy i begins at row 37 * i of them: engines that merge equal constants would undo the copies
CHECKED_ROWS = 32
# Largest relative error against float64 on the contender's own dequantized weight. bfloat16 results alone cost 1.7e-3,
# bfloat16 scales make it 3e-3; int8 activations cost 5e-3 to 9e-3, so a16 that is secretly a8 does not pass as such.
BOUNDS = {"f32": 1e-4, "bf16": 5e-3, "a16": 5e-3, "a8": 2e-2}


class Weights:
    """Copies of one weight [N, K]; each is rows of `base` [DISTINCT, K], in an order of its own."""

    def __init__(self, N: int, K: int) -> None:
        self.N, self.K = N, K
        random = np.random.default_rng(N * 100_003 + K)
        self.base: Array = random.standard_normal((min(N, DISTINCT), K), np.float32) * np.float32(0.02)

    def order(self, copy: int) -> Array:
        return (np.arange(self.N) + ROLL * copy) % len(self.base)


@dataclass
class Ready:
    """What a turn runs: `run` computes every copy once, `outputs` gives (copy, y [M, N]) of a run."""

    run: Callable[[], Any]
    outputs: Callable[[], list[tuple[int, Array]]]
    copies: int
    packed_bytes: int  # of one copy
    x: Array  # float32 [M, K] with the values that the contender got
    base: Array  # its dequantized weight, rows of Weights.base, float32 or float64


def bf16_bits(x: Array) -> Array:
    """float32 -> bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Contender(ABC):
    """Keeps what it made of the weights of the last shape; `ready` is called for one M after another."""

    mode = "f32"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.weights = Weights(0, 1)
        self.made: dict[Any, Any] = {}

    @abstractmethod
    def versions(self) -> str: ...

    @abstractmethod
    def facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        """bits, group_size, c, mode: of this contender, or of the cell it is asked for."""

    @abstractmethod
    def prepare(self, M: int, copies: int, settings: dict[str, Any]) -> Ready: ...

    def ready(self, N: int, K: int, M: int, cold_bytes: int, settings: dict[str, Any]) -> Ready:
        if (self.weights.N, self.weights.K) != (N, K):
            self.made.clear()
            self.weights = Weights(N, K)
        copies = 1
        if cold_bytes:
            copies = max(2, -(-cold_bytes // self.bytes_of_a_copy(settings)))
        return self.prepare(M, copies, settings)

    def bytes_of_a_copy(self, settings: dict[str, Any]) -> int:
        """About; decides how many copies are made."""
        N, K, facts = self.weights.N, self.weights.K, self.facts(settings)
        return int(N * K * facts["bits"] / 8)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def activations(self, M: int) -> Array:
        return np.random.default_rng(M).standard_normal((M, self.weights.K), np.float32)


def mode_argument(module: Any) -> str | None:
    """Name of the argument of `linear` that chooses the activation mode, if it has one."""
    found = re.search(r"(\w+): str = '(?:f32|a16|a8)'", module.linear.__doc__ or "")
    return found[1] if found else None


class Precal(Contender):
    """`precal_ext._C.linear` on numpy arrays: bfloat16 in, bfloat16 out."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        from precal_ext import _C

        _C.set_num_threads(threads)
        self.c = _C

    def versions(self) -> str:
        from precal_ext import __version__

        return f"precal {__version__}"

    def facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "mode": settings["mode"] if mode_argument(self.c) else "f32", "isa": self.c.cpu_isa()}

    def bound(self, facts: dict[str, Any]) -> float:
        return BOUNDS["a8" if facts["mode"] == "a8" else "a16"]  # y is bfloat16 in every mode

    def prepare(self, M: int, copies: int, settings: dict[str, Any]) -> Ready:
        import torch

        from precal_ext.config import QuantizeConfig
        from precal_ext.qtensor import QTensor, WeightSpec
        from precal_ext.quantize import fit_set_grid, quantize_weight

        weights = self.weights
        fields = {name: settings[name] for name in ("bits", "group_size", "c", "trellis")}
        config = QuantizeConfig(**fields)
        spec = WeightSpec.from_config(weights.N, weights.K, config)
        key = json.dumps(fields)

        def quantize() -> QTensor:
            base = torch.from_numpy(weights.base)
            return quantize_weight(base, config, fit_set_grid([base], config))

        q = self.keep((key, "q"), quantize)

        def copy(i: int) -> Array:
            order = torch.from_numpy(weights.order(i))
            tensors = {
                name: t if name in ("weight_grid", "weight_shape") else t[order].contiguous()
                for name, t in q.tensors.items()
            }
            names = ("packed", "scale", "row_scale", "grid", "outlier_index", "outlier_value")
            found = [tensors.get(f"weight_{name}") for name in names]
            arrays = [t if t is None else to_numpy(t) for t in found]
            return np.asarray(self.c.prepack(*arrays, None, None, spec.K, spec.bits, spec.group_size))

        stored = [self.keep((key, i), lambda i=i: copy(i)) for i in range(copies)]
        bits = bf16_bits(self.activations(M))
        mode = mode_argument(self.c)
        extra = {mode: settings["mode"]} if mode else {}
        arguments, linear = spec.op_arguments(), self.c.linear

        def run() -> list[Array]:
            return [linear(bits, weight, None, *arguments, **extra) for weight in stored]

        return Ready(
            run,
            lambda: [(i, bf16_values(y)) for i, y in enumerate(run())],
            copies,
            int(spec.stored_bits() // 8),
            bf16_values(bits),
            q.dequantize().numpy(),
        )


def to_numpy(tensor: Any) -> Array:
    import torch

    return np.asarray(tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())


# How much of a turn goes to which limit. Peaks hardly drift (3 % where it was looked at), memory bandwidth does.
LIMIT_SHARES = {"dram_read": 0.5, "copy": 0.2, "fp32_fma": 0.1, "bf16_dot": 0.1, "int8_dot": 0.1}


class Limits:
    """`_C.measure_limit`; a turn gives one figure for every limit."""

    def __init__(self, threads: int) -> None:
        from precal_ext import _C

        _C.set_num_threads(threads)
        self.c = _C

    def versions(self) -> str:
        return "limits"

    def measure(self, seconds: float, megabytes: int) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, share in LIMIT_SHARES.items():
            try:
                found[name] = self.c.measure_limit(name, seconds * share, megabytes)["value"]
            except RuntimeError:  # this CPU lacks the instruction
                found[name] = None
        return found


def error_of(ready: Ready, weights: Weights) -> float:
    """The largest relative error of sampled rows over the copies, against float64 on the dequantized weight."""
    rows = np.random.default_rng(0).choice(weights.N, min(weights.N, CHECKED_ROWS), replace=False)
    worst = 0.0
    found = ready.outputs()
    assert len(found) == ready.copies
    for copy, y in (found[0], found[-1]):
        expected = ready.x.astype(np.float64) @ ready.base[weights.order(copy)[rows]].astype(np.float64).T
        error = np.linalg.norm(y[:, rows].astype(np.float64) - expected) / np.linalg.norm(expected)
        worst = max(worst, float(error)) if np.isfinite(error) else float("inf")
    return worst


def cpu_ticks() -> tuple[float, float]:
    """Seconds that all CPUs were busy (other guests' share too), and that have passed on all of them."""
    with open("/proc/stat", encoding="ascii") as stat:
        fields = [int(field) for field in stat.readline().split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(fields) - fields[3] - fields[4]) / tick, sum(fields) / tick


def own_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class ForeignShare:
    """Which share of the machine's CPU time others used meanwhile; None where /proc/stat is absent."""

    def __enter__(self) -> ForeignShare:
        self.share: float | None = None
        self.known = Path("/proc/stat").is_file()
        if self.known:
            self.before = (*cpu_ticks(), own_seconds())
        return self

    def __exit__(self, *_: object) -> None:
        if not self.known:
            return
        busy, total = (now - then for now, then in zip(cpu_ticks(), self.before[:2], strict=True))
        own = own_seconds() - self.before[2]
        self.share = max(0.0, busy - own) / total if total > 0 else 0.0


def timed(ready: Ready, seconds: float) -> dict[str, Any]:
    """Median microseconds of one call over passes through all copies."""
    ready.run()  # threads awake, activations in the cache
    times = []
    with ForeignShare() as others:
        end = time.perf_counter() + seconds
        while True:
            begin = time.perf_counter()
            ready.run()
            now = time.perf_counter()
            times.append((now - begin) / ready.copies)
            if now >= end:
                break
    return {"us": float(np.median(times)) * 1e6, "passes": len(times), "foreign": others.share}


def contender(name: str, threads: int) -> Contender | Limits:
    if name == "precal":
        return Precal(threads)
    if name == "limits":
        return Limits(threads)
    import cpu_peers

    return cpu_peers.PEERS[name](threads)


def answer(who: Contender | Limits, cases: dict[str, Ready], command: dict[str, Any]) -> dict[str, Any]:
    kind = command["do"]
    if isinstance(who, Limits):
        assert kind == "limits"
        with ForeignShare() as others:
            found = who.measure(command["seconds"], command["megabytes"])
        return {"limits": found, "foreign": others.share}
    if kind == "turn":
        return timed(cases[command["case"]], command["seconds"])
    assert kind == "case"
    if command["first"]:
        cases.clear()
    settings = command["settings"]
    ready = who.ready(command["N"], command["K"], command["M"], command["cold_bytes"], settings)
    facts = who.facts(settings)
    bound = who.bound(facts) if isinstance(who, Precal) else BOUNDS[facts["mode"]]
    error = error_of(ready, who.weights)
    if not error <= bound:
        return {"failed": f"relative error must be at most {bound:g}, got {error:.2e}"}
    cases[command["case"]] = ready
    return {**facts, "error": error, "copies": ready.copies, "packed_bytes": ready.packed_bytes}


def main() -> None:
    name, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")  # libraries that print do so to stderr
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        who = contender(name, threads)
        reply({"versions": who.versions()})
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reply({"failed": str(error)})
        return
    cases: dict[str, Ready] = {}
    for line in sys.stdin:
        try:
            reply(answer(who, cases, json.loads(line)))
        except Exception as error:  # a peer may refuse a shape in its own way; the run goes on without it
            reply({"failed": f"{type(error).__name__}: {error}".splitlines()[0]})


if __name__ == "__main__":
    main()
