"""Model directory in, quantized model directory out, a few tensors in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from precal_ext import pipeline
from precal_ext.budget import BitPlan, plan_as_chosen
from precal_ext.checkpoint import (
    MAX_SHARD_BYTES,
    CheckpointError,
    ShardWriter,
    TensorInfo,
    copy_other_files,
    read_chunks,
    weight_files,
    write_file,
)
from precal_ext.config import QuantizeConfig
from precal_ext.digest import sha256
from precal_ext.measure import measure
from precal_ext.mixtures import is_expert
from precal_ext.plan import EXPERTS_NOTE, Job, Plan, plan_as_told, plan_quantization, shares, what_is_copied
from precal_ext.qtensor import QTensor
from precal_ext.quantize import SAMPLE, fit_set_grid, quantize_weight
from precal_ext.ranks import Follower, Leader, Message, Payload
from precal_ext.report import REPORT_NAME, Entry, Report
from precal_ext.select import Decision, model_format
from precal_ext.staging import Work, fingerprint
from precal_ext.weights import check_finite, read_sample, read_weight

# A caller that plans and runs needs this module alone.
__all__ = [
    "EXPERTS_NOTE",
    "Job",
    "Plan",
    "Progress",
    "digested",
    "entry",
    "has_digest",
    "load_lines",
    "model_card",
    "plan_quantization",
    "quantize_checkpoint",
    "run_plan",
    "run_share",
]


@dataclass(frozen=True)
class Progress:
    """One finished tensor: how many of how many, and bytes of input so far and in all.

    ``bytes_before`` of them were finished by an earlier run.
    """

    tensor: str
    tensors_done: int
    tensors: int
    bytes_done: int
    bytes_total: int
    bytes_before: int = 0


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    config: QuantizeConfig | None = None,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tensor_parallel: int = 1,
    plan: BitPlan | str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """Quantize a Hugging Face model directory without loading the model.

    Reading, quantizing and writing overlap; weights under way take at most 8 bytes per element of the largest tensor.
    ``out`` appears complete or not at all; the same input and settings give the same bytes. What an interrupted call
    has finished lies in ``.OUT.partial`` beside ``out``, and the same call continues there.

    Args:
        model: directory with config.json and safetensors, single or sharded.
        out: a new or empty directory; ``overwrite`` replaces one with files, and forgets an unfinished run.
        tensor_parallel: make groups small enough that every weight can be cut into so many slices.
        plan: of the bits of every fusion set (``plan_bits``), or the file it is in; it has the settings too.
        progress: called after every tensor.
    Returns:
        The report, also written to ``out/precal_report.json`` and, in short, to ``out/README.md``.
    Raises:
        CheckpointError: the input or output cannot be used, an unfinished run was of another model, settings or
            version, or another process is at work on ``out``.  SelectionError: it is unclear what to quantize.
        ValueError: a weight is not finite, or a setting does not fit.  OSError: reading or writing failed.
    """
    if plan is not None and config is not None:
        raise ValueError("quantize_checkpoint: config must be None with a plan, which has settings of its own")
    how: dict[str, Any] = {"max_shard_bytes": max_shard_bytes, "tensor_parallel": tensor_parallel}
    if plan is not None:
        chosen = plan if isinstance(plan, BitPlan) else BitPlan.load(plan)
        return run_plan(plan_as_chosen(model, out, chosen, **how), overwrite=overwrite, progress=progress)
    return run_plan(plan_quantization(model, out, config, **how), overwrite=overwrite, progress=progress)


class Stage(Protocol):
    """What may follow the quantization of every weight (``calibrate.Calibrator``), in one process."""

    @property
    def disk_bytes(self) -> int:
        """What it puts on the disk for a while."""

    def order(self, jobs: Sequence[Job]) -> list[Job]:
        """The order in which it wants the weights."""

    def working(self, folder: Path, writer: ShardWriter, pending: Sequence[Job]) -> AbstractContextManager[None]:
        """Around all of the work; the weights that are not pending are finished, ``writer`` knows where."""

    def refine(self, job: Job, w: Tensor, q: QTensor) -> tuple[QTensor, dict[str, Any] | None]:
        """Another quantized form of the same spec, and what the report's entry says of it."""

    def said(self, report: Report) -> tuple[dict[str, Any], list[str]]:
        """The report's ``calibration``, and notes."""


def run_plan(
    plan: Plan,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    announce: Callable[[], None] | None = None,
    team: Leader | None = None,
    stage: Stage | None = None,
) -> Report:
    """Do what a plan says; arguments and errors as ``quantize_checkpoint``.

    Args:
        announce: called when the output is this process's alone and has room, before the first tensor.
        team: other processes that do their share with ``run_share``.
        stage: what follows the quantization of a weight; without ``team``.
    """
    started = time.monotonic()
    report = Report(plan.config, notes=[f"linear layers found by {plan.found.source}"])
    begun = {**plan.header, "linears": plan.found.to_dict()}
    if plan.planned is not None:
        report.plan = plan.planned["summary"]
        report.notes.append(_planned_note(plan.planned["summary"]))
        begun["planned"] = plan.planned["document"]
    experts = sum(job.decision is None and is_expert(job.info.name) for job in plan.jobs)
    if experts:
        report.notes.append(f"{experts} {EXPERTS_NOTE.replace('weight', 'weights')}: most of this model stays as it is")
    report.bytes_before = sum(job.nbytes_in for job in plan.jobs)
    apart = sum(job.nbytes_out for job in plan.jobs if job.source is not None)
    if apart:
        report.notes.append(f"the output head has a weight of its own now, beside the embedding's: {apart:,} bytes")
    work = Work(plan.out, begun, overwrite)
    try:
        work.check_room(sum(plan.writer(work.new).sizes.values()) + (0 if stage is None else stage.disk_bytes))
        if announce is not None:
            announce()
    except BaseException:
        work.keep()
        raise
    try:
        writer = plan.writer(work.new)
        try:
            report.entries, report.digests = _run(plan, work, writer, progress, team, stage)
            writer.finish()
        finally:
            writer.close()
        _check_unchanged(plan)
        found = plan.found
        fmt = model_format(plan.decisions, plan.config, found.absent, found.model_names, found.conv1d)
        tying = {"tie_word_embeddings": False} if plan.untied else {}
        model_config = {**plan.model_config, **tying, "quantization_config": fmt.to_dict()}
        write_file(work.new / "config.json", _json(model_config))
        copy_other_files(plan.model, work.new)
        if stage is not None:
            report.calibration, notes = stage.said(report)
            report.notes += notes
        report.bytes_after = sum(p.stat().st_size for p in work.new.glob("*.safetensors"))
        write_file(work.new / REPORT_NAME, report.to_json())
        write_file(work.new / "README.md", model_card(plan.model.name, plan.out.name, report))
        work.publish()
    except (ValueError, TypeError):
        work.discard()  # refused for what it is: the same command would be refused again
        raise
    except BaseException:
        work.keep()
        raise
    report.seconds = time.monotonic() - started
    return report


class _Quantizer:
    """Reads and quantizes some of a plan's tensors, in order; of a fusion set all that are to do, one after another.

    Args:
        check: called before every step; raises to end the work.
        stage: as for ``run_plan``.
    """

    def __init__(
        self, plan: Plan, pending: Sequence[Job], check: Callable[[], None], stage: Stage | None = None
    ) -> None:
        self._plan, self._check, self._stage = plan, check, stage
        self._sets: dict[str, list[Job]] = {}
        for job in plan.jobs:
            if job.spec is not None and job.decision is not None:
                self._sets.setdefault(job.decision.fusion_set, []).append(job)
        # The reader samples a set with the first of its members that is still to do.
        self._first = {_set_of(job): job for job in reversed(pending)}
        self._grids: dict[str, Tensor | None] = {}

    def read(self, job: Job) -> tuple[Tensor, list[Tensor]] | None:
        self._check()
        if job.spec is None or job.decision is None:
            return None
        fitted = self._first[_set_of(job)] is job and not job.decision.settings(self._plan.config).uniform
        members = self._sets[job.decision.fusion_set] if fitted else []
        samples = [read_sample(member.info, max(1, SAMPLE // len(members)), member.conv1d) for member in members]
        return read_weight(job.info, job.conv1d), samples

    def compute(self, job: Job, given: tuple[Tensor, list[Tensor]] | None) -> tuple[Entry, QTensor | None]:
        self._check()
        if given is None or job.decision is None:
            action, reason = what_is_copied(job)
            return Entry(job.info.name, action, reason, job.info.shape, _dtype(job.info)), None
        w, samples = given
        settings, name = job.decision.settings(self._plan.config), job.decision.fusion_set
        if name not in self._grids:
            members = self._sets[name]
            for member, sample in zip(members, samples, strict=False):
                if not bool(torch.isfinite(sample).all()):
                    check_finite(member.info, read_weight(member.info, member.conv1d), member.conv1d)
            with _refused_by_name(members):
                self._grids[name] = fit_set_grid(samples, settings) if samples else None
            samples.clear()
        with _refused_by_name([job]):
            try:
                q = quantize_weight(w, settings, self._grids[name])
            except ValueError:
                check_finite(job.info, w, job.conv1d)  # says where in the file
                raise
        said = None
        if self._stage is not None:
            q, said = self._stage.refine(job, w, q)
        made = entry(job.decision, settings, w, q, _dtype(job.info))
        return dataclasses.replace(made, calibration=said), q


def _run(
    plan: Plan,
    work: Work,
    writer: ShardWriter,
    progress: Callable[[Progress], None] | None,
    team: Leader | None,
    stage: Stage | None,
) -> tuple[list[Entry], dict[str, str]]:
    entries, digests = _finished_before(plan, work, writer)
    pending = [job for job in plan.jobs if job.info.name not in entries]
    pending = pending if stage is None else stage.order(pending)
    by_name = {job.info.name: job for job in pending}
    own = pending if team is None else shares(pending, team.size)[0]
    quantizer = _Quantizer(plan, own, _nothing if team is None else team.check, stage)
    staging = contextlib.nullcontext() if stage is None else stage.working(work.folder, writer, pending)
    writing: contextlib.AbstractContextManager[object] = contextlib.nullcontext() if team is None else team.writing
    counting = threading.Lock()
    total = sum(job.info.nbytes for job in plan.jobs)
    before = done = total - sum(job.info.nbytes for job in pending)

    def count(job: Job, made: Entry) -> None:
        nonlocal done
        with counting:
            entries[job.info.name] = made
            done += job.info.nbytes
            if progress is not None:
                progress(Progress(job.info.name, len(entries), len(plan.jobs), done, total, before))

    def compute(job: Job, given: tuple[Tensor, list[Tensor]] | None) -> QTensor | None:
        made, q = quantizer.compute(job, given)
        count(job, made)
        return q

    def record(job: Job, made: dict[str, str]) -> None:
        digests[job.info.name] = made
        work.record({"tensor": job.info.name, "digests": made, "entry": entries[job.info.name].to_record()})

    def write(job: Job, q: QTensor | None) -> None:
        with writing:
            if q is None:
                digest = hashlib.sha256()
                writer.write_chunks(job.info.name, digested(read_chunks(job.info), digest))
                record(job, {job.info.name: digest.hexdigest()})
            else:
                for key, tensor in q.tensors.items():
                    writer.write(f"{job.module}.{key}", tensor)
                record(job, _digests_of(job, q))

    def deliver(message: Message, payload: Payload) -> None:
        job = by_name[message["tensor"]]
        for name in job.outputs:
            writer.write_chunks(name, payload.take(writer.info(name).nbytes))
        count(job, Entry.from_record(message["entry"]))
        record(job, message["digests"])

    try:
        if team is not None:
            team.begin({**plan.to_tell(), "pending": list(by_name)}, deliver)
        with staging:
            pipeline.run(own, quantizer.read, compute, write, lambda job: job.memory, plan.memory_limit)
        if team is not None:
            team.finish()
    except BaseException as error:
        if team is not None:
            team.halt(error)  # nothing arrives any more
        raise
    # In the order of the plan, whatever an earlier run had finished, and whoever did it.
    names = [job.info.name for job in plan.jobs]
    return [entries[n] for n in names], {key: value for n in names for key, value in digests[n].items()}


def run_share(model: str | Path, team: Follower, progress: Callable[[int], None] | None = None) -> None:
    """Quantize what rank 0 leaves to this rank, and send it there.

    Args:
        model: the model's directory, or what rank 0 may know as one.
        progress: called after every tensor with the bytes of input so far.
    """
    told = team.plan()
    plan = plan_as_told(Path(model) if Path(model).is_dir() else Path(told["model"]), told)
    names = set(told["pending"])
    own = shares([job for job in plan.jobs if job.info.name in names], team.size)[team.rank]
    quantizer = _Quantizer(plan, own, team.check)
    done = 0

    def write(job: Job, result: tuple[Entry, QTensor | None]) -> None:
        nonlocal done
        made, q = result
        assert q is not None
        message = {"is": "tensor", "tensor": job.info.name, "digests": _digests_of(job, q), "entry": made.to_record()}
        team.send(message, list(q.tensors.values()))
        done += job.info.nbytes
        if progress is not None:
            progress(done)

    pipeline.run(own, quantizer.read, quantizer.compute, write, lambda job: job.memory, plan.memory_limit)
    _check_unchanged(plan)


def _nothing() -> None:
    pass


def _check_unchanged(plan: Plan) -> None:
    if fingerprint(plan.model, weight_files(plan.model)) != plan.known:
        raise CheckpointError(f"{plan.model}: must stay as it is while it is quantized, got changed files")


def _digests_of(job: Job, q: QTensor) -> dict[str, str]:
    return {f"{job.module}.{key}": sha256(tensor) for key, tensor in q.tensors.items()}


@contextlib.contextmanager
def _refused_by_name(jobs: Sequence[Job]) -> Iterator[None]:
    """Ops know where in a weight something is wrong, not in which of them."""
    try:
        yield
    except ValueError as error:
        names = " or ".join(job.info.name for job in jobs)
        raise CheckpointError(f"{jobs[0].info.file}: {names} cannot be quantized: {error}") from None


def _set_of(job: Job) -> str:
    return job.info.name if job.spec is None or job.decision is None else "set " + job.decision.fusion_set


def digested(chunks: Iterable[memoryview], digest: Any) -> Iterator[memoryview]:
    """The same chunks, each taken into the digest on the way."""
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


def _finished_before(plan: Plan, work: Work, writer: ShardWriter) -> tuple[dict[str, Entry], dict[str, dict[str, str]]]:
    """Tensors that an earlier run has finished: those whose bytes have the digests that it wrote down."""
    jobs = {job.info.name: job for job in plan.jobs}
    found: dict[str, Entry] = {}
    digests: dict[str, dict[str, str]] = {}
    for record in {record.get("tensor"): record for record in work.records}.values():
        job = jobs.get(str(record.get("tensor")))
        if job is None or set(record["digests"]) != set(job.outputs):
            continue
        if all(has_digest(writer.info(name), digest) for name, digest in record["digests"].items()):
            found[job.info.name] = Entry.from_record(record["entry"])
            # In the order of the outputs: a report has the same bytes however often a run was interrupted.
            digests[job.info.name] = {name: record["digests"][name] for name in job.outputs}
            for name in job.outputs:
                writer.keep(name)
    return found, digests


def has_digest(info: TensorInfo, expected: str) -> bool:
    """Whether a tensor is on the disk as it was written."""
    digest = hashlib.sha256()
    try:
        for _ in digested(read_chunks(info), digest):
            pass
    except OSError:  # cut short, or not there
        return False
    return digest.hexdigest() == expected


def entry(decision: Decision, settings: QuantizeConfig, w: Tensor, q: QTensor, dtype: str) -> Entry:
    """The report's line for a quantized weight."""
    return Entry(
        f"{decision.module}.weight",
        "quantize",
        decision.reason,
        (q.spec.N, q.spec.K),
        dtype,
        decision.fusion_set,
        {
            "bits": q.spec.bits,
            "group_size": q.spec.group_size,
            "c": q.spec.c,
            "grid": settings.grid,
            "trellis": q.spec.trellis,
        },
        measure(w, q),
    )


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def load_lines(out: str) -> list[str]:
    """The three lines that load the result."""
    return [
        "import precal_ext",
        "from transformers import AutoModelForCausalLM",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(out, ensure_ascii=False)})",
    ]


def _planned_note(summary: Mapping[str, Any]) -> str:
    by = "all weights count the same" if summary["text"] is None else f"sensitivities fitted on {summary['text']}"
    return f"settings by a plan for {summary['target_bits']:g} bits per weight, {by}"


def _data_used(report: Report) -> str:
    c, text = report.calibration, (report.plan or {}).get("text")
    planned = "" if text is None else f"{text} decided which weights get more bits; "
    if c is None:
        return planned + "no code depends on it." if planned else "No data was used."
    return (
        f"{planned}{'codes' if planned else 'Codes'} were chosen by {c['method']} on {c['tokens']:,} tokens of "
        f"{c['text']} (SHA-256 {c['text_sha256']}; {c['windows']} windows of {c['window_length']}, "
        f"damping {c['damping']:g}); no data was used for the rest."
    )


def model_card(source: str, out: str, report: Report) -> str:
    """``OUT/README.md``: how to load it, settings, figures per layer."""
    c, s = report.config, report.summary()
    published = s["published_bits_per_weight"]
    settings = f"recipe {c.recipe}, {c.bits} bits, group size {c.group_size}, c = {c.c}, {c.grid} grid"
    if report.plan is not None:
        settings = f"recipe {c.recipe}, planned for {report.plan['target_bits']:g} bits per weight"
    if c.split:
        settings += f", alpha = {c.alpha}"
    if c.lm_head is not None:
        settings += f", output head {c.lm_head} bits"
    lines = [
        f"# {source}, quantized by precal",
        "",
        "```python",
        *load_lines(out),
        "```",
        "",
        f"Settings: {settings}. {_data_used(report)}",
        "",
        f"{s['tensors_quantized']} of {s['tensors']} tensors are quantized, {report.weights:,} weights at "
        f"{report.bits_per_weight:.3f} bits each, everything counted"
        + (f" ({published:.3f} by the publication's count)" if published else "")
        + f": SQNR {report.sqnr_db:.2f} dB, KL {report.kl_nats:.4f} nats. Weight files: {s['bytes_before']:,} -> "
        f"{s['bytes_after']:,} bytes.",
        "",
        report.to_markdown(),
        "Without `import precal_ext`, transformers skips the quantization it does not know and gives wrong weights.",
        "",
    ]
    return "\n".join(lines)
