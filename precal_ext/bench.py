"""Speed of a quantized model beside its original: tokens per second, where the time goes, memory.

Each model has a process of its own and one of them works at a time; rounds go through both, because memory bandwidth
drifts. In a turn a model reads a prompt and then writes tokens one by one. Figures are medians over rounds, ratios are
paired inside them.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from precal_ext import _C
from precal_ext.bench_worker import PARTS
from precal_ext.checkpoint import CheckpointError, read_config
from precal_ext.linear import ACTIVATIONS
from precal_ext.model import read_format

PHASES = ("prefill", "decode")
FOREIGN_LIMIT = 0.1  # share of others' CPU time from which on figures are those of a busy machine
LIMIT_SECONDS, LIMIT_MEGABYTES = 0.1, 256  # how long, and through how much, memory bandwidth is measured in a round


@dataclass(frozen=True)
class Measured:
    """One model.

    Args:
        tokens_per_second: "prefill" and "decode".
        milliseconds: phase -> part -> ms; per token for "decode", of the whole prompt for "prefill".
        ops_outside: torch ops of a token outside the linear layers and the head.
        weight_bytes, linear_bytes, lm_head_bytes: in memory; the first is everything.
        lm_head_bits: width of a quantized head, else None.
        peak_bytes, resident_bytes: of its process, torch and Python included: while loading, and at the end.
    """

    model: str
    tokens_per_second: dict[str, float]
    milliseconds: dict[str, dict[str, float]]
    ops_outside: int
    weight_bytes: int
    linear_bytes: int
    lm_head_bytes: int
    lm_head_bits: int | None
    peak_bytes: int
    resident_bytes: int | None

    def total(self, phase: str) -> float:
        return sum(self.milliseconds[phase].values())

    def outside(self, phase: str) -> float:
        """Milliseconds that are not in the quantized layers."""
        return self.total(phase) - self.milliseconds[phase]["linear"]

    def largest(self, phase: str) -> str:
        """The part that takes most."""
        return max(PARTS, key=lambda part: self.milliseconds[phase][part])


@dataclass(frozen=True)
class Speed:
    """Result of ``bench``. ``ratio`` is the quantized model's speed over the original's, by phase; None without one.

    Args:
        read_gbps: memory bandwidth of this machine, measured in the same rounds.
        foreign: share of the machine's CPU time that other processes took during the turns (Linux; elsewhere 0).
        logits_error: relative difference (2-norm) of some logits after the prompt from the original's.
    """

    quantized: Measured
    original: Measured | None
    ratio: dict[str, float] | None
    logits_error: float | None
    read_gbps: float
    foreign: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def decode_floor(self) -> float:
        """Milliseconds that reading the weights of one token takes at least."""
        q = self.quantized
        return (q.linear_bytes + q.lm_head_bytes) / self.read_gbps * 1e-6


class Process:
    """A model in its process."""

    def __init__(self, model: Path, threads: int) -> None:
        self.model = model
        # The child sees the modules that we see.
        start = 'import sys; sys.path[:] = sys.argv[1].split("\\n"); from precal_ext.bench_worker import main; main()'
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        command = [sys.executable, "-c", start, "\n".join(sys.path)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the missing answer says so
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise CheckpointError(f"{self.model}: its process must answer, got exit status {status}; out of memory?")
        answer = json.loads(line)
        if "failed" in answer:
            text = answer["failed"] if answer["kind"] == "CheckpointError" else f"{answer['kind']}: {answer['failed']}"
            raise CheckpointError(text if str(self.model) in text else f"{self.model}: {text}")
        return answer["answer"]

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def bench(
    model: str | Path,
    original: str | Path | None = None,
    *,
    tokens: int = 32,
    prompt_length: int = 512,
    rounds: int = 5,
    threads: int | None = None,
    activations: str = "a16",
    dtype: str = "auto",
) -> Speed:
    """Measure a quantized model directory, beside its original when one is given.

    Args:
        tokens: written one by one in a turn, batch 1, after a prompt of ``prompt_length``.
        rounds: turns of each model.  threads: of torch (default: every CPU this process may use).
        activations: of the quantized layers: "f32", "a16" or "a8" (``ops.linear``).
        dtype: of everything else and of the original: "float32", "bfloat16", "float16", or "auto": bfloat16 where the
            CPU computes in it, else float32.
    Raises:
        CheckpointError: a directory cannot be used.  ValueError: an argument breaks its contract.
    """
    folders = [Path(model), *([] if original is None else [Path(original)])]
    for name, value in (("tokens", tokens), ("prompt_length", prompt_length), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"bench: {name} must be at least 1, got {value}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"bench: activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"bench: dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")
    read_format(folders[0])
    if len(folders) > 1 and read_config(folders[1]).get("quantization_config"):
        raise CheckpointError(f"{folders[1]}: must be the model before quantization, got a quantized one")
    threads = threads or _cpus()
    dtype = native_dtype() if dtype == "auto" else dtype
    threads_before = _C.get_num_threads()
    _C.set_num_threads(threads)
    processes = [Process(folder, threads) for folder in folders]
    try:
        facts = []
        for process in processes:
            loading = {"model": str(process.model), "dtype": dtype, "threads": threads, "activations": activations}
            facts.append(process.ask("load", **loading, prompt_length=prompt_length))
        _check_facts(folders, facts, prompt_length + tokens)
        logits = [process.ask("logits") for process in processes]
        for process in processes:
            process.ask("ops_outside")  # warms up what a single token needs
        turns: list[list[dict[str, float]]] = [[] for _ in processes]
        bandwidth = []
        for _ in range(rounds):
            bandwidth.append(_C.measure_limit("dram_read", LIMIT_SECONDS, LIMIT_MEGABYTES)["value"])
            for process, found in zip(processes, turns, strict=True):
                found.append(process.ask("turn", tokens=tokens))
        measured = [
            _measured(process, fact, found, tokens, prompt_length, rounds)
            for process, fact, found in zip(processes, facts, turns, strict=True)
        ]
    finally:
        _C.set_num_threads(threads_before)
        for process in processes:
            process.close()
    settings = {"threads": threads, "dtype": dtype, "activations": activations, "rounds": rounds}
    settings.update(tokens=tokens, prompt_length=prompt_length)
    ratio = error = None
    if len(processes) > 1:
        ratio = {phase: statistics.median(b[phase] / a[phase] for a, b in zip(*turns, strict=True)) for phase in PHASES}
        error = _relative_error(*logits)
    pair = (measured[0], measured[1] if len(measured) > 1 else None)
    every = [turn for found in turns for turn in found]
    seconds = sum(turn[phase] for turn in every for phase in PHASES) * (os.cpu_count() or 1)
    foreign = sum(turn["foreign"] for turn in every) / seconds
    return Speed(*pair, ratio, error, statistics.median(bandwidth), foreign, settings)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def native_dtype() -> str:
    """bfloat16 where the CPU has dot products of it, else float32."""
    try:
        _C.measure_limit("bf16_dot", 0.001)
    except RuntimeError:
        return "float32"
    return "bfloat16"


def _check_facts(folders: Sequence[Path], facts: Sequence[dict[str, Any]], positions: int) -> None:
    for folder, fact in zip(folders, facts, strict=True):
        if fact["positions"] is not None and fact["positions"] < positions:
            raise CheckpointError(
                f"{folder}: must have room for prompt and tokens, {positions} in all, got "
                f"max_position_embeddings {fact['positions']}; make --prompt-length or --tokens smaller"
            )
    if not facts[0]["quantized"]:
        raise CheckpointError(f"{folders[0]}: must have quantized layers, got none")
    if len({(fact["vocabulary"], fact["linears"]) for fact in facts}) > 1:
        got = " and ".join(f"{f['linears']} linear layers, vocabulary {f['vocabulary']}" for f in facts)
        raise CheckpointError(f"{folders[1]}: must be the original of {folders[0]}, got {got}")


def _relative_error(got: Sequence[float], expected: Sequence[float]) -> float:
    power = sum(e * e for e in expected)
    return (sum((g - e) ** 2 for g, e in zip(got, expected, strict=True)) / power) ** 0.5 if power else 0.0


def _measured(
    process: Process,
    facts: dict[str, Any],
    turns: Sequence[dict[str, float]],
    tokens: int,
    prompt_length: int,
    rounds: int,
) -> Measured:
    """Speed from the turns; its parts from turns of their own, which are a little slower for being timed."""
    counts = {"prefill": prompt_length, "decode": tokens}
    seconds = {phase: statistics.median(turn[phase] for turn in turns) for phase in PHASES}
    splits = [process.ask("split", tokens=tokens) for _ in range(max(1, rounds // 2))]
    milliseconds = {}
    for phase in PHASES:
        parts = {part: statistics.median(split[phase][part] for split in splits) for part in PARTS}
        # Shares of the timed turns, on the scale of the others.
        scale = seconds[phase] / sum(parts.values()) * 1e3 / (tokens if phase == "decode" else 1)
        milliseconds[phase] = {part: value * scale for part, value in parts.items()}
    sizes = {key: facts[key] for key in ("weight_bytes", "linear_bytes", "lm_head_bytes", "lm_head_bits")}
    return Measured(
        str(process.model),
        {phase: counts[phase] / seconds[phase] for phase in PHASES},
        milliseconds,
        process.ask("ops_outside"),
        **sizes,
        **process.ask("memory"),
    )


# ---- as text --------------------------------------------------------------------------------------------------------


def lines(speed: Speed) -> list[str]:
    """The result for people."""
    s, rows = speed.settings, [("quantized", speed.quantized)]
    if speed.original is not None:
        rows.insert(0, ("original", speed.original))
    prompt = f"prompt of {s['prompt_length']}"
    found = [
        f"{s['threads']} thread{'s' * (s['threads'] > 1)}, {s['dtype']}, activations {s['activations']}"
        f"; medians of {s['rounds']} rounds",
        "",
        f"{'tokens per second':18}{'decode':>10}{prompt:>16}{'weights':>12}{'resident':>12}{'peak':>12}",
    ]
    for name, m in rows:
        rates, resident = m.tokens_per_second, "-" if m.resident_bytes is None else _gb(m.resident_bytes)
        sizes = f"{_gb(m.weight_bytes):>12}{resident:>12}{_gb(m.peak_bytes):>12}"
        found.append(f"{name:18}{rates['decode']:>10.1f}{rates['prefill']:>16.1f}{sizes}")
    if speed.ratio is not None:
        found.append(f"{'ratio':18}{speed.ratio['decode']:>9.2f}x{speed.ratio['prefill']:>15.2f}x")
    for phase, what in (("decode", "ms per token"), ("prefill", f"ms of the {prompt}")):
        found += ["", f"{what:22}" + "".join(f"{part:>11}" for part in (*PARTS, "all"))]
        for name, m in rows:
            figures = [m.milliseconds[phase][part] for part in PARTS]
            found.append(f"{name:22}" + "".join(f"{figure:>11.2f}" for figure in (*figures, m.total(phase))))
    return [*found, "", *verdict(speed)]


def verdict(speed: Speed) -> list[str]:
    """What dominates, in sentences."""
    q = speed.quantized
    total, outside = q.total("decode"), q.outside("decode")
    rest = outside - q.milliseconds["decode"]["lm_head"]
    part = q.largest("decode")
    found = [
        f"decode: {part} dominates with {q.milliseconds['decode'][part] / total:.0%}; {outside / total:.0%} of a token "
        f"is outside the quantized layers. Attention, norms and the rest are {q.ops_outside} torch ops of "
        f"{rest / max(1, q.ops_outside) * 1e3:.1f} us each, Python included.",
        f"reading the weights of a token takes {speed.decode_floor:.2f} ms at the {speed.read_gbps:.1f} GB/s measured "
        f"in the same rounds: {speed.decode_floor / total:.0%} of its time.",
        f"prompt: {q.largest('prefill')} dominates with "
        f"{q.milliseconds['prefill'][q.largest('prefill')] / q.total('prefill'):.0%}.",
    ]
    if speed.logits_error is not None:
        found.append(f"logits after the prompt differ from the original's by {speed.logits_error:.1%} (2-norm).")
    if speed.foreign > FOREIGN_LIMIT:
        found.append(
            f"other processes took {speed.foreign:.0%} of the CPU meanwhile: measure again on a quiet machine."
        )
    return found


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
