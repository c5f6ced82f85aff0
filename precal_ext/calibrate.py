"""``--calibrate gptq``: after the data-free quantization of a weight, other codes for it, chosen on a text.

The model runs on windows of the text one decoder layer at a time (``streaming``). Of each layer the inputs of its
linears are seen with the layer as it was, and with all layers before it quantized; then its weights are rounded again
(``gptq``), and what the quantized layer makes of the windows is what the next one gets. docs/calibration.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from precal_ext import ranks
from precal_ext.checkpoint import MAX_SHARD_BYTES, CheckpointError, ShardWriter, read_index, read_tensor
from precal_ext.config import QuantizeConfig
from precal_ext.convert import Job, Plan, Progress, plan_quantization, run_plan
from precal_ext.evaluate import load_tokenizer, read_documents
from precal_ext.gptq import Factor, factor, gptq
from precal_ext.mixtures import is_expert
from precal_ext.qtensor import QTensor
from precal_ext.quantize import fit_set_grid, quantize_weight
from precal_ext.report import Report
from precal_ext.streaming import HiddenStates, Skeleton

METHODS = ("gptq",)
DAMPING = 0.1  # docs/calibration.md has the losses that say so
LENGTH = 2048  # tokens of a window, where the model takes so many
TOKENS_AT_ONCE = 4096  # whose inputs to a layer's linears are in memory together
PANEL = 512  # rows of a Hessian that one thread computes
FEW = "saw fewer tokens than it has columns"


@dataclass(frozen=True)
class Calibration:
    """What a model is calibrated on, and how.

    Args:
        text: a UTF-8 text file, or ``.jsonl`` with a "text" field.
        windows: how many parts of it, evenly spread, >= 1.
        length: tokens of each, >= 2; None: 2048, or what the model takes.
        damping: share of the mean of a Hessian's diagonal that is added to its diagonal, > 0; large values trust the
            text less, and give the data-free codes in the end.
    """

    text: Path
    windows: int = 128
    length: int | None = None
    damping: float = DAMPING
    method: str = METHODS[0]

    def __post_init__(self) -> None:
        def check(name: str, value: Any, good: bool, contract: str) -> None:
            if not good:
                raise ValueError(f"calibrate: {name} must be {contract}, got {value!r}")

        check("method", self.method, self.method in METHODS, f"one of {', '.join(METHODS)}")
        check("windows", self.windows, type(self.windows) is int and self.windows >= 1, "an integer >= 1")
        good = self.length is None or (type(self.length) is int and self.length >= 2)
        check("length", self.length, good, "an integer >= 2")
        good = isinstance(self.damping, (int, float)) and 0 < self.damping < math.inf
        check("damping", self.damping, good, "a finite number > 0")


def calibrate_checkpoint(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig | None = None,
    *,
    calibration: Calibration,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tensor_parallel: int = 1,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """``quantize_checkpoint``, its codes chosen on a text: same format, same size, other codes.

    The same model, text and settings give the same bytes on the same machine, with any number of threads, interrupted
    or not. An interrupted call continues: it runs the finished layers again, which takes a part of the time.

    Returns:
        The report; ``calibration`` says on what, its entries how far outputs on the text are off before and after.
    Raises:
        CheckpointError: besides those of ``quantize_checkpoint``, a text that is too short, or a model that is not a
            stack of decoder layers that transformers can build.
    """
    plan = plan_quantization(model, out, config, max_shard_bytes=max_shard_bytes, tensor_parallel=tensor_parallel)
    plan, stage = calibrated(plan, calibration)
    return run_plan(plan, overwrite=overwrite, progress=progress, stage=stage)


def calibrated(plan: Plan, calibration: Calibration) -> tuple[Plan, Calibrator]:
    """A plan with calibration in it, and the stage of ``run_plan`` that does it. Reads the text, no weights.

    Raises:
        CheckpointError: as ``calibrate_checkpoint``.
    """
    if ranks.launched():
        raise CheckpointError("calibrate: must run in one process, got one of several; start it without torchrun")
    stage = Calibrator(plan, calibration)
    return dataclasses.replace(plan, calibration=stage.settings), stage


@dataclass
class _Inputs:
    """What linears that share an input saw of it."""

    hessian: Tensor  # float32 [K, K], mean of x x^T; while it is being made, the upper triangle of the sum
    tokens: int = 0
    left: set[str] = field(default_factory=set)  # linears that still want it
    factor: Factor | None = None


class Calibrator:
    """The stage that rounds every weight of a decoder layer again (``convert.Stage``)."""

    def __init__(self, plan: Plan, calibration: Calibration) -> None:
        index = read_index(plan.model)
        self._jobs = [job for job in plan.jobs if job.spec is not None]
        self.skeleton = Skeleton(plan.model, index, [job.module for job in plan.jobs if job.decision is not None])
        self._layer_of = {job.info.name: self.skeleton.layer_of(job.module) for job in self._jobs}
        if all(layer is None for layer in self._layer_of.values()):
            raise CheckpointError(f"{plan.model}: must have a weight to quantize in a decoder layer, got none")
        self._damping = float(calibration.damping)
        self.windows, self.settings, self._said = _windows_of(plan, calibration, self.skeleton)
        self._width = int(self.skeleton.model.get_input_embeddings().weight.shape[1])
        self._at = -1
        self._inputs: dict[str, _Inputs] = {}
        self._few: list[str] = []

    # ---- what convert.run_plan wants -------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        return len(self.windows) * len(self.windows[0])

    @property
    def disk_bytes(self) -> int:
        """The windows between two layers."""
        return 4 * self.tokens * self._width

    def order(self, jobs: Sequence[Job]) -> list[Job]:
        """What is to do, layer by layer; first what is in none."""
        return sorted(jobs, key=lambda job: -1 if (n := self._layer_of.get(job.info.name)) is None else n)

    @contextlib.contextmanager
    def working(self, folder: Path, writer: ShardWriter, pending: Sequence[Job]) -> Iterator[None]:
        """While a plan runs: hidden states go to ``folder``; what is not ``pending`` is finished in ``writer``."""
        self._pending = {job.info.name for job in pending}
        self._writer = writer
        with contextlib.ExitStack() as self._open, contextlib.ExitStack() as self._layer:
            # Every thread does whole pieces by itself: torch's own division of a product depends on their number.
            threads = torch.get_num_threads()
            self._open.callback(torch.set_num_threads, threads)
            self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
            self._open.enter_context(self._pool)
            self._states = HiddenStates(folder, len(self.windows[0]), self._width)
            self._open.callback(self._states.close)
            yield
            self._inputs.clear()

    def refine(self, job: Job, w: Tensor, q: QTensor) -> tuple[QTensor, dict[str, Any] | None]:
        """The weight with codes for its inputs, and what the report says of it."""
        layer = self._layer_of[job.info.name]
        if layer is None:
            return q, None
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._go_to(layer)
            found, said = self._rounded(job, w, q)
            self.skeleton.set_weight(job.module, found.dequantize(), job.conv1d)
        finally:
            torch.set_num_threads(threads)
        return found, said

    def said(self, report: Report) -> tuple[dict[str, Any], list[str]]:
        """What the report says of it all: as data, and in notes."""
        done = [e for e in report.quantized if e.calibration is not None and "output_error" in e.calibration]
        few = [e.tensor.removesuffix(".weight") for e in report.quantized if (e.calibration or {}).get("reason") == FEW]
        rest = len(report.quantized) - len(done) - len(few)
        notes = [
            f"calibrated by {self.settings['method']} on {self._said['tokens']:,} tokens of {self._said['text']} "
            f"(sha256 {self.settings['text_sha256'][:12]}): {len(done)} weights have codes for it"
        ]
        if few:
            some = ", ".join(few[:3]) + (", ..." if len(few) > 3 else "")
            notes.append(f"{len(few)} weights keep their data-free codes, each {FEW}: {some}")
        if rest:
            notes.append(f"{rest} weights keep their data-free codes, they are in no decoder layer")
        return {**self._said, **self.settings}, notes

    # ---- layers ----------------------------------------------------------------------------------------------------

    def _go_to(self, layer: int) -> None:
        if self._at < 0:
            for number, hidden in enumerate(self.skeleton.first_inputs(self.windows)):
                self._states.write(number, hidden)
            self._enter(0)
        while self._at < layer:
            self._leave()
            self._enter(self._at + 1)

    def _enter(self, layer: int) -> None:
        self._at = layer
        self._layer.enter_context(self.skeleton.layer_filled(layer))
        mine = [job for job in self._jobs if self._layer_of[job.info.name] == layer]
        self._see([job for job in mine if job.info.name in self._pending])
        for job in mine:
            if job.info.name not in self._pending:
                assert job.spec is not None
                names = {key: f"{job.module}.{key}" for key in job.spec.tensors()}
                q = QTensor(job.spec, {key: read_tensor(self._writer.info(name)) for key, name in names.items()})
                self.skeleton.set_weight(job.module, q.dequantize(), job.conv1d)

    def _leave(self) -> None:
        """Let the quantized layer make the inputs of the next one."""

        def advance(number: int) -> None:
            self._states.write(number, self.skeleton.run(self._at, self._states.read(number)))

        list(self._pool.map(advance, range(len(self.windows))))
        self._layer.close()

    def _see(self, jobs: Sequence[Job]) -> None:
        """The Hessians of a layer's linears."""
        self._inputs.clear()
        if not jobs:
            return
        modules = [job.module for job in jobs]
        chunk = max(1, TOKENS_AT_ONCE // len(self.windows[0]))
        with self.skeleton.watching(modules) as seen:

            def forward(number: int) -> dict[str, list[Tensor]]:
                self.skeleton.run(self._at, self._states.read(number))
                return seen()

            for first in range(0, len(self.windows), chunk):
                numbers = range(first, min(len(self.windows), first + chunk))
                self._add(jobs, list(self._pool.map(forward, numbers)))
        for inputs in {id(i): i for i in self._inputs.values()}.values():
            h = inputs.hessian
            h.div_(max(1, inputs.tokens))
            h.copy_(h.triu() + h.triu(1).t())

    def _add(self, jobs: Sequence[Job], seen: Sequence[dict[str, list[Tensor]]]) -> None:
        """Take what some windows brought into the sums."""
        shared: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            key = tuple(id(x) for window in seen for x in window.get(job.module, ()))
            if key:
                shared.setdefault(key, []).append(job)
        for members in shared.values():
            name = members[0].module
            x = torch.cat([x.flatten(0, -2) for window in seen for x in window.get(name, ())]).float()
            inputs = self._sums_of(members, x.shape[1])
            inputs.tokens += len(x)
            h = inputs.hessian

            def add(first: int, x: Tensor = x, h: Tensor = h) -> None:
                h[first : first + PANEL, first:] += x[:, first : first + PANEL].t() @ x[:, first:]

            list(self._pool.map(add, range(0, x.shape[1], PANEL)))

    def _sums_of(self, members: Sequence[Job], columns: int) -> _Inputs:
        """Those of linears that have had the same inputs so far."""
        known = {
            id(self._inputs[job.module]): self._inputs[job.module] for job in members if job.module in self._inputs
        }
        new = [job for job in members if job.module not in self._inputs]
        if not known:
            found = _Inputs(torch.zeros(columns, columns))
        elif len(known) == 1 and not new and len(next(iter(known.values())).left) == len(members):
            return next(iter(known.values()))
        else:
            names = ", ".join(job.module for job in members)
            raise CheckpointError(
                f"calibrate: linears must share their input always or never, got {names} that do now and then"
            )
        for job in new:
            self._inputs[job.module] = found
            found.left.add(job.module)
        return found

    def _rounded(self, job: Job, w: Tensor, q: QTensor) -> tuple[QTensor, dict[str, Any]]:
        inputs = self._inputs.pop(job.module, None)
        tokens = 0 if inputs is None else inputs.tokens
        if inputs is None or tokens < q.spec.K:
            return q, {"tokens": tokens, "reason": FEW}
        if inputs.factor is None:
            try:
                inputs.factor = factor(inputs.hessian, self._damping)
            except ValueError as error:
                raise CheckpointError(f"calibrate: {job.module} on this text: {error}") from None
        found = gptq(w, q, inputs.hessian, inputs.factor, self._pool.map)
        return found.q, {"tokens": tokens, "output_error_before": found.error_before, "output_error": found.error_after}


# ---- the text -------------------------------------------------------------------------------------------------------


def _windows_of(
    plan: Plan, calibration: Calibration, skeleton: Skeleton
) -> tuple[list[list[int]], dict[str, Any], dict[str, Any]]:
    """Windows of tokens, the settings that fix the result, and what else to say of them.

    Raises:
        CheckpointError: the text cannot be read or is too short, windows are too long, or tokens do not fit the model.
    """
    path, count = Path(calibration.text), calibration.windows
    positions = skeleton.positions
    length = calibration.length or min(LENGTH, positions or LENGTH)
    if positions is not None and length > positions:
        raise CheckpointError(f"calibrate: windows must have at most the model's {positions} tokens, got {length}")
    documents = read_documents(path)
    if not any(map(str.strip, documents)):
        raise CheckpointError(f"{path}: must have {count * length:,} tokens of text, got an empty file")
    tokenizer = load_tokenizer(plan.model)
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        ids += [*(between if ids else []), *tokenizer(document, verbose=False)["input_ids"]]
    there = len(ids) // length
    if there < count:
        raise CheckpointError(
            f"{path}: must have {count * length:,} tokens for {count} windows of {length}, got {len(ids):,}; give a "
            f"longer text, or {f'at most {there} windows' if there else 'shorter windows'} (--calibration-windows, "
            "--window-length)"
        )
    columns = {job.spec.K for job in plan.jobs if job.spec is not None and not is_expert(job.module)}
    if count * length < max(columns, default=0):
        raise CheckpointError(
            f"calibrate: the text must have at least as many tokens as the widest layer has columns, {max(columns)}, "
            f"got {count * length}: {count} windows of {length}"
        )
    if not 0 <= min(ids) <= max(ids) < skeleton.vocabulary:
        raise CheckpointError(
            f"{plan.model}: the tokenizer must give tokens below {skeleton.vocabulary}, got {max(ids)}; it belongs to "
            "another model"
        )
    starts = [i * there // count * length for i in range(count)]
    windows = [ids[start : start + length] for start in starts]
    tokens = hashlib.sha256(torch.tensor(windows, dtype=torch.int64).numpy().tobytes()).hexdigest()
    settings = {
        "method": calibration.method,
        "text_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "tokens_sha256": tokens,
        "windows": count,
        "window_length": length,
        "damping": float(calibration.damping),
    }
    return windows, settings, {"text": path.name, "tokens": count * length}


# ---- what it will cost ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of the calibration, besides that of quantizing: bytes and seconds, and of what."""

    memory_bytes: int
    disk_bytes: int
    seconds: float
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_TRIAL = (256, 1024)  # rows and columns that are multiplied and rounded to see how fast this machine is


def estimate_calibration(plan: Plan, stage: Calibrator) -> Cost:
    """From sizes, and from a product and a rounding that are tried here. Memory besides what quantizing takes."""
    skeleton, tokens = stage.skeleton, stage.tokens
    threads, at_once = torch.get_num_threads(), min(tokens, max(TOKENS_AT_ONCE, stage.settings["window_length"]))
    elements = [sum(math.prod(i.shape) for i in skeleton.info(n)) for n in range(len(skeleton.layers))]
    outside = sum(math.prod(info.shape) for info in skeleton.outside())
    inputs: dict[int, dict[str, int]] = {}  # columns of each input of a layer's linears
    for job in plan.jobs:
        layer = skeleton.layer_of(job.module) if job.spec is not None else None
        if layer is not None and job.spec is not None and job.decision is not None:
            name = job.decision.fusion_set if not is_expert(job.module) else f"{job.module} {job.spec.K}"
            inputs.setdefault(layer, {})[name] = job.spec.K
    most = max(inputs.values(), key=lambda found: sum(k * k for k in found.values()))
    hessians, widest = 4 * sum(k * k for k in most.values()), max(most.values())
    # A factor is made in float64, and three matrices are there at once; a few activations of every thread.
    holding = 4 * max(elements) + hessians + 4 * at_once * sum(most.values()) + 3 * 8 * widest**2
    running = 4 * 8 * threads * stage.settings["window_length"] * widest
    multiplied = sum(2 * 2 * n * tokens for n in elements)
    multiplied += sum(tokens * k * k + 4 * k**3 for found in inputs.values() for k in found.values())
    rounded = sum(math.prod(job.info.shape) for job in plan.jobs if job.spec is not None)
    product, rounding = _trial(plan)
    seconds = (multiplied * product + rounded * rounding) / threads
    return Cost(max(4 * outside, holding) + running, stage.disk_bytes, seconds, tokens)


def _trial(plan: Plan) -> tuple[float, float]:
    """Seconds of one operation of a product, and of rounding one weight, of one thread."""
    N, K = _TRIAL
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).mul_(0.02)
    settings = plan.config._with({})
    q = quantize_weight(w, settings, fit_set_grid([w], settings))
    h, threads = torch.eye(K), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parts = factor(h, 1.0)
        started = time.perf_counter()
        gptq(w, q, h, parts)
        rounding = (time.perf_counter() - started) / (N * K)
        started = time.perf_counter()
        h @ h
        product = (time.perf_counter() - started) / (2 * K**3)
    finally:
        torch.set_num_threads(threads)
    return product, rounding
